"""What is registered with PyTorch for the kernels, once for all families: schemas and fakes, and one graph for all sizes.

A graph cannot be traced inside emulated_gpu: test_interpreted.py runs this file in a process that has Triton's interpreter.
"""

import kernel_inputs
import op_checks
import pytest
import torch
from kernel_inputs import GRIDS, draw, ints, on_kernel

from sora_fast import Pack
from sora_fast.kernels.convolution_settings import ConvSettings
from sora_fast.ops import uploads


def _custom_ops():
    """(torch op, arguments) of every op that a wrapper registers, with all that may be None there and not there."""
    ops = torch.ops.sora_fast
    for op in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        inputs = kernel_inputs.modulation(op, ints(0, 0, 2, -1), 4, 3, 8, affine=True)
        norm = inputs.get("norm")
        arguments = [inputs.get(name) for name in ("x", "y", "gate", "shift", "scale", "rows", "weight", "bias")]
        for save in (True, False):
            yield ops.modulation_forward, (*arguments, norm, 1e-6, save, torch.float16)
        stats = ops.modulation_forward(*arguments, norm, 1e-6, True, torch.float16)[-1] if norm else None
        outs = (None if op == "norm_modulate" else torch.ones(4, 8)), (torch.ones(4, 8) if norm else None)
        there = [value is not None for value in (arguments[0], *arguments[1:5], *arguments[6:])]
        for wanted in (there, [True] + [False] * 6):
            yield ops.modulation_backward, (*outs, *arguments, stats, norm, wanted)

    for norm in ("rms", "group"):
        inputs = kernel_inputs.normalization((2, 6, 2, 3, 4), norm=norm, groups=3, bias=torch.float16)
        arguments, facts = [inputs[name] for name in ("x", "weight", "bias")], (norm, 3, 1e-6, "silu")
        yield ops.norm_act_forward, (*arguments, *facts)
        y, *stats = ops.norm_act_forward(*arguments, *facts)
        for wanted in ([True] * 3, [True, False, False], [False, True, True]):
            yield ops.norm_act_backward, (torch.ones_like(y), *arguments, stats[0] if stats else None, *facts, wanted)

    for norm, angles in (("rms_all", "full"), ("layer_head", "per head"), (None, None)):
        inputs = kernel_inputs.rotary(4, 2, 2, norm=norm, angles=angles, rows=ints(0, 0, 1, -1))
        get = inputs.get
        axes, theta = ([], []) if get("axes") is None else (list(get("axes")), list(get("theta")))
        affine = [get(name) for name in ("q_weight", "k_weight", "q_bias", "k_bias")]
        settings = (get("coords"), *affine, get("freqs"), get("rows"), norm, axes, theta, get("pairing"), 1e-6)
        for k in (get("k"), None):
            yield ops.rotary_forward, (get("q"), k, *settings)
        there = [value is not None for value in (get("q"), get("k"), *affine, get("freqs"))]
        for wanted in (there, [True] + [False] * 6):
            yield ops.rotary_backward, (torch.ones(4, 2, 12), torch.ones(4, 2, 12), get("q"), get("k"), *settings, wanted)

    arguments = tuple(kernel_inputs.attention((5, 3), (4, 6), 2, 1, 16).values())
    for options in ((None, False, -1, -1), (0.3, True, 4, -1)):
        yield ops.attention_forward, (*arguments, *options)
        out, lse, parts = ops.attention_forward(*arguments, *options)
        for dlse, also in ((None, parts), (torch.ones_like(lse), None)):
            yield ops.attention_backward, (torch.ones_like(out), dlse, *arguments[:3], out, lse, also, *arguments[3:],
                                           *options)

    for op in ("causal_conv3d", "norm_act_conv3d"):
        inputs, normed = kernel_inputs.convolution(op, weight=draw(6, 8, 3, 1, 1)), op == "norm_act_conv3d"
        x, weight, bias, cache, residual, *of_norm = [
            inputs.get(name) for name in ("x", "weight", "bias", "cache", "residual", "norm_weight", "norm_bias")]
        norm = ("rms", 1, 1e-6, "silu") if normed else ()
        settings = ConvSettings((3, 1, 1), (1, 1, 1), (0, 0, 0, 0), "zeros", "zeros", 0, 0, 1, True, *norm).values
        yield ops.convolution_forward, (x, weight, bias, cache, residual, *of_norm, *settings)
        for wanted in ([True] * 4 + [normed] * 2, [False, True] + [False] * 4):
            dy, dcache = draw(2, 6, 2, 3, 4), draw(2, 8, 2, 3, 4)
            yield ops.convolution_backward, (dy, dcache, x, weight, bias, cache, *of_norm, None, wanted, *settings)

    inputs = kernel_inputs.patches("patch_embed", GRIDS, 1, small=True)
    latents, weight = inputs["latents"].nan_to_num(0.0), inputs["weight"]  # opcheck takes NaN for different from NaN
    table = uploads.uploaded_grids(GRIDS, torch.device("cpu"))
    yield ops.patches_grids, (latents, [1, 2, 3, 0, 1, 1])
    for bias in (inputs["bias"], None):
        yield ops.patch_embed_forward, (latents, weight, bias, *table)
    for wanted in ([True] * 3, [True, False, False], [False, False, True]):
        yield ops.patch_embed_backward, (torch.ones(12, 20), latents, weight, *table, wanted)
    yield ops.patches_permute, (torch.ones(12, 12), *table, [1, 2, 2], 3, False)
    yield ops.patches_permute, (torch.ones(144), *table, [1, 2, 2], 3, True)


