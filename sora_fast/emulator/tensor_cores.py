"""ldmatrix, stmatrix, mma.sync (PTX ISA 9.7.14) and wgmma (9.7.15).

Operands are exact and numpy accumulates in float32; the Tensor Core's order of accumulation and rounding are not modelled.
"""

import numpy as np

from . import matrix, memory
from .arith import F4, U2, U4
from .lanes import all_true, any_true, per_lane

FENCED, NEVER_FENCED = -1, -2  # in Machine.unfenced_access: not accessed since the last wgmma.fence; no wgmma.fence yet


class TensorCores:
    """Synchronous and asynchronous matrix instructions."""

    def whole_warps(self, k, number):
        if k is not None and not all_true(k):
            row = int(np.argmin(k.all(1)))
            raise self.launch.fault(number, "executed by part of a warp", self.thread(row))

    # ---- warp level
    def matrix_rows(self, i, address, count, number):
        """Shared-memory addresses of the 16-byte rows of 8 x 8 matrices, from the lanes that hold them; and byte indices."""
        rows = address[:, : 8 * count].astype(U4)
        bad = (rows & U4(15) != 0) | (rows < self.launch.shared_base) | (rows + U4(16) > self.launch.shared_end)
        if any_true(bad):
            row, lane = np.argwhere(bad)[0]
            raise self.fault("shared", number, int(rows[row, lane]), 16, self.thread(row, lane))
        return rows, rows + self.shared_start[i]

    def ldmatrix(self, i, k, address, count, trans, number):
        self.whole_warps(k, number)
        n = len(self.group.warps)
        rows, place = self.matrix_rows(i, per_lane(address, n), count, number)
        if self.initialized is not None:
            self.check_initialized(None, place, 16, number, n)
        if self.counters is not None:
            self.counters.access("ldmatrix", None, rows, 16, number, n)
        if self.races:
            self.races.read(None, place, 16, number, whole_warp=True)
        data = memory.gather(self.shared_views, place, 2, 8).reshape(n, count, 8, 8)  # matrix, row, column
        if trans:
            data = data.swapaxes(2, 3)
        data = np.ascontiguousarray(data).view(U4).reshape(n, count, 32)
        return [data[:, at] for at in range(count)]

    def stmatrix(self, i, k, address, values, count, trans, number):
        self.whole_warps(k, number)
        n = len(self.group.warps)
        rows, place = self.matrix_rows(i, per_lane(address, n), count, number)
        data = np.empty((n, count, 32), U4)
        for at, value in enumerate(values):
            data[:, at] = value
        data = data.view(U2).reshape(n, count, 8, 8)
        if trans:
            data = data.swapaxes(2, 3)
        if self.races:
            self.races.write(None, place, 16, number, whole_warp=True)
        if self.counters is not None:
            self.counters.access("stmatrix", None, rows, 16, number, n)
        memory.scatter(self.shared_views, place, data.reshape(n, count * 8, 8), 2, 8)
        self.mark_initialized(place, 16)

    def fragment(self, operand, regs, depth, kind):
        """Operand ``operand`` ("a" or "b") of an mma, from its registers: a matrix per warp."""
        return (matrix.matrix_a if operand == "a" else matrix.matrix_b)(regs, len(self.group.warps), depth, kind)

    def mma(self, left, right, c, k, number):
        """The registers of D from two fragments and C's registers."""
        self.whole_warps(k, number)
        product = matrix.registers_d(np.matmul(left, right))
        return [before + each for before, each in zip(c, product, strict=True)]

    # ---- warpgroup level
    def wgmma(self, shape, kind, i, k, accumulators, registers, a, b, scale, flags, number):
        """``accumulators``: (warps, N / 8, 16, 8). ``registers``: rows of ``unfenced_access`` of D and, if in
        registers, of A.
        """
        self.whole_warps(k, number)
        warps = self.group.warps.copy()
        n = len(warps)
        columns, depth = (int(x) for x in shape.removeprefix("m64n").split("k"))
        scales, transposes = flags[:2], (flags[2:] + [0, 0])[:2]
        if isinstance(a, tuple):
            transposes = [0, flags[2] if len(flags) > 2 else 0]
            a = tuple(per_lane(r, n).copy() for r in a)
        else:
            a = self.first_lane(a, k, n).copy()
        self.check_fenced(i, registers, warps, number)
        entry = dict(columns=columns, depth=depth, kind=kind, warps=warps, group=self.wgmma_group[warps].copy(), a=a,
                     b=self.first_lane(b, k, n).copy(), live=np.ones(n, bool), accumulators=accumulators, number=number,
                     scale=None if scale is None else per_lane(scale, n)[:, 0].copy(), scales=scales,
                     transposes=transposes)  # fmt: skip
        if self.counters is not None:
            self.counters.wgmma_flops += n * 2 * 16 * columns * depth
        if self.races:
            self.races.wgmma_begins(entry)
        self.wgmmas.append(entry)
        if self.completes_now():
            self.complete_wgmmas(warps, None)  # in order: those before it first

    @staticmethod
    def outer_index(registers, i):
        """An index into arrays (registers, warps), from two that are each a slice or a list."""
        return (registers, i) if isinstance(registers, slice) or isinstance(i, slice) else np.ix_(registers, i)

    def check_fenced(self, i, registers, warps, number):
        """Require a wgmma.fence between a thread's access to the registers and this wgmma (PTX ISA 9.7.15.7.1)."""
        where = self.outer_index(registers, i)
        access = self.unfenced_access[where]
        bad = access != FENCED
        if any_true(bad):
            at, warp = np.argwhere(bad)[0]
            by = int(access[at, warp])
            detail = "before the first wgmma" if by == NEVER_FENCED else f"behind {self.launch.describe_instr(by)}"
            self.launch.report("no wgmma.fence", number, self.thread_of(int(warps[warp])), detail)
        self.register_group[where] = self.wgmma_group[warps]

    def access_wgmma_registers(self, i, registers, number, fenced):
        """Other instructions access registers of a wgmma, which must not be in flight.

        Unless ``fenced``, a wgmma.fence must follow before the next wgmma on these registers.
        """
        warps = self.group.warps
        where = self.outer_index(registers, i)
        bad = self.register_group[where] >= self.wgmma_done[warps]
        if any_true(bad):
            thread = self.thread_of(int(warps[bad.any(0).argmax()]))
            kind = "a register of a wgmma in flight is accessed"
            self.launch.report(kind, number, thread, "no wgmma.wait_group between the wgmma and this access")
        if not fenced:
            self.unfenced_access[where] = number

    def wgmma_fence(self, i, k):
        self.unfenced_access[:, self.group.warps] = FENCED

    def wgmma_commit(self, i, k):
        self.wgmma_group[self.group.warps] += 1

    def wgmma_wait(self, i, k, pending):
        warps = self.group.warps
        self.complete_wgmmas(warps, pending)
        self.wgmma_done[warps] = np.maximum(self.wgmma_done[warps], self.wgmma_group[warps] - pending)
        if self.races:
            self.races.wgmmas_end(warps, pending)

    def complete_wgmmas(self, warps, pending):
        """Execute the wgmma of all but the last ``pending`` groups; None: all. Batched per accumulator array."""
        if not self.wgmmas:
            return
        mine = np.zeros(self.total_warps, bool)
        mine[warps] = True
        run: list = []
        for e in self.wgmmas:
            selected = e["live"] & mine[e["warps"]]
            if pending is not None:
                selected &= e["group"] < self.wgmma_group[e["warps"]] - pending
            if not any_true(selected):
                continue
            if run and not self.continues(run[0], e, selected):
                self.run_wgmmas(run)
                run = []
            run.append((e, selected))
            e["live"] = e["live"] & ~selected
        if run:
            self.run_wgmmas(run)
        self.wgmmas = [e for e in self.wgmmas if any_true(e["live"])]

    @staticmethod
    def continues(first, e, selected) -> bool:
        """Whether e accumulates onto the run's first wgmma, for the same warps."""
        before, chosen = first
        same = before["accumulators"] is e["accumulators"] and np.array_equal(before["warps"][chosen], e["warps"][selected])
        return same and (e["scale"] is None or all_true(e["scale"][selected]))

    def run_wgmmas(self, run) -> None:
        """Accumulate a run in program order, so that results do not depend on the schedule."""
        e, selected = run[0]
        warps, columns, accumulators = e["warps"][selected], e["columns"], e["accumulators"]
        order, n = np.argsort(self.cta_of[warps], kind="stable"), len(warps)  # adjacent warps read the same operands
        warps = warps[order]
        total = np.empty((n, 16, columns), F4)
        blocked = total.reshape(n, 16, -1, 8).swapaxes(1, 2)
        blocked[...] = accumulators[warps]
        if e["scale"] is not None:
            total[~e["scale"][selected][order]] = 0
        for e, selected in run:
            depth, selected = e["depth"], np.flatnonzero(selected)[order]
            if isinstance(e["a"], tuple):
                left = matrix.matrix_a([r[selected] for r in e["a"]], n, depth, e["kind"])
            else:
                whole, counts = self.operands(e["a"][selected], warps, 64, e["transposes"][0], e)
                reads = np.repeat(np.arange(len(counts)), counts)
                left = whole.reshape(-1, 4, 16, depth)[reads, self.warp_of[warps] % 4]
            right, counts = self.operands(e["b"][selected], warps, columns, e["transposes"][1], e)
            right = right.swapaxes(1, 2)
            if all_true(counts == counts[0]):
                product = np.matmul(left.reshape(len(counts), -1, depth), right)
            else:
                parts = zip(np.split(left, np.cumsum(counts)[:-1]), right, strict=True)
                product = np.concatenate([np.matmul(part.reshape(-1, depth), each) for part, each in parts])
            if e["scales"] not in ([1, 1], []):
                product *= F4(e["scales"][0] * e["scales"][1])
            total += product.reshape(total.shape)
        accumulators[warps] = blocked

    def operands(self, descriptors, warps, rows, transposed, e):
        """The operands of matrix descriptors, (operands, rows, depth), and how many consecutive warps read each."""
        ctas, kind = self.cta_of[warps], e["kind"]
        layout = bool(transposed), rows, e["depth"], 4 if kind == "tf32" else 2
        new = np.ones(len(warps), bool)
        new[1:] = (ctas[1:] != ctas[:-1]) | (descriptors[1:] != descriptors[:-1])
        first = np.flatnonzero(new)
        places = [self.operand_chunks(cta, descriptor, layout, e)
                  for cta, descriptor in zip(ctas[first].tolist(), descriptors[first].tolist(), strict=True)]
        bits = self.shared_views[16].take(places).view(matrix.elements(kind))
        counts = np.append(first[1:], len(warps)) - first
        return matrix.to_float32(bits.swapaxes(1, 2) if transposed else bits, kind), counts

    def operand_chunks(self, cta, descriptor, layout, e):
        """The 16-byte chunks of shared memory that an operand occupies."""
        try:
            chunks, low, high = matrix.operand_chunks(descriptor, *layout)
        except matrix.DescriptorError as error:
            raise self.launch.fault(e["number"], str(error), self.thread_of(int(e["warps"][0]))) from None
        if low < self.launch.shared_base or high > self.launch.shared_end:
            raise self.fault("shared", e["number"], low, layout[-1], self.thread_of(int(e["warps"][0])))
        start = cta * self.smem_bytes
        if self.initialized is not None and not all_true(self.initialized[start + low : start + high]):  # maybe gaps only
            missing = int((~self.initialized[matrix.operand_offsets(descriptor, *layout) + start]).sum())
            if missing:
                thread, detail = self.thread_of(int(e["warps"][0])), f"{missing} elements of an operand"
                self.launch.report("uninitialised shared memory", e["number"], thread, detail)
        return chunks + start // 16
