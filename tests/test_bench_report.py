"""What happens to rows after they are measured: compare, the reports, README's tables. All rows here are made up."""

import csv
import json
import math
import re
from html.parser import HTMLParser

import pytest

from sora_fast.benchmarks import charts, compare, figures, pages, report, rows, tables
from sora_fast.benchmarks.compare import verdict

H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
SPREAD = (0.98, 0.99, 1.0, 1.01, 1.02)  # min, p20, median, q3, p80 of a quiet row
NOISY = (0.7, 0.9, 1.0, 1.6, 1.9)
PLANTED = '<script>alert("x")</script> | a\\b & <b>'


def environment(device=H200, **changes):
    return dict(
        device=device, kind="cuda", sm=90, sms=132, memory_bytes=150_000_000_000, l2_bytes=62_914_560, driver="580.65.06",
        clock_max_mhz=1980.0, power_limit_w=700.0, cuda="13.0", cudnn=91200, torch="2.11.0+cu130", triton="3.6.0",
        python="3.12.3", os="Linux 6.8", cpu="a CPU", cores=16, threads=16, tf32=False, commit="c0ffee" * 6 + "abcd",
        changed=None, version="0.1.0", variables={}, packages={"triton": "3.6.0"}, time="2026-01-02T03:04:05+00:00",
    ) | changes


def row(op="norm_modulate", case="Wan 14B, 720p", direction="forward", provider="torch", ms=0.5, *, family="modulation",
        dtype="bfloat16", spread=SPREAD, env=None, **changes):
    """A PASSED row of ``ms`` milliseconds, half of the floor; with a status of its own, one without a time."""
    statistics = dict(zip(figures.STATISTICS, (ms * s for s in spread), strict=True))
    found = dict(
        row="time", schema=rows.SCHEMA, suite="full", family=family, op=op, case=case, direction=direction,
        provider=provider, dtype=dtype, shape=dict(tokens=75_600, width=5_120), status="PASSED", reason="", error=0.0012,
        allowed=0.0024, gate="all of it", **statistics, n=100, timer="graph", l2="cold", clock_mhz=1755.0, flops=0,
        bytes=1_000_000_000, roof="copy", floor_ms=0.25, share=0.25 / ms, peak_bytes=123_000_000, saved_bytes=None, mfu=None,
        details={}, command=f"sora-fast bench {family} --case '{op} / {case}' --providers {provider}",
        environment=env or environment()) | changes
    if found["status"] != "PASSED":
        found |= dict.fromkeys((*figures.STATISTICS, "roof", "floor_ms", "share", "peak_bytes", "timer", "error", "allowed"))
        found |= dict(n=0) | {name: value for name, value in changes.items() if name in figures.STATISTICS}
    return found


def roof(kind="copy", rate=4.3e12, published=4.8e12, env=None):
    return dict(row="roof", schema=rows.SCHEMA, kind=kind, dtype="bfloat16" if kind == "matrix" else None, bytes=2**32,
                rate=rate, published=published, source="https://example.org/h200", l2="cold", timer="events", n=100,
                environment=env or environment())


def a_run(env=None, faster=1.0):
    """A run with every kind of row: two families, a model, roofs, and rows without a time."""
    env = env or environment()
    time = lambda *names, ms, **more: row(*names, ms / faster, env=env, **more)
    attention = dict(family="attention", flops=10**12, roof="matrix", floor_ms=1.2, share=0.6)
    return [
        roof("matrix", 7.9e14, 9.894e14, env), roof(env=env),
        time("norm_modulate", "Wan 14B, 720p", "forward", "triton", ms=0.28),
        time("norm_modulate", "Wan 14B, 720p", "forward", "compile", ms=0.35),
        time("norm_modulate", "Wan 14B, 720p", "forward", "reference", ms=2.5),
        row("norm_modulate", "Wan 14B, 720p", "forward", "liger", status="UNSUPPORTED", reason=PLANTED, env=env),
        time("norm_modulate", "Wan 14B, 720p", "backward", "triton", ms=0.6),
        time("norm_modulate", "Wan 14B, 720p", "backward", "compile", ms=0.9),
        row("norm_modulate", "Wan 14B, 720p", "backward", "liger", status="FAILED", reason="d x: FAILED.", env=env),
        time("norm_modulate", "DiT-XL/2", "forward", "triton", ms=0.02),
        time("norm_modulate", "DiT-XL/2", "forward", "compile", ms=0.02, bytes=10**6),
        time("varlen_attention", "Wan 14B, 720p", "forward", "triton", ms=2.0, **attention),
        time("varlen_attention", "Wan 14B, 720p", "forward", "flash_attn", ms=1.9, **attention),
        row("varlen_attention", "Wan 14B, 720p", "forward", "xformers", family="attention", status="ERROR",
            reason="RuntimeError: no", env=env),
        time("dit", "DiT-XL/2 step", "step", "auto", ms=100.0, family="model", flops=10**13, bytes=None, roof="matrix",
             mfu=0.4, shape=dict(tokens=8_192)),
        row("dit", "DiT-XL/2 step", "step", "compile", family="model", status="ERROR", reason="OutOfMemoryError", env=env),
    ]


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in found))
    return path


