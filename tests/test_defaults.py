"""A default device or dtype, as ``torch.set_default_device("cuda")`` sets one, is for tensors of the user that say nothing.

The library's own on the host say so: "meta" stands for the other device, since no number can be read there.
"""

import ast
from pathlib import Path

import op_checks
import pytest
import torch

import sora_fast
from sora_fast import Pack, compat, nn, ops
from sora_fast.diffusion import make_objective
from sora_fast.diffusion.clean_frames import FrameTimesteps, draw_clean_frames
from sora_fast.diffusion.conditioning import jumps
from sora_fast.evaluation.timesteps import draws
from sora_fast.testing.cases import cases

GRIDS = [(3, 1, 2), (1, 2, 2), (2, 2, 1)]
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
             "scalar_tensor", "tensor", "zeros"}
OF_FLOATS = {"linspace", "ones", "rand", "randn", "zeros"}


def _generator():
    return torch.Generator().manual_seed(3)


def _timesteps(kind, **options):
    objective = make_objective(kind, **options)
    return lambda: objective.draw_timesteps(torch.tensor([6, 300, 1024], device="cpu"), _generator())


def _frames():
    clean = draw_clean_frames(GRIDS, 0.9, _generator())
    times = FrameTimesteps(torch.tensor([300.0, 500.0, 700.0], dtype=torch.float32, device="cpu"), clean,
                           [24, 16, 16], GRIDS, 2)
    return clean, times.timesteps, times._learned


def _xformers(causal):
    q = torch.linspace(-1, 1, 5 * 2 * 16, dtype=torch.float32, device="cpu").view(1, 5, 2, 16)
    k = torch.linspace(1, -2, 6 * 2 * 16, dtype=torch.float32, device="cpu").view(1, 6, 2, 16)
    mask = compat.BlockDiagonalMask.from_seqlens([2, 3], [4, 2])
    return compat.memory_efficient_attention(q, k, k, mask.make_causal() if causal else mask)


def _restarted():
    vectors = torch.linspace(-1, 1, 24, dtype=torch.float32, device="cpu").view(4, 3, 2)
    quantizer = nn.VectorQuantizer(4, 3).to_empty(device="cpu").float()
    quantizer.counts.zero_()
    quantizer.restart(vectors, generator=_generator())
    return quantizer.codebook.detach()


CALLS = {
    "flow": _timesteps("flow"), "flow of one shift": _timesteps("flow", shift=3.0, timesteps="uniform"),
    "ddpm": _timesteps("ddpm"), "clean frames": _frames,
    "masks": lambda: _xformers(False), "top left": lambda: _xformers(True),
    "masking": lambda: nn.random_masking(Pack(GRIDS), 0.5, pattern="tube", generator=_generator()).visible,
    "drop rates": lambda: (nn.continuous_drop_rates(3, generator=_generator()),
                           nn.size_drop_rates([64, 300], generator=_generator())),
    "evaluation": lambda: draws(1, 2, 3, 10, 7, False)[1],
    "jumps": lambda: jumps(torch.zeros((1, 2, 2, 3), dtype=torch.uint8, device="cpu")), "codes": _restarted,
}


def _same(got, want):
    if isinstance(want, torch.Tensor):
        return got.device == want.device and op_checks.same_bits(got, want)
    return got == want if not isinstance(want, (tuple, list)) else len(got) == len(want) and all(map(_same, got, want))


def _assert_is_itself(call):
    """Under other defaults too, of the device and of the dtype."""
    want = call()
    with torch.device("meta"):
        assert _same(call(), want)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert _same(call(), want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_of_the_host(call):
    _assert_is_itself(call)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("op", [op.name for family in ops.FAMILIES for op in getattr(ops, family).OPS])
def test_of_ops(op, backend):
    """Results are where the inputs are, in their dtype, windows and tails included."""
    for _, inputs in list(cases(op, torch.float32)):
        if not op_checks.runs_on(op, backend, inputs):
            continue
        _assert_is_itself(lambda inputs=inputs: op_checks.tensors(getattr(ops, op)(**inputs, backend=backend)))


def _calls_without(tree, parents=()):
    """Lines of calls of torch's factories that name no device, or of floats no dtype, outside of modules' own state."""
    if isinstance(tree, ast.Call):
        owner, _, name = ast.unparse(tree.func).rpartition(".")
        given = {word.arg for word in tree.keywords}
        silent = "device" not in given or name in OF_FLOATS and "dtype" not in given
        if owner == "torch" and name in FACTORIES and silent and not {"Parameter", "register_buffer"} & set(parents):
            yield tree.lineno
        parents = (*parents, name)
    for child in ast.iter_child_nodes(tree):
        yield from _calls_without(child, parents)


def test_every_factory_says_where_and_what():
    """But for parameters and buffers, which are the user's, and the programs of cli."""
    root, silent = Path(sora_fast.__file__).parent, []
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] != "cli":
            silent += [f"{path.relative_to(root)}:{line}" for line in _calls_without(ast.parse(path.read_text()))]
    assert not silent
    told = "torch.arange(3)\ntorch.zeros(3, device=d)\ntorch.zeros(3, device=d, dtype=t)\nParameter(torch.ones(3))"
    assert list(_calls_without(ast.parse(told))) == [1, 2]
