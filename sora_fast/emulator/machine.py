"""Executes a kernel: a batch of CTAs at a time, with warps at the same basic block vectorised.

Warp w of CTA c has index w * ctas + c, so that one warp role (such as the consumers) of all CTAs is one slice. Asynchronous
operations complete as late as the ISA allows, at their issue, or at a random time between (``Schedule.when``). Until then
their destination in shared memory reads as NaN, as does uninitialised shared memory.
"""

import random
from dataclasses import dataclass

import numpy as np

from . import arith, matrix, memory
from .arith import F4, SHARED_WINDOW, U4, UNINITIALIZED_BYTE
from .async_copies import AsyncCopies
from .barriers import Barriers, Mbarrier
from .bulk_copies import BulkCopies
from .codegen import Program
from .global_races import GlobalRaces
from .lanes import LANES, Lanes
from .loads_stores import LoadsStores
from .memory import Fault
from .races import Races
from .scheduler import Deadlock, Group, Scheduler, put_masked
from .tensor_cores import NEVER_FENCED, TensorCores

__all__ = ["Deadlock", "Launch", "Machine", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """The order in which warps run and asynchronous operations complete.

    ``seed``: None runs the warps furthest behind first, an int random ones. ``when``: copies and wgmma complete "late" (at
    their wait), "early" (at their issue), or "random" (at either; TMA loads also in between).
    """

    seed: int | None = None
    when: str = "late"


class Launch:
    """One kernel launch, executed by the constructor; ``findings`` lists the errors.

    ``params``: the bytes of the parameter space. ``shared``: bytes of dynamic shared memory. ``checks``: look for
    uninitialised shared memory. ``race``: look for races in shared and global memory too. ``batch``: CTAs co-resident.
    Raises Fault if the kernel cannot continue, with the ``findings`` so far.
    """

    def __init__(self, program: Program, grid, block, params: bytes, allocations: memory.Allocations, *, shared: int = 0,
                 shared_base: int = 1024, schedule: Schedule = Schedule(), counters=None, checks: bool = True,
                 batch: int | None = None, race: bool = False):  # fmt: skip
        self.program, self.grid, self.block, self.schedule = program, tuple(grid), tuple(block), schedule
        self.allocations, self.counters, self.checks, self.race = allocations, counters, checks, race
        self.findings: dict[tuple, str] = {}
        self.load_parameters(params)
        self.shared_base, self.shared_end = shared_base, self.place_variables(shared_base) + shared
        self.steps = self.warp_instructions = 0
        self.global_races = GlobalRaces(self)
        ctas = int(np.prod(self.grid))
        if batch is None:
            resident = 64 if self.program.spin_blocks or not race else 8  # CTAs that wait for each other must be co-resident
            batch = max(1, min(resident, (64 << 20) // max(self.shared_end, 1)))
        try:
            try:
                for start in range(0, ctas, batch):
                    Machine(self, range(start, min(start + batch, ctas))).run()
            finally:
                self.global_races.find_races()
        except Fault as fault:
            fault.findings = dict(self.findings)
            raise

    def load_parameters(self, params: bytes) -> None:
        """The parameter space is addressable: tensor maps are read from it."""
        self.buffer = np.zeros(len(params) + 256, np.uint8)
        start = -self.buffer.ctypes.data % 128
        self.buffer[start : start + len(params)] = np.frombuffer(params, np.uint8)
        self.param_bytes = self.buffer[start : start + len(params)]
        self.param_start = self.buffer.ctypes.data + start
        self.allocations.add(self.param_start, len(params), "the parameters")
        self.offsets = {p.name: p.offset for p in self.program.kernel.params}

    def place_variables(self, at: int) -> int:
        """Place the module's variables; returns the end of static shared memory. Dynamic shared memory (no size) is last."""
        self.symbols, self.module_memory, self.local_size = {}, [], 0
        for variable in sorted(self.program.kernel.variables.values(), key=lambda v: v.size == 0):
            align = max(variable.align, 1)
            if variable.space == "shared":
                if variable.size:
                    at = (at + align - 1) // align * align
                self.symbols[variable.name] = at
                at += variable.size
            elif variable.space == "local":
                self.symbols[variable.name] = (self.local_size + align - 1) // align * align
                self.local_size = (self.symbols[variable.name] + variable.size + 15) // 16 * 16
            elif variable.space in ("global", "const"):
                data = np.zeros(max(variable.size, 1) + align, np.uint8)
                begin = -data.ctypes.data % align
                data[begin : begin + len(variable.data)] = np.frombuffer(variable.data, np.uint8)
                self.module_memory.append(data)
                self.symbols[variable.name] = data.ctypes.data + begin
                self.allocations.add(data.ctypes.data + begin, variable.size, variable.name)
        return at

    # ---- error messages
    def describe_instr(self, number: int) -> str:
        """An instruction and the line of the kernel's source it comes from."""
        instr = self.program.instrs[number]
        return f"`{instr.text}` ({instr.loc or 'no line'})"

    def message(self, number: int, what: str, thread: str) -> str:
        instr = self.program.instrs[number]
        thread = f", {thread}" if thread else ""
        return f"{self.program.kernel.name} at {instr.loc or 'no line'}{thread}: {what}, in `{instr.text}`"

    def report(self, kind: str, number: int, thread: str, detail: str) -> None:
        """Record a finding and continue. One per kind and instruction is kept."""
        if (kind, number) not in self.findings:
            self.findings[kind, number] = self.message(number, f"{kind} ({detail})", thread)

    def fault(self, number: int, what: str, thread: str = "") -> Fault:
        """An exception for an error after which the kernel cannot continue."""
        return Fault(self.message(number, what, thread))


class Machine(Scheduler, Barriers, LoadsStores, AsyncCopies, BulkCopies, TensorCores, Lanes):
    """A batch of CTAs: registers, shared memory, barriers and operations in flight."""

    def __init__(self, launch: Launch, ctas: range):
        self.launch, self.program, self.schedule = launch, launch.program, launch.schedule
        self.allocations, self.counters = launch.allocations, launch.counters
        self.random = random.Random(None if self.schedule.seed is None else self.schedule.seed * 1000003 + ctas.start)
        threads = int(np.prod(launch.block))
        self.warps = (threads + 31) // 32
        self.ctas, self.cta_ids = len(ctas), ctas
        self.total_warps = total = self.warps * self.ctas
        order = np.arange(total)
        self.cta_of, self.warp_of = order % self.ctas, order // self.ctas
        thread = self.warp_of[:, None] * 32 + LANES
        self.alive = np.broadcast_to(thread < threads, (total, 32)).copy()
        self.smem_bytes = (launch.shared_end + 1023) // 1024 * 1024
        self.shared = np.full(max(self.smem_bytes, 1024) * self.ctas, UNINITIALIZED_BYTE, np.uint8)
        self.shared_views = memory.views(self.shared)
        self.initialized = np.zeros(len(self.shared), bool) if launch.checks else None
        self.initialized_views = memory.views(self.initialized.view(np.uint8)) if launch.checks else None
        self.shared_start = (self.cta_of * self.smem_bytes).astype(U4)[:, None]
        self.local = memory.views(np.full(total * 32 * launch.local_size, UNINITIALIZED_BYTE, np.uint8))  # each thread's own
        self.namespace = self.build_namespace(thread, launch)
        self.functions: dict = {}
        self.constants = -1
        self.executed = np.zeros(len(self.program.blocks), np.int64)
        # operations in flight, and for each warp the index of its uncommitted group
        self.cp_asyncs: list[dict] = []
        self.copy_group = np.zeros(total, np.int64)
        self.wgmmas: list[dict] = []
        self.wgmma_group = np.zeros(total, np.int64)
        self.wgmma_done = np.zeros(total, np.int64)  # groups that were waited for
        # the instruction that accessed a register of wgmma since the last wgmma.fence: its number, FENCED, or NEVER_FENCED
        self.unfenced_access = np.full((len(self.program.wgmma_registers), total), NEVER_FENCED)
        self.register_group = np.full(self.unfenced_access.shape, -1, np.int64)  # the last wgmma group that uses it
        self.tma_loads: list[dict] = []
        self.tma_stores: list[dict] = []
        self.store_group = np.zeros(total, np.int64)
        self.unfenced_maps: set[int] = set()  # addresses of tensor maps that the kernel wrote and has not yet acquired
        # barriers
        self.barriers: dict[tuple[int, int], Mbarrier] = {}
        self.mbarrier_changed = True  # whether an mbarrier has changed since the blocked groups were last tried
        self.idle_blocks = 0  # consecutive blocks of spin loops executed since memory last changed
        self.arrived = np.zeros((16, total), bool)
        self.live_warps = self.alive.any(1).reshape(self.warps, self.ctas).sum(0)  # of each CTA: warps that have not left
        self.waiting: dict[int, list] = {}  # groups by named barrier, or by ("converge", block)
        self.barrier_threads: dict[tuple[int, int], int] = {}  # (barrier, CTA) -> the threads it expects
        self.ready: list[Group] = [Group(0, order, self.alive.copy())]
        self.blocked: list[Group] = []  # at an mbarrier
        self.races = Races(self) if launch.race else None

    def completes_now(self) -> bool:
        """Whether an asynchronous operation completes at its issue."""
        when = self.schedule.when
        return when == "early" or when == "random" and self.random.random() < 0.5

    def build_namespace(self, thread, launch) -> dict:
        """Globals of the generated functions: arithmetic, registers (V_), accumulators (D_), special registers (S_)."""
        total, block, grid = self.total_warps, launch.block, launch.grid
        space = {name: value for name, value in vars(arith).items() if not name.startswith("__")}
        space |= {"np": np, "M": self, "P": put_masked, "SHARED_WINDOW": SHARED_WINDOW}
        for names, number in self.program.accumulator_arrays.items():
            pool = space[f"D_{number}"] = np.zeros((total, len(names) // 4, 16, 8), F4)
            for name, register in zip(names, matrix.registers_d(pool), strict=True):
                space |= {f"V_{name}_{kind}4": register.view(f"{kind}4") for kind in "uif"}
        for name in self.program.cross_block_regs - self.program.accumulator_regs:
            reg = self.program.kernel.regs[name]
            if reg.pred:
                space[f"V_{name}_b"] = np.zeros((total, 32), bool)
                continue
            array = np.zeros((total, 32), f"u{reg.size}")
            kinds = "u" if reg.size == 1 else "uif"
            space |= {f"V_{name}_{kind}{reg.size}": array.view(f"{kind}{reg.size}") for kind in kinds}
        x, y = block[0], block[1]
        tid = {"x": thread % x, "y": thread // x % y, "z": thread // (x * y)}
        index = np.array([self.cta_ids[c] for c in self.cta_of])[:, None]
        cta = {"x": index % grid[0], "y": index // grid[0] % grid[1], "z": index // (grid[0] * grid[1])}
        one = lambda value: np.full((1, 1), value, U4)
        for at, axis in enumerate("xyz"):
            space[f"S_tid_{axis}"], space[f"S_ntid_{axis}"] = tid[axis].astype(U4), one(block[at])
            space[f"S_ctaid_{axis}"], space[f"S_nctaid_{axis}"] = cta[axis].astype(U4), one(grid[at])
        below = (U4(1) << LANES) - U4(1)
        space |= {"S_laneid": LANES, "S_warpid": self.warp_of[:, None].astype(U4), "S_nwarpid": one(self.warps),
                  "S_lanemask_lt": below, "S_lanemask_eq": U4(1) << LANES, "S_lanemask_le": below | (U4(1) << LANES),
                  "S_lanemask_gt": ~(below | (U4(1) << LANES)), "S_lanemask_ge": ~below,
                  "S_cluster_ctarank": one(0), "S_cluster_nctarank": one(1),
                  "S_dynamic_smem_size": one(launch.shared_end - launch.shared_base)}  # fmt: skip
        return space
