"""Executes a kernel: a batch of blocks (CTAs) at a time, warps at the same place together.

Warp w of CTA c is number w * ctas + c, so that a role (the consumers, say) of all CTAs is one slice. Warps that stand at the
same basic block, with whatever lanes, form a Group; a group runs a block at a time. Inside a warp the lanes furthest behind
(the smallest block) go first, which is where compilers let them meet again.

What is asynchronous happens as late as the ISA allows, at the issue, or at a random moment between (Schedule.when).
"""

import random
from dataclasses import dataclass

import numpy as np

from . import arith, matrix, memory, tma
from .codegen import Program
from .memory import Fault
from .arith import F4, I4, U1, U2, U4, U8, SHARED_WINDOW

LANES = np.arange(32, dtype=U4).reshape(1, 32)


@dataclass(frozen=True)
class Schedule:
    seed: int | None = None  # None: always the warps furthest behind; else a random group
    when: str = "late"  # asynchronous copies and products: "late", "early" or "random"


class Deadlock(Fault):
    pass


class Group:
    __slots__ = ("block", "warps", "mask", "index")

    def __init__(self, block: int, warps: np.ndarray, mask: np.ndarray | None):
        self.block, self.warps = block, warps
        self.mask = None if mask is None or mask.all() else mask
        first, count = int(warps[0]), len(warps)
        self.index = slice(first, first + count) if int(warps[-1]) - first + 1 == count else warps

    def full_mask(self):
        return np.ones((len(self.warps), 32), bool) if self.mask is None else self.mask


def put_masked(array, i, k, value):
    if k is None:
        array[i] = value
    elif isinstance(i, slice):
        np.copyto(array[i], value, where=k)
    else:
        part = array[i]
        np.copyto(part, value, where=k)
        array[i] = part


class Barrier:
    """An mbarrier."""

    __slots__ = ("count", "pending", "bytes", "phase", "acc", "done", "landed")

    def __init__(self, count, warps):
        self.count = self.pending = count
        self.bytes, self.phase = 0, 0
        self.acc = self.done = None  # clocks of this phase's arrivals, and of those whose phase has ended (races.py)
        self.landed = 0

    def settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            if self.acc is not None:
                self.done = self.acc if self.done is None else np.maximum(self.done, self.acc)
                self.acc = None
            return True
        return False


class Launch:
    """One kernel launch: where its parameters and memory are, and what was found and counted."""

    def __init__(self, program: Program, grid, block, params: bytes, allocations: memory.Allocations, *, shared: int = 0,
                 shared_base: int = 1024, schedule: Schedule = Schedule(), counters=None, checks: bool = True,
                 batch: int | None = None, race: bool = False):
        self.program, self.grid, self.block = program, tuple(grid), tuple(block)
        self.allocations, self.schedule, self.counters, self.checks, self.race = allocations, schedule, counters, checks, race
        self.findings: dict[tuple, str] = {}
        kernel = program.kernel
        self.buffer = np.zeros(len(params) + 256, np.uint8)  # parameters have an address: tensor maps are read there
        start = -self.buffer.ctypes.data % 128
        self.buffer[start:start + len(params)] = np.frombuffer(params, np.uint8)
        self.param_bytes = self.buffer[start:start + len(params)]
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
                data[begin:begin + len(variable.data)] = np.frombuffer(variable.data, np.uint8)
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


