"""What the tuner tries for QK-norm and rotation."""

from collections.abc import Iterator

from .rotary_config import BackwardConfig, ForwardConfig, Launch, elements_of


def candidates(kernel: str, launch: Launch, gpu: str) -> Iterator[ForwardConfig | BackwardConfig]:
    """What the tuner tries beside the heuristic of ``kernel``, "forward" or "backward"; the first are the likeliest."""
    block = elements_of(max(launch.heads, launch.key_heads), launch.head_dim)
    for elements in ((32, 16, 64) if kernel == "forward" else (16, 8, 32)):  # a thread's share, up to twice as many
        for tokens in (1, 2, 4, 8, 16):
            warps = 1 << (block * tokens // (32 * elements)).bit_length() - 1 if block * tokens >= 32 * elements else 0
            if not 1 <= warps <= 16:
                continue
            if kernel == "forward":
                yield ForwardConfig(warps=warps, tokens=tokens)
                continue
            for resident in (16, 32, 24, 12, 8):  # warps of an SM
                if resident % warps == 0:
                    yield BackwardConfig(warps=warps, tokens=tokens, programs=resident // warps)
