"""Happens-before by vector clocks (FastTrack, Flanagan and Freund 2009), so that race detection does not depend on the
schedule.

A warp's time is an epoch; each release starts a new one. An access is ordered after another if a chain of barriers, mbarrier
arrivals and waits, or release and acquire atomics (PTX ISA 8.8) connects them. Within a CTA a clock has a column per warp,
and one per mbarrier for the TMA loads that complete on it. A warp's knowledge of other CTAs is ``foreign``:
{CTA: epochs of its warps}, empty in kernels whose CTAs do not synchronise.
"""

import numpy as np

MBARRIERS = 32


def merged(a: dict, b: dict) -> dict:
    """The join of two clocks; neither is modified."""
    if not b or a is b:
        return a
    if not a:
        return b
    found = dict(a)
    for cta, row in b.items():
        found[cta] = np.maximum(found[cta], row) if cta in found else row
    return found


class Order:
    """The clocks of a batch of CTAs."""

    def __init__(self, machine):
        self.m = machine
        total, self.warps = machine.total, machine.warps
        self.clock = np.zeros((total, self.warps + MBARRIERS), np.int32)
        self.clock[np.arange(total), machine.warp_of] = 1
        self.foreign: list[dict] = [{}] * total
        self.fenced: list[tuple | None] = [None] * total  # (clock, foreign) at the last fence.acq_rel or membar
        self.seen: list[list] = [[] for _ in range(total)]  # read by relaxed accesses, acquired by the next fence
        self.stamp = np.full(total, -1, np.int64)  # for global_races: index of this warp's current snapshot; -1: none yet
        self.columns: dict[tuple[int, int], int] = {}

    def epoch(self, warps):
        return self.clock[warps, self.m.warp_of[warps]]

    def advance(self, warps):
        self.clock[warps, self.m.warp_of[warps]] += 1
        self.stamp[warps] = -1

    def barrier(self, warps):
        """These warps of one CTA have passed a named barrier."""
        self.clock[warps] = self.clock[warps].max(0)
        known = {}
        for warp in warps:
            known = merged(known, self.foreign[warp])
        if known:
            for warp in warps:
                self.foreign[warp] = known
        self.advance(warps)

    def released(self, warp, barrier):
        """An arrival at an mbarrier releases."""
        mine = self.clock[warp]
        barrier.acc = mine.copy() if barrier.acc is None else np.maximum(barrier.acc, mine)
        barrier.foreign = merged(barrier.foreign, self.foreign[warp])
        self.advance(warp)

    def acquired(self, warp, barrier):
        """A wait on an mbarrier acquires."""
        if barrier.done is not None:
            self.clock[warp] = np.maximum(self.clock[warp], barrier.done)
            self.foreign[warp] = merged(self.foreign[warp], barrier.foreign)
            self.stamp[warp] = -1

    def column(self, cta, address):
        """The column of TMA loads that complete on the mbarrier at ``address``."""
        key = (cta, address)
        if key not in self.columns:
            self.columns[key] = self.warps + sum(c == cta for c, _ in self.columns) % MBARRIERS
        return self.columns[key]

    # ---- between CTAs
    def knowledge(self, warp) -> dict:
        """Everything that happens before now in this warp, by CTA: what a release at gpu scope publishes."""
        return merged(self.foreign[warp], {self.m.ids[self.m.cta_of[warp]]: self.clock[warp, : self.warps].copy()})

    def learn(self, warp, known: dict) -> None:
        own = self.m.ids[self.m.cta_of[warp]]
        if own in known:
            self.clock[warp, : self.warps] = np.maximum(self.clock[warp, : self.warps], known[own])
        self.foreign[warp] = merged(self.foreign[warp], {cta: row for cta, row in known.items() if cta != own})
        self.stamp[warp] = -1

    def fence(self, warps) -> None:
        """fence.acq_rel, fence.sc or membar at gpu or sys scope: makes relaxed atomics around it release and acquire."""
        for warp in warps:
            for known in self.seen[warp]:
                self.learn(warp, known)
            self.seen[warp] = []
            self.fenced[warp] = self.knowledge(warp)
        self.advance(warps)

    def synchronise(self, warp, locations: dict, address: int, order: str, reads: bool, writes: bool) -> None:
        """A strong access at gpu scope; ``locations``: the clocks released at each address."""
        known = locations.get(address)
        if reads and known:
            if order in ("acquire", "acq_rel"):
                self.learn(warp, known)
            else:
                self.seen[warp].append(known)
        if writes:
            given = self.fenced[warp]
            if order in ("release", "acq_rel"):
                given = self.knowledge(warp)
                self.advance(np.array([warp]))
            if given:
                locations[address] = merged(known or {}, given)
