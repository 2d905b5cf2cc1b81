"""Warp scheduling and branches.

Warps at the same basic block, with any active lanes, form a Group, which executes a block at a time. Within a warp the lanes
furthest behind (at the lowest block index) go first: compilers place the reconvergence point after both sides of a branch.
"""

import numpy as np

from .lanes import all_true, any_true, per_lane
from .memory import Fault

# Base, and per ready group: after so many blocks of spin loops without effect, no warp will leave its loop.
IDLE_LIMIT = 2000, 100
# The longest waiting group runs at each 97th pick; odd, so that it meets a loop of groups in every phase.
FAIRNESS_PERIOD = 97


class Deadlock(Fault):
    """A deadlock: every warp waits, and no copy is in flight."""


class Group:
    """Warps (sorted indices) at the start of one block; ``mask``: their active lanes (warps, 32), None for all."""

    __slots__ = ("block", "warps", "mask", "index")

    def __init__(self, block: int, warps: np.ndarray, mask: np.ndarray | None):
        self.block, self.warps = block, warps
        self.mask = None if mask is None or all_true(mask) else mask
        first, count = int(warps[0]), len(warps)
        self.index = slice(first, first + count) if int(warps[-1]) - first + 1 == count else warps

    def full_mask(self):
        return np.ones((len(self.warps), 32), bool) if self.mask is None else self.mask


def put_masked(array, i, k, value):
    """array[i] = value in the lanes of ``k``."""
    if k is None:
        array[i] = value
    elif isinstance(i, slice):
        np.copyto(array[i], value, where=k)
    else:
        part = array[i]
        np.copyto(part, value, where=k)
        array[i] = part


