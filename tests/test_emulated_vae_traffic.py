"""Bytes that a residual block of a VideoVAE moves, forward and backward, against the least that it can.

Every launch of a kernel counts the distinct sectors that it reads and those that it writes, as the emulator counts them, and
every call of PyTorch the memory it is given and the memory it makes, once each; weights, their gradients and what sums these
up are left out (at 480 x 832 they are a ten-thousandth). At the least,
everything is read once and written once, where a norm is a pass of its own (all channels of a pixel are needed before its
first number is known) and so is a convolution (each number is needed 27 times). Per number of the stream, in 16 bits:

=====================================  ====================================  ==============
forward, twice                         read -> written                       bytes
=====================================  ====================================  ==============
norm, activation                       x -> h                                4, 4
convolution (second: and shortcut)     h -> y, h and x -> y                  4, 6
                                                                             18
backward, twice
norm, activation again                 x -> h                                4, 4
gradient of the weight                 dy and h                              4, 4
gradient of h                          dy -> dh                              4, 4
norm (first: and the shortcut's dy)    dh and x -> dx, dh, x and dy -> dx    6, 8
                                                                             38
=====================================  ====================================  ==============
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sora_fast import use_backend
from sora_fast.emulator.counters import READ_KINDS, WRITE_KINDS
from sora_fast.models.vae import ResidualBlock
from sora_fast.ops import convolution_triton, normalization_triton
from sora_fast.testing import emulated_gpu

pytestmark = pytest.mark.full

LEAST = 18, 38
VIDEO = (1, 16, 3, 24, 24)
VIEWS = {"view", "permute", "transpose", "detach", "alias", "slice", "empty", "new_empty", "empty_like", "as_strided",
         "unsqueeze", "squeeze", "expand", "split_with_sizes", "narrow", "t"}


def moved(*values) -> int:
    """Bytes of the distinct memory of video among ``values``."""
    places, waiting = {}, list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, torch.Tensor) and value.numel() >= torch.Size(VIDEO).numel():
            places[value.untyped_storage().data_ptr(), value.storage_offset()] = value.numel() * value.element_size()
    return sum(places.values())


def touched(record) -> int:
    """Bytes of the sectors of video that a launch reads, and of those that it writes."""
    ranges = record.runs[-1].allocations.ranges
    videos = [(start, end) for start, (end, _, size) in ranges.items() if (end - start) // size >= torch.Size(VIDEO).numel()]
    return sum(record.counters.distinct(kinds, start, end) for kinds in (READ_KINDS, WRITE_KINDS) for start, end in videos)


class Calls(TorchDispatchMode):
    """PyTorch's own calls and launches of kernels: ``bytes`` of (name, bytes moved)."""

    def __init__(self, records):
        super().__init__()
        self.records, self.before, self.bytes = records, len(records), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.bytes.append((name, moved(args, made)))
        return made

    def __exit__(self, *error):
        self.bytes += [(record.name, touched(record)) for record in self.records[self.before:]]
        return super().__exit__(*error)

    def per_number(self) -> float:
        return sum(count for _, count in self.bytes) / torch.Size(VIDEO).numel()


def traffic(backend, monkeypatch) -> tuple[Calls, Calls]:
    """Of a block's forward and backward, with kernels called as plain functions, so that what they call is seen too."""
    for module, names in ((convolution_triton, ("convolution_forward", "convolution_backward")),
                          (normalization_triton, ("norm_act_forward", "norm_act_backward"))):
        for name in names:
            monkeypatch.setattr(torch.ops.sora_fast, name, getattr(module, f"_{name.rpartition('_')[2]}"))
    block = ResidualBlock(VIDEO[1], VIDEO[1]).half().to(memory_format=torch.channels_last_3d)
    draw = lambda: torch.randn(VIDEO, dtype=torch.float16).to(memory_format=torch.channels_last_3d)
    x, dy = draw().requires_grad_(), draw()
    with emulated_gpu("sm90", counters=True) as emulator, use_backend(backend):
        with Calls(emulator.records) as forward:
            y = block(x, None)
        with Calls(emulator.records) as backward:
            torch.autograd.grad(y, [x, *block.parameters()], dy)
    return forward, backward


def within(backend, monkeypatch) -> list[bool]:
    """Whether forward and backward move at most 1.3 times the least."""
    found = []
    for what, calls, least in zip(("forward", "backward"), traffic(backend, monkeypatch), LEAST, strict=True):
        print(f"{backend}, {what}: {calls.per_number():.1f} bytes a number, at the least {least}: {calls.bytes}")
        found.append(calls.per_number() <= 1.3 * least)
    return found


def test_a_block_moves_few_bytes(monkeypatch):
    assert within("triton", monkeypatch) == [True, True]


def test_plain_pytorch_does_not(monkeypatch):
    """The count would see more."""
    assert within("torch", monkeypatch) == [False, False]
