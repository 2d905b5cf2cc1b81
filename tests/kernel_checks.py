"""What tests of Triton kernels share: the error rule on every case, and what they plant: memory with guards around it, and
launches that leave work undone.
"""

import torch

from sora_fast.testing import assert_matches, cases


def assert_every_case(op, run, dtype):
    """``run`` obeys the error rule on each validation case of ``op``, also where the gradient given has stride 0."""
    for _, inputs in cases(op, dtype):
        for flat in (False, True):
            assert_matches(op, run, inputs, flat_cotangent=flat)


class Guarded:
    """torch for a module that launches kernels: every allocation with guards around it, and NaN where nothing is written.

    So a kernel that leaves a number out cannot find an earlier call's there, and one that writes past the end is seen.
    """

    def __init__(self):
        self.buffers = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, shape, fill=None, **options):
        shape = torch.Size([shape] if isinstance(shape, int) else shape)
        buffer = torch.full((shape.numel() + 128,), 77, **options)
        inside = buffer[64:64 + shape.numel()]
        inside.fill_(fill if fill is not None else float("nan") if buffer.is_floating_point() else -9)
        self.buffers.append(buffer)
        return inside.view(shape)

    def zeros(self, shape, **options):
        return self.empty(shape, fill=0, **options)

    def empty_like(self, tensor, dtype=None):
        return self.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)

    def assert_whole(self):
        for buffer in self.buffers:
            assert (buffer[:64] == 77).all() and (buffer[-64:] == 77).all()


class Short:
    """A kernel launched with its last program left out, or all but the first ``keep``."""

    def __init__(self, kernel, keep=None):
        self.kernel, self.keep = kernel, keep

    def __getitem__(self, grid):
        kept = (grid[0] - 1 if self.keep is None else self.keep, *grid[1:])
        return self.kernel[kept] if kept[0] else lambda *arguments, **options: None


class Misled:
    """An attention kernel whose first program, a tile of the longest sample, is left to do another's work.

    Its last one, which ``Short`` would leave out, may have none.
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            table = next(a for a, name in zip(arguments, self.kernel.arg_names, strict=False) if name == "schedule")
            table[0] = -1
            return self.kernel[grid](*arguments, **options)
        return launch
