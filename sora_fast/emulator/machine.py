"""Executes a kernel: a batch of CTAs at a time, warps at the same place together.

Warp w of CTA c is number w * ctas + c, so that one role (the consumers, say) of all CTAs is one slice. What is asynchronous
completes as late as the ISA allows, at its issue, or at a random moment between (``Schedule.when``).
"""

import random
from dataclasses import dataclass

import numpy as np

from . import arith, memory
from .arith import F4, SHARED_WINDOW, U4
from .async_copies import AsyncCopies
from .barriers import Barriers, Mbarrier
from .bulk_copies import BulkCopies
from .codegen import Program
from .lanes import LANES, Lanes
from .loads_stores import LoadsStores
from .scheduler import Deadlock, Group, Scheduler, put_masked
from .tensor_cores import TensorCores

__all__ = ["Deadlock", "Launch", "Machine", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    seed: int | None = None  # None: always the warps furthest behind; else a random group
    when: str = "late"  # asynchronous copies and products: "late", "early" or "random"


class Launch:
    """One kernel launch: where its parameters and memory are, and what was found and counted."""

    def __init__(
        self,
        program: Program,
        grid,
        block,
        params: bytes,
        allocations: memory.Allocations,
        *,
        shared: int = 0,
        shared_base: int = 1024,
        schedule: Schedule = Schedule(),
        counters=None,
        checks: bool = True,
        batch: int | None = None,
        race: bool = False,
    ):
        self.program, self.grid, self.block = program, tuple(grid), tuple(block)
        self.allocations, self.schedule, self.counters, self.checks, self.race = (
            allocations,
            schedule,
            counters,
            checks,
            race,
        )
        self.findings: dict[tuple, str] = {}
        kernel = program.kernel
        self.buffer = np.zeros(len(params) + 256, np.uint8)  # parameters have an address: tensor maps are read there
        start = -self.buffer.ctypes.data % 128
        self.buffer[start : start + len(params)] = np.frombuffer(params, np.uint8)
        self.param_bytes = self.buffer[start : start + len(params)]
        self.param_start = self.buffer.ctypes.data + start
        allocations.add(self.param_start, len(params), "the parameters")
        self.offsets = {p.name: p.offset for p in kernel.params}
        self.symbols, self.globals = {}, {}
        at = shared_base
        for variable in sorted(kernel.variables.values(), key=lambda v: v.size == 0):
            if variable.space == "shared":
                align = max(variable.align, 1)
                if variable.size:
                    at = (at + align - 1) // align * align
                self.symbols[variable.name] = at
                at += variable.size
            elif variable.space in ("global", "const"):
                data = np.zeros(max(variable.size, 1) + variable.align, np.uint8)
                begin = -data.ctypes.data % max(variable.align, 1)
                data[begin : begin + len(variable.data)] = np.frombuffer(variable.data, np.uint8)
                self.globals[variable.name] = data
                self.symbols[variable.name] = data.ctypes.data + begin
                allocations.add(data.ctypes.data + begin, variable.size, variable.name)
        self.shared_base, self.shared_end = shared_base, at + shared
        ctas = int(np.prod(self.grid))
        if batch is None:
            batch = max(1, min(64, (64 << 20) // max(self.shared_end, 1)))
            if race:
                batch = min(batch, 8)
        self.steps = self.warp_instructions = 0
        for start in range(0, ctas, batch):
            Machine(self, range(start, min(start + batch, ctas))).run()

    def report(self, kind: str, number: int, detail: str) -> None:
        key = (kind, number)
        if key not in self.findings:
            instr = self.program.instrs[number]
            self.findings[key] = f"{kind} at {instr.loc or '?'}: {instr.text}: {detail}"


class Machine(Scheduler, Barriers, LoadsStores, AsyncCopies, BulkCopies, TensorCores, Lanes):
    """A batch of CTAs: their registers, shared memory, barriers and what is in flight."""

    def __init__(self, launch: Launch, ctas: range):
        self.launch, self.program = launch, launch.program
        self.schedule = launch.schedule
        self.random = random.Random(None if self.schedule.seed is None else self.schedule.seed * 1000003 + ctas.start)
        self.allocations = launch.allocations
        self.counters = launch.counters
        threads = int(np.prod(launch.block))
        self.warps = (threads + 31) // 32
        self.ctas, self.ids = len(ctas), ctas
        self.total = total = self.warps * self.ctas
        order = np.arange(total)
        self.cta_of, self.warp_of = order % self.ctas, order // self.ctas
        self.alive = np.ones((total, 32), bool)
        thread = self.warp_of[:, None] * 32 + LANES
        if threads % 32:
            self.alive &= thread < threads
        self.size = (launch.shared_end + 1023) // 1024 * 1024
        self.shared = np.zeros(max(self.size, 1024) * self.ctas, np.uint8)
        self.shared_views = {size: self.shared.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.shared_rows = {
            (s, c): self.shared_views[s].reshape(-1, c) for s in (1, 2, 4, 8) for c in (2, 4, 8) if s * c <= 16
        }
        self.initialized = np.zeros(len(self.shared), bool) if launch.checks else None
        self.shared_start = (self.cta_of * self.size).astype(U4)[:, None]
        self.names(thread, launch)
        # asynchronous work
        self.cp_asyncs: list[dict] = []  # cp.async
        self.copy_group = np.zeros(total, np.int64)
        self.wgmmas: list[dict] = []  # wgmma
        self.wgmma_group = np.zeros(total, np.int64)
        self.tma_loads: list[dict] = []  # TMA loads
        self.tma_stores: list[dict] = []  # TMA stores
        self.store_group = np.zeros(total, np.int64)
        self.barriers: dict[tuple[int, int], Mbarrier] = {}
        self.changed = True
        # named barriers
        self.arrived = np.zeros((16, total), bool)
        self.waiting: dict[int, list] = {}
        self.wanted: dict[tuple[int, int], int] = {}
        self.ready: list[Group] = [Group(0, order, self.alive.copy())]
        self.blocked: list[Group] = []  # at an mbarrier
        self.functions: dict = {}
        self.constants = -1
        self.executed = np.zeros(len(self.program.blocks), np.int64)
        if launch.race:
            from .races import Races

            self.races = Races(self)
        else:
            self.races = None

    def names(self, thread, launch) -> None:
        """What the sources of blocks refer to."""
        total, block, grid = self.total, launch.block, launch.grid
        self.space = space = {name: value for name, value in vars(arith).items() if not name.startswith("__")}
        space |= {"np": np, "M": self, "P": put_masked, "SHARED_WINDOW": SHARED_WINDOW}
        for names, number in self.program.pools.items():
            pool = space[f"D_{number}"] = np.zeros((len(names), total, 32), F4)
            for at, name in enumerate(names):
                space |= {f"V_{name}_{kind}4": pool[at].view(f"{kind}4") for kind in "uif"}
        for name in self.program.lasting - self.program.async_regs:
            reg = self.program.kernel.regs[name]
            if reg.pred:
                space[f"V_{name}_b"] = np.zeros((total, 32), bool)
            else:
                array = np.zeros((total, 32), f"u{reg.size}")
                for kind in {1: "u", 2: "uif", 4: "uif", 8: "uif"}[reg.size] if reg.size <= 8 else "":
                    if reg.size > 1 or kind == "u":
                        space[f"V_{name}_{kind}{reg.size}"] = array.view(f"{kind}{reg.size}")
        x, y = block[0], block[1]
        tid = {"x": thread % x, "y": thread // x % y, "z": thread // (x * y)}
        index = np.array([self.ids[c] for c in self.cta_of])[:, None]
        cta = {"x": index % grid[0], "y": index // grid[0] % grid[1], "z": index // (grid[0] * grid[1])}
        one = lambda value: np.full((1, 1), value, U4)
        for at, axis in enumerate("xyz"):
            space[f"S_tid_{axis}"] = tid[axis].astype(U4)
            space[f"S_ctaid_{axis}"] = cta[axis].astype(U4)
            space[f"S_ntid_{axis}"] = one(block[at])
            space[f"S_nctaid_{axis}"] = one(grid[at])
            space[f"S_cluster_ctaid_{axis}"] = np.zeros((total, 1), U4)
            space[f"S_cluster_nctaid_{axis}"] = one(1)
            space[f"S_clusterid_{axis}"] = space[f"S_ctaid_{axis}"]
        space |= {
            "S_laneid": LANES,
            "S_warpid": self.warp_of[:, None].astype(U4),
            "S_smid": one(0),
            "S_nsmid": one(1),
            "S_cluster_ctarank": one(0),
            "S_cluster_nctarank": one(1),
            "S_clock": one(0),
            "S_lanemask_lt": (U4(1) << LANES) - U4(1),
            "S_lanemask_eq": U4(1) << LANES,
            "S_lanemask_le": ((U4(1) << LANES) - U4(1)) | (U4(1) << LANES),
            "S_dynamic_smem_size": one(launch.shared_end - launch.shared_base),
        }