class Scheduler:
    """Groups of warps: ready, waiting at a named barrier, or blocked at an mbarrier."""

    def function(self, block: int, masked: bool):
        """The block as a Python function, for full warps or with a mask."""
        key = (block, masked)
        found = self.functions.get(key)
        if found is None:
            code = self.program.code(self.program.blocks[block], masked)
            if self.constants != len(self.program.values):
                self.namespace |= self.program.values
                self.constants = len(self.program.values)
            exec(code, self.namespace)
            found = self.functions[key] = self.namespace.pop("f")
        return found

    def run(self) -> None:
        """Run until every warp has exited."""
        self.picks = 0
        with np.errstate(all="ignore"):
            steps = 0
            while self.ready or self.blocked or self.waiting:
                steps += 1
                if not self.ready and not self.progress():
                    raise Deadlock(self.deadlock_message())
                if self.ready:
                    self.step()
                # IDLE_LIMIT[1] > FAIRNESS_PERIOD: each group has had its turn
                if self.idle_blocks > IDLE_LIMIT[0] + IDLE_LIMIT[1] * len(self.ready):
                    raise Deadlock(self.deadlock_message())
                if self.tma_loads and self.schedule.when == "random" and self.random.random() < 0.1:
                    self.complete_load(self.random.randrange(len(self.tma_loads)))
            self.finish_bulk()
        self.launch.steps += steps
        sizes = np.array([len(b.instrs) + (b.end is not None) for b in self.program.blocks])
        self.launch.warp_instructions += int((self.executed * sizes).sum())
        if self.counters is not None:
            self.counters.add_blocks(self.program, self.executed)

    def pick(self) -> Group:
        """The next group, merged with all others at its block: the one furthest behind or, with a seed, a random one.

        Even without a seed, the group that has waited longest is picked from time to time: a spinning warp (on a lock in
        global memory) must not starve the one that it waits for.
        """
        ready = self.ready
        if len(ready) == 1:
            return ready.pop()
        self.picks += 1
        block, behind = min(g.block for g in ready), None
        if self.schedule.seed is not None or self.picks % FAIRNESS_PERIOD == 0:
            chosen = (ready[0] if self.schedule.seed is None else self.random.choice(ready)).block
            late = np.zeros(self.total_warps, bool)  # warps with lanes further behind: those go first
            for g in ready:
                if g.block < chosen:
                    late[g.warps] = True
            if not all(all_true(late[g.warps]) for g in ready if g.block == chosen):
                block, behind = chosen, late
        same, rest = [], []
        for g in ready:
            if g.block != block:
                rest.append(g)
                continue
            late = None if behind is None else behind[g.warps]
            if late is None or not any_true(late):
                same.append(g)
            else:
                rest.append(self.subset(g, late))
                if not all_true(late):
                    same.append(self.subset(g, ~late))
        self.ready = rest
        group = same[0] if len(same) == 1 else self.merge(same)
        if self.schedule.seed is not None and len(group.warps) > 1 and self.random.random() < 0.02:
            part = np.array([self.random.random() < 0.5 for _ in group.warps])
            if part.any() and not part.all():
                self.ready.append(self.subset(group, ~part))
                group = self.subset(group, part)
        return group

    @staticmethod
    def subset(group: Group, selected: np.ndarray) -> Group:
        return Group(group.block, group.warps[selected], None if group.mask is None else group.mask[selected])

    def merge(self, groups) -> Group:
        warps = np.unique(np.concatenate([g.warps for g in groups]))
        mask = np.zeros((len(warps), 32), bool)
        for g in groups:
            mask[np.searchsorted(warps, g.warps)] |= g.full_mask()
        return Group(groups[0].block, warps, mask)

    def step(self) -> None:
        group = self.pick()
        for _ in range(64):  # without another pick while no other group is ready
            self.idle_blocks = self.idle_blocks + 1 if group.block in self.program.spin_blocks else 0
            if self.idle_blocks % 1000 == 999:  # let copies complete, and groups at mbarriers go on, while others spin
                self.progress()
            group = self.execute(group)
            if group is None:
                return
            if self.ready:
                break
        self.ready.append(group)

    def execute(self, group: Group) -> Group | None:
        """Execute the group's block; returns the group at its next block, or None if it was queued."""
        block = self.program.blocks[group.block]
        self.executed[group.block] += len(group.warps)
        self.group = group
        result = self.function(group.block, group.mask is not None)(group.index, group.mask)
        end = block.end
        if end is None:
            group.block += 1
            return group
        root = end.parts[0]
        if root == "bra":
            if result is None:
                group.block = block.target
                return group
            return self.branch(group, result, block.target)
        if root in ("ret", "exit", "trap"):
            if root == "trap" and (result is None or np.any(result & group.full_mask())):
                raise self.launch.fault(end.number, "a trap is reached", self.thread_of(int(group.warps[0])))
            if result is None:
                self.exit_lanes(group.warps, group.full_mask())
                return None
            taken = per_lane(result, len(group.warps)) & group.full_mask()
            rest = group.full_mask() & ~taken
            self.exit_lanes(group.warps, taken)
            keep = rest.any(1)
            if not any_true(keep):
                return None
            return Group(group.block + 1, group.warps[keep], rest[keep])
        if root in ("bar", "barrier"):
            return self.named_barrier(group, block, result)
        return self.wait(group, block, result)

    def branch(self, group: Group, taken, target: int) -> Group | None:
        """The group, if all its lanes branch the same way; else two new groups become ready."""
        n = len(group.warps)
        taken = per_lane(taken, n)
        active = group.mask
        if active is None:
            if all_true(taken):
                group.block = target
                return group
            if not any_true(taken):
                group.block += 1
                return group
            yes, no = taken, ~taken
        else:
            yes, no = taken & active, active & ~taken
            if not any_true(no):
                group.block = target
                return group
            if not any_true(yes):
                group.block += 1
                return group
        for mask, block in ((yes, target), (no, group.block + 1)):
            nonempty = mask.any(1)
            self.ready.append(Group(block, group.warps[nonempty], mask[nonempty]))
        return None

    def exit_lanes(self, warps, mask) -> None:
        """Exit. A barrier of all threads does not wait for exited threads."""
        self.alive[warps] &= ~mask
        self.live_warps = self.alive.any(1).reshape(self.warps, self.ctas).sum(0)
        if self.waiting:
            for number in list(self.waiting):
                self.release(number)

    def progress(self) -> bool:
        """If no group is ready: retry the mbarriers, or complete a TMA load. False: a deadlock.

        Without a seed the first load of each CTA completes. That is as late as completing one alone, since CTAs do not wait
        for each other's loads, and lets them continue together.
        """
        if self.mbarrier_changed and self.blocked:
            self.mbarrier_changed = False
            self.ready += self.blocked
            self.blocked = []
            return True
        if self.tma_loads:
            if self.schedule.seed is None:
                first = {e["cta"]: at for at, e in reversed(list(enumerate(self.tma_loads)))}
            else:
                first = {None: self.random.randrange(len(self.tma_loads))}
            for at in sorted(first.values(), reverse=True):
                self.complete_load(at)
            return True
        return False

    def deadlock_message(self) -> str:
        """Where each warp waits, and what each mbarrier still expects. Warps that are ready are in loops."""
        lines = [f"{self.program.kernel.name}: deadlock:"]
        later = int(np.prod(self.launch.grid)) - self.cta_ids[-1] - 1
        if self.ready and later:
            lines.append(f"  CTAs {self.cta_ids[0]} to {self.cta_ids[-1]} run together here, and {later} behind them: on a "
                         f"GPU too, how many run together is not promised")
        for group in self.ready:
            at = next((i.loc for i in self.program.blocks[group.block].instrs if i.loc), "no line")
            lines += [f"  {self.thread_of(w)} waits in a loop at {at}" for w in group.warps[:40]]
        for group in self.blocked:
            end = self.program.blocks[group.block].end
            for w in group.warps[:40]:
                lines.append(f"  {self.thread_of(w)} waits at {end.loc}: {end.text}")
        for number, groups in self.waiting.items():
            for group in groups:
                at = number[1] if isinstance(number, tuple) else group.block - 1
                end = self.program.blocks[at].end
                what = "for its other lanes at a barrier" if isinstance(number, tuple) else f"at barrier {number}"
                lines += [f"  {self.thread_of(w)} waits {what}, {end.loc}: {end.text}" for w in group.warps[:40]]
        for (cta, address), b in list(self.barriers.items())[:40]:
            pending = f"phase {b.phase}, {b.pending} arrivals and {b.tx_count} bytes pending"
            lines.append(f"  mbarrier {address:#x} of CTA {self.cta_ids[cta]}: {pending}")
        return "\n".join(lines)
