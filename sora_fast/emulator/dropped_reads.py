"""Loads whose results are unused: they may race, because nothing depends on the value.

If a tensor has fewer elements than the program has threads, Triton lets several threads load each element and one of them
store it: ``tl.store(x + at, 2 * tl.load(x + at))`` of 64 elements by 128 threads is correct, though half of the loads may
execute after the stores. A result is unused if no instruction with an effect that depends on it was executed by that thread,
or by that warp if lanes exchange it. Dependences are followed through registers along all paths.
"""

from .blocks import reads_and_writes

CROSS_LANE = ("shfl", "vote", "redux", "mma", "wgmma", "elect")
LOGGED = ("st", "atom", "red")  # effects that the log of global accesses records
WITHOUT_EFFECT = ("prefetch", "prefetchu", "discard", "applypriority")


class DroppedReads:
    """For one program, the instructions through which the result of a load has an effect."""

    def __init__(self, program):
        self.blocks = program.blocks
        self.cached: dict[int, tuple[frozenset[int], bool] | None] = {}

    def effects(self, number: int) -> tuple[frozenset[int], bool] | None:
        """(numbers of the global stores and atomics that depend on load ``number``, whether lanes exchange it between).

        None: it is not a load to registers, or it has another effect: on a branch, a predicate or shared memory.
        """
        if number not in self.cached:
            self.cached[number] = self._effects(number)
        return self.cached[number]

    def _effects(self, number: int) -> tuple[frozenset[int], bool] | None:
        found, exchanged = set(), False
        dependent_at: dict[int, set[str]] = {}  # registers at the start of each block that is reached
        start = next(block.index for block in self.blocks if any(i.number == number for i in self._instrs(block)))
        worklist = [start]
        while worklist:
            block = self.blocks[worklist.pop()]
            dependent = set(dependent_at.get(block.index, ()))
            for instr in self._instrs(block):
                root = instr.parts[0]
                reads, writes = ({reg.name for reg in part} for part in reads_and_writes(instr))
                if instr.number == number:
                    if root not in ("ld", "ldu"):
                        return None
                    dependent |= writes
                elif not reads & dependent:
                    dependent -= writes
                elif root not in WITHOUT_EFFECT:
                    if root in LOGGED and "global" in instr.parts and not (instr.guard and instr.guard.name in dependent):
                        found.add(instr.number)
                    elif not writes or root in LOGGED:
                        return None
                    exchanged |= root in CROSS_LANE
                    dependent |= writes
            for successor in self._successors(block):
                known = dependent_at.setdefault(successor, set())
                if not dependent <= known:
                    known |= dependent
                    worklist.append(successor)
        return frozenset(found), exchanged

    @staticmethod
    def _instrs(block) -> list:
        return [*block.instrs, *([block.end] if block.end else [])]

    def _successors(self, block) -> list[int]:
        root = block.end.parts[0] if block.end else ""
        successors = [block.target] if root == "bra" else []
        if root not in ("bra", "ret", "exit", "trap") or block.end.guard:
            successors.append(block.index + 1)
        return [index for index in successors if index < len(self.blocks)]
