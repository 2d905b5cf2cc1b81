"""ldmatrix, stmatrix, mma.sync (PTX ISA 9.7.14) and wgmma (9.7.15).

Products of exact operands are summed in float32 by numpy; the Tensor Core's own order and rounding are not modelled.
"""

import numpy as np

from . import matrix
from .arith import F4, U2, U4
from .memory import Fault


class TensorCores:
    """Synchronous and asynchronous matrix instructions."""

    def matrix_rows(self, i, address, count, number):
        """Addresses of the rows of 8 x 8 matrices, 16 bytes each, from the lanes that give them; and their places."""
        rows = address[:, : 8 * count].astype(U4)
        bad = (rows & U4(15) != 0) | (rows < self.launch.shared_base) | (rows + U4(16) > self.launch.shared_end)
        if bad.any():
            raise self.fault("shared", number, int(rows.flat[int(np.flatnonzero(bad)[0])]), 16)
        return rows, rows + self.shared_start[i]

    def ldmatrix(self, i, k, address, count, trans, number):
        n = len(self.group.warps)
        address = np.broadcast_to(address, (n, 32))
        rows, place = self.matrix_rows(i, address, count, number)
        if self.initialized is not None:
            self.check_initialized(None, place, 16, number, n)
        if self.counters is not None:
            self.counters.access("ldmatrix", None, rows, 16, number, n)
        if self.races:
            self.races.read(None, place, 16, number)
        data = self.shared_rows[2, 8][place // U4(16)].reshape(n, count, 8, 8)  # matrix, row, column
        if trans:
            data = data.swapaxes(2, 3)
        data = np.ascontiguousarray(data).view(U4).reshape(n, count, 32)
        return [data[:, at] for at in range(count)]

    def stmatrix(self, i, k, address, values, count, trans, number):
        n = len(self.group.warps)
        rows, place = self.matrix_rows(i, np.broadcast_to(address, (n, 32)), count, number)
        data = np.stack([np.broadcast_to(v, (n, 32)) for v in values], axis=1)  # n, count, 32
        data = np.ascontiguousarray(data).view(U2).reshape(n, count, 8, 8)
        if trans:
            data = data.swapaxes(2, 3)
        if self.races:
            self.races.write(None, place, 16, number)
        if self.counters is not None:
            self.counters.access("stmatrix", None, rows, 16, number, n)
        self.shared_rows[2, 8][place // U4(16)] = data.reshape(n, count * 8, 8)
        self.mark_initialized(place, 16)

    def mma(self, shape, kind, a, b, c, i, k, number):
        if k is not None and not np.all(k):
            raise Fault(f"mma by part of a warp at {self.program.instrs[number].loc}")
        n = len(self.group.warps)
        depth = int(shape.partition("k")[2])
        full = lambda regs: [np.broadcast_to(r, (n, 32)) for r in regs]
        left = matrix.matrix_a(full(a), depth, kind)
        right = matrix.matrix_b(full(b), depth, kind)
        row, column = matrix.coords_d(8)
        sums = np.matmul(left, right)[:, row, column]
        return np.stack(full(c), axis=-1) + sums

    def wgmma(self, shape, to, kind, i, k, targets, a, b, scale, flags, number):
        if k is not None and not np.all(k):
            raise Fault(f"wgmma by part of a warp at {self.program.instrs[number].loc}")
        if to != "f32":
            raise Fault(f"wgmma with sums of {to}")
        warps = self.group.warps.copy()
        n = len(warps)
        columns, depth = (int(x) for x in shape.removeprefix("m64n").split("k"))
        scales, transposes = flags[:2], (flags[2:] + [0, 0])[:2]
        if isinstance(a, tuple):
            transposes = [0, flags[2] if len(flags) > 2 else 0]
            a = tuple(np.broadcast_to(r, (n, 32)).copy() for r in a)
        else:
            a = self.first_lane(a, k, n).copy()
        entry = dict(
            columns=columns,
            depth=depth,
            kind=kind,
            warps=warps,
            group=self.wgmma_group[warps].copy(),
            a=a,
            b=self.first_lane(b, k, n).copy(),
            live=np.ones(n, bool),
            targets=targets,
            number=number,
            scale=None if scale is None else np.broadcast_to(scale, (n, 32))[:, 0].copy(),
            scales=scales,
            transposes=transposes,
        )
        if self.counters is not None:
            self.counters.wgmma_flops += n * 2 * 16 * columns * depth
        if self.races:
            self.races.wgmma_begins(entry)
        when = self.schedule.when
        if when == "early" or when == "random" and self.random.random() < 0.5:
            # in order: everything before it first
            self.wgmmas.append(entry)
            self.complete_wgmmas(warps, None)
        else:
            self.wgmmas.append(entry)

    def wgmma_commit(self, i, k):
        self.wgmma_group[self.group.warps] += 1

    def wgmma_wait(self, i, k, pending, number):
        self.complete_wgmmas(self.group.warps, pending)
        if self.races:
            self.races.wgmmas_end(self.group.warps, pending)

    def complete_wgmmas(self, warps, pending):
        if not self.wgmmas:
            return
        mine = np.zeros(self.total, bool)
        mine[warps] = True
        run: list = []  # of products with the same sums, done as one
        for e in self.wgmmas:
            which = e["live"] & mine[e["warps"]]
            if pending is not None:
                which &= e["group"] < self.wgmma_group[e["warps"]] - pending
            if not which.any():
                continue
            if (
                run
                and run[0][0]["targets"] is not e["targets"]
                or run
                and not np.array_equal(run[0][0]["warps"][run[0][1]], e["warps"][which])
            ):
                self.run_wgmmas(run)
                run = []
            if run and e["scale"] is not None and not e["scale"][which].all():
                self.run_wgmmas(run)
                run = []
            run.append((e, which))
            e["live"] = e["live"] & ~which
        if run:
            self.run_wgmmas(run)
        self.wgmmas = [e for e in self.wgmmas if e["live"].any()]

    def run_wgmmas(self, run) -> None:
        e, which = run[0]
        warps = e["warps"][which]
        n, columns = len(warps), e["columns"]
        sums = np.zeros((n, 16, columns), F4)
        size = 4 if e["kind"] == "tf32" else 2
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
                sums[part] += product
        row, column = matrix.coords_d(columns)
        numbers = sums[:, row.T, column.T].swapaxes(0, 1)  # registers, warps, lanes
        first, which = run[0]
        keep = None if first["scale"] is None else first["scale"][which]
        index = slice(int(warps[0]), int(warps[-1]) + 1) if int(warps[-1]) - int(warps[0]) + 1 == n else warps
        target = first["targets"]
        if keep is None or keep.all():
            target[:, index] += numbers
        else:
            target[:, index] = np.where(keep[:, None], target[:, index], F4(0)) + numbers

    def by_descriptor(self, descriptors, warps):
        """Warps that read the same smem_operand: (CTA, descriptor) -> places."""
        ctas = self.cta_of[warps]
        found: dict = {}
        for at, (cta, d) in enumerate(zip(ctas.tolist(), descriptors.tolist(), strict=True)):
            found.setdefault((cta, d), []).append(at)
        return found

    def smem_operand(self, key, rows, depth, size, transposed, e):
        """A smem_operand (rows, depth) from shared memory."""
        cta, descriptor = key
        start, lead, stride, swizzle = matrix.decode(descriptor)
        offsets = matrix.offsets(swizzle, lead, stride, bool(transposed), rows, depth, size, start % 1024)
        base = start - start % 1024
        low, high = base + int(offsets.min()), base + int(offsets.max()) + size
        if low < self.launch.shared_base or high > self.launch.shared_end:
            raise self.fault("shared", e["number"], low, size)
        places = offsets + (base + cta * self.size)
        if self.initialized is not None and not self.initialized[places].all():
            self.launch.report(
                "uninitialised shared memory",
                e["number"],
                f"{int((~self.initialized[places]).sum())} numbers of a smem_operand",
            )
        if size == 4:
            return (self.shared_views[4][places >> 2] & U4(0xFFFFE000)).view(F4)
        bits = self.shared_views[2][places >> 1]
        return matrix.bf16_to_float(bits) if e["kind"] == "bf16" else bits.view(np.float16).astype(F4)
