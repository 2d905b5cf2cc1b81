"""What every kernel family must show in Triton's interpreter by default: the error rule on the validation cases, indexing to
the bit, isolation, and a planted fault that the rule finds. In float32 alone; test_kernels_<family>.py has the rest.
"""

import kernel_inputs
import pytest
import torch
import torch.nn.functional as F
from convolution_checks import EXACT, integers
from kernel_checks import Guarded, Misled, Short
from kernel_inputs import GRIDS, attention_tiles, convolution_tiles, draw, ints, normalization_tiles, on_kernel, rotary_tiles
from op_checks import gradients, same_bits, tensors, with_grad

from sora_fast import Pack, nn, reference, use_backend
from sora_fast.kernels import attention, convolution, modulation, normalization, patches, rotary
from sora_fast.testing import assert_matches, cases

RAW = ("varlen_attention_forward", "varlen_attention_backward")  # without a backward of their own
# op: module of its kernels, and one whose last program is left out
KERNELS = {
    "patch_embed": (patches, "weight_kernel"), "unpatchify": (patches, "permute_kernel"),
    "norm_modulate": (modulation, "forward_kernel"), "gate_residual": (modulation, "backward_kernel"),
    "gate_residual_norm_modulate": (modulation, "join_kernel"), "qk_norm_rope": (rotary, "backward_kernel"),
    "varlen_attention": (attention, "dkdv_kernel"), "causal_conv3d": (convolution, "dgrad_kernel"),
    "norm_act_conv3d": (convolution, "forward_kernel"), "norm_act": (normalization, "join_stats_kernel"),
}


@pytest.fixture(autouse=True)
def few_programs():
    """The interpreter takes its time for each program."""
    with rotary_tiles(), convolution_tiles():
        yield


@pytest.mark.parametrize("op", (*KERNELS, *RAW))
def test_error_rule(op):
    of_convolution = 0, 1, 2, 7, 8  # of 27 taps, each of which the interpreter goes through: integers prove them below
    for place, (_, inputs) in enumerate(cases(op, torch.float32)):
        if op.endswith("conv3d") and place in of_convolution:
            continue
        # every other gradient of stride 0
        assert_matches(op, on_kernel(op), inputs, grads=op not in RAW, flat_cotangent=op not in RAW and place % 2 == 1)


@pytest.mark.parametrize("op", KERNELS)
def test_a_program_left_out_fails(op, monkeypatch):
    module, kernel = KERNELS[op]
    place = {"norm_act": 2, "causal_conv3d": 5, "norm_act_conv3d": 5}.get(op, 0)  # a group norm; few taps
    inputs = [inputs for _, inputs in cases(op, torch.float32)][place]
    monkeypatch.setattr(module, "torch", Guarded())  # what was not written must not hold an earlier call's numbers
    assert_matches(op, on_kernel(op), inputs)
    whole = getattr(module, kernel)
    wrong = Misled(whole) if module is attention else Short(whole, 0 if kernel == "join_kernel" else None)
    monkeypatch.setattr(module, kernel, wrong)
    with pytest.raises(AssertionError, match=op):
        assert_matches(op, on_kernel(op), inputs)


