"""The predicted cost of a kernel: cycles by unit, the bottleneck, blocks per SM, TFLOP/s or fraction of the copy rate.

A prediction is not a measurement. The model does not see L2 misses, the tail of a grid, and bank conflicts unless they were
counted. Prologue and epilogue are included if the number of iterations of the main loop is known. Every figure comes with
the model's error on kernels with published times (calibration.py), which is of their main loops alone.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from . import calibration, facts, sass, units, warp_paths
from .gpus import GPU, blocks_per_sm
from .issue import Simulation
from .sass import Instruction

PEAK = 4096  # FLOPs per clock of an sm_90 SM, 16-bit operands: the only one whose clock depends on them here
BLOCK_GAP = 250  # cycles from a block's end to its successor's first instruction (estimate)
# Cycles of a load outside the main loop: tables come from L2, a block's own rows from DRAM (estimate).
OUTER_LOAD_LATENCY = 500


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, and what its SASS does not show."""

    name: str
    sass: str  # cuobjdump's listing of one function
    registers: int
    shared: int
    warps: int
    case: str = ""
    tile: str = ""
    direction: str = ""
    stages: int | None = None  # of a TMA pipeline
    bulk: float = 0.0  # bytes that TMA loads per block and iteration of its main loop
    useful: float = 1.0  # fraction of the lanes, or of the FLOPs, that is not padding
    memory: bool = False  # whether it is memory-bound, with or without MMAs
    traffic: float | None = None  # DRAM bytes per byte stored; None: those of all its accesses
    turns: float | None = None  # iterations of a block's main loop; None: unknown, and prologue and epilogue are ignored
    wavefronts: Mapping[str, float] = field(default_factory=dict)  # of opcodes, where they were counted: units.smem_bytes
    lines: Mapping[int, tuple[str, int]] = field(default_factory=dict)  # file and line of addresses, where asked for


@dataclass(frozen=True)
class Line:
    """A line of source and what it becomes in one iteration: instructions of a warp, by opcode, most first."""

    file: str
    line: int
    instructions: int
    opcodes: dict[str, int]


@dataclass(frozen=True)
class Prediction:
    kernel: str
    case: str
    tile: str
    direction: str
    gpu: str
    registers: int
    shared: int
    warps: int
    instructions: int  # per warp and iteration
    units: dict[str, float]  # busy cycles of an SM per iteration of all resident blocks
    binding: str  # the busiest unit
    bound: float  # its cycles: the time if everything overlaps
    cycles: float  # per iteration of all resident blocks, simulated
    waits: dict[str, int]
    turns: float | None
    outside: float | None  # cycles of all resident blocks before and after their main loops
    tflops: float | None  # useful ones, of a whole block if its iterations are known
    loop_tflops: float | None  # of the main loop alone
    bound_tflops: float | None
    copy_share: float | None  # relative to the rate of a copy
    lanes: float
    issue_over_dram: float | None
    wavefronts: Mapping[str, float]  # of shared memory over the ideal, by opcode; empty: none were counted
    facts: facts.Facts
    error: str  # the model's, on kernels like this one
    lines: list[Line]  # most instructions first; empty: not asked for

    def to_dict(self) -> dict:
        return {"predicted": True, **asdict(self), "faults": self.facts.faults()}


def _matrix(code: list[Instruction], path: Sequence[Instruction], kernel: Kernel, gpu: GPU, blocks: int) -> dict:
    warps = kernel.warps * blocks
    busy = units.cycles(path, gpu, warps, kernel.bulk * blocks, kernel.wavefronts)
    distance = (kernel.stages or 2) - 1
    found = Simulation(path, gpu, kernel.warps, blocks, bulk=kernel.bulk, distance=distance,
                       wavefronts=kernel.wavefronts).run()
    cycles = max(found.cycles, busy.get("L2", 0), busy.get("smem", 0))
    outside = _outside(code, path, kernel, gpu, blocks, cycles) if kernel.turns else None
    work = sum(map(units.flops, path)) * warps * kernel.useful
    done = work / kernel.useful
    rate = lambda taken: work / taken * gpu.sms * gpu.clock(done / taken / PEAK) * 1e-3
    return dict(units=busy, cycles=cycles, waits=found.waits, turns=kernel.turns, outside=outside,
                tflops=rate(cycles + outside / kernel.turns if outside else cycles), loop_tflops=rate(cycles),
                bound_tflops=rate(max(busy.values())), copy_share=None, issue_over_dram=None)


def _outside(code: list[Instruction], path: Sequence[Instruction], kernel: Kernel, gpu: GPU, blocks: int,
             cycles: float) -> float:
    """Cycles of the resident blocks from entry to exit with each loop executed once, less those iterations.

    The blocks start together; in reality each would hide more behind the others' main loops. Of paths that depend on an
    argument the one with most bytes is taken: with a bias, a residual, a cache.
    """
    whole = warp_paths.entry_to_exit(code)
    loads = lambda those: sum(i.base in units.BULK for i in those)
    bulk = kernel.bulk * loads(whole) / loads(path) if loads(path) else 0.0
    once = Simulation(whole, gpu, kernel.warps, blocks, bulk=bulk, distance=0, latency=OUTER_LOAD_LATENCY,
                      stagger=0).run(4).cycles
    within = sum(map(units.flops, whole)) / sum(map(units.flops, path)) * cycles
    return max(0.0, once + BLOCK_GAP - within)


