"""cp.async, not bulk (PTX ISA 9.7.9.25.3): a copy completes at its wait, at its issue, or at random between."""

import numpy as np

from . import memory
from .arith import U1, U4, U8


class AsyncCopies:
    """Copies from global to shared memory by groups of each thread."""

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
        entry = dict(
            warps=self.group.warps.copy(),
            group=self.copy_group[self.group.warps].copy(),
            mask=mask,
            place=place,
            source=np.where(given > 0, source, U8(memory.HARMLESS)),
            size=size,
            given=given.copy(),
            live=np.ones(n, bool),
            number=number,
        )
        when = self.schedule.when
        if when == "early" or when == "random" and self.random.random() < 0.5:
            self.complete_copy(entry, np.ones(n, bool))
        else:
            if self.initialized is not None:  # until it lands nobody may read it
                for at in range(size):
                    self.initialized[place[mask] + U4(at)] = False
            self.cp_asyncs.append(entry)

    def complete_copy(self, e, which):
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
            self.mark_initialized(place, size)
            if self.races:
                self.races.copy_lands(e, which)
        e["live"] &= ~which

    def async_commit(self, i, k):
        self.copy_group[self.group.warps] += 1

    def async_wait(self, i, k, pending, number, everything=False):
        self.complete_copies(self.group.warps, pending)

    def complete_copies(self, warps, pending):
        if not self.cp_asyncs:
            return
        mine = np.zeros(self.total, bool)
        mine[warps] = True
        for e in self.cp_asyncs:
            which = e["live"] & mine[e["warps"]]
            if pending is not None:
                which &= e["group"] < self.copy_group[e["warps"]] - pending
            if which.any():
                self.complete_copy(e, which)
        self.cp_asyncs = [e for e in self.cp_asyncs if e["live"].any()]
