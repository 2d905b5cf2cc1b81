"""What the GPUs of each architecture have: for heuristics, tests and models of the machine alike. Neither torch nor Triton.

A GPU is named as in sora_fast.configs: "sm90-H200", "sm90", or "cpu" for the interpreter.
"""

# Bytes of shared memory that one block may use, by compute capability: 80 is sm_80. Triton compiles more without complaint;
# the launch then fails.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TMEM = 512  # columns of tensor memory, sm_100
REGISTERS = 65536  # of a multiprocessor
REGISTERS_OF_THREAD = 255


def capability(gpu: str) -> int:
    """90 of "sm90-H200"; of a GPU that is not in SHARED the nearest below, or the first; 0 of "cpu"."""
    if gpu == "cpu":
        return 0
    asked = int(gpu.removeprefix("sm").partition("-")[0])
    return max((known for known in SHARED if known <= asked), default=min(SHARED))


def is_small(gpu: str) -> bool:
    """Whether a block has no more than 99 KB of shared memory."""
    return gpu != "cpu" and SHARED[capability(gpu)] <= 99 << 10


def has_tma(gpu: str) -> bool:
    """Whether there is a tensor memory accelerator."""
    return capability(gpu) >= 90


def multiplies_registers(gpu: str) -> bool:
    """Whether products go through mma.sync, both factors in registers: all but sm_90 (wgmma) and sm_100 (tcgen05)."""
    return capability(gpu) not in (90, 100)
