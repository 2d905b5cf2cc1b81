"""The layers: drop-in for the plain modules both ways, same statistics at the start, streams that never mix.

`assert_streams` is the check of a stream; a layer that looks its past up by call order must fail it.
"""

import copy
import math
from functools import partial

import pytest
import torch
from float64_checks import assert_close, draw
from torch import nn

from sora_fast import Pack, ops
from sora_fast.nn import (
    CausalConv3d,
    FinalLayer,
    GroupNorm,
    Modulation,
    PatchEmbed3d,
    Residual,
    RMSNorm,
    StreamState,
    VarlenAttention,
    norm_act_conv,
)

PLANS = [(9,), (1,) * 9, (1, 4, 4), (3, 0, 5, 1), (0, 2, 7), (5, 2, 2), (8, 1)]
CONVOLUTIONS = {
    "3x3x3": dict(kernel_size=3),
    "time only": dict(kernel_size=(3, 1, 1)),
    "space only, halved": dict(kernel_size=(1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 0, 1)),
    "half the frames": dict(kernel_size=(3, 1, 1), stride=(2, 1, 1), phase=2),
    "a third of the frames": dict(kernel_size=(4, 3, 3), stride=(3, 1, 1), phase=1),
    "replicate": dict(kernel_size=3, padding_mode="replicate", time_pad="replicate"),
    "reflect, long memory": dict(kernel_size=(5, 3, 3), padding_mode="reflect"),
    "1x1x1": dict(kernel_size=1),
    "upsampled": dict(kernel_size=3, upsample=2),
}


assert_close = partial(assert_close, tolerance=1e-13)


def assert_streams(layer, whole, plan, x):
    """Over the chunks of `plan` two streams through one layer, interleaved, each give what one shot gives."""
    clips, states, parts = (x, -2 * x), (StreamState(), StreamState()), ([], [])
    start = 0
    for size in plan:
        for clip, state, part in zip(clips, states, parts, strict=True):
            part.append(layer(clip[:, :, start : start + size], state))
        start += size
    for clip, part in zip(clips, parts, strict=True):
        assert_close(torch.cat(part, dim=2), whole(clip))


