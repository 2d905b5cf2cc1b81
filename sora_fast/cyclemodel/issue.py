"""Simulates in-order issue on one SM sub-partition, iteration by iteration.

A sub-partition holds a quarter of every resident block's warps; each cycle it issues at most one instruction, in order per
warp. Stalls: ptxas's stall counts and scoreboards, busy units, wgmma groups, copies (cp.async, TMA), block-wide and named
barriers. Sub-partitions are assumed to be alike: a barrier of 256 threads is one of two of these warps.
"""

import re
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .gpus import GPU
from .sass import NO_SCOREBOARD, Instruction
from .units import (
    IDEAL,
    barrier,
    copies_tiles,
    is_helper_barrier,
    issue_cycles,
    kind,
    l2_bytes,
    smem_bytes,
    tensor_cycles,
    wgmma_shape,
)

QUEUES = {"xu": 16, "shfl": 8, "lsu": 24}  # cycles of work that may queue at a slow unit (estimates)
UNITS = {"half": "fma"}  # that another name is for
PORTS = ("fma", "half", "heavy", "alu")  # read two or three registers
INFINITY = float("inf")


@dataclass(frozen=True)
class Result:
    cycles: float  # of one iteration of all warps, in the steady state
    waits: dict[str, int]  # stall cycles per iteration, in which no warp could issue, by what the next one waited for


class _Step:
    """The properties of an instruction that the simulation needs."""

    def __init__(self, i: Instruction, gpu: GPU, copies: bool, wavefronts: Mapping[str, float]):
        self.kind, self.base, self.predicated_off = kind(i), i.base, i.predicated_off
        self.cost, self.tensor, self.smem = issue_cycles(i, gpu), tensor_cycles(i, gpu), smem_bytes(i, wavefronts)
        self.wgmma = wgmma_shape(i) is not None
        self.ends_group = "gsb0" in i.body
        self.l2 = l2_bytes(i, gpu, copies)
        self.busy = max(self.cost, self.smem * 4 / gpu.smem, 32 * i.width / 32 if i.base in ("LDG", "STG") else 0)
        self.stall, self.write_scoreboard, self.read_scoreboard = max(1, i.stall), i.write_scoreboard, i.read_scoreboard
        self.scoreboards = [board for board in range(6) if i.wait_mask >> board & 1]
        pending = re.search(r"(SB\d|gsb0), (0x\w+)", i.body) if "DEPBAR.LE" in i.opcode else None
        self.max_pending = None if pending is None else (pending[1], int(pending[2], 16))
        self.phase = i.base == "SYNCS" and "PHASECHK" in i.opcode
        self.barrier = barrier(i)


class _Warp:
    def __init__(self, block: int, place: int, start: int):
        self.block, self.index, self.ready, self.pc, self.iteration = block, place, float(start), 0, 0
        self.scoreboards = [deque() for _ in range(6)]
        self.cp_async_done = 0.0  # when the latest cp.async has arrived
        self.group_ends: deque = deque(maxlen=8)  # when wgmma groups end
        self.mma_ends: deque = deque(maxlen=8)  # when single wgmmas end
        self.iteration_ends: list[float] = []
        self.blocked = False  # at a barrier
        self.arrivals = 0  # at barriers named by a register, since the last wait at one
        self.stored_bytes = 0.0  # bytes in shared memory for a warp of another role that copies them on
        self.helper_done = 0.0  # when that warp has copied them


