"""What every kernel family must show by default, compiled for sm_90 and executed by the emulator: the error rule,
isolation, NaN that is never read, and a planted fault that the rule finds. In bfloat16 and with the configs that a GPU
gets, on the cases that share their kernels with the fewest others: test_emulated_indexing.py, test_emulated_<family>.py and
kernels/PROOF.md have the rest.
"""

import kernel_inputs
import pytest
import torch
from kernel_checks import Guarded, Misled, Short
from kernel_inputs import GRIDS, attention_tiles, draw, ints, on_kernel
from op_checks import gradients, same_bits, tensors, with_grad

pytest.importorskip("triton")
from sora_fast.kernels import attention, convolution, modulation, normalization, patches, rotary  # noqa: E402
from sora_fast.testing import assert_matches, cases  # noqa: E402

pytestmark = pytest.mark.usefixtures("emulated_sm90")

# op: module of its kernels, one whose last program is left out, that one's case, and the cases of the error rule
KERNELS = {
    "patch_embed": (patches, "weight_kernel", 0, (0, 1, 2)), "unpatchify": (patches, "permute_kernel", 0, (0, 1)),
    "norm_modulate": (modulation, "forward_kernel", 0, (0, 1, 8)),
    "gate_residual": (modulation, "backward_kernel", 0, (0, 1)),
    "gate_residual_norm_modulate": (modulation, "reduce_slots_kernel", 0, (0, 1)),
    "qk_norm_rope": (rotary, "backward_kernel", 0, (0, 7)), "varlen_attention": (attention, "dkdv_kernel", 0, (0, 1, 3)),
    "causal_conv3d": (convolution, "dgrad_kernel", 5, (1, 3, 5)),
    "norm_act_conv3d": (convolution, "forward_kernel", 1, (1, 5)),
    "norm_act": (normalization, "merge_stats_kernel", 2, (0, 2)),
}


def inputs_of(op):
    return [inputs for _, inputs in cases(op, torch.bfloat16)]


@pytest.mark.parametrize("op", KERNELS)
def test_error_rule(op):
    for place in KERNELS[op][3]:
        # every other gradient of stride 0
        assert_matches(op, on_kernel(op), inputs_of(op)[place], flat_cotangent=place % 2 == 1)


@pytest.mark.parametrize("op", KERNELS)
def test_a_program_left_out_fails(op, monkeypatch):
    module, kernel, place, _ = KERNELS[op]
    inputs = inputs_of(op)[place]
    memory = Guarded()
    monkeypatch.setattr(module, "torch", memory)  # what was not written must not hold an earlier call's numbers
    assert_matches(op, on_kernel(op), inputs)
    memory.assert_whole()
    whole = getattr(module, kernel)
    wrong = Misled(whole) if module is attention else Short(whole, 0 if kernel == "reduce_slots_kernel" else None)
    monkeypatch.setattr(module, kernel, wrong)
    with pytest.raises(AssertionError, match=op):
        assert_matches(op, on_kernel(op), inputs)


# ------------------------------------------------------------------------------------------------------- isolation
def _isolated():
    """(op, inputs, what of them is poisoned, where): rows of one sample, a token, a pixel or a whole sample."""
    rows = ints(*[0] * 5, *[1] * 11, *[2] * 6)
    for op in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        yield op, kernel_inputs.modulation(op, rows, 22, 3, 24), ("x", "y"), (rows == 1,)
    yield "qk_norm_rope", kernel_inputs.rotary(20, norm="rms_all", whole=False), ("q", "k", "coords"), (7,)
    for norm, place in (("rms", (slice(None), slice(None), 1, 2, 3)), ("group", (1,))):
        yield "norm_act", kernel_inputs.normalization((2, 6, 3, 4, 5), norm=norm, groups=2), ("x",), place
    for op in ("causal_conv3d", "norm_act_conv3d"):
        yield op, kernel_inputs.convolution(op, weight=draw(6, 8, 3, 1, 1)), ("x", "cache"), (1,)
    six = slice(0, 6 * 12), slice(0, 6)
    for op, name, place in (("patch_embed", "latents", six[0]), ("unpatchify", "tokens", six[1])):
        yield op, kernel_inputs.patches(op, GRIDS), (name,), (place,)


ISOLATED = list(_isolated())


