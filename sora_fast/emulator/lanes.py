"""Warp-level instructions: shfl, vote, redux, elect, bar.warp (PTX ISA 9.7.9.6, 9.7.13)."""

import numpy as np

from .arith import I4, U4

LANES = np.arange(32, dtype=U4).reshape(1, 32)
REDUX = {"add": np.add, "min": np.minimum, "max": np.maximum}
REDUX |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def per_lane(x, n):
    """``x`` broadcast to the lanes of n warps, (n, 32)."""
    return x if x.shape == (n, 32) else np.broadcast_to(x, (n, 32))  # np.broadcast_to is slow even without any work


def any_true(x):
    """x.any(), in a third of its time."""
    return np.count_nonzero(x) > 0


def all_true(x):
    """x.all(), likewise."""
    return np.count_nonzero(x) == x.size


class Lanes:
    """Warp-level exchanges."""

    def members(self, mask, n):
        """The lanes (n, 32) of a membermask."""
        return ((per_lane(mask, n) >> LANES) & U4(1)).astype(bool)

    def check_converged(self, i, k, mask, number):
        """All lanes of the membermask must execute the instruction; in a diverged warp some may not."""
        missing = self.members(mask, len(self.group.warps)) & self.alive[self.group.warps] & ~k
        if missing.any():
            row, lane = np.argwhere(missing)[0]
            raise self.launch.fault(number, "a lane of its membermask is elsewhere", self.thread(row, lane))

    def shuffle(self, mode, i, value, b, c):
        """(values, predicate): the predicate says whether the source lane is in range (PTX ISA 9.7.9.6)."""
        n = len(self.group.warps)
        value = per_lane(value, n)
        limit, segment = c & U4(31), (c >> U4(8)) & U4(31)
        low = LANES & segment
        high = (low | (limit & ~segment)).astype(I4)
        if mode == "up":
            source = LANES.astype(I4) - (b & U4(31)).astype(I4)
            good = source >= high
        elif mode == "down":
            source = (LANES + (b & U4(31))).astype(I4)
            good = source <= high
        elif mode == "bfly":
            source = (LANES ^ (b & U4(31))).astype(I4)
            good = source <= high
        else:
            source = (low | (b & ~segment & U4(31))).astype(I4)
            good = source <= high
        source = np.where(good, source, LANES.astype(I4))
        if source.shape[0] == 1:
            return value[:, source[0]], good
        return np.take_along_axis(value, np.broadcast_to(source, (n, 32)).astype(np.int64), 1), good

    def vote(self, mode, i, k, p, mask):
        n = len(self.group.warps)
        p = per_lane(p, n)
        active = self.members(mask, n) & self.lane_mask(k, n)
        if mode == "ballot":
            return np.where(p & active, U4(1) << LANES, U4(0)).sum(1, dtype=U4, keepdims=True)
        if mode == "any":
            return (p & active).any(1, keepdims=True)
        if mode == "all":
            return (p | ~active).all(1, keepdims=True)
        return (p | ~active).all(1, keepdims=True) | (~p | ~active).all(1, keepdims=True)  # uni

    def redux(self, operation, i, k, value, mask):
        n = len(self.group.warps)
        value = per_lane(value, n)
        active = self.members(mask, n) & self.lane_mask(k, n)
        out = np.empty((n, 1), value.dtype)
        for row in range(n):
            chosen = value[row][active[row]]
            out[row] = REDUX[operation].reduce(chosen, dtype=value.dtype) if len(chosen) else 0
        return out

    def elect(self, i, k, mask):
        """True in one lane of the membermask, the lowest."""
        n = len(self.group.warps)
        active = self.members(mask, n) & self.lane_mask(k, n)
        return LANES == active.argmax(1)[:, None]

    def activemask(self, i, k):
        n = len(self.group.warps)
        return np.where(self.lane_mask(k, n), U4(1) << LANES, U4(0)).sum(1, dtype=U4, keepdims=True)

    def warp_barrier(self, i, k):
        """bar.warp.sync orders memory between the lanes."""
        if self.races:
            self.races.start_epoch(self.group.warps)
