"""Races in global memory: two threads of any CTAs access one element, at least one writes, not both are atomic, and they are
unordered (PTX ISA 8.7 and 8.8).

Every access of a launch is logged with its thread and the thread's vector clock (order.py). CTAs run in batches, and a later
one may race with an earlier one, so the log is checked once, after the last. For each element, accesses are in execution
order: each must be ordered after the last write before it, and each write after every read since the previous write.

Lanes of a warp are ordered by bar.warp.sync and bar.sync, not by executing together. But a read that comes first in program
order does not race with a later write of another lane: Triton lets several lanes load what one of them stores, and discards
the other results. Nor does a read by any thread of the CTA whose result is unused (dropped_reads.py).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .dropped_reads import DroppedReads

PENDING = 2**31 - 1
READ, WRITE, STRONG = 0, 1, 2  # kinds: WRITE | STRONG is an atomic


@dataclass
class Event:
    """One instruction of a group of warps."""

    number: int
    kind: int
    size: int  # bytes of each thread
    cta: np.ndarray  # (threads,)
    thread: np.ndarray  # warp * 32 + lane, in the CTA
    address: np.ndarray
    epoch: np.ndarray
    snapshot: np.ndarray  # row of GlobalRaces.clocks
    low: int
    high: int


class GlobalRaces:
    """The log of one launch."""

    def __init__(self, launch):
        self.launch = launch
        self.events: list[Event] = []
        self.clocks: list[np.ndarray] = []  # snapshots: epochs of the CTA's warps
        self.foreign: list[dict] = []
        self.locations: dict[int, dict] = {}  # what was released at each address

    # ---- logging
    def snapshots(self, m, warps):
        """Snapshots of these warps' clocks, taken anew only if a clock has changed."""
        snapshot = m.races.snapshot
        for warp in np.unique(warps[snapshot[warps] < 0]):
            snapshot[warp] = len(self.clocks)
            self.clocks.append(m.races.clock[warp, : m.warps].copy())
            self.foreign.append(m.races.foreign[warp])
        return snapshot[warps]

    def log(self, m, warps, lanes, address, size, number, kind, pending=False):
        epoch = np.full(len(warps), PENDING) if pending else m.races.epoch(warps)
        ids = np.asarray(m.cta_ids)[m.cta_of[warps]]
        thread = m.warp_of[warps] * 32 + lanes
        low, high = int(address.min()), int(address.max()) + size
        snapshot = self.snapshots(m, warps)
        self.events.append(Event(number, kind, size, ids, thread, address.copy(), epoch, snapshot, low, high))

    def access(self, m, k, address, size, number, values=None):
        """A weak load of the current group, or with ``values`` a store; ``address`` (n, 32)."""
        mask = m.lane_mask(k, len(m.group.warps))
        rows, lanes = np.nonzero(mask)
        if not len(rows):
            return
        address = address[mask]
        if values is not None:
            self.same_instruction(m, rows, lanes, address, values[mask], number)
        self.log(m, m.group.warps[rows], lanes, address, size, number, READ if values is None else WRITE)

    def same_instruction(self, m, rows, lanes, address, values, number):
        """Report lanes of one store that write different values to one address."""
        order = np.argsort(address, kind="stable")
        same = address[order[1:]] == address[order[:-1]]
        if same.any():
            values = values.reshape(len(values), -1)
            differ = same & (values[order[1:]] != values[order[:-1]]).any(1) & (rows[order[1:]] == rows[order[:-1]])
            if differ.any():
                at = int(order[1:][differ][0])
                name = m.allocations.name(int(address[at]))
                kind = "race in global memory: lanes of one store write different values"
                m.launch.report(kind, number, m.thread(rows[at], lanes[at]), name)

    def atomic(self, m, k, address, size, number, order, scope):
        mask = m.lane_mask(k, len(m.group.warps))
        for row, lane in np.argwhere(mask):
            where = int(address[row, lane])
            if scope != "cta":
                m.races.synchronise(int(m.group.warps[row]), self.locations, where, order, reads=True, writes=True)
        rows, lanes = np.nonzero(mask)
        if len(rows):
            self.log(m, m.group.warps[rows], lanes, address[mask], size, number, WRITE | STRONG)

    def strong(self, m, k, address, size, number, order, scope, write):
        """ld.acquire, ld.relaxed, st.release, st.relaxed and volatile accesses. A load acquires before it is logged."""
        mask = m.lane_mask(k, len(m.group.warps))
        for row, lane in np.argwhere(mask):
            where = int(address[row, lane])
            if scope != "cta":
                m.races.synchronise(int(m.group.warps[row]), self.locations, where, order, reads=not write, writes=write)
        rows, lanes = np.nonzero(mask)
        if len(rows):
            kind = STRONG | (WRITE if write else READ)
            self.log(m, m.group.warps[rows], lanes, address[mask], size, number, kind)

    def box(self, m, warp, entry, box, write, pending=False):
        """A TMA copy, as accesses of the thread that issued it: a load at its issue, a store at its wait."""
        if len(box.addresses):
            warps, lanes = np.full(len(box.addresses), warp), np.zeros(len(box.addresses), np.int64)
            self.log(m, warps, lanes, box.addresses, box.size, entry["number"], WRITE if write else READ, pending)

    def map_accessed(self, m, warp, address, number, write):
        """A tensor map in global memory: built by the kernel, or read by TMA."""
        warps, address = np.array([warp]), np.array([address], np.uint64)
        self.log(m, warps, np.zeros(1, np.int64), address, 128, number, WRITE if write else READ)

    # ---- the verdict
    def find_races(self) -> None:
        writes = [e for e in self.events if e.kind & WRITE]
        if not writes:
            return
        unit = min(e.size for e in self.events)
        starts = np.unique(np.concatenate([e.address for e in writes])) // np.uint64(unit)
        low, high = min(e.low for e in writes), max(e.high for e in writes)
        written = np.unique(np.concatenate([self.elements(e, unit) for e in writes])) if len(starts) else starts
        columns = []
        for at, e in enumerate(self.events):
            if e.high <= low or e.low >= high:
                continue
            per = e.size // unit
            element = self.elements(e, unit)
            row = np.repeat(np.arange(len(e.address)), per)
            if not e.kind & WRITE:
                place = np.minimum(np.searchsorted(written, element), len(written) - 1)
                keep = written[place] == element
                element, row = element[keep], row[keep]
            if len(element):
                columns.append((element, np.full(len(element), at), row))
        element, event, row = (np.concatenate(c) for c in zip(*columns, strict=True))
        order = np.lexsort((event, element))
        self.check(element[order], event[order], row[order], unit)

    @staticmethod
    def elements(e, unit):
        first = e.address // np.uint64(unit)
        per = e.size // unit
        return first if per == 1 else (first[:, None] + np.arange(per, dtype=np.uint64)).ravel()

    def check(self, element, event, row, unit):
        """Accesses sorted by element, then by execution order."""
        offsets = np.cumsum([0] + [len(e.address) for e in self.events])
        flat = offsets[event] + row
        take = lambda name: np.concatenate([getattr(e, name) for e in self.events])[flat]
        kind = np.array([e.kind for e in self.events])[event]
        cta, thread = take("cta"), take("thread")
        new = np.r_[True, element[1:] != element[:-1]]
        group = np.cumsum(new) - 1
        # groups of a single thread, or of atomics only, need no look
        first = np.flatnonzero(new)
        single_thread = np.logical_and.reduceat((cta == cta[first][group]) & (thread == thread[first][group]), first)
        atomics = np.logical_and.reduceat(kind & STRONG != 0, first)
        keep = ~(single_thread | atomics)[group]
        if not keep.any():
            return
        element, event, kind, cta, thread, group = (x[keep] for x in (element, event, kind, cta, thread, group))
        a = dict(element=element, event=event, kind=kind, cta=cta, thread=thread)
        a |= dict(epoch=take("epoch")[keep], snapshot=take("snapshot")[keep])
        n = len(element)
        index = np.arange(n)
        new = np.r_[True, group[1:] != group[:-1]]
        start = np.maximum.accumulate(np.where(new, index, 0))
        writes = kind & WRITE != 0
        # the last write before each access, and for reads the next write behind it
        last = np.r_[-1, np.maximum.accumulate(np.where(writes, index, -1))[:-1]]
        self.check_pairs(a, np.where(last >= start, last, -1), index)
        following = np.minimum.accumulate(np.where(writes, index, n)[::-1])[::-1]
        following = np.where(following < n, following, 0)
        ahead = (group[following] == group) & ~writes & (following > index)
        self.check_pairs(a, np.where(ahead, index, -1), following)
        self.check_mixed(a, group)

    def check_mixed(self, a, group):
        """Plain accesses mixed with atomics: the last atomic may be the thread's own, and earlier ones unordered."""
        strong = a["kind"] & STRONG != 0
        first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
        some = np.logical_or.reduceat(strong, first) & ~np.logical_and.reduceat(strong, first)
        for at in np.flatnonzero(some):
            stop = first[at + 1] if at + 1 < len(first) else len(group)
            members = np.arange(first[at], stop)
            atomics = members[strong[members] & (a["kind"][members] & WRITE != 0)]
            plain = members[~strong[members]]
            one, two = (x.ravel() for x in np.meshgrid(atomics, plain, indexing="ij"))
            self.check_pairs(a, np.minimum(one, two), np.maximum(one, two))

    def check_pairs(self, a, before, after):
        """Report pairs (indices; before < 0: none) that conflict and are not ordered."""
        valid = before >= 0
        before, after = before[valid], after[valid]
        conflict = (a["kind"][before] | a["kind"][after]) & WRITE != 0
        conflict &= (a["kind"][before] & a["kind"][after] & STRONG) == 0
        conflict &= (a["cta"][before] != a["cta"][after]) | (a["thread"][before] != a["thread"][after])
        one_store = (a["event"][before] == a["event"][after]) & (a["thread"][before] // 32 == a["thread"][after] // 32)
        conflict &= ~one_store | (a["cta"][before] != a["cta"][after])  # lanes of one store: same_instruction
        before, after = before[conflict], after[conflict]
        if not len(before):
            return
        bad = ~self.ordered(a, before, after)
        before, after = before[bad], after[bad]
        bad = ~(self.unused(a, before, after) | self.unused(a, after, before))
        seen = set()
        for x, y in zip(before[bad], after[bad], strict=True):
            key = self.events[a["event"][x]].number, self.events[a["event"][y]].number
            if key not in seen:
                seen.add(key)
                self.report(a, x, y)

    def ordered(self, a, before, after):
        warp = a["thread"][before] // 32
        epoch = a["epoch"][before]
        same_cta = a["cta"][before] == a["cta"][after]
        clocks = np.array(self.clocks)
        known = clocks[a["snapshot"][after], warp]
        same_warp = warp == a["thread"][after] // 32
        read_first = (a["kind"][before] & WRITE) == 0
        found = same_cta & np.where(same_warp, (epoch < known) | read_first, epoch <= known)
        informed = np.array([bool(known) for known in self.foreign])
        for at in np.flatnonzero(~same_cta & informed[a["snapshot"][after]]):
            row = self.foreign[a["snapshot"][after[at]]].get(int(a["cta"][before[at]]))
            found[at] = row is not None and epoch[at] <= row[warp[at]]
        return found

    @cached_property
    def dropped_reads(self) -> DroppedReads:
        return DroppedReads(self.launch.program)

    def unused(self, a, reads, others):
        """Whether ``reads`` are weak loads whose results had no effect, by threads of the CTAs of ``others``."""
        found = np.zeros(len(reads), bool)
        candidate = (a["kind"][reads] == READ) & (a["cta"][reads] == a["cta"][others])
        number = np.array([e.number for e in self.events])[a["event"][reads]]
        for each in np.unique(number[candidate]):
            effects = self.dropped_reads.effects(int(each))
            if effects is None:
                continue
            numbers, exchanged = effects
            group_size = 32 if exchanged else 1
            thread_key = lambda cta, thread, group_size=group_size: cta.astype(np.int64) * 1024 + thread // group_size
            executed = [thread_key(e.cta, e.thread) for e in self.events if e.number in numbers]
            at = candidate & (number == each)
            used = np.isin(thread_key(a["cta"][reads], a["thread"][reads]), np.concatenate([*executed, []]))
            found |= at & ~used
        return found

    def report(self, a, x, y):
        launch = self.launch
        one, two = self.events[a["event"][x]], self.events[a["event"][y]]
        name = lambda at: f"CTA {a['cta'][at]} warp {a['thread'][at] // 32} lane {a['thread'][at] % 32}"
        other_warp = a["thread"][x] // 32 != a["thread"][y] // 32
        other_thread = "another CTA" if a["cta"][x] != a["cta"][y] else "another warp" if other_warp else "another lane"
        describe = lambda e: "an atomic" if e.kind == WRITE | STRONG else "a write" if e.kind & WRITE else "a read"
        unit = min(e.size for e in self.events)
        place = launch.allocations.name(int(a["element"][x]) * unit)
        what = f"{place}, with {describe(one)} by {name(x)}, {launch.describe_instr(one.number)}"
        title = f"race in global memory: not ordered behind {describe(one)} of {other_thread}"
        launch.report(title, two.number, name(y), what)
