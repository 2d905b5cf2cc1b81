"""TMA: cp.async.bulk.tensor and the tensor maps it reads (PTX ISA 9.7.9.25.5 and 9.7.9.27)."""

from functools import lru_cache

import numpy as np

from . import memory, tma
from .arith import UNINITIALIZED_BYTE
from .lanes import LANES, all_true
from .memory import Fault
from .races import WHOLE_WARP

_cached_box = lru_cache(4096)(tma.Box)  # CTAs load the same boxes, and each is needed at its issue and at its completion


class BulkCopies:
    """TMA boxes in flight: loads complete on an mbarrier, stores in bulk async-groups of the issuing thread."""

    # ---- loads
    def tma_load(self, i, k, to, tensor_map, coords, barrier, number):
        for warp, shared, where, bar, *at in self.active_lanes(i, k, to, tensor_map, barrier, *coords):
            cta = int(self.cta_of[warp])
            e = dict(warp=warp, cta=cta, shared=shared, map=where, barrier=bar, coords=at, number=number)
            self.tma_loads.append(e)
            self.mbarrier_at(warp, bar, number)
            box = self.box(e)
            self.check_map(e)
            if self.races:
                self.races.load_begins(warp, e, box)
            start = cta * self.smem_bytes + shared
            self.shared[start : start + box.bytes] = UNINITIALIZED_BYTE
            if self.initialized is not None:
                self.initialized[start : start + box.bytes] = False
            if self.counters is not None:
                self.counters.box("TMA load", box)
            if self.schedule.when == "early":
                self.complete_load(len(self.tma_loads) - 1)

    def box(self, e) -> tma.Box:
        thread = self.thread_of(e["warp"])
        if e["map"] % 64 or self.allocations.check(np.array([e["map"]], np.uint64), 128) is not None:
            raise self.fault("global", e["number"], e["map"], 128, thread)
        try:
            box = _cached_box(memory.span(e["map"], e["map"] + 128).tobytes(), tuple(e["coords"]), e["shared"])
        except tma.MapError as error:
            raise self.launch.fault(e["number"], str(error), thread) from None
        if e["shared"] < self.launch.shared_base or e["shared"] + box.bytes > self.launch.shared_end:
            raise self.fault("shared", e["number"], e["shared"], box.bytes, thread)
        if len(box.addresses) and self.allocations.check(box.addresses, box.size) is not None:
            addresses = box.elements(box.addresses)
            wrong = self.allocations.check(addresses, box.element)
            if wrong is not None:
                raise self.fault("global", e["number"], int(addresses[wrong]), box.element, thread)
        return box

    def complete_load(self, at: int) -> None:
        e = self.tma_loads.pop(at)
        box = self.box(e)
        values = np.zeros(box.count, memory.UNITS[box.size])
        if len(box.addresses):
            values[box.in_bounds] = memory.load(box.addresses, box.size, 1)
        memory.scatter(self.shared_views, box.shared + e["cta"] * self.smem_bytes, values, box.size, 1)
        if self.initialized is not None:
            start = e["cta"] * self.smem_bytes + e["shared"]
            self.initialized[start : start + box.bytes] = True
        b = self.mbarrier_at(e["warp"], e["barrier"], e["number"])
        if self.races:
            self.races.load_lands(e, b)
        b.tx_count -= box.bytes
        self.mbarrier_changed |= b.try_complete_phase()

    # ---- stores
    def tma_store(self, i, k, tensor_map, coords, shared, number):
        for warp, where, source, *at in self.active_lanes(i, k, tensor_map, shared, *coords):
            e = dict(warp=warp, cta=int(self.cta_of[warp]), shared=source, map=where, coords=at, number=number, data=None,
                     group=int(self.store_group[warp]))  # fmt: skip
            self.tma_stores.append(e)
            box = self.box(e)
            self.check_map(e)
            if self.races:
                self.races.store_begins(e, box)
            if self.counters is not None:
                self.counters.box("TMA store", box)
            if self.completes_now():
                self.read_source(e, box)

    def bulk_commit(self, i, k):
        self.store_group[self.group.warps] += 1

    def bulk_wait(self, i, k, pending, read):
        """Wait for all but ``pending`` groups: with ``read`` until their sources are read, else until they complete."""
        mine = set(self.group.warps.tolist())
        done = [e for e in self.tma_stores if e["warp"] in mine and e["group"] < self.store_group[e["warp"]] - pending]
        for e in done:
            self.read_source(e, self.box(e))
            if self.races:
                self.races.store_read(e)
            if not read:
                self.write_box(e, waited=True)

    def read_source(self, e, box) -> None:
        if e["data"] is not None:
            return
        place = box.shared[box.in_bounds] + e["cta"] * self.smem_bytes
        if self.initialized is not None and not all_true(self.initialized.take(box.elements(place))):
            thread = self.thread_of(e["warp"])
            self.launch.report("uninitialised shared memory", e["number"], thread, "part of the box that TMA stores")
        e["data"] = memory.gather(self.shared_views, place, box.size, 1)

    def write_box(self, e, waited) -> None:
        box = self.box(e)
        self.read_source(e, box)
        if len(box.addresses):
            memory.store(box.addresses, e["data"], box.size, 1)
        if self.races:
            self.races.store_ends(e, box, waited)
        self.tma_stores = [other for other in self.tma_stores if other is not e]

    def finish_bulk(self) -> None:
        """At exit: complete stores without a wait, and report loads in flight, which may write to the next CTA's memory."""
        for e in list(self.tma_stores):
            if e["data"] is None:
                kind = "a TMA store may still read shared memory when its CTA ends"
                self.launch.report(kind, e["number"], self.thread_of(e["warp"]), "no cp.async.bulk.wait_group waits for it")
            self.write_box(e, waited=False)
        for e in self.tma_loads:
            kind = "a TMA load is in flight when its CTA ends"
            self.launch.report(kind, e["number"], self.thread_of(e["warp"]), f"mbarrier {e['barrier']:#x}")

    # ---- tensor maps built on the device
    def tensormap_replace(self, i, k, space, address, field, ordinal, value, number):
        name = tma.MAP_FIELDS[field]
        for warp, lane, a, v in self.active_lanes(i, k, LANES, address, value):
            raw = self.map_at(space, warp, a)
            if field == "elemtype":
                v = tma.ELEMTYPE.get(v, v)
            elif field == "rank":
                v += 1
            if raw[name].ndim:
                raw[name][ordinal] = v
            else:
                raw[name] = v
            if self.races and space == "shared":
                self.races.map_accessed(warp, lane, a, number, write=True)
            self.write_map(space, warp, a, raw)

    def map_at(self, space, warp, a):
        if space == "shared":
            start = int(self.cta_of[warp]) * self.smem_bytes + a
            return self.shared[start : start + 128].copy().view(tma.MAP)[0]
        return memory.load(np.arange(a, a + 128, dtype=np.uint64), 1, 1).view(tma.MAP)[0]

    def write_map(self, space, warp, a, raw):
        data = np.frombuffer(raw.tobytes(), np.uint8)
        if space == "shared":
            start = int(self.cta_of[warp]) * self.smem_bytes + a
            self.shared[start : start + 128] = data
        else:
            if self.allocations.check(np.array([a], np.uint64), 128) is not None:
                raise Fault(f"{self.program.kernel.name}: a tensor map at {a:#x} is out of bounds, {self.thread_of(warp)}")
            memory.store(np.arange(a, a + 128, dtype=np.uint64), data, 1, 1)

    def tensormap_copy(self, i, k, to, source, number):
        """tensormap.cp_fenceproxy, executed by a converged warp: from shared to global memory, with a release."""
        done = set()
        for warp, a, s in self.active_lanes(i, k, to, source):
            if (warp, a) in done:
                continue
            done.add((warp, a))
            if self.races:
                self.races.map_accessed(warp, WHOLE_WARP, s, number, write=False)
                self.races.global_races.map_accessed(self, warp, a, number, write=True)
            self.write_map("global", warp, a, self.map_at("shared", warp, s))
            self.unfenced_maps.add(a)

    def tensormap_fence(self, i, k, address):
        """fence.proxy.tensormap::generic.acquire of the 128 bytes at ``address``."""
        for _, a in self.active_lanes(i, k, address):
            self.unfenced_maps.discard(a)

    def check_map(self, e) -> None:
        """A tensor map built by the kernel must be acquired by the tensormap proxy before TMA reads it."""
        if e["map"] in self.unfenced_maps:
            kind = "no fence.proxy.tensormap::generic.acquire behind the writes of a tensor map"
            self.launch.report(kind, e["number"], self.thread_of(e["warp"]), self.allocations.name(e["map"]))
        if self.races:
            self.races.global_races.map_accessed(self, e["warp"], e["map"], e["number"], write=False)

    # ---- fences
    def memory_fence(self, i, k):
        """fence and membar at gpu scope or wider."""
        if self.races:
            self.races.fence(self.group.warps)

    def proxy_fence(self, i, k):
        if self.races:
            self.races.proxy_fence(self.group.warps)

    def mbarrier_init_fence(self, i, k):
        if self.races:
            self.races.mbarrier_init_fence(self.group.warps)
