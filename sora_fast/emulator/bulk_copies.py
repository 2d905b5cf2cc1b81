"""TMA: cp.async.bulk.tensor and the tensor maps it reads (PTX ISA 9.7.9.25.5 and 9.7.9.27)."""

import numpy as np

from . import memory, tma
from .memory import Fault


class BulkCopies:
    """Boxes in flight, loads and stores."""

    def tma_load(self, i, k, to, tensor_map, coords, barrier, number):
        for warp, shared, where, bar, *at in self.lanes(i, k, to, tensor_map, barrier, *coords):
            self.tma_loads.append(
                dict(warp=warp, cta=int(self.cta_of[warp]), shared=shared, map=where, barrier=bar, coords=at, number=number)
            )
            box = self.box(self.tma_loads[-1])
            if self.races:
                self.races.load_begins(warp, self.tma_loads[-1], box)
            if self.initialized is not None:
                start = self.tma_loads[-1]["cta"] * self.size + shared
                self.initialized[start : start + box.bytes] = False
            if self.counters is not None:
                self.counters.box(box)
            if self.schedule.when == "early":
                self.complete_load(len(self.tma_loads) - 1)

    def box(self, e) -> tma.Box:
        where = e["map"]
        if self.allocations.check(np.array([where], np.uint64), 128) is not None or where % 64:
            raise self.fault("global", e["number"], where, 128)
        raw = memory.load(np.arange(where, where + 128, dtype=np.uint64), 1, 1).tobytes()
        try:
            return tma.Box(raw, e["coords"], e["shared"])
        except tma.MapError as error:
            raise Fault(f"{error} ({self.program.instrs[e['number']].loc})") from None

    def complete_load(self, at: int) -> None:
        e = self.tma_loads.pop(at)
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
        if self.initialized is not None:
            start = e["cta"] * self.size + e["shared"]
            self.initialized[start : start + box.bytes] = True
        b = self.barriers.get((e["cta"], e["barrier"]))
        if b is None:
            raise Fault(f"a copy completes on {e['barrier']:#x}, where no mbarrier is")
        if self.races:
            self.races.load_lands(e, b)
        b.bytes -= box.bytes
        self.changed |= b.settle()

    def tma_store(self, i, k, tensor_map, coords, shared, number):
        for warp, where, source, *at in self.lanes(i, k, tensor_map, shared, *coords):
            e = dict(
                warp=warp,
                cta=int(self.cta_of[warp]),
                shared=source,
                map=where,
                coords=at,
                number=number,
                group=int(self.store_group[warp]),
            )
            self.tma_stores.append(e)
            if self.races:
                self.races.store_begins(e, self.box(e))
            if self.counters is not None:
                self.counters.box(self.box(e))

    def bulk_commit(self, i, k):
        self.store_group[self.group.warps] += 1

    def bulk_wait(self, i, k, pending, read, number):
        self.complete_stores(self.group.warps, pending, read, number)

    def complete_stores(self, warps, pending, read, number):
        mine = set(int(w) for w in warps)
        left = []
        for e in self.tma_stores:
            if e["warp"] not in mine or number >= 0 and e["group"] >= self.store_group[e["warp"]] - pending:
                left.append(e)
                continue
            box = self.box(e)
            place = box.shared + e["cta"] * self.size
            if self.initialized is not None and not self.initialized[place[box.inside]].all():
                self.launch.report("uninitialised shared memory", e["number"], "a box on its way out")
            inside = box.addresses[box.inside]
            if len(inside):
                wrong = self.allocations.check(inside, box.size)
                if wrong is not None:
                    raise self.fault("global", e["number"], int(inside[wrong]), box.size)
                memory.store(inside, self.shared_views[box.size][place // box.size][box.inside], box.size, 1)
            if self.races:
                self.races.store_ends(e)
        self.tma_stores = left

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
            return self.shared[start : start + 128].copy().view(tma.MAP)[0]
        return memory.load(np.arange(a, a + 128, dtype=np.uint64), 1, 1).view(tma.MAP)[0]

    def write_map(self, space, warp, a, raw):
        data = np.frombuffer(raw.tobytes(), np.uint8)
        if space == "shared":
            start = int(self.cta_of[warp]) * self.size + a
            self.shared[start : start + 128] = data
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
