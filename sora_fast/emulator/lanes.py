"""Instructions between the lanes of a warp: shfl, vote, redux, elect (PTX ISA 9.7.9.6 and 9.7.13)."""

import numpy as np

from .arith import I4, U4
from .memory import Fault

LANES = np.arange(32, dtype=U4).reshape(1, 32)


class Lanes:
    """Exchanges inside a warp."""

    def converged(self, i, k, members, number):
        alive = self.alive[self.group.warps]
        wanted = ((np.broadcast_to(members, (len(self.group.warps), 32)) >> LANES) & U4(1)).astype(bool) & alive
        if (wanted & ~k).any():
            instr = self.program.instrs[number]
            raise Fault(f"{instr.text} ({instr.loc}): lanes of its mask are elsewhere")

    def shuffle(self, mode, i, value, by, c):
        n = len(self.group.warps)
        value = np.broadcast_to(value, (n, 32))
        lane = LANES
        limit, segment = c & U4(31), (c >> U4(8)) & U4(31)
        low = lane & segment
        high = low | (limit & ~segment)
        if mode == "up":
            source = lane.astype(I4) - by.astype(I4)
            good = source >= high.astype(I4)
        elif mode == "down":
            source = (lane + by).astype(I4)
            good = source <= high.astype(I4)
        elif mode == "bfly":
            source = (lane ^ by).astype(I4)
            good = source <= high.astype(I4)
        else:
            source = (low | (by & ~segment & U4(31))).astype(I4)
            good = source <= high.astype(I4)
        source = np.where(good, source, lane.astype(I4))
        if source.shape[0] == 1:
            return value[:, source[0]], good
        return np.take_along_axis(value, np.broadcast_to(source, (n, 32)).astype(np.int64), 1), good

    def vote(self, mode, i, k, p, members):
        n = len(self.group.warps)
        p = np.broadcast_to(p, (n, 32))
        active = ((np.broadcast_to(members, (n, 32)) >> LANES) & U4(1)).astype(bool)
        if k is not None:
            active = active & k
        if mode == "ballot":
            return np.where(p & active, U4(1) << LANES, U4(0)).sum(1, dtype=U4, keepdims=True)
        if mode == "any":
            return (p & active).any(1, keepdims=True)
        if mode == "all":
            return (p | ~active).all(1, keepdims=True)
        raise Fault(f"vote.{mode}")

    def redux(self, operation, i, k, value, members):
        n = len(self.group.warps)
        value = np.broadcast_to(value, (n, 32))
        function = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[operation]
        if k is not None and not np.all(k):
            out = np.empty((n, 1), value.dtype)
            for w in range(n):
                out[w] = (
                    function.reduce(value[w][np.broadcast_to(k, (n, 32))[w]]) if np.broadcast_to(k, (n, 32))[w].any() else 0
                )
            return out
        return function.reduce(value, axis=1, keepdims=True).astype(value.dtype)

    def elect(self, i, k):
        n = len(self.group.warps)
        mask = np.ones((n, 32), bool) if k is None else np.broadcast_to(k, (n, 32))
        return LANES == mask.argmax(1)[:, None]

    def activemask(self, i, k):
        n = len(self.group.warps)
        mask = np.ones((n, 32), bool) if k is None else np.broadcast_to(k, (n, 32))
        return np.where(mask, U4(1) << LANES, U4(0)).sum(1, dtype=U4, keepdims=True)

    def warp_barrier(self, i, k):
        pass