def scaled(found, factor):
    return found | {name: found[name] * factor for name in figures.STATISTICS}


# --------------------------------------------------------------------------------------------------------- compare
@pytest.mark.parametrize("spread", [SPREAD, NOISY, (1, 1, 1, 1, 1)])
def test_a_run_compared_with_itself_is_the_same(spread):
    found = [*a_run(), row(case="another", spread=spread)]
    result = compare.compare(found, found, fail_slower=0.0)
    assert {e.verdict for e in result.entries} == {"SAME"} and result.exit_code == 0 and "passes: 0 slower" in str(result)
    assert len(result.entries) == sum(r.get("status") == "PASSED" for r in found) and result.neither == 4


@pytest.mark.parametrize("spread", [SPREAD, NOISY])
def test_what_was_slowed_by_a_fifth_is_slow_and_nothing_else_is(spread):
    base = [row(case=f"case {n}", spread=spread, ms=0.1 * (n + 1)) for n in range(9)]
    new = [scaled(r, 1.2) if n % 3 == 0 else r for n, r in enumerate(base)]
    result = compare.compare(base, new, 0.05)
    found = {e.new["case"]: e.verdict for e in result.entries}
    assert found == {f"case {n}": "SLOW" if n % 3 == 0 else "SAME" for n in range(9)}
    assert result.exit_code == 1 and len(result.fails) == 3 and all(e.ratio == pytest.approx(1.2) for e in result.fails)
    assert "SAME 6, UNDECIDED 0, FAST 0, SLOW 3\nfails: 3 slower by more than 5 %" in str(result)
    assert compare.compare(base, new, 0.25).exit_code == 0  # slow, and not by more than the caller allows
    back = compare.compare(new, base, 0.05)
    assert {e.verdict for e in back.entries} == {"SAME", "FAST"} and back.exit_code == 0


@pytest.mark.parametrize("new, expected, why", [
    (row(ms=0.502), "SAME", ""),  # 0.4 %, within
    (row(ms=0.504), "UNDECIDED", "the samples overlap"),  # 0.8 %, the intervals overlap
    (row(ms=0.53), "SLOW", ""),  # 6 %, apart
    (row(ms=0.47), "FAST", ""),
    (row(ms=0.502, spread=NOISY), "UNDECIDED", "spread over 90 %"),
    (row(ms=0.52, spread=NOISY), "UNDECIDED", "spread over 90 %"),  # not all five moved by 5 %
    (row(ms=0.6, clock_mhz=1755 / 1.2), "UNDECIDED", "the clock went from 1,755 to 1,462 MHz"),
    (row(ms=0.6, clock_mhz=1800.0), "SLOW", ""),
    (row(ms=0.6, clock_mhz=None), "SLOW", ""),
])
def test_the_tree(new, expected, why):
    quiet = (0.995, 0.998, 1.0, 1.003, 1.006)
    base = row(ms=0.5, spread=quiet)
    if new["q3_ms"] < 1.5 * new["median_ms"]:
        new = new | dict(zip(figures.STATISTICS, (new["median_ms"] * s for s in quiet), strict=True))
    found, reason = verdict(base, new)
    assert found == expected and why in reason and bool(reason) == bool(why)


