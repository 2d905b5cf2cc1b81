"""cp.async, not bulk (PTX ISA 9.7.9.25.3): a copy completes at its wait, at its issue, or at random between."""

import numpy as np

from . import memory
from .arith import U1, U4, U8, UNWRITTEN


class AsyncCopies:
    """Copies from global to shared memory, in groups of each thread."""

    def async_copy(self, i, k, to, source, size, src_size, number):
        """``size`` bytes per lane; what is behind ``src_size`` of them is filled with zeros and not read."""
        n = len(self.group.warps)
        to, source = np.broadcast_to(to, (n, 32)), np.broadcast_to(source, (n, 32))
        src_size = np.broadcast_to(src_size, (n, 32))
        mask = self.lane_mask(k, n).copy()
        reads = mask & (src_size > 0)
        place = self.shared_addresses(i, k, to, size, number, n)
        self.global_addresses(reads, source, size, number, n)
        if self.counters is not None:
            self.counters.access("cp.async", reads, source, size, number, n)
            self.counters.access("st.shared", mask, to, size, number, n)
        if self.races:
            self.races.copy_begins(mask, place, size, number)
            self.races.globals.access(self, reads, source, size, number)
        entry = dict(warps=self.group.warps.copy(), group=self.copy_group[self.group.warps].copy(), mask=mask, place=place,
                     source=np.where(src_size > 0, source, U8(memory.HARMLESS)), size=size, src_size=src_size.copy(),
                     live=np.ones(n, bool), number=number)  # fmt: skip
        if self.completes_now():
            self.complete_copy(entry, np.ones(n, bool))
        else:
            if self.initialized is not None:  # until it completes nobody may read the destination
                for at in range(size):
                    self.initialized[place[mask] + U4(at)] = False
            self.shared[place[mask][:, None] + np.arange(size, dtype=U4)] = UNWRITTEN
            self.cp_asyncs.append(entry)

    def complete_copy(self, e, which):
        """Write what some warps of an entry have copied."""
        mask = e["mask"] & which[:, None]
        place, source, src_size, size = e["place"][mask], e["source"][mask], e["src_size"][mask], e["size"]
        if len(place):
            unit = min(size, 8)
            data = np.ascontiguousarray(memory.load(source, unit, size // unit)).view(np.uint8).reshape(len(place), size)
            data = np.where(np.arange(size) < src_size[:, None], data, U1(0))
            self.shared[(place[:, None] + np.arange(size, dtype=U4))] = data
            self.mark_initialized(place, size)
            if self.races:
                self.races.copy_lands(e, which)
        e["live"] &= ~which

    def async_commit(self, i, k):
        self.copy_group[self.group.warps] += 1

    def async_wait(self, i, k, pending):
        """``pending``: the most groups that may stay in flight; None for all copies, committed or not."""
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
