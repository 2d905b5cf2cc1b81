"""What the ops' wrappers around kernels promise, once for all families: what is saved for the backward, gradients one at a
time, and no second derivative. Interpreted, on inputs as small as can be; test_registered.py has schemas and graphs.
"""

from dataclasses import dataclass
from functools import partial

import kernel_inputs
import op_checks
import pytest
import torch
from kernel_inputs import GRIDS, draw, ints, on_kernel
from op_checks import gradients, same_bits, tensors, with_grad
from torch._subclasses import FakeTensorMode

from sora_fast import ops
from sora_fast.kernels import rotary as rotary_kernels
from sora_fast.ops import rotary_triton, uploads

ROWS = ints(*[0] * 6, *[1] * 2, *[2] * 3, -1)
POINTWISE = draw(6, 8, 1, 1, 1)  # what a wrapper promises does not depend on the taps

pytestmark = [pytest.mark.full, pytest.mark.ci, pytest.mark.usefixtures("emulated_sm90")]


@dataclass(frozen=True)
class Call:
    """A call of ``op``; ``saves``: inputs, and outputs by number, that its backward needs, of those at least as large as
    the smallest of these; ``near``: gradients that come from runs of another length where they are wanted alone."""

    label: str
    op: str
    inputs: dict
    saves: tuple
    near: tuple = ()


def _calls():
    modulation = partial(kernel_inputs.modulation, rows=ROWS, tokens=12, count=3, width=24)
    yield Call("norm_modulate", "norm_modulate", modulation("norm_modulate", affine=True), ("x",))
    yield Call("gate_residual", "gate_residual", modulation("gate_residual"), ("y",))
    fused = "gate_residual_norm_modulate"
    yield Call("fused", fused, modulation(fused, y=torch.float16), ("y", 0))
    rotary, of_weights = partial(kernel_inputs.rotary, 12, 4, 4), ("q_weight", "k_weight", "q_bias", "k_bias", "freqs")
    yield Call("rms_all", "qk_norm_rope", rotary(norm="rms_all", angles="full", rows=ROWS), ("q", "k"), of_weights)
    yield Call("learned", "qk_norm_rope", rotary(norm=None, angles="per head"), ("q", "k"), of_weights)
    yield Call("no sums", "qk_norm_rope", rotary(norm=None, angles="full"), ())
    yield Call("attention", "varlen_attention", kernel_inputs.attention((7, 5), (9, 6), 2, 1, 16, return_lse=True),
               ("q", "k", "v", 0))
    for norm in ("rms", "group"):
        inputs = kernel_inputs.normalization((2, 6, 3, 4, 5), norm=norm, groups=3, bias=torch.float16)
        yield Call(norm, "norm_act", inputs, ("x",))
    yield Call("convolution", "causal_conv3d", kernel_inputs.convolution("causal_conv3d", weight=POINTWISE, cache=None,
                                                                         return_cache=False), ("x",))
    yield Call("fused", "norm_act_conv3d", kernel_inputs.convolution("norm_act_conv3d", weight=POINTWISE, cache=None,
                                                                     return_cache=False), ("x",))
    yield Call("patches", "patch_embed", kernel_inputs.patches("patch_embed", GRIDS), ("latents",))
    yield Call("patches", "unpatchify", kernel_inputs.patches("unpatchify", GRIDS), ())


torch.manual_seed(0)
CALLS = list(_calls())
each_call = pytest.mark.parametrize("call", CALLS, ids=[f"{call.op}-{call.label}" for call in CALLS])