def test_a_row_that_no_longer_passes_fails_the_comparison():
    base = [row(case=name) for name in ("kept", "wrong", "broken", "refused", "gone")]
    base.append(row(case="mended", status="ERROR", reason="It broke."))
    new = [row(case="kept"), row(case="wrong", status="FAILED", reason="y: FAILED."), row(case="mended"),
           row(case="broken", status="ERROR", reason="RuntimeError: no"), row(case="added"),
           row(case="refused", status="UNSUPPORTED", reason="It is not installed.")]
    result = compare.compare(base, new)
    text = str(result)
    assert result.exit_code == 1 and len(result.broken) == 2 and "fails: 0 slower by more than 5 %, 2 no longer pass" in text
    assert "norm_modulate / wrong / forward / torch / bfloat16: was PASSED, now FAILED: y: FAILED." in text
    assert "now ERROR: RuntimeError: no" in text and "now UNSUPPORTED: It is not installed." in text
    for head, name in (("missing in the new run (1)", "gone"), ("in the new run only (1)", "added"),
                       ("passing now and not before (1)", "mended")):
        assert f"{head}:\n    norm_modulate / {name} / forward" in text
    without = [r for r in new if r["case"] not in ("wrong", "broken")]
    assert compare.compare(base, without).exit_code == 0  # missing and unsupported rows are listed, no more


@pytest.mark.parametrize("new, said", [
    (row(env=environment(H100)), f"one device, got {H200} and {H100}"),
    (row(dtype="float16"), "one dtype, got bfloat16 and float16 for norm_modulate / Wan 14B, 720p / forward / torch"),
    (row(l2="hot"), "one L2 state, got cold and hot"),
    (row(timer="events"), "one timer, got graph and events for norm_modulate"),
    (row(suite="quick"), "one suite, got full and quick"),
    (row(shape=dict(tokens=1)), r"one shape, got \{'tokens': 75600, 'width': 5120\} and \{'tokens': 1\}"),
    (row(env=environment(tf32=True)), "one TF32 setting, got False and True"),
    (row(case="another"), "rows that both runs have, got none among 1 and 1"),
])
def test_what_cannot_be_compared_is_refused_by_name(new, said):
    with pytest.raises(ValueError, match=f"^bench compare: expected .*{said}.*; measure both with the same command[^;]*$"):
        compare.compare([row()], [new])


def test_threads_are_a_condition_on_a_cpu_only():
    on = lambda kind, threads: [row(env=environment(kind=kind, threads=threads))]
    assert compare.compare(on("cuda", 16), on("cuda", 8)).exit_code == 0
    with pytest.raises(ValueError, match="one number of CPU threads, got 16 and 8"):
        compare.compare(on("cpu", 16), on("cpu", 8))


def test_versions_may_differ_and_stand_in_the_header():
    text = str(compare.compare([row()], [row(env=environment(torch="2.12.0", commit="beef", driver="590.1"))]))
    first, second, third = text.splitlines()[:3]
    assert first.startswith("base: commit c0ffee") and "torch 2.11.0+cu130" in first and "driver 580.65.06" in first
    assert second.startswith("new:  commit beef") and "torch 2.12.0" in second
    assert third == f"{H200}, L2 cold, rows in both: 1"


def test_the_table_for_logs_is_aligned_and_ends_with_what_matters():
    base = [row(case="slow one"), row(case="a", ms=1234.5), row(case="fast", provider="flash_attn")]
    new = [scaled(base[0], 1.5), base[1], scaled(base[2], 0.5)]
    lines = str(compare.compare(base, new)).split("\n\n")[1].splitlines()
    assert [line.split()[-1] for line in lines] == ["verdict", "SAME", "FAST", "SLOW"]
    assert len({line.index(line.split()[-1]) for line in lines}) == 1
    assert re.split(r"  +", lines[3]) == ["norm_modulate", "slow one", "forward", "torch", "0.5000", "0.7500", "1.500",
                                          "SLOW"]


