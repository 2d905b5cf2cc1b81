"""What ``sora-fast predict`` prints, and its report.html: for each kernel a picture of its units' busy time, as a profiler's
speed of light.

The page is one file, in the style of the benchmark's report. Every figure is called predicted, or measured.
"""

import html as escaping
import linecache
from collections.abc import Sequence
from pathlib import Path

from ..benchmarks.report import STYLE
from ..cyclemodel import GPU, Prediction, calibration
from .predict_measured import Measured

UNITS = ("tensor", "issue", "alu", "fma", "xu", "shfl", "uniform", "smem", "L2", "DRAM")
NAMES = {"tensor": "Tensor Core", "issue": "instruction issue", "alu": "integer and logic", "fma": "floating point",
         "xu": "exp2, rcp, conversions", "shfl": "shuffles", "uniform": "uniform datapath", "smem": "shared memory",
         "L2": "L2", "DRAM": "DRAM"}
PICTURE = """
.unit { display: grid; grid-template-columns: 10.5rem 1fr 4.5rem; column-gap: .7rem; align-items: center; font-size: .85rem;
  padding: .1rem 0; }
.unit .share { text-align: right; font-variant-numeric: tabular-nums; } .binds { font-weight: 650; }
.track { background: var(--soft); border-radius: .2rem; height: .7rem; }
.track i { display: block; height: 100%; min-width: 2px; border-radius: .2rem; background: var(--other); }
.binds .track i { background: var(--accent); }
.stack { display: flex; height: 1.1rem; border-radius: .2rem; overflow: hidden; background: var(--soft); margin: .5rem 0; }
.stack i { height: 100%; } .figure { font-size: 1.25rem; font-weight: 650; margin: .3rem 0 0; }
.key { white-space: nowrap; margin-right: .5rem; } .wide td { min-width: 6.5rem; }
.fault { color: var(--bad); font-weight: 650; }
"""
WORDS = {
    "predicted": "Nothing of it ran on a GPU. Machine code is read, and its instructions are issued to the units of one SM, "
                 "cycle by cycle, at published rates.",
    "measured": "What sora-fast bench timed on this GPU behind a passed gate: a whole call of the same sizes, with the tile "
                "that it found there.",
    "a full bar": "The cycles of one turn of the main loop, or of one block where there is none, as simulated. What a unit "
                  "leaves of its bar, it waits.",
    "stacked": "Where a scheduler's time goes: cycles in which an instruction was issued, and cycles in which none could "
               "be, by what the next one waited for.",
    "outside the loop": "Cycles of the blocks of an SM before and behind their main loops, and their share of a block's "
                        "time at so many turns, as if every optional tensor was there. The figure counts them.",
    "the model's error": "Predicted over published, less one, on kernels that others wrote and timed: the table at the end. "
                         "What is not like them is not calibrated.",
}
COLOURS = ("#2a78d6", "#c98a1b", "#8a94a3", "#7a5cc0", "#3f9a6a", "#c0567a", "#6b7280", "#b0b0b0")


def _units(prediction: Prediction) -> str:
    lines = []
    for unit in UNITS:
        busy = prediction.units.get(unit, 0.0) / prediction.cycles
        if busy >= 0.02:
            binds = " binds" if unit == prediction.binding else ""
            width = min(1.0, busy) * 100
            lines.append(f'<div class="unit{binds}"><span>{NAMES[unit]}</span><span class=track>'
                         f'<i style="width:{width:.1f}%"></i></span><span class=share>{busy:.0%}</span></div>')
    return "".join(lines)


def _stack(prediction: Prediction) -> str:
    """Issue and waits, stacked; the simulation is of one sub-partition, so that all of them are of its cycles."""
    parts = [("issued", prediction.units.get("issue", 0.0)), *prediction.waits.items()]
    whole = max(prediction.cycles, sum(cycles for _, cycles in parts))
    bar = "".join(f'<i style="width:{cycles / whole * 100:.1f}%;background:{colour}" title="{name}, {cycles:,.0f}"></i>'
                  for (name, cycles), colour in zip(parts, COLOURS, strict=False))
    key = " ".join(f'<span class=key><b style="color:{colour}">\u25a0</b> {escaping.escape(name)} {cycles / whole:.0%}'
                   "</span>" for (name, cycles), colour in zip(parts, COLOURS, strict=False) if cycles / whole >= 0.02)
    return f"<div class=stack>{bar}</div><small>{key}</small>"