def test_opcheck():
    checked = set()
    for op, arguments in _custom_ops():
        torch.library.opcheck(op.default, arguments)
        checked.add(str(op).rpartition(".")[2])
    registered = {name.rpartition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("sora_fast::")}
    assert {name for name in registered if "_cuda_" not in name} == checked


# ------------------------------------------------------------------------------------------------------------ graphs
def _compiled():
    """(op, fixed arguments, inputs of a size)."""
    def rows(size):
        return Pack([(1, 1, size - 2), (1, 1, 2)]).pad_to(size + 2).rows

    for op in ("norm_modulate", "gate_residual_norm_modulate"):
        yield op, {}, lambda size, op=op: {name: value for name, value in kernel_inputs.modulation(
            op, rows(size), size + 2, 2, 8, affine=True).items() if isinstance(value, torch.Tensor)}
    rotary = kernel_inputs.rotary(2, norm="layer_head", angles="learned")
    yield "qk_norm_rope", dict(norm="layer_head", pairing=rotary["pairing"]), lambda size: {
        name: value for name, value in kernel_inputs.rotary(size, norm="layer_head", angles="learned").items()
        if isinstance(value, torch.Tensor)}
    yield "norm_act", dict(norm="group", groups=2), lambda size: {
        name: value for name, value in kernel_inputs.normalization((1, 4, size, 2, 3), bias=torch.float32).items()
        if isinstance(value, torch.Tensor)}
    yield "varlen_attention", dict(causal=True), lambda size: kernel_inputs.attention(
        {17: (9, 8), 16: (0, 16), 15: (5, 5, 5)}[size], {17: (10, 9), 16: (1, 17), 15: (6, 6, 6)}[size], 2, 1, 16)
    yield "norm_act_conv3d", dict(return_cache=True), lambda size: {
        name: value for name, value in kernel_inputs.convolution(
            "norm_act_conv3d", x=draw(1, 8, 2, size, 4), cache=draw(1, 8, 2, size, 4), weight=draw(6, 8, 3, 1, 1),
            residual=None).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("op, fixed, inputs_of", _compiled(), ids=lambda value: value if isinstance(value, str) else "")
def test_one_graph_for_all_sizes(op, fixed, inputs_of):
    """No break, and no new graph after the second distinct size; another number of samples makes one at most."""
    counts = op_checks.graphs(on_kernel(op, **fixed), inputs_of, (17, 16, 15), None)
    assert max(counts) <= (3 if op == "varlen_attention" else 2), counts


PACKS = (Pack([(1, 2, 2), (1, 3, 3)]), Pack([(1, 2, 3), (2, 3, 3), (1, 1, 1)]), Pack([(2, 1, 2), (0, 1, 1)] * 4),
         Pack([(1, 1, 1), (1, 4, 4)]).pad_to(20))


@pytest.mark.parametrize("op", ("patch_embed", "unpatchify"))
def test_packs_are_data_of_one_graph(op):
    """Grids of other sizes and other sample counts."""
    weight = draw(5, 3, 1, 2, 2)

    def fn(x, grids):
        if op == "patch_embed":
            return on_kernel(op)(x, weight, grids=grids)
        return on_kernel(op)(x, grids, (1, 2, 2), 3, flat=True)

    def inputs_for(which):
        tokens = torch.randn(PACKS[which].num_tokens, 12)
        return dict(x=tokens.flatten() if op == "patch_embed" else tokens, grids=PACKS[which])

    counts = op_checks.graphs(fn, inputs_for, range(len(PACKS)), None)
    assert counts[1] == counts[-1] <= 2, counts