# -------------------------------------------------------------------------------------------------------- indexing
@pytest.mark.parametrize("op", ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"))
def test_modulation_takes_each_tokens_own_row(op):
    """Small integers, and a norm that leaves them alone, forward and backward."""
    rows = Pack([(2, 2, 3), (0, 1, 1), (3, 1, 2)], modulation="frame").pad_to(21).rows
    count = int(rows.max()) + 1
    inputs = kernel_inputs.modulation(op, rows, 21, count, 5)
    if op == "gate_residual":
        for name in ("x", "y", "gate"):
            inputs[name] = torch.randint(-4, 5, inputs[name].shape).float()
        fresh, leaves = with_grad(inputs)
        got = on_kernel(op)(**fresh)
        index, inside = rows.clamp(min=0).long(), (rows >= 0)[:, None]
        assert torch.equal(got, torch.where(inside, fresh["x"] + fresh["gate"][index] * fresh["y"], 0))
        got.sum().backward()
        want = torch.stack([inputs["y"][rows == row].sum(0) for row in range(count)])
        assert torch.equal(leaves["gate"].grad, want)
    else:
        inputs |= dict(x=torch.zeros(21, 5), shift=torch.arange(count)[:, None].expand(-1, 5).float())
        if "y" in inputs:
            inputs["y"] = torch.zeros(21, 5)
        fresh, leaves = with_grad(inputs)
        got = tensors(on_kernel(op)(**fresh))[-1]
        assert torch.equal(got, torch.where(rows >= 0, rows, 0)[:, None].expand(-1, 5).float())
        got.sum().backward()
        want = torch.stack([(rows == row).sum() for row in range(count)])[:, None].expand(-1, 5)
        assert torch.equal(leaves["shift"].grad, want.float())


@pytest.mark.parametrize("pairing", ("interleaved", "half"))
def test_rotation_by_nothing_moves_nothing(pairing):
    """Small integers and angles of 0: outputs are inputs, and the gradient of freqs is a sum of integers."""
    coords = Pack([(2, 2, 3), (0, 1, 1), (3, 1, 2)]).pad_to(21)
    rows, at = coords.rows, coords.coords
    q, k = (torch.randint(-4, 5, (21, 3, 11)).float() for _ in range(2))
    d_q, d_k = (torch.randint(-4, 5, (21, 3, 11)).float() for _ in range(2))
    freqs = torch.zeros(3, 3, 4, requires_grad=True)
    outs = on_kernel("qk_norm_rope")(q, k, at, norm=None, freqs=freqs, pairing=pairing, rows=rows)
    inside = (rows >= 0)[:, None, None]
    assert torch.equal(outs[0], torch.where(inside, q, 0)) and torch.equal(outs[1], torch.where(inside, k, 0))
    torch.autograd.backward(outs, (d_q, d_k))
    first, second = (slice(0, 8, 2), slice(1, 8, 2)) if pairing == "interleaved" else (slice(0, 4), slice(4, 8))
    turned = sum(x[..., first] * d[..., second] - x[..., second] * d[..., first] for x, d in ((q, d_q), (k, d_k)))
    assert torch.equal(freqs.grad, torch.einsum("na,nhp->ahp", at.float(), torch.where(inside, turned, 0)))


@pytest.mark.parametrize("mask", (dict(causal=True), dict(window=(17, 5)), dict(window=(40, -1))), ids=str)
def test_attention_sees_what_the_dense_mask_shows(mask):
    """A uniform softmax: the mean over what is seen, counted by a mask written out. A tile of keys is not full."""
    queries, keys = 50, 61
    inputs = kernel_inputs.attention((queries,), (keys,), 1, 1, 16, **mask)
    inputs["q"] = torch.zeros_like(inputs["q"])
    left, right = inputs.get("window", (-1, -1))
    right = 0 if inputs.get("causal") else right
    distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - (keys - queries)
    seen = ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
    with attention_tiles(16, 16):
        out, lse = on_kernel("varlen_attention_forward")(**inputs)
    count = seen.sum(1)
    assert torch.equal(torch.isneginf(lse[0]), count == 0)
    torch.testing.assert_close(lse[0][count > 0], count[count > 0].float().log())
    torch.testing.assert_close(out[:, 0], (seen.float() @ inputs["v"][:, 0]) / count.clamp(min=1)[:, None])


@pytest.mark.parametrize("tma", (False, True))
@pytest.mark.parametrize("setting", [
    dict(cache=2, residual=True), dict(time_pad="replicate", frames=3, phase=1), EXACT[5], EXACT[24],
    dict(kernel=(2, 2, 4), padding=(1, 2, 0, 1))], ids=str)
def test_convolution_of_integers(setting, tma):
    """Output by output, in the gathering kernel and, where it takes the call, in the one whose tiles TMA loads."""
    inputs, want = integers(dict(batch=1) | setting)
    with convolution_tiles(64, 16, 16, tma=tma, wgrad=(16, 16, 0, 32)):
        fresh, leaves = with_grad({name: value for name, value in inputs.items() if value is not None})
        got = on_kernel("causal_conv3d")(**fresh)
        assert same_bits(got.detach(), want)
        weights = torch.randint(-2, 3, got.shape).float()
        found = torch.autograd.grad(got, list(leaves.values()), weights)
    twin, twins = with_grad({name: value for name, value in inputs.items() if value is not None})
    wanted = torch.autograd.grad(reference.causal_conv3d(**_filled(twin)), list(twins.values()), weights, allow_unused=True)
    for name, a, b in zip(leaves, found, wanted, strict=True):
        assert torch.equal(a, torch.zeros_like(a) if b is None else b), name


def _filled(inputs):
    """As ops fill in what the definition must be given."""
    kernel, stride = inputs["weight"].shape[2:], inputs.get("stride", 1)
    padding = inputs.get("padding", (kernel[2] // 2,) * 2 + (kernel[1] // 2,) * 2)
    return inputs | dict(padding=padding, stride=(stride,) * 3 if isinstance(stride, int) else stride)


def test_norms_of_signs_are_signs():
    """A channel, a pixel or a group of +1 and -1 has deviation 1, so that weight and bias come out as integers."""
    sign = lambda *shape: torch.tensor([1.0, -1.0]).repeat(shape[1] // 2).view(1, -1, 1, 1, 1).expand(shape).clone()
    weight, bias = torch.arange(6.0), torch.arange(6.0) - 2
    x = sign(2, 6, 3, 4, 5)
    for norm in ("rms", "group"):
        with normalization_tiles(8):
            got = on_kernel("norm_act")(x, weight, bias, norm=norm, groups=3, eps=0.0, act=None)
        assert torch.equal(got, x * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1))


@pytest.mark.parametrize("patch", ((1, 2, 2), (2, 3, 1)))
def test_patches_are_those_of_conv3d(patch, dtype=torch.float32):
    """On small integers, which every dtype sums exactly: conv3d's own numbers and gradients, and unpatchify's way back."""
    inputs = kernel_inputs.patches("patch_embed", GRIDS, 2, 3, patch, 6, dtype=dtype, small=True)
    fresh, leaves = with_grad(inputs)
    got = on_kernel("patch_embed")(**fresh)
    cotangent = torch.randint(-2, 3, got.shape).to(dtype)
    cotangent[11:] = float("nan")
    grads = dict(zip(leaves, torch.autograd.grad(got, list(leaves.values()), cotangent), strict=True))
    pt, ph, pw = patch
    whole, mine = with_grad({name: value.float() for name, value in inputs.items() if name != "grids"})
    wanted, start = [], 0
    for t, h, w in GRIDS:
        end = start + 3 * t * pt * h * ph * w * pw
        if end > start:
            clip = whole["latents"][start:end].view(1, 3, t * pt, h * ph, w * pw)
            wanted.append(F.conv3d(clip, whole["weight"], whole["bias"], stride=patch)[0].flatten(1).t())
        start = end
    want = torch.cat(wanted)
    assert torch.equal(got[:11], want.to(dtype)) and not got[11:].any()
    for name, grad in zip(mine, torch.autograd.grad(want, list(mine.values()), cotangent[:11].float()), strict=True):
        assert torch.equal(grads[name], grad.to(dtype)), name

    numbers = 3 * pt * ph * pw
    identity = torch.eye(numbers, dtype=dtype).view(numbers, pt, ph, pw, 3).permute(0, 4, 1, 2, 3)
    tokens = on_kernel("patch_embed")(inputs["latents"], identity, grids=GRIDS)
    back = on_kernel("unpatchify")(tokens, GRIDS, patch, 3, flat=True)
    assert torch.equal(back[:11 * numbers], inputs["latents"][:11 * numbers]) and not back[11 * numbers:].any()


# ------------------------------------------------------------------------------------------------------- isolation
def _isolated():
    """(op, inputs, what of them is poisoned, where): rows of one sample, a token, a pixel or a whole sample."""
    rows = ints(*[0] * 5, *[1] * 11, *[2] * 6)
    for op in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        yield op, kernel_inputs.modulation(op, rows, 22, 3, 24), ("x", "y"), (rows == 1,)
    for norm in ("rms_all", "layer_head"):
        yield "qk_norm_rope", kernel_inputs.rotary(20, norm=norm, whole=False), ("q", "k", "coords"), (7,)
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


def test_a_stream_is_one_shot():
    """Frames in chunks through a convolution with a stride in time: integers, so to the bit."""
    conv = nn.CausalConv3d(2, 3, (3, 1, 3), stride=(2, 1, 2), phase=1)
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-3, 4, conv.weight.shape)), conv.bias.copy_(torch.randint(-3, 4, (3,)))
    x = torch.randint(-3, 4, (1, 2, 5, 2, 5)).float()
    with use_backend("triton"):
        want = conv(x)
        for plan in ((1, 1, 1, 1, 1), (2, 3), (4, 1)):
            state = nn.StreamState()
            assert same_bits(torch.cat([conv(part, state) for part in x.split(plan, dim=2)], dim=2), want)
