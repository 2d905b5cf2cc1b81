"""Named barriers (bar, PTX ISA 9.7.13.1) and mbarriers (9.7.13.15)."""

import numpy as np

from .lanes import all_true, any_true, per_lane
from .scheduler import Group, put_masked


class Mbarrier:
    """An mbarrier object: the arrivals (``pending``) and transaction bytes (``tx_count``) that this phase waits for."""

    __slots__ = ("arrival_clock", "completed_loads", "count", "foreign", "pending", "phase", "phase_clock", "tx_count")

    def __init__(self, count):
        self.count = self.pending = count
        self.tx_count, self.phase = 0, 0
        # clocks (order.py) of this phase's arrivals, and of all completed phases
        self.arrival_clock = self.phase_clock = None
        self.foreign: dict = {}
        self.completed_loads = 0  # TMA loads completed

    def try_complete_phase(self) -> bool:
        """Complete the phase if nothing is pending."""
        if self.pending == 0 and self.tx_count == 0:
            self.phase += 1
            self.pending = self.count
            if self.arrival_clock is not None:
                clock, self.arrival_clock = self.arrival_clock, None
                self.phase_clock = clock if self.phase_clock is None else np.maximum(self.phase_clock, clock)
            return True
        return False


class Barriers:
    """Arrivals and waits. ``i``, ``k``: the warps and the active lanes (codegen.py); ``number``: the instruction's, but in
    ``arrive`` and ``release`` the named barrier's.
    """

    def active_lanes(self, i, k, *values):
        """For each active lane of the group: its warp and its values."""
        warps = self.group.warps
        n = len(warps)
        mask = self.lane_mask(k, n)
        columns = [None if v is None else per_lane(v, n)[mask] for v in values]
        rows = np.nonzero(mask)[0]
        return [(int(warps[row]), *(None if c is None else int(c[j]) for c in columns)) for j, row in enumerate(rows)]

    def first_lane(self, values, k, n):
        """One value per warp, that of its first active lane."""
        values = per_lane(values, n)
        return values[:, 0] if k is None else values[np.arange(n), k.argmax(1)]

    # ---- named barriers
    def named_barrier(self, group: Group, block, values) -> Group | None:
        """bar.sync or bar.arrive, which ends ``block``; ``values``: its operands. None: the group waits."""
        end = block.end
        number = int(values[0].flat[0])
        threads = int(values[1].flat[0]) if len(values) > 1 else None
        if group.mask is not None and any_true(group.mask != self.alive[group.warps]):
            # the warp has diverged: its other lanes must arrive too, or it is a deadlock
            self.waiting.setdefault(("converge", block.index), []).append(group)
            return self.gather_converged(block.index)
        self.arrive(number, group, threads)
        if "arrive" in end.parts:
            self.release(number)
            group.block += 1
            return group
        self.waiting.setdefault(number, []).append(Group(group.block + 1, group.warps, group.mask))
        self.release(number)
        return None

    def gather_converged(self, index: int) -> Group | None:
        """Warps whose diverged lanes have all reached the barrier that ends block ``index``."""
        key = ("converge", index)
        merged = self.merge(self.waiting.pop(key))
        whole = (merged.full_mask() == self.alive[merged.warps]).all(1)
        if not whole.all():
            self.waiting[key] = [self.subset(merged, ~whole)]
        if not whole.any():
            return None
        return self.subset(merged, whole)

    def arrive(self, number: int, group: Group, threads) -> None:
        end = self.program.blocks[group.block].end
        for cta in set(self.cta_of[group.warps].tolist()):
            expected = self.barrier_threads.setdefault((number, cta), threads)
            if expected != threads:
                raise self.launch.fault(end.number, f"barrier {number} of {expected} threads is used with {threads}")
        twice = self.arrived[number][group.warps]
        if any_true(twice):
            thread = self.thread_of(int(group.warps[twice.argmax()]))
            raise self.launch.fault(end.number, f"a warp arrives twice at barrier {number}", thread)
        self.arrived[number][group.warps] = True

    def release(self, number) -> None:
        """Release the warps whose barrier is complete."""
        if isinstance(number, tuple):
            group = self.gather_converged(number[1])
            if group is not None:
                self.ready.append(group)
            return
        arrived = self.arrived[number].reshape(self.warps, self.ctas).sum(0)
        complete = []
        for cta, (count, live_warps) in enumerate(zip(arrived.tolist(), self.live_warps.tolist(), strict=True)):
            expected = self.barrier_threads.get((number, cta))
            if count and (count == live_warps if expected is None else count * 32 >= expected):
                complete.append(cta)
        if not complete:
            return
        for cta in complete:
            self.barrier_threads.pop((number, cta), None)
            if self.races:
                self.races.barrier(np.flatnonzero(self.arrived[number] & (self.cta_of == cta)))
        done = np.zeros(self.ctas, bool)
        done[complete] = True
        self.arrived[number][done[self.cta_of]] = False
        left = []
        for group in self.waiting.pop(number, []):
            free = done[self.cta_of[group.warps]]
            if all_true(free):
                self.ready.append(group)
            else:
                left.append(self.subset(group, ~free))
                if any_true(free):
                    self.ready.append(self.subset(group, free))
        if left:
            self.waiting[number] = left

    # ---- mbarriers
    def mbarrier_at(self, warp, address, number) -> Mbarrier:
        found = self.barriers.get((int(self.cta_of[warp]), address))
        if found is None:
            raise self.launch.fault(number, f"no mbarrier at shared address {address:#x}", self.thread_of(warp))
        return found

    def wait(self, group: Group, block, values) -> Group | None:
        """try_wait and test_wait of a parity; retried until they return true."""
        n, number = len(group.warps), block.end.number
        addresses = self.first_lane(values[0], group.mask, n)
        parities = self.first_lane(values[1], group.mask, n)
        tried = zip(group.warps.tolist(), addresses.tolist(), parities.tolist(), strict=True)
        done = np.array([self.mbarrier_at(w, a, number).phase % 2 != p & 1 for w, a, p in tried])
        if self.races:
            for w, a in zip(group.warps[done].tolist(), addresses[done].tolist(), strict=True):
                self.races.mbarrier_used(w, a, number)
                self.races.acquire_mbarrier(w, self.mbarrier_at(w, a, number))
        if not all_true(done):
            self.blocked.append(self.subset(group, ~done))
            if not any_true(done):
                return None
            group = self.subset(group, done)
        put_masked(self.namespace[f"V_{block.end.args[0].name}_b"], group.index, group.mask, True)
        group.block += 1
        return group

    def mbarrier_init(self, i, k, address, count, number):
        for warp, a, c in self.active_lanes(i, k, address, count):
            if a % 8:
                raise self.launch.fault(number, f"an mbarrier at {a:#x}, which is not a multiple of 8", self.thread_of(warp))
            if self.races:
                self.races.mbarrier_written(warp, a, number, init=True)
            self.barriers[int(self.cta_of[warp]), a] = Mbarrier(c)
        self.mbarrier_changed = True

    def mbarrier_inval(self, i, k, address, number):
        for warp, a in self.active_lanes(i, k, address):
            if self.races:
                self.races.mbarrier_written(warp, a, number, init=False)
            barrier = self.barriers.pop((int(self.cta_of[warp]), a), None)
            if barrier is not None and barrier.tx_count:
                kind = "an mbarrier is invalidated before its copies have completed"
                self.launch.report(kind, number, self.thread_of(warp), f"{barrier.tx_count} bytes pending")

    def mbarrier_arrive(self, i, k, address, count, expect, arrives, number):
        """mbarrier.arrive, .expect_tx and .arrive.expect_tx; ``count``, ``expect``: None, or a value per lane."""
        for warp, a, c, e in self.active_lanes(i, k, address, count, expect):
            b = self.mbarrier_at(warp, a, number)
            if self.races:
                self.races.mbarrier_used(warp, a, number)
                if arrives:
                    self.races.release_mbarrier(warp, b)
            if e is not None:
                b.tx_count += e
            if arrives:
                b.pending -= 1 if c is None else c
                if b.pending < 0:
                    raise self.launch.fault(number, f"more arrivals than mbarrier {a:#x} counts", self.thread_of(warp))
            self.mbarrier_changed |= b.try_complete_phase()

    def async_arrive(self, i, k, address, noinc, number):
        """cp.async.mbarrier.arrive: arrives once the thread's copies complete; here they complete immediately."""
        self.complete_copies(self.group.warps, None)
        for warp, a in self.active_lanes(i, k, address):
            b = self.mbarrier_at(warp, a, number)
            if self.races:
                self.races.mbarrier_used(warp, a, number)
                self.races.release_mbarrier(warp, b)
            if noinc:  # without .noinc pending is incremented first
                b.pending -= 1
            if b.pending < 0:
                raise self.launch.fault(number, f"more arrivals than mbarrier {a:#x} counts", self.thread_of(warp))
            self.mbarrier_changed |= b.try_complete_phase()
