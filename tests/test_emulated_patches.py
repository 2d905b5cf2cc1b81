"""The kernels of patch_embed and unpatchify, executed by the emulator."""

from math import prod

import op_checks
import pytest
import test_emulated_core
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, Short, assert_every_case
from kernel_inputs import DTYPES, GRIDS, on_kernel
from kernel_inputs import patches as inputs_of
from op_checks import same_bits, with_grad

from sora_fast import Pack, configs
from sora_fast.kernels import patches as kernels
from sora_fast.ops import uploads
from sora_fast.reference import patches as reference
from sora_fast.testing import assert_matches, cases

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("emulated_sm90")]

OPS = ("patch_embed", "unpatchify")


def tokens_of(grids):
    return sum(map(prod, grids))


def assert_close(op, inputs):
    # where there is no sample, the reference's unpatchify has no gradient at all, and ours is 0
    grads = op == "patch_embed" or len(inputs["grids"]) > 0
    op_checks.assert_close_to_reference(op, on_kernel(op), inputs, grads=grads)
    if not grads:
        fresh, leaves = with_grad(inputs)
        assert not torch.autograd.grad(on_kernel(op)(**fresh).sum(), [leaves["tokens"]])[0].any()


# ------------------------------------------------------------------------------------------------------ error rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_error_rule(op, dtype):
    assert_every_case(op, on_kernel(op), dtype)


# label: grids, tail, channels, patch, width; the blocks of tests are 32 tokens (16 of the weight's gradient, of unpatchify)
# and 16 columns
LAYOUTS = {
    "15 tokens, width 15": (((1, 3, 5),), 0, 3, (1, 2, 2), 15),
    "16 tokens, width 16": (((4, 2, 2),), 0, 16, (1, 2, 2), 16),
    "17 tokens, width 17, tail": (((1, 1, 17),), 3, 12, (1, 1, 2), 17),
    "31 tokens": (((31, 1, 1),), 0, 1, (2, 1, 1), 5),
    "32 tokens, samples of none": (((1, 1, 1),) * 4 + ((0, 3, 3), (3, 3, 3), (2, 0, 1), (1, 1, 1), (5, 5, 0)), 0, 4,
                                   (1, 2, 2), 8),
    "33 tokens, numbers one by one": (((1, 3, 11),), 0, 3, (1, 1, 1), 8),
    "48 channels": (((1, 2, 3), (1, 1, 1)), 1, 48, (1, 2, 2), 16),
    "a patch of 3 x 3": (((2, 2, 3), (1, 4, 1)), 2, 3, (2, 3, 3), 9),
    "pixels": (((1, 2, 3),), 1, 3, (2, 16, 16), 24),
    "a run of 5": (((1, 2, 2),), 0, 2, (1, 1, 5), 7),
    "no samples": ((), 0, 3, (1, 2, 2), 8),
    "no samples, tail": ((), 5, 3, (1, 2, 2), 8),
    "samples of nothing, tail": (((0, 1, 1), (2, 0, 3)), 4, 3, (1, 2, 2), 8),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("label", LAYOUTS)
def test_layouts(label, op):
    grids, tail, channels, patch, width = LAYOUTS[label]
    place = list(LAYOUTS).index(label) % 2
    assert_close(op, inputs_of(op, grids, tail, channels, patch, width, bias=place == 0, dtype=DTYPES[place]))


def test_width_of_a_model():
    inputs = inputs_of("patch_embed", ((1, 2, 3), (2, 2, 1)), 2, 16, (1, 2, 2), 384, dtype=torch.float16)
    with (configs.override("patches", "embed", kernels.GemmConfig(16, 128, 64, 4, 1)),
          configs.override("patches", "weight", kernels.GemmConfig(16, 128, 64, 4, 1))):
        assert_matches("patch_embed", on_kernel("patch_embed"), inputs)


@settings(op_checks.drawn, max_examples=12)
@given(grids=st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=5), tail=st.integers(0, 3),
       patch=st.tuples(*[st.integers(1, 3)] * 3), channels=st.integers(1, 5), width=st.sampled_from((1, 7, 16, 33)),
       bias=st.booleans(), dtype=st.sampled_from(DTYPES), block_k=st.sampled_from((16, 64)), op=st.sampled_from(OPS))
