"""ldmatrix, stmatrix, mma.sync (PTX ISA 9.7.14) and wgmma (9.7.15).

Products of exact operands are summed in float32 by numpy; the Tensor Core's own order and rounding are not modelled.
"""

import numpy as np

from . import matrix
from .arith import F4, U2, U4

NO, NEVER_FENCED = -1, -2


class TensorCores:
    """Synchronous and asynchronous matrix instructions."""

    def whole_warps(self, k, number):
        if k is not None and not np.all(k):
            row = int(np.argmin(k.all(1)))
            raise self.launch.fault(number, "executed by part of a warp", self.thread(row))

    # ---- warp level
    def matrix_rows(self, i, address, count, number):
        """Shared addresses of the 16-byte rows of 8 x 8 matrices, from the lanes that give them; and indices of bytes."""
        rows = address[:, : 8 * count].astype(U4)
        bad = (rows & U4(15) != 0) | (rows < self.launch.shared_base) | (rows + U4(16) > self.launch.shared_end)
        if bad.any():
            row, lane = np.argwhere(bad)[0]
            raise self.fault("shared", number, int(rows[row, lane]), 16, self.thread(row, lane))
        return rows, rows + self.shared_start[i]

    def ldmatrix(self, i, k, address, count, trans, number):
        self.whole_warps(k, number)
        n = len(self.group.warps)
        rows, place = self.matrix_rows(i, np.broadcast_to(address, (n, 32)), count, number)
        if self.initialized is not None:
            self.check_initialized(None, place, 16, number, n)
        if self.counters is not None:
            self.counters.access("ldmatrix", None, rows, 16, number, n)
        if self.races:
            self.races.read(None, place, 16, number, whole_warp=True)
        data = self.shared_rows[2, 8][place // U4(16)].reshape(n, count, 8, 8)  # matrix, row, column
        if trans:
            data = data.swapaxes(2, 3)
        data = np.ascontiguousarray(data).view(U4).reshape(n, count, 32)
        return [data[:, at] for at in range(count)]

    def stmatrix(self, i, k, address, values, count, trans, number):
        self.whole_warps(k, number)
        n = len(self.group.warps)
        rows, place = self.matrix_rows(i, np.broadcast_to(address, (n, 32)), count, number)
        data = np.stack([np.broadcast_to(v, (n, 32)) for v in values], axis=1)  # n, count, 32
        data = np.ascontiguousarray(data).view(U2).reshape(n, count, 8, 8)
        if trans:
            data = data.swapaxes(2, 3)
        if self.races:
            self.races.write(None, place, 16, number, whole_warp=True)
        if self.counters is not None:
            self.counters.access("stmatrix", None, rows, 16, number, n)
        self.shared_rows[2, 8][place // U4(16)] = data.reshape(n, count * 8, 8)
        self.mark_initialized(place, 16)

    def mma(self, shape, kind, a, b, c, i, k, number):
        self.whole_warps(k, number)
        n = len(self.group.warps)
        depth = int(shape.partition("k")[2])
        full = lambda regs: [np.broadcast_to(r, (n, 32)) for r in regs]
        left = matrix.matrix_a(full(a), depth, kind)
        right = matrix.matrix_b(full(b), depth, kind)
        row, column = matrix.coords_d(8)
        return np.stack(full(c), axis=-1) + np.matmul(left, right)[:, row, column]

    # ---- warpgroup level
    def wgmma(self, shape, kind, i, k, accumulators, registers, a, b, scale, flags, number):
        """``accumulators``: an array (registers, warps, 32); ``registers``: their indices and A's in ``touched``."""
        self.whole_warps(k, number)
        warps = self.group.warps.copy()
        n = len(warps)
        columns, depth = (int(x) for x in shape.removeprefix("m64n").split("k"))
        scales, transposes = flags[:2], (flags[2:] + [0, 0])[:2]
        if isinstance(a, tuple):
            transposes = [0, flags[2] if len(flags) > 2 else 0]
            a = tuple(np.broadcast_to(r, (n, 32)).copy() for r in a)
        else:
            a = self.first_lane(a, k, n).copy()
        self.check_fenced(registers, warps, number)
        entry = dict(columns=columns, depth=depth, kind=kind, warps=warps, group=self.wgmma_group[warps].copy(), a=a,
                     b=self.first_lane(b, k, n).copy(), live=np.ones(n, bool), accumulators=accumulators, number=number,
                     scale=None if scale is None else np.broadcast_to(scale, (n, 32))[:, 0].copy(), scales=scales,
                     transposes=transposes)  # fmt: skip
        if self.counters is not None:
            self.counters.wgmma_flops += n * 2 * 16 * columns * depth
        if self.races:
            self.races.wgmma_begins(entry)
        self.wgmmas.append(entry)
        if self.completes_now():
            self.complete_wgmmas(warps, None)  # in order: those before it first

    def check_fenced(self, registers, warps, number):
        """wgmma.fence must stand between a thread's access to the registers and this wgmma (PTX ISA 9.7.15.7.1)."""
        touched = self.touched[np.ix_(registers, warps)]
        bad = touched != NO
        if bad.any():
            at, warp = np.argwhere(bad)[0]
            by = int(touched[at, warp])
            detail = "before the first wgmma" if by == NEVER_FENCED else f"behind {self.launch.cite(by)}"
            self.launch.report("no wgmma.fence", number, self.thread_of(int(warps[warp])), detail)
        self.in_flight[np.ix_(registers, warps)] = self.wgmma_group[warps]

    def touch(self, i, registers, number, fenced):
        """Other instructions access registers of wgmma: not while it is in flight, and not unfenced before the next."""
        warps = self.group.warps
        where = np.ix_(registers, warps)
        bad = self.in_flight[where] >= self.wgmma_done[warps]
        if bad.any():
            thread = self.thread_of(int(warps[bad.any(0).argmax()]))
            kind = "a register of a wgmma in flight is accessed"
            self.launch.report(kind, number, thread, "no wgmma.wait_group between the wgmma and this access")
        if not fenced:
            self.touched[where] = number

    def wgmma_fence(self, i, k):
        self.touched[:, self.group.warps] = NO

    def wgmma_commit(self, i, k):
        self.wgmma_group[self.group.warps] += 1

    def wgmma_wait(self, i, k, pending):
        warps = self.group.warps
        self.complete_wgmmas(warps, pending)
        self.wgmma_done[warps] = np.maximum(self.wgmma_done[warps], self.wgmma_group[warps] - pending)
        if self.races:
            self.races.wgmmas_end(warps, pending)

    def complete_wgmmas(self, warps, pending):
        """Execute those of all groups but the last ``pending``; None: all. Those with one accumulator array run as one."""
        if not self.wgmmas:
            return
        mine = np.zeros(self.total, bool)
        mine[warps] = True
        run: list = []
        for e in self.wgmmas:
            which = e["live"] & mine[e["warps"]]
            if pending is not None:
                which &= e["group"] < self.wgmma_group[e["warps"]] - pending
            if not which.any():
                continue
            if run and not self.continues(run[0], e, which):
                self.run_wgmmas(run)
                run = []
            run.append((e, which))
            e["live"] = e["live"] & ~which
        if run:
            self.run_wgmmas(run)
        self.wgmmas = [e for e in self.wgmmas if e["live"].any()]

    @staticmethod
    def continues(first, e, which) -> bool:
        """Is e's product added to what the run's first wgmma computes, for the same warps?"""
        before, chosen = first
        same = before["accumulators"] is e["accumulators"] and np.array_equal(before["warps"][chosen], e["warps"][which])
        return same and (e["scale"] is None or bool(e["scale"][which].all()))

    def run_wgmmas(self, run) -> None:
        """Add the products of a run to its accumulators one after the other: bits do not depend on the schedule."""
        e, which = run[0]
        warps = e["warps"][which]
        n, columns, accumulators = len(warps), e["columns"], e["accumulators"]
        size = 4 if e["kind"] == "tf32" else 2
        index = slice(int(warps[0]), int(warps[-1]) + 1) if int(warps[-1]) - int(warps[0]) + 1 == n else warps
        row, column = matrix.coords_d(columns)
        total = np.empty((n, 16, columns), F4)
        total[:, row.T, column.T] = accumulators[:, index].swapaxes(0, 1)  # accumulators: registers, warps, lanes
        if e["scale"] is not None:
            total[~e["scale"][which]] = 0
        for e, which in run:
            depth = e["depth"]
            if isinstance(e["a"], tuple):
                left = matrix.matrix_a([r[which] for r in e["a"]], depth, e["kind"])
            else:
                left = np.empty((n, 16, depth), F4)
                for key, part in self.by_descriptor(e["a"][which], warps).items():
                    whole = self.smem_operand(key, 64, depth, size, e["transposes"][0], e)
                    quarter = self.warp_of[warps[part]] % 4
                    left[part] = whole.reshape(4, 16, depth)[quarter]
            for key, part in self.by_descriptor(e["b"][which], warps).items():
                right = self.smem_operand(key, columns, depth, size, e["transposes"][1], e)
                product = np.matmul(left[part].reshape(-1, depth), right.T).reshape(-1, 16, columns)
                if e["scales"] not in ([1, 1], []):
                    product *= F4(e["scales"][0] * e["scales"][1])
                total[part] += product
        accumulators[:, index] = total[:, row.T, column.T].swapaxes(0, 1)

    def by_descriptor(self, descriptors, warps):
        """Warps that read the same operand: (CTA, descriptor) -> their places."""
        found: dict = {}
        for at, (cta, d) in enumerate(zip(self.cta_of[warps].tolist(), descriptors.tolist(), strict=True)):
            found.setdefault((cta, d), []).append(at)
        return found

    def smem_operand(self, key, rows, depth, size, transposed, e):
        """An operand (rows, depth) that a matrix descriptor describes."""
        cta, descriptor = key
        thread = self.thread_of(int(e["warps"][0]))
        try:
            start, lead, stride, swizzle = matrix.decode(descriptor)
            offsets = matrix.offsets(swizzle, lead, stride, bool(transposed), rows, depth, size, start % 1024)
        except matrix.DescriptorError as error:
            raise self.launch.fault(e["number"], str(error), thread) from None
        base = start - start % 1024
        low, high = base + int(offsets.min()), base + int(offsets.max()) + size
        if low < self.launch.shared_base or high > self.launch.shared_end:
            raise self.fault("shared", e["number"], low, size, thread)
        places = offsets + (base + cta * self.size)
        if self.initialized is not None and not self.initialized[places].all():
            missing = int((~self.initialized[places]).sum())
            self.launch.report("uninitialised shared memory", e["number"], thread, f"{missing} elements of an operand")
        if size == 4:
            return (self.shared_views[4][places >> 2] & U4(0xFFFFE000)).view(F4)
        bits = self.shared_views[2][places >> 1]
        return matrix.bf16_to_float(bits) if e["kind"] == "bf16" else bits.view(np.float16).astype(F4)
