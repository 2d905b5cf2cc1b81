"""Exact properties of a kernel's main loops, read from SASS: no timing, no estimates.

CI checks them for our kernels (tests/structure.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from . import warp_paths
from .sass import Instruction
from .units import BULK, flops

# Least prefetch distance, in iterations, between a copy and its wait; a little less than one, since the wait is at the top
# of an iteration and the copy is issued after it.
PREFETCH = 0.8
RESIDENT_WARPS = 8  # per SM: two per scheduler, so that one can issue while the other waits


@dataclass(frozen=True)
class Facts:
    prefetch: float | None  # iterations from a copy's issue to its wait, the shortest; None: no copy was found
    divisions: int  # integer and float divisions in main loops
    calls: int  # subroutines called in main loops: slow paths of divisions, functions of libdevice
    local: int  # loads and stores of local memory in main loops
    local_outside: int
    blocks: int  # of an SM
    limit: str  # what limits them
    resident_warps: int

    def faults(self) -> list[str]:
        """Faults among "prefetch", "division", "local memory" and "occupancy", in this order."""
        found = {"prefetch": self.prefetch is not None and self.prefetch < PREFETCH, "division": self.divisions + self.calls,
                 "local memory": self.local, "occupancy": self.resident_warps < RESIDENT_WARPS}
        return [name for name, wrong in found.items() if wrong]


def prefetch(path: Sequence[Instruction], stages: int | None = None) -> float | None:
    """The shortest distance, in iterations, between a copy and its wait.

    cp.async: a wait that leaves n groups in flight needs all but the latest n. TMA: a load is for ``stages - 1`` iterations
    later, which SASS does not show; None without ``stages``, and if another warp loads.
    """
    length, found = len(path), []
    commits = [at for at, i in enumerate(path) if i.base == "LDGDEPBAR"]
    copies = [at for at, i in enumerate(path) if i.base == "LDGSTS"]
    if commits and copies:
        far = 64 * len(commits)  # enough iterations back that group indices stay positive
        for at, i in enumerate(path):
            if i.opcode.startswith("DEPBAR.LE"):
                left = int(i.body.rpartition("0x")[2], 16)
                committed = far + sum(commit < at for commit in commits)
                turn, slot = divmod(committed - left - 1, len(commits))
                found.append((64 - turn) + (at - commits[slot]) / length)
    loads = [at for at, i in enumerate(path) if i.base in BULK]
    waits = [at for at, i in enumerate(path) if i.base == "SYNCS" and "PHASECHK" in i.opcode]
    if loads and waits and stages:
        parts = len(loads) / len(waits)
        found += [stages - 1 + (wait - loads[min(int(number * parts), len(loads) - 1)]) / length
                  for number, wait in enumerate(waits)]
    return min(found, default=None)


def read(code: list[Instruction], blocks: int, limit: str, warps: int, stages: int | None = None) -> Facts:
    """``code``: one function; ``stages``: of its TMA pipeline, where known."""
    loops = warp_paths.main_loops(code)
    inside = {i.address: i for loop in loops for i in loop}
    distances = [prefetch(warp_paths.iteration(loop, code), stages) for loop in loops if any(map(flops, loop))]
    count = lambda wanted, those: sum(map(wanted, those))
    is_local = lambda i: i.base in ("LDL", "STL") and not i.predicated_off
    local = count(is_local, inside.values())
    return Facts(
        prefetch=min((each for each in distances if each is not None), default=None),
        # an integer reciprocal starts with an I2F that rounds up; FCHK tests whether a float division needs its slow path
        divisions=count(lambda i: i.base == "FCHK" or i.base == "I2F" and ".RP" in i.opcode, inside.values()),
        calls=count(lambda i: i.base == "CALL" and i.target is None, inside.values()), local=local,
        local_outside=count(is_local, code) - local, blocks=blocks, limit=limit, resident_warps=blocks * warps)
