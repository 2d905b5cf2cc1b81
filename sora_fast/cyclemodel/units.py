"""The unit of an SM that an instruction occupies, and for how long.

Units: ``issue`` (one instruction per clock and sub-partition), ``tensor`` (Tensor Core), ``fma``, ``alu``, ``xu``
(exp2, rcp, conversions), ``shfl``, ``uniform``, ``smem`` (bytes through shared memory) and ``L2`` (bytes from it).
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from .gpus import GPU
from .sass import Instruction

WGMMA = ("HGMMA", "QGMMA", "IGMMA")
MATRIX = (*WGMMA, "HMMA", "IMMA", "QMMA", "UTCHMMA")
ATOMICS = ("RED", "REDG", "ATOM", "ATOMG")
BULK = ("UTMALDG", "UBLKCP")
IDEAL: Mapping[str, float] = {}  # by opcode, wavefronts of shared memory over the ideal; 1 by default
GLOBAL = ("LDG", "STG", "LDGSTS", *ATOMICS)

_KINDS = {
    "heavy": "IMAD XMAD IDP",
    "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FSWZADD FFMA32I FMUL32I FADD32I",
    "half": "HFMA2 HADD2 HMUL2",
    "alu": "LOP3 IADD3 ISETP FMNMX FSETP FSEL SEL PRMT SHF LEA VIADD F2FP PLOP3 MOV P2R R2P I2FP VIMNMX IABS SGXT BMSK FCHK "
           "IMNMX LOP HMNMX2 HSETP2 VIADDMNMX FMNMX3 VABSDIFF ISCADD VHMNMX PSETP MOVM IADD HSET2 R2UR CSMTEST",
    "xu": "MUFU POPC FLO I2F F2I F2F FRND BREV CONV",
    "shfl": "SHFL REDUX",
    "lsu": "LDS STS LDSM STSM LDG STG LDGSTS ATOM ATOMG ATOMS RED REDG LD ST LDL STL",
    "control": "BRA BAR EXIT BSSY BSYNC WARPSYNC CALL RET NOP DEPBAR LDGDEPBAR WARPGROUP YIELD JMP ELECT ENDCOLLECTIVE "
               "MEMBAR FENCE SYNCS CS2R S2R S2UR LDC CCTL ERRBAR UTMALDG UTMASTG UTMACMDFLUSH UTMAREDG UTMAPF UBLKCP "
               "UBLKRED",
}
_KIND = {base: kind for kind, bases in _KINDS.items() for base in bases.split()}


def kind(i: Instruction) -> str:
    """"matrix", "heavy", "fma", "half", "alu", "xu", "shfl", "lsu", "uniform", "control" or "other"."""
    if i.base in MATRIX:
        return "matrix"
    return _KIND.get(i.base) or ("uniform" if i.base.startswith("U") else "other")


def issue_cycles(i: Instruction, gpu: GPU) -> int:
    """Of its unit, for a warp's 32 threads; an uncalibrated estimate for "uniform", "lsu" and "other"."""
    found = kind(i)
    costs = {"heavy": gpu.imad, "fma": gpu.fma, "half": gpu.half, "alu": gpu.alu, "xu": gpu.xu, "shfl": gpu.shfl}
    return costs.get(found, 2 if found in ("uniform", "lsu", "other") else 1)


def wgmma_shape(i: Instruction) -> tuple[int, int, bool] | None:
    """(N, K, whether A is in registers) of a wgmma of 64 x N x K."""
    if i.base not in WGMMA:
        return None
    _, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", i.opcode).groups())
    return n, k, not i.body.partition(",")[2].strip().startswith("gdesc")


def tensor_cycles(i: Instruction, gpu: GPU) -> float:
    """wgmma: 4,096 FLOPs per clock and SM; A and B are read from shared memory, B once for all four warps."""
    shape = wgmma_shape(i)
    if shape:
        n, _, registers = shape
        return max(n / 2, n / 4 + (0 if registers else 16)) if i.base == "HGMMA" else n / 2
    if i.base == "HMMA":  # TF32 at half the rate
        return gpu.hmma if ".16816" in i.opcode or "TF32" in i.opcode else gpu.hmma / 2
    return 0


