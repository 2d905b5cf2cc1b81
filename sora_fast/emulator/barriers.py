"""Named barriers (bar, PTX ISA 9.7.13.1) and mbarriers (9.7.13.15)."""

import numpy as np

from .memory import Fault
from .scheduler import Group, put_masked


class Mbarrier:
    """The state of an mbarrier object: arrivals and transaction bytes still pending in this phase."""

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


class Barriers:
    """Arrivals and waits."""

    def barrier(self, group: Group, block, values) -> Group | None:
        end = block.end
        number = int(values[0].flat[0])
        threads = int(values[1].flat[0]) if len(values) > 1 else None
        if group.mask is not None and (group.mask != self.alive[group.warps]).any():
            # lanes of the same warp are elsewhere: they come, or it is a deadlock
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
        done = np.array([self.passed(w, int(a), int(p)) for w, a, p in zip(group.warps, addresses, parities, strict=True)])
        if self.races:
            for w, a in zip(group.warps[done], addresses[done], strict=True):
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

    def mbarrier_init(self, i, k, address, count, number):
        for warp, a, c in self.lanes(i, k, address, count):
            if a % 8:
                raise Fault(f"mbarrier at {a:#x}")
            self.barriers[int(self.cta_of[warp]), a] = Mbarrier(c, self.warps)
        self.changed = True

    def mbarrier_inval(self, i, k, address, number):
        for warp, a in self.lanes(i, k, address):
            cta = int(self.cta_of[warp])
            barrier = self.barriers.pop((cta, a), None)
            if barrier is not None and barrier.bytes:
                self.launch.report(
                    "an mbarrier ends before its copies", number, f"CTA {self.ids[cta]}, {barrier.bytes} bytes to come"
                )

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
        self.complete_copies(self.group.warps, None)
        for warp, a in self.lanes(i, k, address):
            b = self.barriers[int(self.cta_of[warp]), a]
            if noinc:
                b.pending -= 1
                self.changed |= b.settle()

    def lanes(self, i, k, *values):
        """For each active lane: its warp and its values."""
        warps = self.group.warps
        n = len(warps)
        mask = np.ones((n, 32), bool) if k is None else np.broadcast_to(k, (n, 32))
        at = np.argwhere(mask)
        columns = [None if v is None else np.broadcast_to(v, (n, 32))[mask] for v in values]
        return [(int(warps[w]), *(None if c is None else int(c[j]) for c in columns)) for j, (w, _) in enumerate(at)]