def _blocks_time(prediction: Prediction) -> str:
    """A block's time in two parts: its main loop, and what stands before and behind that."""
    if not prediction.outside:
        return ""
    share = outside_share(prediction)
    bar = "".join(f'<i style="width:{part * 100:.1f}%;background:{colour}"></i>'
                  for part, colour in ((1 - share, COLOURS[0]), (share, COLOURS[1])))
    return f"<div class=stack>{bar}</div><small>{escaping.escape(outside(prediction))}</small>"


def _card(prediction: Prediction, measured: Sequence[Measured]) -> str:
    faults = prediction.facts.faults()
    told = f'<p class=fault>{escaping.escape(", ".join(faults))}</p>' if faults else ""
    escape = escaping.escape
    return (f"<div class=card><h4>{escape(prediction.kernel)} <small>{escape(prediction.direction)}</small></h4>"
            f"<p>{escape(prediction.case)} \u00b7 {escape(prediction.tile)}</p>"
            f"<p class=figure>{escape(figure(prediction))} predicted</p>"
            f"{''.join(f'<p>{escape(beside(each))}</p>' for each in measured)}"
            f"<p>the model's error: {escape(prediction.error)}</p>{told}{_units(prediction)}{_stack(prediction)}"
            f"{_blocks_time(prediction)}"
            f"<p>{escape(structure(prediction))}; {prediction.instructions:,} instructions a warp</p></div>")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    filled = [any(row[place] for row in rows) for place in range(len(heads))]  # empty columns are not shown
    cells = lambda tag, values: "".join(f"<{tag}>{escaping.escape(value)}</{tag}>"
                                        for value, shown in zip(values, filled, strict=True) if shown)
    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{cells('th', heads)}</tr>{lines}</table></div>"


def _calibration() -> str:
    rows = [(row["kernel"], row["gpu"], f"{row['predicted']:,.0f}", f"{row['published']:,.0f}", f"{row['error']:+.0%}",
             "yes" if row["fitted"] else "no", row["source"]) for row in calibration.rows()]
    heads = ("kernel", "GPU", "predicted TFLOP/s", "published TFLOP/s", "error", "used for fitting", "source of the time")
    return _table(heads, rows) if rows else "<p>No row yet.</p>"


def html(predictions: Sequence[tuple[Prediction, Sequence[Measured]]], gpu: GPU) -> str:
    """The page, of predictions and what was measured of the same."""
    words = "".join(f"<dt>{escaping.escape(word)}</dt><dd>{escaping.escape(text)}</dd>" for word, text in WORDS.items())
    summary = _table(("kernel", "case", "tile", "predicted", "measured", "outside the loop", "the model's error", "binds",
                      "CTAs per SM", "faults"),
                     [(p.kernel, p.case, p.tile, figure(p), "; ".join(map(measured_figure, measured)),
                       f"{outside_share(p):.0%}" if p.outside else "", p.error, NAMES[p.binding],
                       f"{p.facts.blocks} ({p.facts.limit})", ", ".join(p.facts.faults())) for p, measured in predictions])
    cards = "".join(_card(*each) for each in predictions)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>sora_fast: predicted for {gpu.name}</title><style>{STYLE}{PICTURE}</style></head><body>
<h1>Predicted for {gpu.name}, sm_{gpu.cc}</h1>
<p class=lead>{len(predictions)} kernels, by the cycle model. Every figure is predicted unless it says measured.</p>
<details><summary>What the words and pictures mean</summary><dl>{words}</dl></details>
<h2>In short</h2>{summary}
<h2>Kernels</h2><div class=cards>{cards}</div>
<h2>How far the model was off</h2>{_calibration()}
</body></html>
"""


def figure(prediction: Prediction) -> str:
    """TFLOP/s or the share of a copy's rate."""
    if prediction.tflops is not None:
        return f"{prediction.tflops:,.0f} TFLOP/s"
    return f"{prediction.copy_share:.0%} of the copy rate"