def test_peers_tell_what_the_machine_did():
    """All rows of a run beside a busy process are slower, some more; then nothing is SLOW but what was planted."""
    names = ("torch", "sdpa", "compile")
    base = [row(case=f"case {n}", provider=name, ms=1.0) for n in range(6) for name in names]
    busy = [scaled(r, 1.08 + 0.04 * (n % 4)) for n, r in enumerate(base)]
    result = compare.compare(base, busy)
    assert {e.verdict for e in result.entries} == {"UNDECIDED"} and result.exit_code == 0
    assert "12 rows of peers: the middle one at 1." in result.header
    planted = [scaled(r, 2.0) if r["case"] == "case 3" and r["provider"] == "torch" else r for r in busy]
    assert [(e.new["case"], e.new["provider"]) for e in compare.compare(base, planted).fails] == [("case 3", "torch")]
    slower = [scaled(r, 1.2) for r in planted]  # where peers moved far, what moved farther may be the machine's doing too
    assert {e.verdict for e in compare.compare(base, slower).entries} == {"UNDECIDED"}
    assert "the machine was busy: the peers moved to 1." in str(compare.compare(base, slower))
    other = [r | dict(environment=environment(torch="2.12.0")) for r in busy]  # peers of other software are no control
    assert {e.verdict for e in compare.compare(base, other).entries} == {"SLOW"}


def test_a_torn_last_line_does_not_stop_a_comparison(tmp_path):
    path = write(tmp_path / "bench.jsonl", a_run())
    with open(path, "a") as file:
        file.write(json.dumps(row())[:70])
    assert compare.compare(a_run(), rows.read(path)).exit_code == 0


def test_of_two_rows_with_one_key_the_later_counts():
    assert [r["median_ms"] for r in figures.measurements([row(ms=0.5), row(case="b"), row(ms=0.7)])] == [0.7, 0.5]


# --------------------------------------------------------------------------------------------------------- figures
@pytest.mark.parametrize("bad, said", [
    (row(status="FAILED", reason="y: FAILED.", median_ms=0.5), "expected no time in a row that is FAILED, got .*0.5"),
    (row(p80_ms=None), "expected five positive times"), (row(min_ms=0.0), "expected five positive times"),
    (row(median_ms=math.nan), "expected five positive times"), (row(status="FINE"), "expected one of PASSED"),
])
def test_rows_that_no_run_writes_are_refused(bad, said, tmp_path):
    for use in (lambda: report.write([("a", [bad])], tmp_path), lambda: compare.compare([bad], [row()]),
                lambda: tables.markdown([("a", [bad])]), lambda: tables.as_csv([("a", [bad])])):
        with pytest.raises(ValueError, match=said):
            use()
    assert not list(tmp_path.iterdir())


def test_geometric_means_are_over_what_both_passed():
    found = {s.provider: s for s in figures.standings([r for r in a_run() if r.get("family") == "modulation"])}
    # triton: 0.35 / 0.28, 0.9 / 0.6 and 0.02 / 0.02 against torch.compile
    assert found["triton"].compile == (pytest.approx((1.25 * 1.5 * 1.0) ** (1 / 3)), 3)
    assert found["triton"].other == found["triton"].compile  # nothing was faster than torch.compile
    assert found["compile"].compile == (None, 0)
    assert found["compile"].other == (pytest.approx((1 / 1.25 / 1.5) ** (1 / 3)), 3)
    assert found["reference"].compile == (pytest.approx(0.35 / 2.5), 1) and found["liger"].compile == (None, 0)
    assert found["triton"].share == (pytest.approx((0.25**2 / 0.28 / 0.6) ** 0.5), 2)  # 0.25 / 0.02 is no share
    assert dict(found["liger"].statuses) == {"UNSUPPORTED": 1, "FAILED": 1} and list(found)[0] == "triton"


def test_others_of_one_of_ours_are_not_ours():
    cell = {name: row(provider=name, ms=ms) for name, ms in (("triton", 1.0), ("torch", 0.5), ("compile", 2.0), ("x", 3.0))}
    assert figures.best_other(cell, "triton")["provider"] == "compile"
    assert figures.best_other(cell, "compile")["provider"] == "torch" and figures.ours(cell)["provider"] == "triton"
    cell |= {name: row(provider=name, ms=0.1) for name in ("auto_chunk4", "reference")}
    assert figures.best_other(cell, "triton")["provider"] == "compile"
    assert figures.best_other(cell, "compile")["provider"] == "torch"