def _nbytes(path: Sequence[Instruction], kernel: Kernel) -> tuple[float, float]:
    """(moved by all accesses of a block, of them to or from DRAM)."""
    accesses = [i for i in path if i.base in units.GLOBAL and not i.predicated_off]
    nbytes = lambda those: sum(32 * i.width * kernel.warps for i in those)
    moved, stored = nbytes(accesses), nbytes(i for i in accesses if i.base == "STG")
    return moved, max(1.0, kernel.useful * (stored * kernel.traffic if kernel.traffic else moved))


def issue_over_dram(kernel: Kernel, gpu: GPU) -> float:
    """For a memory-bound kernel: the time to issue its instructions over that of its bytes, without simulation."""
    path, _ = _streaming(max(sass.functions(kernel.sass), key=len))
    _, dram = _nbytes(path, kernel)
    return units.cycles(path, gpu, kernel.warps)["issue"] * gpu.bytes_per_clock / dram


def _stream(path: Sequence[Instruction], kernel: Kernel, gpu: GPU, blocks: int, gap: int) -> dict:
    """An iteration, or a block, with all that are resident; DRAM is a queue of all accesses."""
    moved, dram = _nbytes(path, kernel)
    joined = max(1, 4 // kernel.warps)  # blocks with fewer warps than sub-partitions: enough of them for a warp each
    found = Simulation(path, gpu, max(kernel.warps, 4), max(1, blocks // joined), latency=gpu.latency_dram,
                       rate=gpu.bytes_per_clock * moved / dram, stagger=150, wavefronts=kernel.wavefronts).run(6)
    busy = units.cycles(path, gpu, kernel.warps * blocks, wavefronts=kernel.wavefronts)
    busy["DRAM"] = dram * blocks / gpu.bytes_per_clock
    busy.pop("L2", None)
    cycles = max(found.cycles + gap, busy["DRAM"])
    return dict(units=busy, cycles=cycles, waits=found.waits, turns=None, outside=None, tflops=None, loop_tflops=None,
                bound_tflops=None, copy_share=busy["DRAM"] / cycles, issue_over_dram=busy["issue"] / busy["DRAM"])


def _streaming(code: list[Instruction]) -> tuple[list[Instruction], int]:
    """The repeated part of a memory-bound kernel, a loop that loads and stores or a block, and the cycles between."""
    reads_and_writes = lambda path: {"LDG", "STG"} <= {i.base for i in path}
    paths = [warp_paths.iteration(loop, code) for loop in warp_paths.main_loops(code)]
    paths = [path for path in paths if reads_and_writes(path)]
    return (max(paths, key=len), 0) if paths else (warp_paths.entry_to_exit(code), BLOCK_GAP)


def _lines(path: Sequence[Instruction], kernel: Kernel) -> list[Line]:
    opcodes = defaultdict(Counter)
    for i in path:
        if i.address in kernel.lines:
            opcodes[kernel.lines[i.address]][i.base] += 1
    found = [Line(*place, counted.total(), dict(counted.most_common())) for place, counted in opcodes.items()]
    return sorted(found, key=lambda line: -line.instructions)


def predict(kernel: Kernel, gpu: GPU) -> Prediction:
    """Predict one kernel; ValueError if its blocks do not fit, or it has neither an MMA loop nor memory accesses."""
    code = max(sass.functions(kernel.sass), key=len)
    blocks, limit = blocks_per_sm(gpu, kernel.registers, kernel.shared, kernel.warps)
    if not blocks:
        raise ValueError(f"predict: expected blocks of {kernel.name} that fit on an SM of {gpu.name}, got one that has no "
                         f"room for its {limit}; use smaller tiles or fewer stages")
    loops = [loop for loop in warp_paths.main_loops(code) if any(map(units.flops, loop))]
    if loops and not kernel.memory:
        # of two loops with the same work one has masks: the shorter one is of interior tiles
        paths = [warp_paths.iteration(loop, code) for loop in loops]
        path = max(paths, key=lambda path: (sum(map(units.flops, path)), -len(path)))
        found = _matrix(code, path, kernel, gpu, blocks)
    else:
        path, gap = _streaming(code)
        if not any(i.base == "STG" for i in path):
            raise ValueError(f"predict: expected a main loop with matrix products, or stores to global memory, in "
                             f"{kernel.name}, got neither; the model has nothing to count it by")
        found = _stream(path, kernel, gpu, blocks, gap)
    binding = max(found["units"], key=found["units"].get)
    return Prediction(
        kernel.name, kernel.case, kernel.tile, kernel.direction, gpu.name, kernel.registers, kernel.shared, kernel.warps,
        len(path), wavefronts=dict(kernel.wavefronts), binding=binding, bound=found["units"][binding], lanes=kernel.useful,
        facts=facts.read(code, blocks, limit, kernel.warps, kernel.stages),
        error=calibration.known_error(calibration.kind_of(path), gpu), lines=_lines(path, kernel), **found)
