"""ld, st, atom and red, checked for bounds, alignment and uninitialised shared memory (PTX ISA 9.7.9.8 to 11, 9.7.13.9).

``i`` and ``k`` are as in codegen.py; ``n`` is the number of warps in the group, ``number`` that of the instruction.
"""

import numpy as np

from . import memory
from .arith import SHARED_WINDOW, U4, U8, packed_add
from .lanes import all_true, any_true, per_lane

ATOMIC = {  # old value and operands -> new value; inc and dec wrap
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "cas": lambda old, x, new: new if old == x else old,
    "inc": lambda old, x: old.dtype.type(0) if old >= x else old + old.dtype.type(1),
    "add_bf16": lambda old, x: packed_add(old, x, "bf16"),
    "add_bf16x2": lambda old, x: packed_add(old, x, "bf16x2"),
    "add_f16x2": lambda old, x: packed_add(old, x, "f16x2"),
    "dec": lambda old, x: x if old == 0 or old > x else old - old.dtype.type(1),
}

INITIALIZED = memory.splat(1)  # of every byte, in Machine.initialized


class LoadsStores:
    """Synchronous memory accesses."""

    # ---- addresses
    def symbol(self, name, t, offset=0):
        """The address of a parameter or variable. A 32-bit one of a parameter is an offset, to which cvta.param adds."""
        if name in self.launch.offsets:
            base = 0 if t == U4 else self.launch.param_start
            return np.full((1, 1), base + self.launch.offsets[name] + offset, t)
        return np.full((1, 1), self.launch.symbols[name] + offset, t)

    def param(self, name, offset, t, count):
        start = self.launch.offsets[name] + offset
        found = self.launch.param_bytes[start : start + np.dtype(t).itemsize * count].view(t)
        return found.reshape(1, 1) if count == 1 else found.reshape(1, 1, count)

    def generic_param(self, address):
        return np.where(address < U8(1 << 31), address + U8(self.launch.param_start), address)

    def param_address(self, name):
        return np.full((1, 1), self.launch.param_start + self.launch.offsets[name], U8)

    def lane_mask(self, k, n):
        """The active lanes (n, 32)."""
        return np.ones((n, 32), bool) if k is None else per_lane(k, n)

    def thread(self, row, lane=None) -> str:
        """ "CTA 3 warp 1 lane 5", of a warp of the group."""
        return self.thread_of(int(self.group.warps[row]), lane)

    def thread_of(self, warp: int, lane=None) -> str:
        tail = "" if lane is None else f" lane {lane}"
        return f"CTA {self.cta_ids[self.cta_of[warp]]} warp {self.warp_of[warp]}{tail}"

    def fault(self, space, number, address, size, thread=""):
        if space == "global":
            place = self.allocations.name(address)
        elif space == "local":
            place = f"a thread has {self.launch.local_size} bytes of local memory"
        else:
            place = f"shared memory is {self.launch.shared_base:#x} .. {self.launch.shared_end:#x}"
        what = "misaligned" if address % size and size & (size - 1) == 0 else "out of bounds"
        return self.launch.fault(number, f"{space} access of {size} bytes at {address:#x} is {what}: {place}", thread)

    def global_addresses(self, k, address, size, number, n):
        """Checked addresses (n, 32); inactive lanes get a harmless one."""
        address, mask = per_lane(address, n), None if k is None else per_lane(k, n)
        active = (address if k is None else address[mask]).ravel()
        if active.size:
            misaligned = active & U8(size - 1)
            wrong = int(np.flatnonzero(misaligned)[0]) if any_true(misaligned) else self.allocations.check(active, size)
            if wrong is not None:
                row, lane = divmod(wrong if k is None else int(np.flatnonzero(mask)[wrong]), 32)
                raise self.fault("global", number, int(active[wrong]), size, self.thread(row, lane))
        return address if k is None else np.where(mask, address, U8(memory.INACTIVE_LANE_ADDRESS))

    def shared_addresses(self, i, k, address, size, number, n):
        """Checked byte indices in self.shared (n, 32); inactive lanes get the CTA's start."""
        address = per_lane(address, n).astype(U4, copy=False)
        if k is not None:
            address = np.where(k, address, U4(self.launch.shared_base + 15 & ~15))
        if address.size:
            low, high = int(address.min()), int(address.max()) + size
            outside = low < self.launch.shared_base or high > self.launch.shared_end
            if outside and (k is None or any_true(k)) or any_true(address & U4(size - 1)):
                bad = (address < self.launch.shared_base) | (address.astype(np.int64) + size > self.launch.shared_end)
                row, lane = divmod(int(np.flatnonzero(bad | (address & U4(size - 1) != 0))[0]), 32)
                raise self.fault("shared", number, int(address[row, lane]), size, self.thread(row, lane))
        return address + self.shared_start[i]

    def local_place(self, k, address, size, count, number, n):
        """Byte indices (n, 32) of elements in local memory; inactive lanes get the start."""
        address = per_lane(address, n).astype(np.int64)
        address = address if k is None else np.where(k, address, 0)
        wrong = (address + size * count > self.launch.local_size) | (address % (size * count) != 0)
        if wrong.any():
            row, lane = np.argwhere(wrong)[0]
            raise self.fault("local", number, int(address[row, lane]), size * count, self.thread(row, lane))
        start = (np.asarray(self.group.warps)[:, None] * 32 + np.arange(32)) * self.launch.local_size
        return start + address

    def resolve(self, space, address, number, n):
        """The state space of generic addresses, and addresses in it (PTX ISA 5.1, generic addressing)."""
        if space != "generic":
            return space, address
        shared = per_lane(address, n) >= SHARED_WINDOW
        if not any_true(shared):
            return "global", address
        if not all_true(shared):
            raise self.launch.fault(number, "generic addresses of shared and of global memory in one instruction")
        return "shared", (address - SHARED_WINDOW).astype(U4)

    # ---- accesses
    def ld(self, space, i, k, address, t, count, number, order="", scope=""):
        """``order``: "relaxed" or "acquire" for a strong load, which does not race with atomics; "" for a weak one."""
        n = len(self.group.warps)
        size = np.dtype(t).itemsize
        if space == "local":
            return memory.gather(self.local, self.local_place(k, address, size, count, number, n), size, count).view(t)
        space, address = self.resolve(space, address, number, n)
        if space != "shared":
            address = self.global_addresses(k, address, size * count, number, n)
            found = memory.load(address, size, count)
            if self.counters is not None:
                self.counters.access("ld.global", k, address, size * count, number, n)
            if self.races and space != "const":
                if order:
                    self.races.global_races.strong(self, k, address, size * count, number, order, scope, write=False)
                else:
                    self.races.global_races.access(self, k, address, size * count, number)
            return found.view(t)
        place = self.shared_addresses(i, k, address, size * count, number, n)
        if self.initialized is not None:
            self.check_initialized(k, place, size * count, number, n)
        if self.counters is not None:
            self.counters.access("ld.shared", k, address, size * count, number, n)
        if self.races:
            self.races.read(k, place, size * count, number)
        return memory.gather(self.shared_views, place, size, count).view(t)

    def check_initialized(self, k, place, size, number, n):
        good = self.initialized.take(place) & self.initialized.take(place + U4(size - 1))
        if k is not None:
            good |= ~k
        if not all_true(good):
            row, lane = np.argwhere(~good)[0]
            where = int(place[row, lane]) % self.smem_bytes
            detail = f"address {where:#x}, {(~good).sum()} lanes"
            self.launch.report("uninitialised shared memory", number, self.thread(row, lane), detail)

    def mark_initialized(self, place, size):
        if self.initialized is not None:
            unit = min(size, 16)
            for at in range(0, size, unit):
                self.initialized_views[unit][(place + at) >> unit.bit_length() - 1] = INITIALIZED[unit]

    def st(self, space, i, k, address, values, t, number, order="", scope=""):
        n, count = len(self.group.warps), len(values)
        size = np.dtype(t).itemsize
        space, address = (space, address) if space == "local" else self.resolve(space, address, number, n)
        values = [v.view(memory.UNITS[size]) for v in values]
        if count == 1:
            value = per_lane(values[0], n)
        else:
            value = np.empty((n, 32, count), memory.UNITS[size])
            for at, each in enumerate(values):
                value[..., at] = each
        mask = None if k is None else per_lane(k, n)
        if space == "local":
            place = self.local_place(k, address, size, count, number, n)
            place, value = (place, value) if mask is None else (place[mask], value[mask])
            return memory.scatter(self.local, place, value, size, count)
        if space == "global":
            address = self.global_addresses(k, address, size * count, number, n)
            if self.counters is not None:
                self.counters.access("st.global", k, address, size * count, number, n)
            if self.races:
                if order:
                    self.races.global_races.strong(self, k, address, size * count, number, order, scope, write=True)
                else:
                    self.races.global_races.access(self, k, address, size * count, number, value)
            if self.group.block in self.program.spin_blocks:
                self.note_progress(memory.load(address, size, count), value, mask)
            address, value = (address, value) if mask is None else (address[mask], value[mask])
            return memory.store(address, value, size, count)
        place = self.shared_addresses(i, k, address, size * count, number, n)
        if self.counters is not None:
            self.counters.access("st.shared", k, address, size * count, number, n)
        if mask is not None:
            place, value = place[mask], value[mask]
        if self.races:
            self.races.write(mask, place, size * count, number)
        if self.group.block in self.program.spin_blocks:
            self.note_progress(memory.gather(self.shared_views, place, size, count), value)
        memory.scatter(self.shared_views, place, value, size, count)
        self.mark_initialized(place, size * count)
        return None

    def note_progress(self, old, values, mask=None):
        """A store in a spin loop: if it changes memory, the loop makes progress."""
        changed = old != values
        if (changed if mask is None else changed[mask]).any():
            self.idle_blocks = 0

    def atomic(self, space, operation, i, k, address, values, t, number, order="relaxed", scope="gpu"):
        """Serialised over lanes; returns the old values (n, 32)."""
        n = len(self.group.warps)
        size = np.dtype(t).itemsize
        mask = self.lane_mask(k, n)
        out = np.zeros((n, 32), t)
        space, address = self.resolve(space, address, number, n)
        if space == "global":
            address = self.global_addresses(k, address, size, number, n)
            view, base, shift = memory.words(size, t)
            places = (address - base) >> shift
            if self.counters is not None:
                self.counters.access("atom.global", k, address, size, number, n)
            if self.races:
                self.races.global_races.atomic(self, k, address, size, number, order, scope)
        else:
            places = self.shared_addresses(i, k, address, size, number, n)
            if self.initialized is not None:
                self.check_initialized(k, places, size, number, n)
            if self.races:
                self.races.shared_atomic(k, places, size, number)
            places, view = places // U4(size), self.shared_views[size].view(t)
        values = [per_lane(v, n) for v in values]
        new = ATOMIC[operation]
        for row, lane in np.argwhere(mask):
            at = places[row, lane]
            out[row, lane] = view[at]
            view[at] = new(view[at], *(v[row, lane] for v in values))
            if view[at] != out[row, lane]:
                self.idle_blocks = 0
        return out