def test_what_is_too_small_to_rank_is_marked_and_counts_in_no_mean():
    pair = lambda ms, timer: [row(provider=name, ms=ms * by, timer=timer) for name, by in (("torch", 2.0), ("compile", 1.0))]
    for rows_, small in ((pair(0.4, "wall"), True), (pair(0.6, "wall"), False), (pair(0.4, "graph"), False)):
        page, plain = report.html([("a", rows_)]), tables.markdown([("a", rows_)])
        assert (f", {figures.TOO_SMALL}</small>" in page) == (f"forward, {figures.TOO_SMALL} |" in plain) == small
        assert figures.standings(rows_)[0].compile == ((None, 0) if small else (0.5, 1))


@pytest.mark.parametrize("value, text", [(0.123456, "0.1235"), (12.3456, "12.35"), (98765.4, "98,765"), (None, ""),
                                         (0.00001234, "0.00001234"), (1.0, "1.000"), (0.0, "0")])
def test_numbers_as_text(value, text):
    assert figures.number(value) == text


def test_rates_sizes_and_throughput_as_text():
    assert figures.rate(row(ms=0.5)) == "2,000 GB/s" and figures.size(123_000_000) == "123 MB" and figures.size(0) == "0 B"
    assert figures.rate(row(ms=2.0, flops=10**12, roof="matrix")) == "500 TFLOP/s"
    step = row(ms=100.0, shape=dict(tokens=8192), details=dict(frames=81))
    assert figures.throughput(step) == "81,920 tokens/s, 810 frames/s"
    assert figures.throughput(row(shape={})) == "" and figures.rate(row(roof=None)) == ""


def test_a_share_above_the_roof_is_never_shown():
    for above in (row(ms=0.2, share=1.25), row(ms=0.2, share=None, details=dict(above_roof=1.25))):
        assert figures.share(above) is None and figures.share_text(above) == figures.ABOVE
        page, plain = report.html([("a", [above])]), tables.markdown([("a", [above])]) + tables.as_csv([("a", [above])])
        assert "above the roof: check" in page and "125" not in page.replace("1.25</td>", "")
        assert "125.0 %" not in plain and ",1.25," not in plain
    assert figures.share_text(row(ms=0.25, share=1.02)) == "102.0 %"


