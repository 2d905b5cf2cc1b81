"""What the cycle model cannot know of a chip, measured in a minute: L2 under TMA, WGMMAs in flight, latencies, the clock.

A row ("chip") for each measurement, in the model's own units where it has a constant for it, with that constant beside it:

    what, settings; value, unit; model: the constant of sora_fast.cyclemodel for this GPU, or null
    ms, n: of one call, the median, and how many; clock_mhz: the SM clock right behind half a second of this very work
    status: PASSED; FAILED (a result that is not what was known beforehand) or ERROR, with a reason and no value

None of it has run on a GPU yet: the kernels are compiled for sm_90 and executed by the emulator (tests/test_bench_chip.py).

python -m sora_fast.benchmarks.chip --device cuda [--jsonl FILE]
"""

import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from sora_fast.cyclemodel import GPU, GPUS
from sora_fast.environment import environment

from . import rows, timing
from .gate import explain
from .roofs import Roofs

LINE = 128  # bytes
TILE = 64  # rows and columns of int32: 16 KiB
BLOCKS = 2  # of an SM, so that one copies while the other sums
SPIN = 2_000_000  # clocks
WIDTHS, DEPTHS = (64, 128, 256), (1, 2, 3, 4)  # columns of a WGMMA, groups of four that are in flight


@dataclass(frozen=True)
class Sizes:
    """How much of everything: of a GPU, or small."""

    sms: int
    near: int  # lines of 128 bytes that stay in L2
    far: int  # lines that do not
    steps: int = 20_000  # dependent loads of a call
    turns: int = 4_000  # tiles or groups of a program in a call
    tiles: int = 8  # that a program goes round


@dataclass(frozen=True)
class Probe:
    """One measurement: ``value(seconds, hertz)`` of a call; ``wrong()``, asked after calls, whether their results are."""

    what: str
    unit: str
    call: Callable[[], object]
    wrong: Callable[[], bool]
    value: Callable[[float, float], float]
    model: float | None = None
    settings: dict = field(default_factory=dict)


