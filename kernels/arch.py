"""Limits and features of each architecture, for heuristics, tests and the cycle model. Imports neither torch nor Triton.

A GPU is named as in sora_fast.configs: "sm90-H200", "sm90", or "cpu" for the interpreter.
"""

# Shared memory per block in bytes, by compute capability (80: sm_80). Triton compiles kernels that exceed it; their launch
# fails.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TMEM = 512  # columns of tensor memory, sm_100
REGISTERS = 65536  # per SM
REGISTERS_OF_THREAD = 255


def capability(gpu: str) -> int:
    """90 for "sm90-H200"; the nearest lower one in SHARED for an unknown GPU, or else the lowest; 0 for "cpu"."""
    if gpu == "cpu":
        return 0
    asked = int(gpu.removeprefix("sm").partition("-")[0])
    return max((known for known in SHARED if known <= asked), default=min(SHARED))


def is_small(gpu: str) -> bool:
    """Whether shared memory is limited to 99 KB per block."""
    return gpu != "cpu" and SHARED[capability(gpu)] <= 99 << 10


def has_tma(gpu: str) -> bool:
    """Whether the GPU has TMA."""
    return capability(gpu) >= 90


def uses_mma_sync(gpu: str) -> bool:
    """Whether MMAs are mma.sync, with both operands in registers: all but sm_90 (wgmma) and sm_100 (tcgen05)."""
    return capability(gpu) not in (90, 100)