class Simulation:
    """``warps`` of each of ``blocks`` blocks that execute ``path`` repeatedly.

    ``bulk``: bytes that TMA loads per iteration of a block, ``distance`` iterations ahead. ``rate``: the SM's bytes per
    clock from memory, ``latency``: its latency. ``stagger``: cycles between the blocks' starts. ``wavefronts``: see
    units.smem_bytes.
    """

    def __init__(self, path: Sequence[Instruction], gpu: GPU, warps: int, blocks: int, *, bulk: float = 0.0,
                 distance: int = 1, latency: float | None = None, rate: float | None = None, stagger: int = 400,
                 wavefronts: Mapping[str, float] = IDEAL):
        self.gpu, self.per_block = gpu, max(1, warps // 4)
        self.latency, self.rate = latency or gpu.latency_l2, (rate or gpu.l2_port) / 4
        self.steps = [_Step(i, gpu, copies_tiles(path), wavefronts) for i in path]
        self.warps = [_Warp(block, place, block * stagger + place)
                      for block in range(blocks) for place in range(self.per_block)]
        self.unit_free = defaultdict(float)
        self.arrived = Counter()
        self.waiting = defaultdict(list)
        self.loads = [at for at, step in enumerate(self.steps) if step.base == "UTMALDG"]
        waits = [at for at, step in enumerate(self.steps) if step.phase]
        # The j-th wait of an iteration is for the j-th part of its loads, if they can be paired.
        paired = bool(waits and self.loads) and len(self.loads) % len(waits) == 0
        parts = len(self.loads) // len(waits) if paired else 1
        self.load_part = {at: j // parts if paired else 0 for j, at in enumerate(self.loads)}
        self.load_part |= {at: j if paired else 0 for j, at in enumerate(waits)}
        self.bulk, self.distance, self.tma_done = bulk, distance, {}
        self.now = 0.0
        self._open_first_barrier()

    def _open_first_barrier(self) -> None:
        """If warpgroups alternate by barriers of their own (ping-pong), the first finds its barrier open."""
        own = [step.barrier for step in self.steps if step.barrier and self._alternates(step.barrier)]
        for _, name, threads in own:
            for block in {warp.block for warp in self.warps}:
                self.arrived[block, name[:1], 0] = max(self.arrived[block, name[:1], 0], self._barrier_warps(threads) - 1)

    def _alternates(self, barrier) -> bool:
        """Whether a barrier's id is in a register: each warpgroup then has its own, at which others arrive."""
        _, name, threads = barrier
        return name.startswith("R") and threads is not None and threads % 128 == 0 and self.per_block > 1

    def _barrier_warps(self, threads: int | None) -> int:
        return self.per_block if threads is None else max(1, threads // 128)

    # -------------------------------------------------------------------------------------------------------- waiting
    def _ready(self, warp: _Warp) -> tuple[float, str]:
        """When a warp may issue its next instruction, and what it waits for."""
        if warp.blocked:
            return INFINITY, "barrier"
        step, gpu = self.steps[warp.pc], self.gpu
        when, why = warp.ready, "stall count"
        for board in step.scoreboards:
            if warp.scoreboards[board]:
                end = max(warp.scoreboards[board])
                if end > when:
                    when, why = end, "scoreboard"
        if step.predicated_off:
            return when, why
        end, cause = 0.0, ""
        if step.max_pending is not None:
            name, pending = step.max_pending
            queue = warp.group_ends if name == "gsb0" else sorted(warp.scoreboards[int(name[2])])
            end, cause = queue[-pending - 1] if len(queue) > pending else 0.0, "wgmma" if name == "gsb0" else "copies"
        elif step.wgmma:
            pending = [end_of_mma for end_of_mma in warp.mma_ends if end_of_mma > when]
            end = sorted(pending)[-gpu.wgmma_queue] if len(pending) >= gpu.wgmma_queue else 0.0
            cause = "wgmma queue"
        elif step.kind == "matrix":
            end, cause = self.unit_free["matrix"], "tensor"
        elif step.kind == "heavy":
            end, cause = max(self.unit_free["heavy"], self.unit_free["fma"]), "fma"
        elif step.kind in ("fma", "half", "alu", "uniform", *QUEUES):
            unit = UNITS.get(step.kind, step.kind)
            end, cause = self.unit_free[unit] - QUEUES.get(unit, 0), unit
        elif step.phase and self.bulk:
            end, cause = self.tma_done.get((warp.block, warp.iteration, self.load_part[warp.pc]), 0.0), "copies"
        elif is_helper_barrier(step.barrier) and step.barrier[0] == "SYNC":
            end, cause = warp.helper_done, "atomics"
        return (end, cause) if end > when else (when, why)

    # -------------------------------------------------------------------------------------------------------- issuing
    def _occupy(self, unit: str, busy: float) -> float:
        """When the unit starts ``busy`` cycles of work."""
        start = max(self.now, self.unit_free[unit])
        self.unit_free[unit] = start + busy
        return start

    def _memory(self, nbytes: float) -> float:
        """When bytes requested now arrive."""
        return self._occupy("l2", nbytes / self.rate) + nbytes / self.rate + self.latency

    def _issue(self, warp: _Warp) -> None:
        step, gpu, now = self.steps[warp.pc], self.gpu, self.now
        if step.kind in PORTS and not step.predicated_off and self.unit_free["matrix"] > now:
            self.now += gpu.wgmma_ports - 1
        written = read = now + 4
        if step.predicated_off:
            pass
        elif step.wgmma:
            end = self._occupy("matrix", step.tensor) + step.tensor
            warp.mma_ends.append(end)
            if step.ends_group:
                warp.group_ends.append(end + gpu.latency_wgmma)
            written = read = end + gpu.latency_wgmma
        elif step.kind == "matrix":
            self._occupy("matrix", step.tensor)
            written, read = now + 33, now + 8
        elif step.kind == "heavy":
            self._occupy("heavy", gpu.imad)
            self._occupy("fma", gpu.fma)
        elif step.kind in ("fma", "half"):
            self._occupy("fma", step.cost)
        elif step.kind == "lsu":
            written, read = self._access(warp, step)
        elif step.kind == "xu":
            start = self._occupy("xu", step.cost)
            written, read = start + step.cost + gpu.latency_xu, start + 4
        elif step.kind == "shfl":
            start = self._occupy("shfl", step.cost)
            written, read = start + step.cost + gpu.latency_shfl, start + 6
        elif step.kind in ("alu", "uniform"):
            self._occupy(step.kind, step.cost)
            written = now + (12 if step.kind == "uniform" or step.base == "R2UR" else 6)
        elif step.base == "LDGDEPBAR":
            written = max(now + 4, warp.cp_async_done)
        elif step.base in ("MEMBAR", "FENCE"):
            written = read = now + gpu.latency_barrier
        elif step.base in ("SYNCS", "LDC", "S2R", "S2UR"):
            written = now + (22 if step.base == "SYNCS" else 30)
        elif step.base == "UTMALDG" and self.bulk and warp.index == 0:
            key = warp.block, warp.iteration + self.distance, self.load_part[warp.pc]
            arrives = self._memory(self.bulk / len(self.loads) / 4) + gpu.latency_tma - self.latency
            self.tma_done[key] = max(self.tma_done.get(key, 0.0), arrives)
        for board, end in ((step.write_scoreboard, written), (step.read_scoreboard, read)):
            if board != NO_SCOREBOARD:
                queue = warp.scoreboards[board]
                while queue and queue[0] <= now:
                    queue.popleft()
                queue.append(end)
        warp.ready = now + step.stall
        if step.barrier:
            self._arrive_at_barrier(warp, step)
        warp.pc += 1
        if warp.pc == len(self.steps):
            warp.pc, warp.iteration = 0, warp.iteration + 1
            warp.iteration_ends.append(now)

    def _access(self, warp: _Warp, step: _Step) -> tuple[float, float]:
        """When a load, store or atomic has written its result, and read its operands."""
        start = self._occupy("lsu", step.busy)
        read = start + step.busy + 6
        if step.base in ("STS", "STSM"):
            warp.stored_bytes += step.smem
        if step.base in ("LDS", "LDSM"):
            return start + step.busy + self.gpu.latency_smem, read
        if not step.l2:
            return read, read
        arrives = self._memory(step.l2)
        if step.base == "LDGSTS":
            warp.cp_async_done = max(warp.cp_async_done, arrives)
            return read, read
        return arrives if step.base != "RED" and step.base != "REDG" else read, read

    def _arrive_at_barrier(self, warp: _Warp, step: _Step) -> None:
        what, name, threads = step.barrier
        if is_helper_barrier(step.barrier):
            if what == "ARV":
                warp.helper_done = self._memory(warp.stored_bytes / self.gpu.red)
            warp.stored_bytes = 0.0
            return
        if threads is not None and threads < 128:
            return  # fewer than a warp per sub-partition
        owner = None
        if self._alternates(step.barrier):
            name = name[:1]
            if what == "SYNC":
                owner, warp.arrivals = warp.index, 0
            else:
                warp.arrivals += 1
                owner = (warp.index + warp.arrivals) % self.per_block
        key = warp.block, name, owner
        self.arrived[key] += 1
        if what == "SYNC":
            warp.blocked = True
            self.waiting[key].append(warp)
        if self.waiting[key] and self.arrived[key] >= self._barrier_warps(threads):
            for other in self.waiting.pop(key):
                other.blocked, other.ready = False, max(other.ready, self.now + self.gpu.latency_barrier)
            self.arrived[key] -= self._barrier_warps(threads)

    def run(self, iterations: int = 12) -> Result:
        """Greedy: the warp that issued last, unless it is an iteration ahead of another; else the first that is ready."""
        waits, last, slowest = Counter(), self.warps[0], 0
        while slowest < iterations:
            best, when, why = None, INFINITY, ""
            ahead = last.iteration > slowest + 1
            for warp in self.warps if ahead else (last, *self.warps):
                ready, cause = self._ready(warp)
                if ready < when or ready == when and ready < INFINITY and warp.iteration < best.iteration:
                    best, when, why = warp, ready, cause
                    if when <= self.now and not ahead:
                        break
            if best is None:
                raise ValueError("cyclemodel: expected barriers that the loop's own warps meet at, got one that none "
                                 "arrives at; the loop is one role of several, which the model cannot simulate")
            if when > self.now:
                waits[why] += when - self.now
                self.now = when
            self._issue(best)
            if best.pc == 0:
                slowest = min(warp.iteration for warp in self.warps)
            last = best
            self.now += 1
        skip = max(2, iterations // 3)
        each = [(ends[-1] - ends[skip]) / (len(ends) - 1 - skip) for ends in (warp.iteration_ends for warp in self.warps)
                if len(ends) > skip + 1]
        return Result(len(each) / sum(1 / cycles for cycles in each),
                      {why: round(cycles / iterations) for why, cycles in waits.most_common(6)})