def measured_figure(measured: Measured) -> str:
    """TFLOP/s or the share of a copy's rate, and how far the prediction is off."""
    figure = f"{measured.tflops:,.0f} TFLOP/s" if measured.tflops else f"{measured.copy_share:.0%} of the copy rate"
    return f"{figure}, predicted {measured.error:+.0%}"


def beside(measured: Measured) -> str:
    """A measurement in a line."""
    return f"measured {measured_figure(measured)} ({measured.case}; {measured.device}, {measured.time[:10]})"


def outside_share(prediction: Prediction) -> float:
    """Of a block's time, what it is not in its main loop."""
    return prediction.outside / (prediction.outside + prediction.turns * prediction.cycles)


def outside(prediction: Prediction) -> str:
    """Prologue and epilogue in a line."""
    return (f"outside the loop {prediction.outside:,.0f} cycles, {outside_share(prediction):.0%} at {prediction.turns:,.0f} "
            f"turns (the loop alone: {prediction.loop_tflops:,.0f} TFLOP/s)")


def structure(prediction: Prediction) -> str:
    """What SASS says, in one line."""
    facts = prediction.facts
    said = [f"{facts.blocks} block{'s' if facts.blocks != 1 else ''} an SM ({facts.limit})",
            f"{prediction.registers} registers"]
    if facts.prefetch is not None:
        said.append(f"copies {facts.prefetch:.2f} turns ahead")
    said += [f"{count} {name}" for count, name in (
        (facts.divisions, "divisions in the loop"), (facts.calls, "calls in the loop"),
        (facts.local, "local accesses in the loop"), (facts.local_outside, "outside")) if count]
    if prediction.wavefronts:
        conflicts = [f"{opcode} {factor:.2f}" for opcode, factor in prediction.wavefronts.items() if factor > 1]
        said.append(f"shared-memory wavefronts over the ideal, as emulated: {', '.join(conflicts) or 'none'}")
    if prediction.lanes < 1:
        said.append(f"{prediction.lanes:.0%} of the lanes used")
    if prediction.issue_over_dram is not None:
        said.append(f"issue {prediction.issue_over_dram:.0%} of DRAM time")
    return ", ".join(said)


def line(prediction: Prediction, measured: Sequence[Measured] = ()) -> str:
    """One kernel on three lines, one more where a block's turns are known, and one for each measurement."""
    busiest = sorted(prediction.units.items(), key=lambda unit: -unit[1])[:4]
    faults = prediction.facts.faults()
    direction = f" ({prediction.direction})" if prediction.direction else ""
    return (f"{prediction.case}, {prediction.kernel}{direction}, {prediction.tile}: predicted {figure(prediction)} on "
            f"{prediction.gpu} (the model's error: {prediction.error})\n"
            f"  {prediction.cycles:,.0f} cycles a turn; busy {', '.join(f'{unit} {busy:,.0f}' for unit, busy in busiest)}"
            f"; {prediction.binding} binds\n"
            f"{f'  {outside(prediction)}{chr(10)}' if prediction.outside else ''}"
            f"  {structure(prediction)}{'; FAULTS: ' + ', '.join(faults) if faults else ''}"
            + "".join(f"\n  {beside(each)}" for each in measured))


def source_lines(prediction: Prediction, count: int) -> list[str]:
    """The ``count`` lines that issue most, one each: instructions of a warp, their place, their opcodes, the source."""
    found = []
    for each in prediction.lines[:count]:
        opcodes = " ".join(f"{opcode} {times}" for opcode, times in list(each.opcodes.items())[:4])
        source = linecache.getline(each.file, each.line).strip()
        found.append(f"  {each.instructions:6,}  {Path(each.file).name}:{each.line}  {opcodes}  | {source}")
    return found