class Machine:
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
        self.shared_rows = {(s, c): self.shared_views[s].reshape(-1, c) for s in (1, 2, 4, 8) for c in (2, 4, 8) if s * c <= 16}
        self.known = np.zeros(len(self.shared), bool) if launch.checks else None
        self.shared_start = (self.cta_of * self.size).astype(U4)[:, None]
        self.names(thread, launch)
        # asynchronous work
        self.copies: list[dict] = []  # cp.async
        self.copy_group = np.zeros(total, np.int64)
        self.products: list[dict] = []  # wgmma
        self.product_group = np.zeros(total, np.int64)
        self.boxes: list[dict] = []  # TMA loads
        self.stores: list[dict] = []  # TMA stores
        self.store_group = np.zeros(total, np.int64)
        self.barriers: dict[tuple[int, int], Barrier] = {}
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
        space |= {"S_laneid": LANES, "S_warpid": self.warp_of[:, None].astype(U4), "S_smid": one(0), "S_nsmid": one(1),
                  "S_cluster_ctarank": one(0), "S_cluster_nctarank": one(1), "S_clock": one(0),
                  "S_lanemask_lt": (U4(1) << LANES) - U4(1), "S_lanemask_eq": U4(1) << LANES,
                  "S_lanemask_le": ((U4(1) << LANES) - U4(1)) | (U4(1) << LANES),
                  "S_dynamic_smem_size": one(launch.shared_end - launch.shared_base)}

    # ------------------------------------------------------------------------------------------------- scheduling
    def function(self, block: int, masked: bool):
        key = (block, masked)
        found = self.functions.get(key)
        if found is None:
            code = self.program.code(self.program.blocks[block], masked)
            if self.constants != len(self.program.values):
                self.space |= self.program.values
                self.constants = len(self.program.values)
            exec(code, self.space)
            found = self.functions[key] = self.space.pop("f")
        return found

    def run(self) -> None:
        with np.errstate(all="ignore"):
            steps = 0
            while self.ready or self.blocked or self.waiting:
                steps += 1
                if not self.ready and not self.progress():
                    raise Deadlock(self.stuck())
                if self.ready:
                    self.step()
                if self.boxes and self.schedule.when == "random" and self.random.random() < 0.1:
                    self.land(self.random.randrange(len(self.boxes)))
            self.finish_stores(np.arange(self.total), 0, False, -1)  # what nobody waited for is written at the end
            for e in self.boxes:
                self.launch.report("a box is in flight at the end", e["number"], f"CTA {self.ids[e['cta']]}, mbarrier {e['barrier']:#x}")
        self.launch.steps += steps
        sizes = np.array([len(b.instrs) + (b.end is not None) for b in self.program.blocks])
        self.launch.warp_instructions += int((self.executed * sizes).sum())
        if self.counters is not None:
            self.counters.add_blocks(self.program, self.executed)

    def pick(self) -> Group:
        """The next group, merged with all others at its place."""
        ready = self.ready
        if len(ready) == 1:
            return ready.pop()
        if self.schedule.seed is None:
            block = min(g.block for g in ready)
            behind = None
        else:
            block = self.random.choice(ready).block
            behind = np.zeros(self.total, bool)  # warps with lanes further behind: those go first
            for g in ready:
                if g.block < block:
                    behind[g.warps] = True
            if all(behind[g.warps].all() for g in ready if g.block == block):
                block = min(g.block for g in ready)
                behind = None
        same, rest = [], []
        for g in ready:
            if g.block != block:
                rest.append(g)
                continue
            late = None if behind is None else behind[g.warps]
            if late is None or not late.any():
                same.append(g)
            else:
                rest.append(self.part(g, late))
                if not late.all():
                    same.append(self.part(g, ~late))
        self.ready = rest
        group = same[0] if len(same) == 1 else self.merge(same)
        if self.schedule.seed is not None and len(group.warps) > 1 and self.random.random() < 0.02:
            part = np.array([self.random.random() < 0.5 for _ in group.warps])
            if part.any() and not part.all():
                self.ready.append(self.part(group, ~part))
                group = self.part(group, part)
        return group

    @staticmethod
    def part(group: Group, which: np.ndarray) -> Group:
        return Group(group.block, group.warps[which], None if group.mask is None else group.mask[which])

    def merge(self, groups) -> Group:
        warps = np.unique(np.concatenate([g.warps for g in groups]))
        mask = np.zeros((len(warps), 32), bool)
        for g in groups:
            mask[np.searchsorted(warps, g.warps)] |= g.full_mask()
        return Group(groups[0].block, warps, mask)

    def step(self) -> None:
        group = self.pick()
        for _ in range(64):  # on and on where nobody else could join
            group = self.execute(group)
            if group is None:
                return
            if self.ready:
                break
        self.ready.append(group)

    def execute(self, group: Group) -> Group | None:
        """Run the group's block; the group at its next one, or None where it was put away."""
        block = self.program.blocks[group.block]
        self.executed[group.block] += len(group.warps)
        self.group = group
        result = self.function(group.block, group.mask is not None)(group.index, group.mask)
        end = block.end
        if end is None:
            group.block += 1
            return group
        root = end.parts[0]
        if root == "bra":
            if result is None:
                group.block = block.target
                return group
            return self.branch(group, result, block.target)
        if root in ("ret", "exit", "trap"):
            if root == "trap":
                raise Fault(f"trap at {end.loc}")
            if result is None:
                self.leave(group.warps, group.full_mask())
                return None
            taken = np.broadcast_to(result, (len(group.warps), 32)) & group.full_mask()
            rest = group.full_mask() & ~taken
            self.leave(group.warps, taken)
            keep = rest.any(1)
            if not keep.any():
                return None
            return Group(group.block + 1, group.warps[keep], rest[keep])
        if root in ("bar", "barrier"):
            return self.barrier(group, block, result)
        return self.wait(group, block, result)

    def branch(self, group: Group, taken, target: int) -> Group | None:
        n = len(group.warps)
        taken = np.broadcast_to(taken, (n, 32))
        active = group.mask
        if active is None:
            if taken.all():
                group.block = target
                return group
            if not taken.any():
                group.block += 1
                return group
            yes, no = taken, ~taken
        else:
            yes, no = taken & active, active & ~taken
            if not no.any():
                group.block = target
                return group
            if not yes.any():
                group.block += 1
                return group
        for mask, block in ((yes, target), (no, group.block + 1)):
            some = mask.any(1)
            part = mask[some]
            self.ready.append(Group(block, group.warps[some], part))
        return None

    def leave(self, warps, mask) -> None:
        self.alive[warps] &= ~mask
        if self.waiting:
            for number in list(self.waiting):
                self.release(number)

    # --------------------------------------------------------------------------------------------- named barriers
    def barrier(self, group: Group, block, values) -> Group | None:
        end = block.end
        number = int(values[0].flat[0])
        threads = int(values[1].flat[0]) if len(values) > 1 else None
        if group.mask is not None and (group.mask != self.alive[group.warps]).any():
            # lanes of the same warp are elsewhere: they come, or it is a deadlock
            missing = (group.mask != self.alive[group.warps]).any(1)
            self.waiting.setdefault(("converge", block.index), []).append(group)
            return self.gather_converged(block.index)
        if "arrive" in end.parts:
            self.arrive(number, group, threads)
            self.release(number)
            group.block += 1
            return group
        self.arrive(number, group, threads)
        self.waiting.setdefault(number, []).append(Group(group.block + 1, group.warps, group.mask))
        self.release(number)
        return None

    def gather_converged(self, index: int) -> Group | None:
        key = ("converge", index)
        merged = self.merge(self.waiting.pop(key))
        whole = (merged.full_mask() == self.alive[merged.warps]).all(1)
        if not whole.all():
            self.waiting[key] = [self.part(merged, ~whole)]
        if not whole.any():
            return None
        return self.part(merged, whole)

    def arrive(self, number: int, group: Group, threads) -> None:
        for cta in np.unique(self.cta_of[group.warps]):
            wanted = self.wanted.setdefault((number, int(cta)), threads)
            if wanted != threads:
                raise Fault(f"barrier {number} with {threads} threads, and before with {wanted}")
        twice = self.arrived[number][group.warps]
        if twice.any():
            raise Fault(f"barrier {number}: a warp arrived twice, at {self.program.blocks[group.block].end.loc}")
        self.arrived[number][group.warps] = True

    def release(self, number) -> None:
        if isinstance(number, tuple):
            group = self.gather_converged(number[1])
            if group is not None:
                self.ready.append(group)
            return
        arrived = self.arrived[number].reshape(self.warps, self.ctas)
        there = arrived.sum(0)
        living = self.alive.any(1).reshape(self.warps, self.ctas).sum(0)
        done = np.zeros(self.ctas, bool)
        for cta in range(self.ctas):
            if there[cta]:
                wanted = self.wanted.get((number, cta))
                done[cta] = there[cta] == living[cta] if wanted is None else there[cta] * 32 >= wanted
        if not done.any():
            return
        if self.races:
            for cta in np.flatnonzero(done):
                self.races.barrier(np.flatnonzero(self.arrived[number] & (self.cta_of == cta)))
        for cta in np.flatnonzero(done):
            self.wanted.pop((number, int(cta)), None)
        self.arrived[number][done[self.cta_of]] = False
        left = []
        for group in self.waiting.pop(number, []):
            free = done[self.cta_of[group.warps]]
            if free.all():
                self.ready.append(group)
            else:
                left.append(self.part(group, ~free))
                if free.any():
                    self.ready.append(self.part(group, free))
        if left:
            self.waiting[number] = left

    # -------------------------------------------------------------------------------------------------- mbarriers
    def first_lane(self, values, group_mask, n):
        """One value a warp, that of its first active lane."""
        values = np.broadcast_to(values, (n, 32))
        if group_mask is None:
            return values[:, 0]
        return values[np.arange(n), group_mask.argmax(1)]

    def wait(self, group: Group, block, values) -> Group | None:
        n = len(group.warps)
        addresses = self.first_lane(values[0], group.mask, n)
        parities = self.first_lane(values[1], group.mask, n)
        done = np.array([self.passed(w, int(a), int(p)) for w, a, p in zip(group.warps, addresses, parities)])
        if self.races:
            for w, a in zip(group.warps[done], addresses[done]):
                self.races.acquired(int(w), self.barriers[int(self.cta_of[w]), int(a)])
        if not done.all():
            self.blocked.append(self.part(group, ~done))
            if not done.any():
                return None
            group = self.part(group, done)
        name = f"V_{block.end.args[0].name}_b"
        put_masked(self.space[name], group.index, group.mask, True)
        group.block += 1
        return group

    def passed(self, warp, address, parity) -> bool:
        barrier = self.barriers.get((int(self.cta_of[warp]), address))
        if barrier is None:
            raise Fault(f"a wait on shared address {address:#x}, where no mbarrier is")
        return barrier.phase % 2 != parity & 1

    def progress(self) -> bool:
        """Something that waits goes on, or a copy lands."""
        if self.changed and self.blocked:
            self.changed = False
            self.ready += self.blocked
            self.blocked = []
            return True
        if self.boxes:
            at = 0 if self.schedule.seed is None else self.random.randrange(len(self.boxes))
            self.land(at)
            return True
        return False

    def stuck(self) -> str:
        lines = ["deadlock:"]
        for group in self.blocked:
            end = self.program.blocks[group.block].end
            for w in group.warps[:40]:
                lines.append(f"  CTA {self.ids[self.cta_of[w]]} warp {self.warp_of[w]} waits at {end.loc}: {end.text}")
        for number, groups in self.waiting.items():
            for group in groups:
                for w in group.warps[:40]:
                    lines.append(f"  CTA {self.ids[self.cta_of[w]]} warp {self.warp_of[w]} waits at barrier {number}, block "
                                 f"{group.block}")
        for (cta, address), b in list(self.barriers.items())[:40]:
            lines.append(f"  mbarrier {address:#x} of CTA {cta}: phase {b.phase}, {b.pending} arrivals and {b.bytes} bytes to come")
        return "\n".join(lines)

    def lanes(self, i, k, *values):
        """For each active lane: its warp and its values."""
        warps = self.group.warps
        n = len(warps)
        mask = np.ones((n, 32), bool) if k is None else np.broadcast_to(k, (n, 32))
        at = np.argwhere(mask)
        columns = [None if v is None else np.broadcast_to(v, (n, 32))[mask] for v in values]
        return [(int(warps[w]), *(None if c is None else int(c[j]) for c in columns)) for j, (w, _) in enumerate(at)]

    def mbarrier_init(self, i, k, address, count, number):
        for warp, a, c in self.lanes(i, k, address, count):
            if a % 8:
                raise Fault(f"mbarrier at {a:#x}")
            self.barriers[int(self.cta_of[warp]), a] = Barrier(c, self.warps)
        self.changed = True

    def mbarrier_inval(self, i, k, address, number):
        for warp, a in self.lanes(i, k, address):
            cta = int(self.cta_of[warp])
            barrier = self.barriers.pop((cta, a), None)
            if barrier is not None and barrier.bytes:
                self.launch.report("an mbarrier ends before its copies", number, f"CTA {self.ids[cta]}, {barrier.bytes} bytes to come")

    def mbarrier_arrive(self, i, k, address, count, expect, arrives, number):
        for warp, a, c, e in self.lanes(i, k, address, count, expect):
            b = self.barriers.get((int(self.cta_of[warp]), a))
            if b is None:
                raise Fault(f"an arrival at shared address {a:#x}, where no mbarrier is ({self.program.instrs[number].loc})")
            if self.races:
                self.races.released(warp, b)
            if e is not None:
                b.bytes += e
            if arrives:
                b.pending -= 1 if c is None else c
                if b.pending < 0:
                    raise Fault(f"more arrivals than mbarrier {a:#x} counts, at {self.program.instrs[number].loc}")
            self.changed |= b.settle()

    def async_arrive(self, i, k, address, noinc, number):
        """cp.async.mbarrier.arrive: when this thread's copies are done; here they are done at once."""
        self.finish_copies(self.group.warps, None)
        for warp, a in self.lanes(i, k, address):
            b = self.barriers[int(self.cta_of[warp]), a]
            if noinc:
                b.pending -= 1
                self.changed |= b.settle()

    # ------------------------------------------------------------------------------------------------ plain memory
    def symbol(self, name, t, offset=0):
        if name in self.launch.offsets and t == U4:  # an address of the parameter space, to which cvta.param gives the rest
            return np.full((1, 1), self.launch.offsets[name] + offset, t)
        if name in self.launch.offsets:
            return np.full((1, 1), self.launch.param_start + self.launch.offsets[name] + offset, t)
        return np.full((1, 1), self.launch.symbols[name] + offset, t)

    def param(self, name, offset, t, count):
        start = self.launch.offsets[name] + offset
        size = np.dtype(t).itemsize
        found = self.launch.param_bytes[start:start + size * count].view(t)
        return found.reshape(1, 1) if count == 1 else found.reshape(1, 1, count)

    def generic_param(self, address):
        return np.where(address < U8(1 << 31), address + U8(self.launch.param_start), address)

    def param_address(self, name):
        return np.full((1, 1), self.launch.param_start + self.launch.offsets[name], U8)

    def fault(self, kind, number, address, size, where=None):
        instr = self.program.instrs[number]
        detail = ""
        if where is not None:
            warp, lane = divmod(where, 32)
            w = int(self.group.warps[warp])
            detail = f" by CTA {self.ids[self.cta_of[w]]} warp {self.warp_of[w]} lane {lane}"
        name = self.allocations.name(address) if kind == "global" else f"shared memory is {self.launch.shared_base:#x} .. {self.launch.shared_end:#x}"
        return Fault(f"{self.program.kernel.name}: {kind} access of {size} bytes at {address:#x}{detail} out of bounds or "
                     f"misaligned ({name}): {instr.text} ({instr.loc})")

    def global_addresses(self, k, address, size, number, n):
        """Addresses (n, 32), those of inactive lanes harmless; checked."""
        address = np.broadcast_to(address, (n, 32))
        active = address if k is None else address[np.broadcast_to(k, (n, 32))]
        if active.size:
            if (active & U8(size - 1)).any():
                wrong = int(np.flatnonzero(active & U8(size - 1))[0])
                raise self.fault("global", number, int(active.flat[wrong]), size, self.origin(k, wrong, n))
            wrong = self.allocations.check(active.ravel(), size)
            if wrong is not None:
                raise self.fault("global", number, int(active.flat[wrong]), size, self.origin(k, wrong, n))
        if k is not None:
            address = np.where(k, address, U8(memory.HARMLESS))
        return address

    def origin(self, k, place, n):
        return place if k is None else int(np.flatnonzero(np.broadcast_to(k, (n, 32)))[place])

    def shared_addresses(self, i, k, address, size, number, n):
        """Places in self.shared (n, 32); inactive lanes at the CTA's start."""
        address = np.broadcast_to(address, (n, 32)).astype(U4, copy=False)
        if k is not None:
            address = np.where(k, address, U4(self.launch.shared_base + 15 & ~15))
        if address.size:
            low, high = int(address.min()), int(address.max()) + size
            if low < self.launch.shared_base or high > self.launch.shared_end and (k is None or np.broadcast_to(k, (n, 32)).any()) \
                    or (address & U4(size - 1)).any():
                bad = (address < self.launch.shared_base) | (address.astype(np.int64) + size > self.launch.shared_end) | (address & U4(size - 1) != 0)
                place = int(np.flatnonzero(bad)[0])
                raise self.fault("shared", number, int(address.flat[place]), size, place)
        return address + self.shared_start[i]

    def ld(self, space, i, k, address, t, count, number):
        n = len(self.group.warps)
        size = np.dtype(t).itemsize
        if space == "generic":
            space = "shared" if int(np.broadcast_to(address, (n, 32))[0, 0]) >= SHARED_WINDOW else "global"
            if space == "shared":
                address = (address - SHARED_WINDOW).astype(U4)
        if space in ("global", "const"):
            address = self.global_addresses(k, address, size * count, number, n)
            found = memory.load(address, size, count)
            if self.counters is not None:
                self.counters.access("ld.global", k, address, size * count, number, n)
            return found.view(t)
        if space != "shared":
            raise Fault(f"state space {space}")
        place = self.shared_addresses(i, k, address, size * count, number, n)
        if self.known is not None:
            self.check_known(k, place, size * count, number, n)
        if self.counters is not None:
            self.counters.access("ld.shared", k, address, size * count, number, n)
        if self.races:
            self.races.read(k, place, size * count, number)
        if count == 1:
            return self.shared_views[size][place // U4(size) if size > 1 else place].view(t)
        return self.shared_rows[size, count][place // U4(size * count)].view(t)

    def check_known(self, k, place, size, number, n):
        last = self.known[place] & self.known[place + U4(size - 1)]
        if k is not None:
            last = last | ~np.broadcast_to(k, (n, 32))
        if not last.all():
            self.launch.report("uninitialised shared memory", number,
                               f"{int((~last).sum())} lanes, first at {int(place.flat[int(np.flatnonzero(~last)[0])]) % self.size:#x}")

    def mark_known(self, place, size):
        if self.known is not None:
            for at in range(0, size):
                self.known[place + U4(at)] = True

    def st(self, space, i, k, address, values, t, number):
        n, count = len(self.group.warps), len(values)
        size = np.dtype(t).itemsize
        if space == "generic":
            space = "shared" if int(np.broadcast_to(address, (n, 32))[0, 0]) >= SHARED_WINDOW else "global"
            if space == "shared":
                address = (address - SHARED_WINDOW).astype(U4)
        plain = f"u{size}"
        values = [np.broadcast_to(v.view(plain), (n, 32)) for v in values]
        value = values[0] if count == 1 else np.stack(values, axis=-1)
        mask = None if k is None else np.broadcast_to(k, (n, 32))
        if space == "global":
            address = self.global_addresses(k, address, size * count, number, n)
            if self.counters is not None:
                self.counters.access("st.global", k, address, size * count, number, n)
            if mask is None:
                memory.store(address, value, size, count)
            else:
                memory.store(address[mask], value[mask], size, count)
            return
        if space != "shared":
            raise Fault(f"state space {space}")
        place = self.shared_addresses(i, k, address, size * count, number, n)
        if self.counters is not None:
            self.counters.access("st.shared", k, address, size * count, number, n)
        if mask is not None:
            place, value = place[mask], value[mask]
        if self.races:
            self.races.write(mask, place, size * count, number)
        if count == 1:
            self.shared_views[size][place // U4(size) if size > 1 else place] = value
        else:
            self.shared_rows[size, count][place // U4(size * count)] = value
        self.mark_known(place, size * count)

    def atomic(self, space, operation, i, k, address, values, t, number, wanted):
        n = len(self.group.warps)
        size = np.dtype(t).itemsize
        mask = np.ones((n, 32), bool) if k is None else np.broadcast_to(k, (n, 32))
        out = np.zeros((n, 32), t)
        if space == "global":
            address = self.global_addresses(k, address, size, number, n)
            view, places = memory._VIEWS[size].view(t), (address - U8(memory._BASE)) >> U8(size.bit_length() - 1)
        else:
            places = self.shared_addresses(i, k, address, size, number, n) // U4(size)
            view = self.shared_views[size].view(t)
        values = [np.broadcast_to(v, (n, 32)) for v in values]
        order = np.argwhere(mask)
        for w, lane in order:
            at = places[w, lane]
            old = view[at]
            out[w, lane] = old
            x = values[0][w, lane]
            if operation == "cas":
                new = values[1][w, lane] if old == x else old
            else:
                new = {"add": lambda: old + x, "min": lambda: min(old, x), "max": lambda: max(old, x), "and": lambda: old & x,
                       "or": lambda: old | x, "xor": lambda: old ^ x, "exch": lambda: x}[operation]()
            view[at] = new
        return out

    # ---------------------------------------------------------------------------------------------------- cp.async
    def async_copy(self, i, k, to, source, size, given, number):
        n = len(self.group.warps)
        to, source = np.broadcast_to(to, (n, 32)), np.broadcast_to(source, (n, 32))
        given = np.broadcast_to(given, (n, 32))
        mask = np.ones((n, 32), bool) if k is None else np.broadcast_to(k, (n, 32)).copy()
        place = self.shared_addresses(i, k, to, size, number, n)
        self.global_addresses(mask & (given > 0), source, size, number, n)  # alignment and bounds of what is read
        if self.counters is not None:
            self.counters.access("cp.async", mask & (given > 0), source, size, number, n)
            self.counters.access("st.shared", mask, to, size, number, n)
        if self.races:
            self.races.copy_begins(mask, place, size, number)
        entry = dict(warps=self.group.warps.copy(), group=self.copy_group[self.group.warps].copy(), mask=mask, place=place,
                     source=np.where(given > 0, source, U8(memory.HARMLESS)), size=size, given=given.copy(),
                     live=np.ones(n, bool), number=number)
        when = self.schedule.when
        if when == "early" or when == "random" and self.random.random() < 0.5:
            self.copy_now(entry, np.ones(n, bool))
        else:
            if self.known is not None:  # until it lands nobody may read it
                for at in range(size):
                    self.known[place[mask] + U4(at)] = False
            self.copies.append(entry)

    def copy_now(self, e, which):
        """Lands the copies of some warps of an entry."""
        mask = e["mask"] & which[:, None]
        place, source, given, size = e["place"][mask], e["source"][mask], e["given"][mask], e["size"]
        if len(place):
            unit = min(size, 8)
            count = size // unit
            data = memory.load(source, unit, count)
            data = np.ascontiguousarray(data).view(np.uint8).reshape(len(place), size)
            data = np.where(np.arange(size) < given[:, None], data, U1(0))
            self.shared[(place[:, None] + np.arange(size, dtype=U4))] = data
            self.mark_known(place, size)
            if self.races:
                self.races.copy_lands(e, which)
        e["live"] &= ~which

    def async_commit(self, i, k):
        self.copy_group[self.group.warps] += 1

    def async_wait(self, i, k, pending, number, everything=False):
        self.finish_copies(self.group.warps, pending)

    def finish_copies(self, warps, pending):
        if not self.copies:
            return
        mine = np.zeros(self.total, bool)
        mine[warps] = True
        for e in self.copies:
            which = e["live"] & mine[e["warps"]]
            if pending is not None:
                which &= e["group"] < self.copy_group[e["warps"]] - pending
            if which.any():
                self.copy_now(e, which)
        self.copies = [e for e in self.copies if e["live"].any()]

    # --------------------------------------------------------------------------------------------------- matrices
    def matrix_rows(self, i, address, count, number):
        """Addresses of the rows of 8 x 8 matrices, 16 bytes each, from the lanes that give them; and their places."""
        rows = address[:, :8 * count].astype(U4)
        bad = (rows & U4(15) != 0) | (rows < self.launch.shared_base) | (rows + U4(16) > self.launch.shared_end)
        if bad.any():
            raise self.fault("shared", number, int(rows.flat[int(np.flatnonzero(bad)[0])]), 16)
        return rows, rows + self.shared_start[i]

    def ldmatrix(self, i, k, address, count, trans, number):
        n = len(self.group.warps)
        address = np.broadcast_to(address, (n, 32))
        rows, place = self.matrix_rows(i, address, count, number)
        if self.known is not None:
            self.check_known(None, place, 16, number, n)
        if self.counters is not None:
            self.counters.access("ldmatrix", None, rows, 16, number, n)
        if self.races:
            self.races.read(None, place, 16, number)
        data = self.shared_rows[2, 8][place // U4(16)].reshape(n, count, 8, 8)  # matrix, row, column
        if trans:
            data = data.swapaxes(2, 3)
        data = np.ascontiguousarray(data).view(U4).reshape(n, count, 32)
        return [data[:, at] for at in range(count)]

    def stmatrix(self, i, k, address, values, count, trans, number):
        n = len(self.group.warps)
        rows, place = self.matrix_rows(i, np.broadcast_to(address, (n, 32)), count, number)
        data = np.stack([np.broadcast_to(v, (n, 32)) for v in values], axis=1)  # n, count, 32
        data = np.ascontiguousarray(data).view(U2).reshape(n, count, 8, 8)
        if trans:
            data = data.swapaxes(2, 3)
        if self.races:
            self.races.write(None, place, 16, number)
        if self.counters is not None:
            self.counters.access("stmatrix", None, rows, 16, number, n)
        self.shared_rows[2, 8][place // U4(16)] = data.reshape(n, count * 8, 8)
        self.mark_known(place, 16)

    def mma(self, shape, kind, a, b, c, i, k, number):
        if k is not None and not np.all(k):
            raise Fault(f"mma by part of a warp at {self.program.instrs[number].loc}")
        n = len(self.group.warps)
        depth = int(shape.partition("k")[2])
        full = lambda regs: [np.broadcast_to(r, (n, 32)) for r in regs]
        left = matrix.matrix_a(full(a), depth, kind)
        right = matrix.matrix_b(full(b), depth, kind)
        row, column = matrix.places_d(8)
        sums = np.matmul(left, right)[:, row, column]
        return np.stack(full(c), axis=-1) + sums

    def wgmma(self, shape, to, kind, i, k, targets, a, b, scale, flags, number):
        if k is not None and not np.all(k):
            raise Fault(f"wgmma by part of a warp at {self.program.instrs[number].loc}")
        if to != "f32":
            raise Fault(f"wgmma with sums of {to}")
        warps = self.group.warps.copy()
        n = len(warps)
        columns, depth = (int(x) for x in shape.removeprefix("m64n").split("k"))
        scales, transposes = flags[:2], (flags[2:] + [0, 0])[:2]
        if isinstance(a, tuple):
            transposes = [0, flags[2] if len(flags) > 2 else 0]
            a = tuple(np.broadcast_to(r, (n, 32)).copy() for r in a)
        else:
            a = self.first_lane(a, k, n).copy()
        entry = dict(columns=columns, depth=depth, kind=kind, warps=warps, group=self.product_group[warps].copy(), a=a,
                     b=self.first_lane(b, k, n).copy(), live=np.ones(n, bool), targets=targets, number=number,
                     scale=None if scale is None else np.broadcast_to(scale, (n, 32))[:, 0].copy(), scales=scales,
                     transposes=transposes)
        if self.counters is not None:
            self.counters.products += n * 2 * 16 * columns * depth
        if self.races:
            self.races.product_begins(entry)
        when = self.schedule.when
        if when == "early" or when == "random" and self.random.random() < 0.5:
            # in order: everything before it first
            self.products.append(entry)
            self.finish_products(warps, None)
        else:
            self.products.append(entry)

    def wgmma_commit(self, i, k):
        self.product_group[self.group.warps] += 1

    def wgmma_wait(self, i, k, pending, number):
        self.finish_products(self.group.warps, pending)
        if self.races:
            self.races.products_end(self.group.warps, pending)

    def finish_products(self, warps, pending):
        if not self.products:
            return
        mine = np.zeros(self.total, bool)
        mine[warps] = True
        run: list = []  # of products with the same sums, done as one
        for e in self.products:
            which = e["live"] & mine[e["warps"]]
            if pending is not None:
                which &= e["group"] < self.product_group[e["warps"]] - pending
            if not which.any():
                continue
            if run and run[0][0]["targets"] is not e["targets"] or run and not np.array_equal(run[0][0]["warps"][run[0][1]], e["warps"][which]):
                self.multiply(run)
                run = []
            if run and e["scale"] is not None and not e["scale"][which].all():
                self.multiply(run)
                run = []
            run.append((e, which))
            e["live"] = e["live"] & ~which
        if run:
            self.multiply(run)
        self.products = [e for e in self.products if e["live"].any()]

    def multiply(self, run) -> None:
        e, which = run[0]
        warps = e["warps"][which]
        n, columns = len(warps), e["columns"]
        sums = np.zeros((n, 16, columns), F4)
        size = 4 if e["kind"] == "tf32" else 2
        for e, which in run:
            depth = e["depth"]
            if isinstance(e["a"], tuple):
                left = matrix.matrix_a([r[which] for r in e["a"]], depth, e["kind"])
            else:
                left = np.empty((n, 16, depth), F4)
                for key, part in self.alike(e["a"][which], warps).items():
                    whole = self.factor(key, 64, depth, size, e["transposes"][0], e)
                    quarter = self.warp_of[warps[part]] % 4
                    left[part] = whole.reshape(4, 16, depth)[quarter]
            for key, part in self.alike(e["b"][which], warps).items():
                right = self.factor(key, columns, depth, size, e["transposes"][1], e)
                product = np.matmul(left[part].reshape(-1, depth), right.T).reshape(-1, 16, columns)
                if e["scales"] not in ([1, 1], []):
                    product *= F4(e["scales"][0] * e["scales"][1])
                sums[part] += product
        row, column = matrix.places_d(columns)
        numbers = sums[:, row.T, column.T].swapaxes(0, 1)  # registers, warps, lanes
        first, which = run[0]
        keep = None if first["scale"] is None else first["scale"][which]
        index = slice(int(warps[0]), int(warps[-1]) + 1) if int(warps[-1]) - int(warps[0]) + 1 == n else warps
        target = first["targets"]
        if keep is None or keep.all():
            target[:, index] += numbers
        else:
            target[:, index] = np.where(keep[:, None], target[:, index], F4(0)) + numbers

    def alike(self, descriptors, warps):
        """Warps that read the same factor: (CTA, descriptor) -> places."""
        ctas = self.cta_of[warps]
        found: dict = {}
        for at, (cta, d) in enumerate(zip(ctas.tolist(), descriptors.tolist())):
            found.setdefault((cta, d), []).append(at)
        return found

    def factor(self, key, rows, depth, size, transposed, e):
        """A factor (rows, depth) from shared memory."""
        cta, descriptor = key
        start, lead, stride, swizzle = matrix.decode(descriptor)
        offsets = matrix.offsets(swizzle, lead, stride, bool(transposed), rows, depth, size, start % 1024)
        base = start - start % 1024
        low, high = base + int(offsets.min()), base + int(offsets.max()) + size
        if low < self.launch.shared_base or high > self.launch.shared_end:
            raise self.fault("shared", e["number"], low, size)
        places = offsets + (base + cta * self.size)
        if self.known is not None and not self.known[places].all():
            self.launch.report("uninitialised shared memory", e["number"], f"{int((~self.known[places]).sum())} numbers of a factor")
        if size == 4:
            return (self.shared_views[4][places >> 2] & U4(0xFFFFE000)).view(F4)
        bits = self.shared_views[2][places >> 1]
        return matrix.bf16_to_float(bits) if e["kind"] == "bf16" else bits.view(np.float16).astype(F4)

    # -------------------------------------------------------------------------------------------------------- TMA
    def tma_load(self, i, k, to, tensor_map, coords, barrier, number):
        for warp, shared, where, bar, *at in self.lanes(i, k, to, tensor_map, barrier, *coords):
            self.boxes.append(dict(warp=warp, cta=int(self.cta_of[warp]), shared=shared, map=where, barrier=bar, coords=at,
                                   number=number))
            box = self.box(self.boxes[-1])
            if self.races:
                self.races.box_begins(warp, self.boxes[-1], box)
            if self.known is not None:
                start = self.boxes[-1]["cta"] * self.size + shared
                self.known[start:start + box.bytes] = False
            if self.counters is not None:
                self.counters.box(box)
            if self.schedule.when == "early":
                self.land(len(self.boxes) - 1)

    def box(self, e) -> tma.Box:
        where = e["map"]
        if self.allocations.check(np.array([where], np.uint64), 128) is not None or where % 64:
            raise self.fault("global", e["number"], where, 128)
        raw = memory.load(np.arange(where, where + 128, dtype=np.uint64), 1, 1).tobytes()
        try:
            return tma.Box(raw, e["coords"], e["shared"])
        except tma.MapError as error:
            raise Fault(f"{error} ({self.program.instrs[e['number']].loc})") from None

    def land(self, at: int) -> None:
        e = self.boxes.pop(at)
        box = self.box(e)
        if e["shared"] < self.launch.shared_base or e["shared"] + box.bytes > self.launch.shared_end:
            raise self.fault("shared", e["number"], e["shared"], box.bytes)
        values = np.zeros(box.count, f"u{box.size}")
        inside = box.addresses[box.inside]
        if len(inside):
            wrong = self.allocations.check(inside, box.size)
            if wrong is not None:
                raise self.fault("global", e["number"], int(inside[wrong]), box.size)
            values[box.inside] = memory.load(inside, box.size, 1)
        place = box.shared + e["cta"] * self.size
        self.shared_views[box.size][place // box.size] = values
        if self.known is not None:
            start = e["cta"] * self.size + e["shared"]
            self.known[start:start + box.bytes] = True
        b = self.barriers.get((e["cta"], e["barrier"]))
        if b is None:
            raise Fault(f"a copy completes on {e['barrier']:#x}, where no mbarrier is")
        if self.races:
            self.races.box_lands(e, b)
        b.bytes -= box.bytes
        self.changed |= b.settle()

    def tma_store(self, i, k, tensor_map, coords, shared, number):
        for warp, where, source, *at in self.lanes(i, k, tensor_map, shared, *coords):
            e = dict(warp=warp, cta=int(self.cta_of[warp]), shared=source, map=where, coords=at, number=number,
                     group=int(self.store_group[warp]))
            self.stores.append(e)
            if self.races:
                self.races.store_begins(e, self.box(e))
            if self.counters is not None:
                self.counters.box(self.box(e))

    def bulk_commit(self, i, k):
        self.store_group[self.group.warps] += 1

    def bulk_wait(self, i, k, pending, read, number):
        self.finish_stores(self.group.warps, pending, read, number)

    def finish_stores(self, warps, pending, read, number):
        mine = set(int(w) for w in warps)
        left = []
        for e in self.stores:
            if e["warp"] not in mine or number >= 0 and e["group"] >= self.store_group[e["warp"]] - pending:
                left.append(e)
                continue
            box = self.box(e)
            place = box.shared + e["cta"] * self.size
            if self.known is not None and not self.known[place[box.inside]].all():
                self.launch.report("uninitialised shared memory", e["number"], "a box on its way out")
            inside = box.addresses[box.inside]
            if len(inside):
                wrong = self.allocations.check(inside, box.size)
                if wrong is not None:
                    raise self.fault("global", e["number"], int(inside[wrong]), box.size)
                memory.store(inside, self.shared_views[box.size][place // box.size][box.inside], box.size, 1)
            if self.races:
                self.races.store_ends(e)
        self.stores = left

    def tensormap_replace(self, i, k, space, address, field, ordinal, value, number):
        name = tma.REPLACED[field]
        for warp, a, v in self.lanes(i, k, address, value):
            raw = self.map_at(space, warp, a)
            if field == "elemtype":
                v = tma.ELEMTYPE.get(v, v)
            elif field == "rank":
                v += 1
            if raw[name].ndim:
                raw[name][ordinal] = v
            else:
                raw[name] = v
            self.write_map(space, warp, a, raw)

    def map_at(self, space, warp, a):
        if space == "shared":
            start = int(self.cta_of[warp]) * self.size + a
            return self.shared[start:start + 128].copy().view(tma.MAP)[0]
        return memory.load(np.arange(a, a + 128, dtype=np.uint64), 1, 1).view(tma.MAP)[0]

    def write_map(self, space, warp, a, raw):
        data = np.frombuffer(raw.tobytes(), np.uint8)
        if space == "shared":
            start = int(self.cta_of[warp]) * self.size + a
            self.shared[start:start + 128] = data
        else:
            if self.allocations.check(np.array([a], np.uint64), 128) is not None:
                raise Fault(f"a tensor map at {a:#x}, out of bounds")
            memory.store(np.arange(a, a + 128, dtype=np.uint64), data, 1, 1)

    def tensormap_copy(self, i, k, to, source, number):
        done = set()
        for warp, a, s in self.lanes(i, k, to, source):
            if (warp, a) not in done:
                done.add((warp, a))
                self.write_map("global", warp, a, self.map_at("shared", warp, s))

    def fence_tensormap(self, i, k):
        pass

    def fence_async(self, i, k):
        if self.races:
            self.races.fence(self.group.warps)

    # ------------------------------------------------------------------------------------------------------ lanes
    def converged(self, i, k, members, number):
        alive = self.alive[self.group.warps]
        wanted = ((np.broadcast_to(members, (len(self.group.warps), 32)) >> LANES) & U4(1)).astype(bool) & alive
        if (wanted & ~k).any():
            instr = self.program.instrs[number]
            raise Fault(f"{instr.text} ({instr.loc}): lanes of its mask are elsewhere")

    def shuffle(self, mode, i, value, by, c):
        n = len(self.group.warps)
        value = np.broadcast_to(value, (n, 32))
        lane = LANES
        limit, segment = c & U4(31), (c >> U4(8)) & U4(31)
        low = lane & segment
        high = low | (limit & ~segment)
        if mode == "up":
            source = lane.astype(I4) - by.astype(I4)
            good = source >= high.astype(I4)
        elif mode == "down":
            source = (lane + by).astype(I4)
            good = source <= high.astype(I4)
        elif mode == "bfly":
            source = (lane ^ by).astype(I4)
            good = source <= high.astype(I4)
        else:
            source = (low | (by & ~segment & U4(31))).astype(I4)
            good = source <= high.astype(I4)
        source = np.where(good, source, lane.astype(I4))
        if source.shape[0] == 1:
            return value[:, source[0]], good
        return np.take_along_axis(value, np.broadcast_to(source, (n, 32)).astype(np.int64), 1), good

    def vote(self, mode, i, k, p, members):
        n = len(self.group.warps)
        p = np.broadcast_to(p, (n, 32))
        active = ((np.broadcast_to(members, (n, 32)) >> LANES) & U4(1)).astype(bool)
        if k is not None:
            active = active & k
        if mode == "ballot":
            return np.where(p & active, U4(1) << LANES, U4(0)).sum(1, dtype=U4, keepdims=True)
        if mode == "any":
            return (p & active).any(1, keepdims=True)
        if mode == "all":
            return (p | ~active).all(1, keepdims=True)
        raise Fault(f"vote.{mode}")

    def redux(self, operation, i, k, value, members):
        n = len(self.group.warps)
        value = np.broadcast_to(value, (n, 32))
        function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                    "xor": np.bitwise_xor}[operation]
        if k is not None and not np.all(k):
            out = np.empty((n, 1), value.dtype)
            for w in range(n):
                out[w] = function.reduce(value[w][np.broadcast_to(k, (n, 32))[w]]) if np.broadcast_to(k, (n, 32))[w].any() else 0
            return out
        return function.reduce(value, axis=1, keepdims=True).astype(value.dtype)

    def elect(self, i, k):
        n = len(self.group.warps)
        mask = np.ones((n, 32), bool) if k is None else np.broadcast_to(k, (n, 32))
        return LANES == mask.argmax(1)[:, None]

    def activemask(self, i, k):
        n = len(self.group.warps)
        mask = np.ones((n, 32), bool) if k is None else np.broadcast_to(k, (n, 32))
        return np.where(mask, U4(1) << LANES, U4(0)).sum(1, dtype=U4, keepdims=True)

    def warp_barrier(self, i, k):
        pass
