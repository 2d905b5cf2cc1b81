"""Non-bulk cp.async (PTX ISA 9.7.9.25.3): a copy completes at its wait, at its issue, or at a random time between."""

import numpy as np

from . import memory
from .arith import U1, UNINITIALIZED_BYTE
from .lanes import all_true, any_true, per_lane

NOT_INITIALIZED = memory.splat(0)  # of every byte, in Machine.initialized
UNINITIALIZED = memory.splat(UNINITIALIZED_BYTE)  # what shared memory holds there


class AsyncCopies:
    """Copies from global to shared memory, in per-thread groups."""

    def async_copy(self, i, k, to, source, size, src_size, number):
        """Copy ``size`` bytes per lane; those past ``src_size`` are zero-filled and not read."""
        n = len(self.group.warps)
        to, source, src_size = per_lane(to, n), per_lane(source, n), per_lane(src_size, n)
        mask = self.lane_mask(k, n)
        reads = mask & (src_size > 0)
        place = self.shared_addresses(i, k, to, size, number, n)
        source = self.global_addresses(reads, source, size, number, n)
        if self.counters is not None:
            self.counters.access("cp.async", reads, source, size, number, n)
            self.counters.access("st.shared", mask, to, size, number, n)
        if self.races:
            self.races.copy_begins(mask, place, size, number)
            self.races.global_races.access(self, reads, source, size, number)
        entry = dict(warps=self.group.warps.copy(), group=self.copy_group[self.group.warps].copy(), mask=mask.copy(),
                     place=place, source=source, size=size, src_size=src_size.copy(), live=np.ones(n, bool), number=number)
        if self.completes_now():
            self.complete_copy(entry, entry["live"])
        else:
            place = place if all_true(mask) else place[mask]
            if self.initialized is not None:  # until it completes, the destination must not be read
                memory.scatter(self.initialized_views, place, NOT_INITIALIZED[size], size, 1)
            memory.scatter(self.shared_views, place, UNINITIALIZED[size], size, 1)
            self.cp_asyncs.append(entry)

    def complete_copy(self, e, selected):
        """Complete the copy of an entry for some of its warps."""
        size, parts = e["size"], [e["place"], e["source"], e["src_size"]]
        mask = e["mask"] & selected[:, None]
        if any_true(mask):
            place, source, src_size = parts if all_true(mask) else (part[mask] for part in parts)
            data = memory.load(source, size, 1)
            short = src_size < size
            if any_true(short):
                rest = np.arange(size) >= src_size[short][:, None]
                data[short] = np.where(rest, U1(0), data[short].view(U1).reshape(-1, size)).view(data.dtype)[:, 0]
            memory.scatter(self.shared_views, place, data, size, 1)
            self.mark_initialized(place, size)
            if self.races:
                self.races.copy_lands(e, selected)
        e["live"] = e["live"] & ~selected

    def async_commit(self, i, k):
        self.copy_group[self.group.warps] += 1

    def async_wait(self, i, k, pending):
        """``pending``: how many groups may stay in flight; None waits for all copies, committed or not."""
        self.complete_copies(self.group.warps, pending)

    def complete_copies(self, warps, pending):
        if not self.cp_asyncs:
            return
        mine = np.zeros(self.total_warps, bool)
        mine[warps] = True
        for e in self.cp_asyncs:
            selected = e["live"] & mine[e["warps"]]
            if pending is not None:
                selected &= e["group"] < self.copy_group[e["warps"]] - pending
            if any_true(selected):
                self.complete_copy(e, selected)
        self.cp_asyncs = [e for e in self.cp_asyncs if any_true(e["live"])]