# --------------------------------------------------------------------------------------------- drop-in
@pytest.mark.parametrize("settings", [
    dict(kernel_size=3, padding=1), dict(kernel_size=(3, 1, 1), padding=0), dict(kernel_size=(1, 3, 3), padding="valid"),
    dict(kernel_size=(3, 3, 5), padding="same"), dict(kernel_size=(2, 3, 3), stride=(2, 2, 1), padding=(0, 1, 2)),
    dict(kernel_size=3, padding=1, padding_mode="reflect"), dict(kernel_size=1, padding=0, bias=False),
    dict(kernel_size=3, padding=1, padding_mode="replicate", stride=2, dilation=1, groups=1),
])
def test_causal_conv_is_conv3d_on_a_clip_with_a_past_of_zeros(settings):
    """The same state_dict both ways, and nn.Conv3d's own numbers once kT - 1 frames of zeros stand before the clip."""
    ours, plain = CausalConv3d(4, 6, **settings).double(), nn.Conv3d(4, 6, **settings).double()
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    back = nn.Conv3d(4, 6, **settings).double()
    back.load_state_dict(ours.state_dict())
    assert torch.equal(back.weight, plain.weight)
    frames = plain.kernel_size[0] - 1
    x = draw(2, 4, 5, 7, 6)
    plain.padding = (0, *plain.padding[1:]) if isinstance(plain.padding, tuple) else plain.padding
    padded = torch.cat([x.new_zeros(2, 4, frames, 7, 6), x], dim=2)
    if settings["padding"] == "same":  # nn.Conv3d pads time on both sides there
        wanted = plain(padded)[:, :, frames // 2 : frames // 2 + 5]
    elif settings.get("padding_mode", "zeros") != "zeros":
        pad = plain.padding
        flat = padded.transpose(1, 2).flatten(0, 1)
        flat = nn.functional.pad(flat, (pad[2], pad[2], pad[1], pad[1]), mode=settings["padding_mode"])
        wanted = nn.functional.conv3d(flat.unflatten(0, (2, -1)).transpose(1, 2), plain.weight, plain.bias, plain.stride)
    else:
        wanted = plain(padded)
    assert_close(ours(x), wanted)


@pytest.mark.parametrize("ours, plain", [
    (lambda: CausalConv3d(5, 7, 3), lambda: nn.Conv3d(5, 7, 3)),
    (lambda: CausalConv3d(5, 7, (1, 3, 3), bias=False), lambda: nn.Conv3d(5, 7, (1, 3, 3), bias=False)),
    (lambda: GroupNorm(2, 8), lambda: nn.GroupNorm(2, 8)),
])
def test_the_same_seed_starts_from_the_same_numbers(ours, plain):
    torch.manual_seed(3)
    first = ours().state_dict()
    torch.manual_seed(3)
    second = plain().state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_group_norm_is_nn_group_norm_then_silu():
    plain = nn.GroupNorm(3, 12, eps=1e-3).double()
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    x = draw(2, 12, 3, 4, 5)
    for act in (None, "silu"):
        ours = GroupNorm(3, 12, eps=1e-3, act=act).double()
        ours.load_state_dict(plain.state_dict())
        nn.GroupNorm(3, 12).load_state_dict(ours.state_dict())
        wanted = plain(x) if act is None else nn.functional.silu(plain(x))
        assert_close(ours(x), wanted)
    assert list(GroupNorm(3, 12, affine=False).state_dict()) == []
    assert_close(GroupNorm(3, 12, affine=False)(x), nn.GroupNorm(3, 12, affine=False)(x))


def test_rms_norm_is_the_vector_over_its_length():
    ours = RMSNorm(6, act="silu").double()
    nn.init.normal_(ours.weight)
    x = draw(2, 6, 3, 4, 5)
    x[0, :, 1, 2, 3] = 0
    wanted = nn.functional.silu(nn.functional.normalize(x, dim=1) * math.sqrt(6) * ours.weight[:, None, None, None])
    assert_close(ours(x), wanted)
    assert (ours(x)[0, :, 1, 2, 3] == 0).all()


def test_patch_embed_is_conv3d():
    ours = PatchEmbed3d(4, 24, (2, 3, 2)).double()
    plain = nn.Conv3d(4, 24, (2, 3, 2), (2, 3, 2)).double()
    ours.proj.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.proj.state_dict())
    assert sorted(ours.state_dict()) == ["proj.bias", "proj.weight"]
    x = draw(2, 4, 4, 6, 8)
    wanted = plain(x).flatten(2).transpose(1, 2).reshape(-1, 24)
    assert_close(ours(x), wanted)
    assert_close(ours(list(x)), wanted)
    assert_close(ours(x.flatten(), [(2, 2, 4)] * 2), wanted)


def test_patch_embed_starts_like_the_official_one():
    bound = math.sqrt(6 / (4 * 2 * 2 + 384))
    weight = PatchEmbed3d(4, 384).proj.weight
    assert weight.abs().max() <= bound
    assert abs(weight.std() - bound / math.sqrt(3)) < 0.03 * bound