def flops(i: Instruction) -> int:
    """FLOPs per warp."""
    shape = wgmma_shape(i)
    if shape:
        return 2 * 16 * shape[0] * shape[1]
    return (4096 if ".16816" in i.opcode else 2048) if i.base == "HMMA" else 0


def smem_bytes(i: Instruction, wavefronts: Mapping[str, float] = IDEAL) -> float:
    """Shared-memory bytes per warp. SASS does not show bank conflicts: ``wavefronts`` has them, by opcode."""
    return _ideal_bytes(i) * wavefronts.get(i.base, 1.0)


def _ideal_bytes(i: Instruction) -> float:
    if i.predicated_off:
        return 0
    shape = wgmma_shape(i)
    if shape:
        n, k, registers = shape
        return ((0 if registers else 64 * k * 2) + n * k * 2) / 4  # a quarter of the warpgroup's
    if i.base in ("LDS", "STS", "LDGSTS"):
        return 32 * i.width
    if i.base in ("LDSM", "STSM"):
        return 128 * (4 if ".4" in i.opcode else 2 if ".2" in i.opcode else 1)
    return 0


def l2_bytes(i: Instruction, gpu: GPU, copies: bool) -> float:
    """L2 bytes per warp; if tiles are ``copies``, plain loads are of rows that all warps share through L1."""
    if i.predicated_off:
        return 0
    if i.base in ("LDG", "LDGSTS"):
        return 32 * i.width / (16 if copies and i.base == "LDG" else 1)
    return 32 * i.width / gpu.red if i.base in ATOMICS else 0


def copies_tiles(path: Sequence[Instruction]) -> bool:
    """Whether copies to shared memory are asynchronous."""
    return any(i.base in ("LDGSTS", *BULK) for i in path)


def barrier(i: Instruction) -> tuple[str, str, int | None] | None:
    """("SYNC" or "ARV", id, threads) of a block's barrier; None threads: all of the block's."""
    found = None if i.predicated_off else re.match(r"BAR\.(SYNC|ARV)\S* (\w+)(?:, (0x\w+))?", i.body)
    return (found[1], found[2], int(found[3], 16) if found[3] else None) if found else None


def is_helper_barrier(barrier: tuple[str, str, int | None] | None) -> bool:
    """Whether a barrier is shared with one warp of another role, which reduces stored tiles to global memory."""
    return barrier is not None and barrier[2] is not None and barrier[2] % 128 == 32


def reduced_bytes(path: Sequence[Instruction]) -> float:
    """Bytes that a warp passes to such a warp per iteration, stored in shared memory between its barriers."""
    stored = total = 0.0
    for i in path:
        if i.base in ("STS", "STSM"):
            stored += smem_bytes(i)
        found = barrier(i)
        if is_helper_barrier(found):
            total += stored if found[0] == "ARV" else 0.0
            stored = 0.0
    return total


def cycles(path: Sequence[Instruction], gpu: GPU, warps: int, bulk: float = 0.0,
           wavefronts: Mapping[str, float] = IDEAL) -> dict[str, float]:
    """Busy cycles of each unit of an SM per iteration of ``warps`` warps; ``bulk``: bytes that TMA loads in it."""
    reduced = reduced_bytes(path) * warps
    share = warps / 4  # of one sub-partition
    total = defaultdict(float)
    heavy, shared, moved, copies = 0.0, bulk + reduced, bulk + reduced / gpu.red, copies_tiles(path)
    for i in path:
        total["issue"] += share
        if i.predicated_off:
            continue
        found, cost = kind(i), issue_cycles(i, gpu) * share
        if found == "matrix":  # a wgmma keeps the Tensor Cores of all four sub-partitions busy
            total["tensor"] += (wgmma_shape(i)[0] / 2 if wgmma_shape(i) else tensor_cycles(i, gpu)) * share
        elif found == "heavy":
            heavy += cost
            total["fma"] += gpu.fma * share
        elif found in ("fma", "half"):
            total["fma"] += cost
        elif found in ("alu", "xu", "shfl", "uniform"):
            total[found] += cost
        shared += smem_bytes(i, wavefronts) * warps
        moved += l2_bytes(i, gpu, copies) * warps
    total["fma"] = max(total["fma"], heavy)
    total["smem"] = shared / gpu.smem
    total["L2"] = moved / gpu.l2
    return {unit: busy for unit, busy in total.items() if busy}
