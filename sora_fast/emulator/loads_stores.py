"""ld, st, atom and red, checked for bounds, alignment and uninitialised shared memory (PTX ISA 9.7.9, 9.7.13.7)."""

import numpy as np

from . import memory
from .arith import SHARED_WINDOW, U4, U8
from .memory import Fault

ATOMIC = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
}


class LoadsStores:
    """Synchronous memory accesses."""

    def symbol(self, name, t, offset=0):
        if name in self.launch.offsets and t == U4:  # an address of the parameter space, to which cvta.param gives the rest
            return np.full((1, 1), self.launch.offsets[name] + offset, t)
        if name in self.launch.offsets:
            return np.full((1, 1), self.launch.param_start + self.launch.offsets[name] + offset, t)
        return np.full((1, 1), self.launch.symbols[name] + offset, t)

    def param(self, name, offset, t, count):
        start = self.launch.offsets[name] + offset
        size = np.dtype(t).itemsize
        found = self.launch.param_bytes[start : start + size * count].view(t)
        return found.reshape(1, 1) if count == 1 else found.reshape(1, 1, count)

    def generic_param(self, address):
        return np.where(address < U8(1 << 31), address + U8(self.launch.param_start), address)

    def param_address(self, name):
        return np.full((1, 1), self.launch.param_start + self.launch.offsets[name], U8)

    def fault(self, kind, number, address, size, where=None):
        instr = self.program.instrs[number]
        detail = ""
        if where is not None:
            warp, lane = divmod(where, 32)
            w = int(self.group.warps[warp])
            detail = f" by CTA {self.ids[self.cta_of[w]]} warp {self.warp_of[w]} lane {lane}"
        name = (
            self.allocations.name(address)
            if kind == "global"
            else f"shared memory is {self.launch.shared_base:#x} .. {self.launch.shared_end:#x}"
        )
        return Fault(
            f"{self.program.kernel.name}: {kind} access of {size} bytes at {address:#x}{detail} out of bounds or "
            f"misaligned ({name}): {instr.text} ({instr.loc})"
        )

    def global_addresses(self, k, address, size, number, n):
        """Addresses (n, 32), those of inactive lanes harmless; checked."""
        address = np.broadcast_to(address, (n, 32))
        active = address if k is None else address[np.broadcast_to(k, (n, 32))]
        if active.size:
            if (active & U8(size - 1)).any():
                wrong = int(np.flatnonzero(active & U8(size - 1))[0])
                raise self.fault("global", number, int(active.flat[wrong]), size, self.origin(k, wrong, n))
            wrong = self.allocations.check(active.ravel(), size)
            if wrong is not None:
                raise self.fault("global", number, int(active.flat[wrong]), size, self.origin(k, wrong, n))
        if k is not None:
            address = np.where(k, address, U8(memory.HARMLESS))
        return address

    def origin(self, k, place, n):
        return place if k is None else int(np.flatnonzero(np.broadcast_to(k, (n, 32)))[place])

    def shared_addresses(self, i, k, address, size, number, n):
        """Places in self.shared (n, 32); inactive lanes at the CTA's start."""
        address = np.broadcast_to(address, (n, 32)).astype(U4, copy=False)
        if k is not None:
            address = np.where(k, address, U4(self.launch.shared_base + 15 & ~15))
        if address.size:
            low, high = int(address.min()), int(address.max()) + size
            if (
                low < self.launch.shared_base
                or high > self.launch.shared_end
                and (k is None or np.broadcast_to(k, (n, 32)).any())
                or (address & U4(size - 1)).any()
            ):
                bad = (
                    (address < self.launch.shared_base)
                    | (address.astype(np.int64) + size > self.launch.shared_end)
                    | (address & U4(size - 1) != 0)
                )
                place = int(np.flatnonzero(bad)[0])
                raise self.fault("shared", number, int(address.flat[place]), size, place)
        return address + self.shared_start[i]

    def ld(self, space, i, k, address, t, count, number):
        n = len(self.group.warps)
        size = np.dtype(t).itemsize
        if space == "generic":
            space = "shared" if int(np.broadcast_to(address, (n, 32))[0, 0]) >= SHARED_WINDOW else "global"
            if space == "shared":
                address = (address - SHARED_WINDOW).astype(U4)
        if space in ("global", "const"):
            address = self.global_addresses(k, address, size * count, number, n)
            found = memory.load(address, size, count)
            if self.counters is not None:
                self.counters.access("ld.global", k, address, size * count, number, n)
            return found.view(t)
        if space != "shared":
            raise Fault(f"state space {space}")
        place = self.shared_addresses(i, k, address, size * count, number, n)
        if self.initialized is not None:
            self.check_initialized(k, place, size * count, number, n)
        if self.counters is not None:
            self.counters.access("ld.shared", k, address, size * count, number, n)
        if self.races:
            self.races.read(k, place, size * count, number)
        if count == 1:
            return self.shared_views[size][place // U4(size) if size > 1 else place].view(t)
        return self.shared_rows[size, count][place // U4(size * count)].view(t)

    def check_initialized(self, k, place, size, number, n):
        last = self.initialized[place] & self.initialized[place + U4(size - 1)]
        if k is not None:
            last = last | ~np.broadcast_to(k, (n, 32))
        if not last.all():
            self.launch.report(
                "uninitialised shared memory",
                number,
                f"{int((~last).sum())} lanes, first at {int(place.flat[int(np.flatnonzero(~last)[0])]) % self.size:#x}",
            )

    def mark_initialized(self, place, size):
        if self.initialized is not None:
            for at in range(0, size):
                self.initialized[place + U4(at)] = True

    def st(self, space, i, k, address, values, t, number):
        n, count = len(self.group.warps), len(values)
        size = np.dtype(t).itemsize
        if space == "generic":
            space = "shared" if int(np.broadcast_to(address, (n, 32))[0, 0]) >= SHARED_WINDOW else "global"
            if space == "shared":
                address = (address - SHARED_WINDOW).astype(U4)
        plain = f"u{size}"
        values = [np.broadcast_to(v.view(plain), (n, 32)) for v in values]
        value = values[0] if count == 1 else np.stack(values, axis=-1)
        mask = None if k is None else np.broadcast_to(k, (n, 32))
        if space == "global":
            address = self.global_addresses(k, address, size * count, number, n)
            if self.counters is not None:
                self.counters.access("st.global", k, address, size * count, number, n)
            if mask is None:
                memory.store(address, value, size, count)
            else:
                memory.store(address[mask], value[mask], size, count)
            return
        if space != "shared":
            raise Fault(f"state space {space}")
        place = self.shared_addresses(i, k, address, size * count, number, n)
        if self.counters is not None:
            self.counters.access("st.shared", k, address, size * count, number, n)
        if mask is not None:
            place, value = place[mask], value[mask]
        if self.races:
            self.races.write(mask, place, size * count, number)
        if count == 1:
            self.shared_views[size][place // U4(size) if size > 1 else place] = value
        else:
            self.shared_rows[size, count][place // U4(size * count)] = value
        self.mark_initialized(place, size * count)

    def atomic(self, space, operation, i, k, address, values, t, number):
        n = len(self.group.warps)
        size = np.dtype(t).itemsize
        mask = np.ones((n, 32), bool) if k is None else np.broadcast_to(k, (n, 32))
        out = np.zeros((n, 32), t)
        if space == "global":
            address = self.global_addresses(k, address, size, number, n)
            view, places = memory._VIEWS[size].view(t), (address - U8(memory._BASE)) >> U8(size.bit_length() - 1)
        else:
            places = self.shared_addresses(i, k, address, size, number, n) // U4(size)
            view = self.shared_views[size].view(t)
        values = [np.broadcast_to(v, (n, 32)) for v in values]
        order = np.argwhere(mask)
        for w, lane in order:
            at = places[w, lane]
            old = view[at]
            out[w, lane] = old
            x = values[0][w, lane]
            if operation == "cas":
                new = values[1][w, lane] if old == x else old
            else:
                new = ATOMIC[operation](old, x)
            view[at] = new
        return out
