"""Loads whose results are dropped: they may race, for nothing depends on what they return.

Where a tensor has fewer elements than the program has threads, Triton lets several threads load each element, and one of
them store: ``tl.store(x + at, 2 * tl.load(x + at))`` of 64 elements by 128 threads is right, though half of the loads may
run behind the stores. A result is dropped where no instruction that has an effect and depends on it was executed, by that
thread, or, where lanes exchange it, by that warp. What it depends on is followed through the registers of the whole kernel.
"""

from .blocks import reads_and_writes

LANES_EXCHANGE = ("shfl", "vote", "redux", "mma", "wgmma", "elect")
LOGGED = ("st", "atom", "red")  # effects whose execution the log of global accesses shows
WITHOUT_EFFECT = ("prefetch", "prefetchu", "discard", "applypriority")


class DroppedReads:
    """Of one program: which instructions make the result of a load count."""

    def __init__(self, program):
        self.instrs = {instr.number: instr for instr in program.instrs}
        self.parts = [(instr, *({reg.name for reg in part} for part in reads_and_writes(instr))) for instr in program.instrs]
        self.known: dict[int, tuple[frozenset[int], bool] | None] = {}

    def effects(self, number: int) -> tuple[frozenset[int], bool] | None:
        """(numbers of the global stores and atomics that depend on load ``number``, whether lanes exchange it between).

        None: it is no load into registers, or has an effect of another kind: a branch, a predicate, shared memory.
        """
        if number not in self.known:
            self.known[number] = self._effects(number)
        return self.known[number]

    def _effects(self, number: int) -> tuple[frozenset[int], bool] | None:
        load = self.instrs[number]
        if load.parts[0] not in ("ld", "ldu"):
            return None
        depend = {reg.name for reg in reads_and_writes(load)[1]}
        effects, exchanged, before = set(), False, -1
        while before != len(depend):
            before = len(depend)
            for instr, reads, writes in self.parts:
                root = instr.parts[0]
                if not reads & depend or root in WITHOUT_EFFECT or instr is load:
                    continue
                if root in LOGGED and "global" in instr.parts and not (instr.guard and instr.guard.name in depend):
                    effects.add(instr.number)
                elif not writes or root in LOGGED:
                    return None
                exchanged |= root in LANES_EXCHANGE
                depend |= writes
        return frozenset(effects), exchanged
