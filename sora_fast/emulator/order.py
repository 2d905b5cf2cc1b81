"""Happens-before by vector clocks (FastTrack, Flanagan and Freund 2009), so that race detection does not depend on the
schedule.

A warp's time is an epoch; each release starts a new one. An access is ordered after another if a chain of barriers, mbarrier
arrivals and waits, or release and acquire atomics (PTX ISA 8.8) connects them. Within a CTA a clock has a column per warp,
and one per mbarrier for the TMA loads that complete on it. A warp's knowledge of other CTAs is ``foreign``:
{CTA: epochs of its warps}, empty in kernels whose CTAs do not synchronise.
"""

import numpy as np

MBARRIERS = 32  # columns for mbarriers; further mbarriers of a CTA share them


def join_clocks(a: dict, b: dict) -> dict:
    """The join of two clocks; neither is modified."""
    if not b or a is b:
        return a
    if not a:
        return b
    found = dict(a)
    for cta, row in b.items():
        found[cta] = np.maximum(found[cta], row) if cta in found else row
    return found


class VectorClocks:
    """The clocks of a batch of CTAs."""

    def __init__(self, machine):
        self.m = machine
        total, self.warps = machine.total_warps, machine.warps
        self.clock = np.zeros((total, self.warps + MBARRIERS), np.int32)
        self.clock[np.arange(total), machine.warp_of] = 1
        self.foreign: list[dict] = [{}] * total
        self.fence_clocks: list[tuple | None] = [None] * total  # (clock, foreign) at the last fence.acq_rel or membar
        self.relaxed_reads: list[list] = [[] for _ in range(total)]  # read by relaxed accesses, acquired by the next fence
        self.snapshot = np.full(total, -1, np.int64)  # for global_races: index of this warp's current snapshot; -1: none yet
        self.tma_columns: dict[tuple[int, int], int] = {}

    def epoch(self, warps):
        return self.clock[warps, self.m.warp_of[warps]]

    def start_epoch(self, warps):
        self.clock[warps, self.m.warp_of[warps]] += 1
        self.snapshot[warps] = -1

    def barrier(self, warps):
        """These warps of one CTA have passed a named barrier."""
        self.clock[warps] = self.clock[warps].max(0)
        known = {}
        for warp in warps:
            known = join_clocks(known, self.foreign[warp])
        if known:
            for warp in warps:
                self.foreign[warp] = known
        self.start_epoch(warps)

    def release_mbarrier(self, warp, barrier):
        """An arrival at an mbarrier releases."""
        mine = self.clock[warp]
        barrier.arrival_clock = mine.copy() if barrier.arrival_clock is None else np.maximum(barrier.arrival_clock, mine)
        barrier.foreign = join_clocks(barrier.foreign, self.foreign[warp])
        self.start_epoch(warp)

    def acquire_mbarrier(self, warp, barrier):
        """A wait on an mbarrier acquires."""
        if barrier.phase_clock is not None:
            self.clock[warp] = np.maximum(self.clock[warp], barrier.phase_clock)
            self.foreign[warp] = join_clocks(self.foreign[warp], barrier.foreign)
            self.snapshot[warp] = -1

    def tma_column(self, cta, address):
        """The column of TMA loads that complete on the mbarrier at ``address``."""
        key = (cta, address)
        if key not in self.tma_columns:
            self.tma_columns[key] = self.warps + sum(c == cta for c, _ in self.tma_columns) % MBARRIERS
        return self.tma_columns[key]

    # ---- between CTAs
    def released_clocks(self, warp) -> dict:
        """Everything that happens before now in this warp, by CTA: what a release at gpu scope publishes."""
        return join_clocks(self.foreign[warp], {self.m.cta_ids[self.m.cta_of[warp]]: self.clock[warp, : self.warps].copy()})

    def acquire_clocks(self, warp, known: dict) -> None:
        """From now on this warp is ordered after what ``released_clocks`` has published."""
        own = self.m.cta_ids[self.m.cta_of[warp]]
        if own in known:
            self.clock[warp, : self.warps] = np.maximum(self.clock[warp, : self.warps], known[own])
        self.foreign[warp] = join_clocks(self.foreign[warp], {cta: row for cta, row in known.items() if cta != own})
        self.snapshot[warp] = -1

    def fence(self, warps) -> None:
        """fence.acq_rel, fence.sc or membar at gpu or sys scope: makes relaxed atomics around it release and acquire."""
        for warp in warps:
            for known in self.relaxed_reads[warp]:
                self.acquire_clocks(warp, known)
            self.relaxed_reads[warp] = []
            self.fence_clocks[warp] = self.released_clocks(warp)
        self.start_epoch(warps)

    def synchronise(self, warp, locations: dict, address: int, order: str, reads: bool, writes: bool) -> None:
        """A strong access at gpu scope; ``locations``: the clocks released at each address."""
        known = locations.get(address)
        if reads and known:
            if order in ("acquire", "acq_rel"):
                self.acquire_clocks(warp, known)
            else:
                self.relaxed_reads[warp].append(known)
        if writes:
            released = self.fence_clocks[warp]
            if order in ("release", "acq_rel"):
                released = self.released_clocks(warp)
                self.start_epoch(np.array([warp]))
            if released:
                locations[address] = join_clocks(known or {}, released)
