"""Indexing of every kernel family to the bit, on small integers; the error rule on every case; streams. Executed by the
emulator."""

import kernel_inputs
import pytest
import torch
import torch.nn.functional as F
from convolution_checks import EXACT, integers
from kernel_inputs import GRIDS, attention_tiles, convolution_tiles, normalization_tiles, on_kernel
from op_checks import same_bits, tensors, with_grad

pytest.importorskip("triton")
from sora_fast import Pack, nn, reference, use_backend  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.ci, pytest.mark.usefixtures("emulated_sm90")]


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