def sizes(device: torch.device) -> Sizes:
    chip = torch.cuda.get_device_properties(device)
    l2 = getattr(chip, "L2_cache_size", 0) or 64 * 2**20
    return Sizes(chip.multi_processor_count, near=l2 // 4 // LINE, far=8 * l2 // LINE)


def probes(device: torch.device, size: Sizes, hopper: bool, gpu: GPU | None = None) -> Iterator[Callable[[], Probe]]:
    """What makes each measurement, one after the other: their tensors need not be there at once."""
    for what, lines, model in (("L2 latency", size.near, gpu and gpu.latency_l2),
                               ("DRAM latency", size.far, gpu and gpu.latency_dram)):
        yield lambda what=what, lines=lines, model=model: _chase(device, what, lines, size.steps, model)
    for tma in (True, False) if hopper else (False,):
        for shared in (False, True):
            yield lambda tma=tma, shared=shared: _stream(device, size, tma, shared, gpu)
    for width in WIDTHS if hopper else ():
        for depth in DEPTHS:
            yield lambda width=width, depth=depth: _wgmma(device, size, width, depth)


def _chase(device: torch.device, what: str, lines: int, steps: int, model: float | None) -> Probe:
    """Loads that each wait for the one before, over all lines in a random order."""
    from . import chip_kernels

    order = torch.randperm(lines, generator=torch.Generator().manual_seed(0)).to(device)
    places = torch.zeros(lines * LINE // 4, dtype=torch.int32, device=device)
    places[order * (LINE // 4)] = (order.roll(-1) * (LINE // 4)).int()
    state, made = (order[:1] * (LINE // 4)).int(), [0]

    def call():
        made[0] += steps
        chip_kernels.chase_kernel[(1,)](places, state, steps, num_warps=1)

    return Probe(what, "clocks", call, lambda: int(state) != int(order[made[0] % lines]) * (LINE // 4),
                 lambda seconds, hertz: seconds / steps * hertz, model, dict(bytes=lines * LINE, steps=steps))


def _stream(device: torch.device, size: Sizes, tma: bool, shared: bool, gpu: GPU | None) -> Probe:
    """All SMs read tiles that stay in L2: each its own, or all the same."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from . import chip_kernels

    programs = size.sms * BLOCKS
    groups = 1 if shared else programs
    numbers = torch.randint(2**31 - 1, (groups * size.tiles * TILE, TILE), dtype=torch.int32, device=device)
    out = torch.zeros(programs, TILE, TILE, dtype=torch.int32, device=device)
    source = TensorDescriptor.from_tensor(numbers, [TILE, TILE]) if tma else numbers

    def call():
        chip_kernels.stream_kernel[(programs,)](source, out, size.turns, size.tiles, shared, tma, TILE, TILE, 4, num_warps=4)

    def wrong() -> bool:
        expected = torch.zeros(groups, TILE, TILE, dtype=torch.int32, device=device)
        tiles = numbers.view(groups, size.tiles, TILE, TILE)
        for place in range(size.tiles):
            if (size.turns - place + size.tiles - 1) // size.tiles % 2:  # an even number of times it undoes itself
                expected ^= tiles[:, place]
        return not torch.equal(out, expected.expand(programs, TILE, TILE))

    moved = programs * size.turns * TILE * TILE * 4
    return Probe("L2 throughput", "bytes a clock and SM", call, wrong,
                 lambda seconds, hertz: moved / seconds / hertz / size.sms, gpu and gpu.l2,
                 dict(by="TMA" if tma else "cp.async", tiles="shared by all SMs" if shared else "of each SM",
                      bytes=numbers.numel() * 4))


def _wgmma(device: torch.device, size: Sizes, width: int, depth: int) -> Probe:
    """One warpgroup an SM, so many groups in flight; of ones: the rate in clocks does not hang on the operands."""
    from . import chip_kernels

    out = torch.zeros(size.sms, 64, width, device=device)

    def call():
        chip_kernels.wgmma_kernel[(size.sms,)](out, size.turns, width, 64, depth, num_warps=4)

    work = size.turns * 64 * width * 64 * 2
    return Probe("WGMMA", "FLOPs a clock and SM", call, lambda: not bool((out == size.turns * 64).all()),
                 lambda seconds, hertz: work / seconds / hertz, None, dict(columns=width, groups_in_flight=depth))


# -------------------------------------------------------------------------------------------------------- measuring
def _blank(what: str, unit: str) -> dict:
    return dict(schema=rows.SCHEMA, row="chip", what=what, settings={}, value=None, unit=unit, model=None, ms=None, n=0,
                clock_mhz=None, status="PASSED", reason="")


def _hertz(call: Callable[[], object], ms: float, device: torch.device) -> float:
    """The SM clock behind half a second of this work: by a kernel that spins for so many clocks, within a millisecond."""
    for _ in range(int(500 / max(ms, 0.1)) + 1):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        start.record()
        torch.cuda._sleep(SPIN)
        end.record()
    end.synchronize()
    return SPIN / start.elapsed_time(end) * 1e3


def _measure(make: Callable[[], Probe], device: torch.device) -> dict:
    row = _blank("", "")
    try:
        probe = make()
        row |= dict(what=probe.what, unit=probe.unit, settings=probe.settings, model=probe.model)
        measured = timing.measure({"": timing.Events([probe.call], device)}, timing.GPU)[""].statistics()
        hertz = _hertz(probe.call, measured["median_ms"], device)
        if probe.wrong():
            return row | dict(status="FAILED", reason="Its result is not what it must be.")
        return row | dict(value=probe.value(measured["median_ms"] * 1e-3, hertz), ms=measured["median_ms"], n=measured["n"],
                          clock_mhz=hertz * 1e-6)
    except Exception as error:  # such as a Triton that compiles one of them no more: the others still count
        return row | dict(status="ERROR", reason=explain(error))


def _loaded(device: torch.device, gpu: GPU | None) -> Iterator[dict]:
    """The clock at rest and under a product of random numbers, the product's rate, and that of a copy."""
    torch.cuda.synchronize(device)
    time.sleep(1)
    yield _blank("SM clock at rest", "MHz") | dict(value=_hertz(lambda: None, 1e9, device) * 1e-6)
    roofs, size = Roofs(device, "cold"), 8192
    rate = roofs.matrix(torch.bfloat16)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    clocks = [_hertz(lambda: a @ b, 2 * size**3 / rate * 1e3, device) * 1e-6 for _ in range(6)]
    settings = dict(size=size, dtype="bfloat16", clocks=clocks)
    yield _blank("SM clock under load", "MHz") | dict(
        value=sum(clocks) / len(clocks), settings=settings, model=gpu and gpu.clock(1.0) * 1e3)
    yield _blank("matrix product", "TFLOP/s") | dict(value=rate * 1e-12, settings=settings)
    yield _blank("copy", "bytes a second") | dict(value=roofs.copy(0), model=gpu and gpu.dram)


def line(row: dict) -> str:
    """One row for people."""
    settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items() if name != "clocks")
    found = f"{row['value']:,.4g} {row['unit']}" if row["value"] is not None else f"{row['status']} {row['reason']}"
    model = f" (the model has {row['model']:,.4g})" if row["model"] is not None else ""
    return f"{row['what']}{f' ({settings})' if settings else ''}: {found}{model}"


def main(arguments: list[str] | None = None) -> int:
    asked = rows.arguments_of("chip", __doc__, "a CUDA GPU", "write the rows to it", arguments)
    device = torch.device(asked.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        print("UNSUPPORTED: these are measurements of a CUDA GPU, and there is none here.")
        return 0
    here = environment(device)
    gpu = next((gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.name}\b", here["device"])), None)
    if asked.jsonl:
        asked.jsonl.unlink(missing_ok=True)
    made = (_measure(make, device) for make in probes(device, sizes(device), here["sm"] == 90, gpu))
    whole = True
    for row in itertools.chain(made, _loaded(device, gpu)):
        print(line(row), flush=True)
        whole = whole and row["status"] == "PASSED"
        if asked.jsonl:
            rows.append(asked.jsonl, [row | dict(environment=here)])
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