@pytest.mark.parametrize("case", range(len(ISOLATED)), ids=[f"{place}-{case[0]}" for place, case in enumerate(ISOLATED)])
def test_isolation(case):
    """NaN in one sample, pixel or token changes no bit of the others' outputs and gradients."""
    op, inputs, names, place = ISOLATED[case]
    names = [name for name in names if name in inputs]
    leaves_of = [name for name in names if name != "coords"]
    results = []
    for poison in (False, True):
        mine = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        for name in names if poison else ():
            mine[name][place] = float("nan")
        fresh, leaves = with_grad(mine, leaves_of)
        outs = tensors(on_kernel(op)(**fresh))
        results.append(([o.detach() for o in outs], gradients(outs, leaves)))
    (want, want_grads), (got, got_grads) = results
    spoilt = torch.zeros(0)
    for a, b in (*zip(want, got, strict=True), *((want_grads[name], got_grads[name]) for name in leaves_of)):
        where = place if len(a) == len(inputs[names[0]]) or op.startswith("norm_act") else None
        if where is None:  # an output of another form: the first six of eleven tokens
            where = (slice(0, 6 * len(a) // 11),)
        kept = torch.ones(a.shape, dtype=torch.bool)
        kept[where] = False
        assert same_bits(a[kept], b[kept]) and not torch.isnan(b[kept]).any()
        spoilt = torch.cat([spoilt, torch.isnan(b[~kept]).float()])
    assert spoilt.any()


def test_isolation_of_attention(tma=False):
    """NaN and Inf in a sample, in its neighbours' last tiles or behind them, change no bit of the others."""
    inputs = kernel_inputs.attention((13, 21, 5), (30, 11, 9), 2, 1, 40, tail=3, return_lse=True)
    poisoned = dict(inputs)
    own_q, own_k = slice(13, 34), slice(30, 41)
    for name, rows in (("q", own_q), ("k", own_k), ("v", own_k)):
        poisoned[name] = inputs[name].clone()
        poisoned[name][rows] = float("inf") if name == "v" else float("nan")
    results = []
    for each in (inputs, poisoned):
        fresh, leaves = with_grad(each)
        with attention_tiles(16, 16, tma=tma):
            outs = tensors(on_kernel("varlen_attention")(**fresh))
            dout = torch.ones_like(outs[0])
            if each is poisoned:
                dout[own_q] = float("nan")
            dout[-3:] = float("nan")
            dlse = torch.where(outs[1] > -float("inf"), 1.0, float("nan"))
            results.append((*outs, *torch.autograd.grad(outs, list(leaves.values()), [dout, dlse])))
    for place, (want, got) in enumerate(zip(*results, strict=True)):
        rows, own = want.shape[0] if place != 1 else want.shape[1], own_q if place in (0, 1, 2) else own_k
        others = torch.ones(rows, dtype=torch.bool)
        others[own] = False
        pick = (lambda t, others=others: t[:, others]) if place == 1 else (lambda t, others=others: t[others])
        assert same_bits(pick(want), pick(got)) and not torch.isnan(pick(got)).any()
        assert torch.isneginf(want[:, -3:]).all() if place == 1 else not want[-3:].any()
    assert torch.isnan(results[1][0][own_q]).all()


def test_nan_behind_the_samples_is_never_read():
    """Nor in gradients there; an infinite weight, which 0 times would make NaN, does not reach it either."""
    rows = ints(*[0] * 4, -1, *[1] * 6, -1, -1, -1)
    for op in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate", "qk_norm_rope"):
        if op == "qk_norm_rope":
            inputs, names = kernel_inputs.rotary(14, norm="rms_head", angles="learned", rows=rows, whole=False), ("q", "k")
            inputs["coords"][rows < 0] = float("nan")
        else:
            inputs, names = kernel_inputs.modulation(op, rows, 14, 2, 8, affine=True), ("x", "y")
        for name in names:
            if name in inputs:
                inputs[name][rows < 0] = float("nan")
        fresh, leaves = with_grad(inputs, [name for name in inputs if name != "coords"])
        outs = tensors(on_kernel(op)(**fresh))
        tail = lambda t: (rows < 0).view(-1, *[1] * (t.dim() - 1))
        torch.autograd.backward(outs, [torch.where(tail(o), float("nan"), torch.ones_like(o)) for o in outs])
        for t in (*outs, *(leaf.grad for leaf in leaves.values())):
            assert torch.isfinite(t).all()
            assert len(t) != 14 or not t[rows < 0].any()