def test_drawn(grids, tail, patch, channels, width, bias, dtype, block_k, op):
    """Whole patches in a tile and patches in pieces, blocks of tokens that begin and end anywhere in samples."""
    config = kernels.GemmConfig(16, 16, block_k, 4, 1)
    with (configs.override("patches", "embed", config), configs.override("patches", "latents", config),
          configs.override("patches", "weight", config),
          configs.override("patches", "permute", kernels.PermuteConfig(16, 2, 2, 4))):
        assert_close(op, inputs_of(op, tuple(grids), tail, channels, patch, width, bias, dtype))


# --------------------------------------------------------------------------------------------------------- indexing
@pytest.mark.parametrize("patch", ((1, 2, 2), (2, 3, 1), (4, 1, 2), (1, 1, 1), (1, 2, 3)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_bit_for_bit(dtype, patch):
    test_emulated_core.test_patches_are_those_of_conv3d(patch, dtype)


@pytest.mark.parametrize("patch", ((1, 2, 2), (2, 3, 1), (1, 2, 3)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permutation_bit_for_bit(dtype, patch):
    """Every number is moved as it is, NaN included, and back."""
    inputs = inputs_of("unpatchify", GRIDS, 2, 3, patch, dtype=dtype)
    inputs["tokens"][3, 2] = float("nan")
    fresh, leaves = with_grad(inputs)
    flat = on_kernel("unpatchify")(**fresh)
    assert same_bits(flat, reference.unpatchify(inputs["tokens"], GRIDS, patch, 3))
    cotangent = torch.arange(flat.numel()).to(dtype)
    cotangent[11 * 3 * prod(patch):] = float("nan")
    (got,) = torch.autograd.grad(flat, [leaves["tokens"]], cotangent)
    _, again = with_grad(inputs)
    (want,) = torch.autograd.grad(reference.unpatchify(again["tokens"], GRIDS, patch, 3), [again["tokens"]], cotangent)
    assert torch.equal(got[:11], want[:11]) and not got[11:].any()


def test_forms():
    """A batch, a list, a flat buffer; grids as triples, a tensor, a Pack and a Pack with a tail."""
    clips = [torch.randn(3, t, 2 * h, 2 * w) for t, h, w in GRIDS]
    weight, bias = torch.randn(6, 3, 1, 2, 2), torch.randn(6)
    want = on_kernel("patch_embed")(clips, weight, bias)
    flat = torch.cat([clip.flatten() for clip in clips])
    pack = Pack(GRIDS)
    for grids in (GRIDS, [list(g) for g in GRIDS], torch.tensor(GRIDS), pack):
        assert same_bits(on_kernel("patch_embed")(flat, weight, bias, grids=grids), want)
    padded = on_kernel("patch_embed")(F.pad(flat, (0, 24), value=float("nan")), weight, bias, grids=pack.pad_to(13))
    assert same_bits(padded[:11], want) and not padded[11:].any()
    batch = torch.stack([clips[0], clips[0].flip(1)])
    got = on_kernel("patch_embed")(batch, weight, bias)
    # close only: the emulator's products are summed by NumPy, in an order that may depend on a token's place in its tile
    torch.testing.assert_close(got, torch.cat([on_kernel("patch_embed")([clip], weight, bias) for clip in batch]))
    turned = batch.transpose(3, 4).contiguous().transpose(3, 4)
    assert same_bits(on_kernel("patch_embed")(turned, weight, bias), got)
    strided = torch.stack([flat, flat], 1)[:, 0]
    channels_last = weight.to(memory_format=torch.channels_last_3d)
    assert same_bits(on_kernel("patch_embed")(strided, channels_last, bias, grids=GRIDS), want)
    identity = torch.eye(12).view(12, 1, 2, 2, 3).permute(0, 4, 1, 2, 3)
    tokens = on_kernel("patch_embed")(flat.mul(4).round(), identity, grids=pack)  # values that three TF32 products keep
    for grids in (GRIDS, pack):
        views = on_kernel("unpatchify")(tokens, grids, (1, 2, 2), 3)
        assert len(views) == len(clips)
        assert all(torch.equal(view, clip.mul(4).round()) for view, clip in zip(views, clips, strict=True))


def test_thousands_of_samples():
    """The search finds each among 3,000, a third of them without tokens."""
    grids = ((0, 1, 1), (1, 1, 1), (1, 1, 0)) * 999 + ((1, 1, 2),)
    latents = torch.arange(tokens_of(grids)).float()
    with configs.override("patches", "embed", kernels.GemmConfig(128, 16, 16, 4, 1)):
        out = on_kernel("patch_embed")(latents, torch.ones(1, 1, 1, 1, 1), grids=grids)
    assert torch.equal(out[:, 0], latents)


# -------------------------------------------------------------------------------------------- what is read and written
@pytest.mark.parametrize("op", OPS)
def test_nan_in_the_tail_is_never_read(op):
    """Nor in gradients there; an infinite weight, which 0 times would make NaN, does not reach the tail either."""
    inputs = inputs_of(op, GRIDS, tail=7)
    if op == "patch_embed":
        inputs["weight"][0, 0] = float("inf")
        inputs["latents"][: 11 * 12] = inputs["latents"][: 11 * 12].abs() + 1
    fresh, leaves = with_grad(inputs)
    out = on_kernel(op)(**fresh)
    cotangent = torch.ones_like(out).view(18, -1)
    cotangent[11:] = float("nan")
    out.backward(cotangent.view(out.shape))
    assert not torch.isnan(out).any() and not out.view(18, -1)[11:].any()
    for name, leaf in leaves.items():
        assert not torch.isnan(leaf.grad).any(), name
        if name in ("latents", "tokens"):
            assert not leaf.grad.view(18, -1)[11:].any() and leaf.grad.view(18, -1)[:11].all()


@pytest.mark.parametrize("op", OPS)
def test_nothing_outside_is_read_or_written(op, monkeypatch):
    for channels, patch in ((3, (1, 2, 2)), (5, (2, 1, 3))):
        inputs = inputs_of(op, GRIDS, tail=2, channels=channels, patch=patch, width=17)
        for name, value in inputs.items():  # numbers of others before and after
            if isinstance(value, torch.Tensor):
                room = torch.full((value.numel() + 64,), float("nan"))
                inputs[name] = room[32:32 + value.numel()].view(value.shape).copy_(value)
        guarded = Guarded()
        monkeypatch.setattr(kernels, "torch", guarded)
        assert_matches(op, on_kernel(op), inputs)
        assert len(guarded.buffers) == {"patch_embed": 4, "unpatchify": 2}[op]
        guarded.assert_whole()


@triton.jit
def places_kernel(tokens, grids, cu_seqlens, out, samples: tl.int64, steps: tl.int64, C: tl.constexpr, PT: tl.constexpr,
                  PH: tl.constexpr, PW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where the rows of the patches of some tokens begin, (BLOCK_R, BLOCK_N)."""
    n, r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    _, corner, row, plane, volume = kernels._places(tl.load(tokens + n), grids, cu_seqlens, samples, steps, C, PT, PH, PW)
    at = kernels._rows_at(0, corner, row, plane, volume, PT, PH, BLOCK_R)
    tl.store(out + r[:, None] * BLOCK_N + n[None, :], at)


def test_numbers_beyond_two_to_the_31():
    """Clips of more than 2^31 numbers each: of 4 channels and 8 tokens of them, and of the tail, where all rows begin."""
    grids = ((2, 2**14, 2**13), (0, 1, 1), (3, 2**14, 2**13))
    ends = [0, 2**28, 2**28, 2**28 + 3 * 2**27]
    tokens = [0, 2**27 + 5, 2**28 - 1, 2**28, 2**28 + 2**27 + 7 * 2**13 + 11, 2**28 + 3 * 2**27 - 1, 2**28 + 3 * 2**27,
              2**33 + 1]
    out = torch.empty(16, len(tokens), dtype=torch.int64)
    tables = (torch.tensor(table, dtype=torch.int32) for table in (grids, ends))
    places_kernel[(1,)](torch.tensor(tokens), *tables, out, 3, 2, C=4, PT=2, PH=2, PW=2, BLOCK_N=len(tokens), BLOCK_R=16)
    for n, token in enumerate(tokens):
        sample = next((s for s in (0, 2) if ends[s] <= token < ends[s + 1]), None)
        (t, h, w), first = ((1, 1, 1), token) if sample is None else (grids[sample], ends[sample])
        a, b, c = (token - first) // (h * w), (token - first) // w % h, (token - first) % w
        for r in range(16):
            channel, frame, line = r // 4, a * 2 + r // 2 % 2, b * 2 + r % 2
            want = first * 32 + ((channel * 2 * t + frame) * 2 * h + line) * 2 * w + 2 * c
            assert int(out[r, n]) == want, (token, r)


# ------------------------------------------------------------------------------------------------------- autograd
@pytest.mark.parametrize("op", OPS)
def test_gradients_with_strides_of_0(op):
    inputs = inputs_of(op, GRIDS, tail=1)
    results = []
    for cotangent in (torch.ones(()), torch.ones(12 * (20 if op == "patch_embed" else 12))):
        fresh, leaves = with_grad(inputs)
        out = on_kernel(op)(**fresh)
        shaped = cotangent.expand(out.shape) if cotangent.dim() == 0 else cotangent.view(out.shape)
        results.append(torch.autograd.grad(out, list(leaves.values()), shaped))
    assert all(map(same_bits, *results)) and results[0][0].any()


def test_autocast_is_that_of_linear():
    inputs = inputs_of("patch_embed", GRIDS)
    with torch.autocast("cpu", torch.float16):
        got = on_kernel("patch_embed")(**inputs)
    cast = {name: t.half() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    assert same_bits(got, on_kernel("patch_embed")(**cast))


def test_host_grids_are_uploaded_once():
    inputs = inputs_of("patch_embed", ((1, 3, 2), (7, 1, 1)))
    on_kernel("patch_embed")(**inputs)
    before = uploads._upload.cache_info()
    on_kernel("patch_embed")(**inputs)
    after = uploads._upload.cache_info()
    assert after.hits == before.hits + 1 and after.misses == before.misses
    on_kernel("patch_embed")(**{**inputs, "grids": Pack(inputs["grids"])})
    assert uploads._upload.cache_info() == after


def test_too_many_tokens():
    with pytest.raises(ValueError) as caught:
        uploads._upload(((2**16, 2**15, 1),), torch.device("cpu"))
    op_checks.assert_sentence(str(caught.value), "grids")


# ----------------------------------------------------------------------------------------------------------- wrong
@pytest.mark.parametrize("op, kernel", (("patch_embed", "embed_kernel"), ("patch_embed", "latents_kernel"),
                                        ("patch_embed", "weight_kernel"), ("unpatchify", "permute_kernel")))
def test_wrong_kernels_fail(op, kernel, monkeypatch):
    label, inputs = next(iter(cases(op, torch.float32)))
    monkeypatch.setattr(kernels, "torch", Guarded())  # what was not written must not hold an earlier call's numbers
    assert_matches(op, on_kernel(op), inputs)
    monkeypatch.setattr(kernels, kernel, Short(getattr(kernels, kernel)))
    with pytest.raises(AssertionError, match=op):
        assert_matches(op, on_kernel(op), inputs)


def test_a_swapped_axis_fails():
    """Height and width of the patch swapped in the weight: right in shape, wrong in numbers."""
    label, inputs = next(iter(cases("patch_embed", torch.float16)))
    swapped = lambda weight, **rest: on_kernel("patch_embed")(weight=weight.transpose(3, 4), **rest)
    with pytest.raises(AssertionError, match="patch_embed"):
        assert_matches("patch_embed", swapped, inputs)