# ------------------------------------------------------------------------------------------------------------ report
class Page(HTMLParser):
    """Elements and text of a page; loads: addresses that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.text, self.bars, self.open, self.in_bar = [], [], "", [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.loads += [given[name] for name in ("src", "srcset", "data", "poster", "background") if name in given]
        self.loads += [given["href"]] if tag in ("link", "image", "use", "base") else []
        assert not any(name.startswith("on") for name in given)
        if tag == "div" and "bar" in (given.get("class") or "").split():
            self.bars.append(dict(value=None, text="", depth=len(self.open)))
            self.in_bar = True
        if tag == "data":
            self.bars[-1]["value"] = float(given["value"])
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.in_bar = self.in_bar and len(self.open) > self.bars[-1]["depth"]

    def handle_data(self, data):
        self.text += data
        if self.in_bar:
            self.bars[-1]["text"] += data


def test_the_page_loads_nothing_and_every_text_is_escaped():
    evil = row(PLANTED, PLANTED, PLANTED, PLANTED, family=PLANTED, dtype=PLANTED, suite=PLANTED, details={PLANTED: PLANTED},
               command=PLANTED, flops=10**9, shape={PLANTED: PLANTED},
               env=environment(PLANTED, commit=PLANTED, triton=PLANTED))
    matrix = roof("matrix", 7.9e14) | dict(dtype=PLANTED, source=PLANTED)
    runs = [(PLANTED, [*a_run(), matrix, roof(), evil, evil | dict(provider="two")]), ("b", [evil])]
    text = report.html(runs)
    page = Page(text)
    assert not page.open and page.loads == [] and "script" not in page.tags and "b" not in page.tags
    assert "<script" not in text and "@import" not in text and "url(" not in text and PLANTED in page.text
    assert {"svg", "details", "table"} <= set(page.tags)
    plain = tables.markdown(runs)
    assert "<script" not in plain and "<b>" not in plain
    assert all(len(re.findall(r"(?<!\\)\|", line)) == columns for lines in re.findall(r"(?:^\|.*\n)+", plain, flags=re.M)
               for columns in [len(re.findall(r"(?<!\\)\|", lines.splitlines()[1]))] for line in lines.splitlines())


def test_the_numbers_of_the_page_are_those_of_the_rows():
    found = a_run()
    page = Page(report.html([("h200", found)]))
    passed = [r for r in found if r.get("status") == "PASSED"]
    timed = [bar for bar in page.bars if bar["value"] is not None]
    assert sorted(bar["value"] for bar in timed) == sorted(r["median_ms"] for r in passed)
    for r in passed:
        texts = [bar["text"] for bar in timed if bar["value"] == r["median_ms"] and bar["text"].startswith(r["provider"])]
        assert any(f"{figures.number(r['median_ms'])} ms" in text and figures.rate(r) in text
                   and figures.share_text(r) in text and "peak 123 MB" in text
                   and "error 0.0012 of 0.0024 allowed" in text for text in texts), (r, texts)
    untimed = [bar["text"] for bar in page.bars if bar["value"] is None]
    for r in found:
        if r["row"] == "time" and r["status"] in ("FAILED", "ERROR"):
            assert f"{r['provider']}{r['status']} {r['reason']}" in untimed  # and no number
        elif r["row"] == "time" and r["status"] == "UNSUPPORTED":
            assert f"Not run, with reasons below: {r['provider']}" in page.text and r["reason"] in page.text
    assert "MFU 40.0 %" in page.text and "81,920 tokens/s" in page.text and "FAILED" in page.text
    for told in (H200, "580.65.06", "2.11.0+cu130", "790 TFLOP/s", "989 TFLOP/s", "4,300 GB/s", "89.6 %",
                 "1,755 to 1,755 MHz", "2026-01-02T03:04:05", "cold",
                 "c0ffee", "sora-fast bench --suite full --device cuda --l2 cold"):
        assert told in page.text, told


def test_the_roofline_stands_where_the_rows_say():
    limits = [roof("matrix", 8e14, 1e15), roof(rate=4e12, published=5e12)]
    dot = lambda intensity, rate, provider="torch": row(
        provider=provider, ms=1e3 * 10**12 / rate, flops=10**12, bytes=10**12 // intensity, case=f"{intensity}, {provider}")
    svg = charts.roofline([dot(100, 4e14), dot(1000, 8e14, "compile"), dot(100, 1e14, "x"), dot(1000, 1e14, "y")], limits,
                          "bfloat16")
    found = re.findall(r'<circle class=(\w+) cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>([^<]*)', svg)
    assert [kind for kind, *_ in found] == ["compiled", "other", "other", "ours"]  # ours on top
    (peak, low, corner, own) = ((float(x), float(y)) for _, x, y, _ in found)
    path = re.search(r'class=roof d="M([\d.]+) ([\d.]+) L([\d.]+) ([\d.]+) L([\d.]+) ([\d.]+)"', svg)
    x0, y0, x1, y1, x2, y2 = map(float, path.groups())
    assert y1 == y2 == peak[1] and x1 < peak[0] < x2  # at the matrix rate, right of the ridge
    assert (y0 - own[1]) / (own[0] - x0) == pytest.approx((y0 - y1) / (x1 - x0), rel=2e-3)  # on the copy's slope
    assert low[0] == own[0] and corner[0] == peak[0] and low[1] == corner[1] > own[1] > peak[1]
    assert "torch: 400 TFLOP/s" in found[3][3]
    assert "measured: 800 TFLOP/s and 4,000 GB/s; dashed, published: 1,000 TFLOP/s and 5,000 GB/s" in svg
    assert charts.roofline([dot(100, 4e14)], [], "bfloat16") == "" == charts.roofline([row()], limits, "bfloat16")


def test_runs_stand_side_by_side(tmp_path):
    both = [("h200", a_run()), ("h100", a_run(environment(H100, torch="2.12.0"), faster=0.8))]
    report.write(both, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.csv", "report.html", "report.md"]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert f"{H200}, {H100}" in page.text and page.text.count("providerh200h100") == 5
    assert "triton0.2800\u00a0ms, 89.3\u00a0%0.3500\u00a0ms, 71.4\u00a0%" in page.text and "ligerFAILEDFAILED" in page.text
    assert not {"SAME", "FAST", "SLOW", "UNDECIDED"} & set(page.text.split())
    plain = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| norm_modulate | Wan 14B, 720p | forward | bfloat16 | triton | 0.2800 | 89.3 % | 0.3500 | 71.4 % |" in plain
    assert "| norm_modulate | Wan 14B, 720p | backward | bfloat16 | liger | FAILED |  | FAILED |  |" in plain
    assert "| torch | 2.11.0+cu130 | 2.12.0 |" in plain
    lone = tables.side_by_side([("a", [row()]), ("b", [row(case="other")])], "modulation")
    assert [r[-4:] for r in lone.rows] == [("0.5000", "50.0 %", "", ""), ("", "", "0.5000", "50.0 %")]


def test_a_case_that_only_one_of_several_runs_has_is_shown_as_alone():
    models = [r for r in a_run() if r.get("family") == "model"]
    text = report.html([("ops", [r for r in a_run() if r.get("family") != "model"]), ("models", models)])
    assert len(Page(text).bars) == 13 and "<summary>Bars" not in text


def test_markdown_and_csv_hold_the_numbers_of_the_rows():
    found = a_run()
    plain = tables.markdown([("h200", found)])
    for r in (r for r in found if r.get("status") == "PASSED"):
        start = f"| {r['op']} | {r['case']} | {r['direction']} | {r['dtype']} | {r['provider']} | "
        (line,) = [line for line in plain.splitlines() if line.startswith(start)]
        ms, rate, share, peak = line.removeprefix(start).split(" | ")[:4]
        assert float(ms.replace(",", "")) == pytest.approx(r["median_ms"], rel=1e-3) and peak == "123 MB"
        assert share == (f"{r['share'] * 100:.1f} %" if r["share"] <= 1.05 else figures.ABOVE) and rate == figures.rate(r)
    lines = list(csv.DictReader(tables.as_csv([("h200", found)]).splitlines()))
    timed = [r for r in found if r["row"] == "time"]
    assert len(lines) == len(timed)
    for line, r in zip(lines, timed, strict=True):
        assert [line[name] for name in ("op", "case", "provider", "status", "reason")] == [
            r[name] for name in ("op", "case", "provider", "status", "reason")]
        assert [float(line[name]) if line[name] else None for name in figures.STATISTICS] == [
            r[name] for name in figures.STATISTICS]
        assert json.loads(line["shape"]) == r["shape"] and line["run"] == "h200" and line["device"] == H200


def test_host_time_has_a_table_of_its_own():
    host = dict(row="host", schema=rows.SCHEMA, l2="cold", backend="triton", op="qk_norm_rope", what="forward", ours_us=61.2,
                eager_us=None, more_us=None, python_calls=91, peer=None, peer_us=None, environment=environment())
    for text in (report.html([("a", [*a_run(), host])]), tables.markdown([("a", [*a_run(), host])])):
        assert "Host time" in text and "61.2" in text
    assert "Host time" not in report.html([("a", a_run())])
    assert compare.compare([*a_run(), host], a_run()).exit_code == 0


def test_readme_has_what_a_cpu_measured(tmp_path):
    env = environment(kind="cpu", packages={"diffusers": "0.42.1"})
    cell = lambda side, **more: dict(row="cpu", schema=rows.SCHEMA, group="packing", case="a step", side=side, base="padded",
                                     samples=[1.0], bytes=None, command="the command", environment=env) | more
    write(tmp_path / "cpu.jsonl", [cell("packed", seconds=0.3456, share=0.5215), cell("padded", seconds=0.6627, share=1.0),
                                   cell("packed", group="memory", seconds=None, bytes=12_300_000, share=0.25),
                                   cell("padded", group="memory", seconds=None, bytes=49_200_000, share=1.0)])
    block = tables.readme_block(tmp_path)
    assert "| a step | 0.52 | 0.663 s |" in block and "| a step | 0.25 | 49.2 MB |" in block and "`the command`" in block


def test_a_run_without_rows_makes_a_report(tmp_path):
    report.write([("empty", [])], tmp_path)
    assert "no rows yet" in (tmp_path / "report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ README
def test_readme_says_so_where_nothing_is_measured(tmp_path):
    (tmp_path / "nvidia-h200").mkdir()
    (tmp_path / "nvidia-h200" / "validate.jsonl").write_text("{}\n")
    for folder in (tmp_path, tmp_path / "absent"):
        assert tables.readme_block(folder) == "No measured results are committed yet."


def test_readme_tables_are_made_of_the_committed_rows(tmp_path):
    write(tmp_path / "nvidia-h200" / "bench.jsonl", [r for r in a_run() if r.get("family") != "model"])
    write(tmp_path / "nvidia-h200" / "bench-model.jsonl", [r for r in a_run() if r.get("family") == "model"])
    write(tmp_path / "a-h100" / "bench.jsonl", a_run(environment(H100), faster=0.8))
    block = tables.readme_block(tmp_path)
    assert block == tables.readme_block(tmp_path) and re.findall("^### (.*)", block, flags=re.M) == [H100, H200]
    ours = block[block.index(f"### {H200}"):]
    assert "Commit c0ffeec0ffee, torch 2.11.0+cu130, Triton 3.6.0, driver 580.65.06, L2 cold" in ours
    assert "`benchmarks/results/nvidia-h200/`" in ours
    mean = f"{(1.25 * 1.5) ** (1 / 3):.2f} (3)"
    share = f"{(0.25**2 / 0.28 / 0.6) ** 0.5 * 100:.1f} % (2)"
    assert f"| modulation | {mean} | {mean} | {share} | 4 / 3 | 0 / 1 | 0 / 0 | 0 / 1 |" in ours
    wan = "| Wan 14B, 720p, bfloat16 | forward"
    assert f"| norm_modulate {wan} | 0.2800 (triton) | 0.3500 |  | 89.3 % |" in ours
    assert f"| varlen_attention {wan} | 2.000 (triton) |  | 1.900 (flash_attn) | 60.0 % |" in ours
    assert "| dit | DiT-XL/2 step, bfloat16 | auto | 100.0 | 81,920 tokens/s | 123 MB | 40.0 % |" in ours
    assert "DiT-XL/2, bfloat16" not in ours  # the smaller case


def test_a_readme_edited_by_hand_fails_the_check(tmp_path):
    results, path = tmp_path / "results", tmp_path / "README.md"
    write(results / "nvidia-h200" / "bench.jsonl", a_run())
    blocks = "".join(f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n\n" for name in ("evidence", "measured"))
    path.write_text(f"# Title\n\n{blocks}## Limits\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the tables .* run sora-fast bench readme$"):
        pages.update(path, check=True, results_folder=results)
    pages.update(path, results_folder=results)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Title\n") and text.endswith("\n\n## Limits\n") and "0.2800 (triton)" in text
    pages.update(path, check=True, results_folder=results)
    path.write_text(text.replace("0.2800 (triton)", "0.1800 (triton)"), encoding="utf-8")
    with pytest.raises(ValueError, match="got others"):
        pages.update(path, check=True, results_folder=results)
    path.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(ValueError, match="measured: begin"):
        pages.update(path, results_folder=results)


def test_a_kernels_page_that_its_data_has_left_behind_fails_the_check(tmp_path):
    page = tmp_path / "attention.md"
    page.write_text((pages.ROOT / "docs/kernels/attention.md").read_text(encoding="utf-8"), encoding="utf-8")
    pages.update(page, check=True)
    page.write_text(re.sub(r"(?m)^\| 128 bfloat16 .*$", "| 128 bfloat16 | 9 | 9 | 9 |", page.read_text(encoding="utf-8")))
    with pytest.raises(ValueError, match="run sora-fast bench readme"):
        pages.update(page, check=True)