@pytest.mark.parametrize("ours, plain, x", [
    (CausalConv3d(4, 6, 3), nn.Conv3d(4, 6, 3, padding=1), (1, 4, 3, 8, 8)),
    (GroupNorm(2, 4), nn.GroupNorm(2, 4), (1, 4, 3, 8, 8)),
    (PatchEmbed3d(4, 8), nn.Conv3d(4, 8, (1, 2, 2), (1, 2, 2)), (1, 4, 3, 8, 8)),
])
def test_autocast_gives_the_plain_module_s_dtype(ours, plain, x):
    x = draw(*x, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == plain(x).dtype
        assert ours(x.bfloat16()).dtype == plain(x.bfloat16()).dtype
    assert ours(x).dtype == torch.float32


def test_norm_act_conv_is_the_norm_then_the_convolution():
    x, y = draw(1, 8, 4, 5, 6), draw(1, 3, 4, 5, 6, seed=1)
    for norm in (RMSNorm(8, act="silu").double(), GroupNorm(2, 8, act="silu").double()):
        conv = CausalConv3d(8, 3, 3).double()
        assert_close(norm_act_conv(norm, conv, x, residual=y), conv(norm(x)) + y)


# --------------------------------------------------------------------------------------------- streams
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_streams(name, plan):
    torch.manual_seed(0)
    conv, x = CausalConv3d(3, 4, **CONVOLUTIONS[name]).double(), draw(2, 3, 9, 5, 6)
    assert_streams(conv, conv, plan, x)
    norm = RMSNorm(3, act="silu").double()
    assert_streams(lambda x, state: norm_act_conv(norm, conv, x, state), lambda x: norm_act_conv(norm, conv, x), plan, x)
    with torch.no_grad():  # caches are written over there
        assert_streams(conv, conv, plan, x)


def test_a_layer_that_goes_by_call_order_fails_the_check():
    conv = CausalConv3d(3, 4, 3).double()

    class ByOrder(StreamState):
        calls = 0

        def get(self, module, default=None):
            ByOrder.calls += 1
            return super().get(ByOrder.calls % 3, default)

        def set(self, module, value):
            super().set(ByOrder.calls % 3, value)

    def layer(x, state):
        state.__class__ = ByOrder
        return conv(x, state)

    with pytest.raises(AssertionError):
        assert_streams(layer, conv, (3, 3, 3), draw(1, 3, 9, 5, 6))


def test_a_state_is_keyed_by_module():
    """Modules of one shape in another order, one skipped for a while, and a copy of a module: nothing mixes."""
    first, second = CausalConv3d(3, 3, 3).double(), CausalConv3d(3, 3, 3).double()
    twin = copy.deepcopy(first)
    x, state = draw(1, 3, 8, 4, 4), StreamState()
    outs = {first: [], second: [], twin: []}
    for place, chunk in enumerate(x.split(2, dim=2)):
        order = [first, second] if place % 2 else [second, first]
        for module in order + ([twin] if place >= 2 else []):
            outs[module].append(module(chunk, state))
    assert_close(torch.cat(outs[first], 2), first(x))
    assert_close(torch.cat(outs[second], 2), second(x))
    assert_close(torch.cat(outs[twin], 2), first(x[:, :, 4:]))


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_stream_holds_is_constant_and_its_own(grad):
    """nbytes is constant once full, and no cached frame keeps an activation alive or sees it change."""
    with torch.set_grad_enabled(grad):
        norm, conv, half = RMSNorm(4), CausalConv3d(4, 4, 3), CausalConv3d(4, 4, (3, 1, 1), (2, 1, 1), phase=2)
        state, sizes, kept = StreamState(), [], None
        for place in range(6):
            x = draw(1, 4, 5, 6, 6, seed=place, dtype=torch.float32)
            h = norm_act_conv(norm, conv, x, state)
            half(h, state)
            sizes.append(state.nbytes)
            for cache in state.tensors():
                assert cache.untyped_storage().nbytes() == cache.numel() * cache.element_size()
                assert cache.data_ptr() not in (x.data_ptr(), h.data_ptr())
            pointers = {cache.data_ptr() for cache in state.tensors()}
            assert grad or kept is None or pointers == kept, "without gradients the caches stay where they are"
            kept = pointers
        assert set(sizes) == {2 * 2 * 4 * 36 * 4}
        wanted = conv(norm(torch.cat([draw(1, 4, 5, 6, 6, seed=n, dtype=torch.float32) for n in (4, 5)], 2)))
        assert torch.allclose(h, wanted[:, :, 5:], atol=1e-5)


def test_a_copy_of_a_stream_goes_its_own_way():
    conv, x = CausalConv3d(3, 3, 3).double(), draw(1, 3, 6, 4, 4)
    with torch.no_grad():
        state = StreamState()
        conv(x[:, :, :2], state)
        fork = state.copy()
        conv(-x[:, :, 2:4], state)
        assert_close(conv(x[:, :, 2:], fork), conv(x)[:, :, 2:])


def test_gradients_flow_through_a_stream():
    conv, x = CausalConv3d(2, 2, 3).double(), draw(1, 2, 5, 4, 4).requires_grad_()
    weights = draw(1, 2, 5, 4, 4, seed=1)
    wanted = torch.autograd.grad((conv(x) * weights).sum(), [x, *conv.parameters()])
    state = StreamState()
    y = torch.cat([conv(part, state) for part in x.split([1, 3, 1], dim=2)], dim=2)
    for got, want in zip(torch.autograd.grad((y * weights).sum(), [x, *conv.parameters()]), wanted, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("call, words", [
    (lambda: CausalConv3d(3, 3, 3, dilation=2), "dilation 1"),
    (lambda: CausalConv3d(4, 4, 3, groups=2), "groups 1"),
    (lambda: CausalConv3d(3, 3, 3, padding="circular"), "padding as None"),
    (lambda: CausalConv3d(3, 3, 3, lookahead=1)(draw(1, 3, 2, 4, 4, dtype=torch.float32), StreamState()), "lookahead"),
    (lambda: norm_act_conv(GroupNorm(1, 3), CausalConv3d(3, 3, 3), torch.zeros(1, 3, 1, 4, 4), StreamState()), "GroupNorm"),
    (lambda: VarlenAttention(48, 5), "divide"),
])
def test_errors_are_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert ";" in str(caught.value) and "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------- packs
def test_modulation_and_final_layer_start_at_zero():
    parts = Modulation(16, 6)(draw(3, 16, dtype=torch.float32))
    assert len(parts) == 6 and all((part == 0).all() and part.shape == (3, 16) for part in parts)
    layer, rows = FinalLayer(16, 5), torch.tensor([0, 0, 1, 2], dtype=torch.int32)
    assert (layer(Residual(draw(4, 16, dtype=torch.float32)), draw(3, 16, dtype=torch.float32), rows) == 0).all()
    names = sorted(layer.state_dict())
    assert names == ["adaLN_modulation.1.bias", "adaLN_modulation.1.weight", "linear.bias", "linear.weight"]


def test_final_layer_is_the_paper_s():
    layer = FinalLayer(16, 5).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.1)
    x, c, rows = draw(4, 16), draw(2, 16, seed=1), torch.tensor([0, 1, 1, 1])
    shift, scale = (nn.functional.silu(c) @ layer.adaLN_modulation[1].weight.T + layer.adaLN_modulation[1].bias).chunk(2, 1)
    wanted = nn.functional.layer_norm(x, (16,), eps=1e-6) * (1 + scale[rows]) + shift[rows]
    assert_close(layer(Residual(x), c, rows.int()), layer.linear(wanted))
    y, gate = draw(4, 16, seed=2), draw(2, 16, seed=3)
    assert_close(layer(Residual(x - gate[rows] * y, y, gate), c, rows.int()), layer.linear(wanted))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_of_a_pack_is_each_sample_s_own(cross, qk_norm):
    """Against nn.functional's attention on each sample, a sample without text and a NaN tail among them."""
    torch.manual_seed(0)
    layer = VarlenAttention(64, 2, context_width=24 if cross else None, qk_norm=qk_norm).double()
    lengths = (3, 0, 2)
    pack = Pack([(2, 2, 2), (1, 1, 1), (1, 3, 1)], text_lengths=lengths).pad_to(15)
    x, text = draw(15, 64), draw(5, 24, seed=1)
    out = layer(x, pack, text if cross else None)
    texts = text.split(lengths)
    heads = lambda t: t.unflatten(-1, (2, 32)).transpose(0, 1)
    norm = lambda t, w: t if w is None else nn.functional.rms_norm(t, (32,), w, 1e-6)
    for tokens, seen, got in zip(pack.split(x), texts, pack.split(out), strict=True):
        if cross:
            q, (k, v) = layer.q(tokens), layer.kv(seen).chunk(2, -1)
        else:
            q, k, v = layer.qkv(tokens).chunk(3, -1)
        q, k, v = norm(heads(q), layer.q_norm), norm(heads(k), layer.k_norm), heads(v)
        inner = torch.zeros_like(q) if k.shape[1] == 0 else (q @ k.mT / math.sqrt(32)).softmax(-1) @ v
        assert_close(got, layer.proj(inner.transpose(0, 1).flatten(1)))


def test_rotation_needs_the_place_in_the_clip_and_nothing_else():
    """Scores depend on differences of places: a pack whose coords are shifted gives the same, one scaled does not."""
    torch.manual_seed(0)
    layer = VarlenAttention(64, 2, rope_axes=(8, 12, 12), theta=100.0).double()
    x = draw(12, 64)
    pack, moved, scaled = (Pack([(2, 2, 3)]) for _ in range(3))
    moved.coords, scaled.coords = pack.coords + 5, pack.coords * 2
    out = layer(x, pack)
    assert_close(layer(x, moved), out, tolerance=1e-12)
    assert (layer(x, scaled) - out).abs().max() > 1e-3 * out.abs().max()
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 32)).unbind(1)
    q, k = ops.qk_norm_rope(q, k, pack.coords, norm=None, axes=(8, 12, 12), theta=100.0)
    inner = (q.transpose(0, 1) @ k.permute(1, 2, 0) / math.sqrt(32)).softmax(-1) @ v.transpose(0, 1)
    assert_close(out, layer.proj(inner.transpose(0, 1).flatten(1)))