@each_call
def test_one_gradient_at_a_time(call):
    """Only inputs that ask for a gradient get one, with the bits it has when all ask; and two calls agree to the bit."""
    run = on_kernel(call.op)
    inputs = {name: value for name, value in call.inputs.items() if name != "coords"}
    fixed = {name: value for name, value in call.inputs.items() if name == "coords"}
    fresh, leaves = with_grad(inputs)
    want = gradients(run(**fresh, **fixed), leaves)
    again, others = with_grad(inputs)
    got = gradients(run(**again, **fixed), others)
    assert want and all(same_bits(want[name], got[name]) for name in want)
    for name in leaves:
        alone, leaf = with_grad(inputs, (name,))
        got = gradients(run(**alone, **fixed), leaf)
        assert list(got) == [name]
        if name in call.near:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
        else:
            assert same_bits(got[name], want[name]), name
    plain, _ = with_grad(inputs, ())
    assert not any(o.requires_grad for o in tensors(run(**plain, **fixed)))
    with torch.no_grad():
        assert not any(o.requires_grad for o in tensors(run(**fresh, **fixed)))


@each_call
def test_second_backward_is_refused(call):
    fresh, leaves = with_grad(call.inputs, [name for name in call.inputs if name != "coords"])
    outs = tensors(on_kernel(call.op)(**fresh))
    grads = torch.autograd.grad(outs, list(leaves.values()), [torch.ones_like(o) for o in outs], create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError) as caught:
            torch.autograd.grad(grad.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
        op_checks.assert_sentence(str(caught.value), call.op)


@pytest.mark.parametrize("call", [call for call in CALLS if call.label in ("patches", "no sums")], ids=lambda call: call.op)
def test_what_inference_mode_left_is_trained_with(call):
    """Tables that the first call keeps for all later ones."""
    run = on_kernel(call.op)
    fresh, leaves = with_grad(call.inputs, [name for name in call.inputs if name != "coords"])
    want = gradients(run(**fresh), leaves)
    rotary_triton._fixed.cache_clear()
    rotary_kernels.frequencies.cache_clear()
    uploads._upload.cache_clear()
    with torch.inference_mode():
        run(**call.inputs)
        assert rotary_triton._fixed.cache_info().currsize + uploads._upload.cache_info().currsize == 1
    got = gradients(run(**fresh), leaves)
    assert want and all(same_bits(want[name], got[name]) for name in want)


def test_fake_tensors_leave_no_table_behind():
    uploads._upload.cache_clear()
    with FakeTensorMode():
        tokens = torch.empty(11, 12)
        assert on_kernel("unpatchify")(tokens, GRIDS, (1, 2, 2), 3, flat=True).shape == (132,)
    assert uploads._upload.cache_info().currsize == 0


def test_fixed_frequencies_are_no_inference_tensor():
    rotary_triton._fixed.cache_clear()
    rotary_kernels.frequencies.cache_clear()
    with torch.inference_mode():
        assert not rotary_triton._table(torch.zeros(1, 3), None, [4, 2, 2], [1e4] * 3).is_inference()


@each_call
def test_what_is_saved(call):
    """What the formula needs, as it came or as it is handed on: no copy, and nothing else of its size."""
    fresh, _ = with_grad(call.inputs, [name for name in call.inputs if name != "coords"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outs = tensors(on_kernel(call.op)(**fresh))
    named = {name: t for name, t in (*fresh.items(), *enumerate(outs)) if isinstance(t, torch.Tensor)}
    first = next(t for t in fresh.values() if isinstance(t, torch.Tensor))
    size = min([named[name].numel() for name in call.saves], default=first.numel())
    weights = {t.data_ptr() for name, t in named.items() if "weight" in str(name)}
    large = {t.data_ptr() for t in saved if t.numel() >= size and t.is_floating_point()} - weights
    assert large == {named[name].data_ptr() for name in call.saves}


def test_graphs_are_refused():
    """A graph would keep the GPU that was emulated when it was traced."""
    x = torch.randn(4, 8)
    for fullgraph in (True, False):
        fn = torch.compile(lambda x: ops.norm_modulate(x, None, None, None), backend="eager", fullgraph=fullgraph)
        with pytest.raises(Exception, match="emulated_gpu: expected calls of ops outside torch.compile"):
            fn(x)
