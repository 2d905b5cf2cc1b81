"""patch_embed and unpatchify."""

import op_checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_checks import double, same_bits, with_grad

from sora_fast import Pack, ops, reference
from sora_fast.ops.patches import clips
from sora_fast.testing import assert_matches

OPS = ("patch_embed", "unpatchify")
GRIDS = ((2, 1, 3), (0, 2, 2), (1, 2, 2))  # 6 + 0 + 4 tokens

test_error_rule = op_checks.error_rule(OPS)


def good(op):
    if op == "patch_embed":
        return dict(latents=torch.randn(10 * 12), weight=torch.randn(5, 3, 1, 2, 2), bias=torch.randn(5),
                    grids=torch.tensor(GRIDS))
    return dict(tokens=torch.randn(10, 12), grids=torch.tensor(GRIDS), patch=(1, 2, 2), channels=3)


test_every_tensor_is_checked = op_checks.every_tensor_is_checked(OPS, good, free=("grids",))
_META = torch.zeros(3, 3, dtype=torch.int64, device="meta")
test_refusals = op_checks.refusals([
    ("patch_embed", "weight of a 2-D convolution", dict(weight=torch.zeros(5, 3, 2, 2)), ("weight", "(5, 3, 2, 2)")),
    ("patch_embed", "bias of another length", dict(bias=torch.zeros(4)), ("bias", "(5,)", "(4,)")),
    ("patch_embed", "latents in another dtype", dict(latents=torch.zeros(120).double()), ("float64", "float32")),
    ("patch_embed", "a flat buffer without grids", dict(grids=None), ("grids", "None")),
    ("patch_embed", "half a patch", dict(latents=torch.zeros(122)), ("whole patches of 12", "122")),
    ("patch_embed", "a buffer too short", dict(latents=torch.zeros(108)), ("at least the 120 elements", "108")),
    ("patch_embed", "a batch with grids", dict(latents=torch.zeros(1, 3, 1, 2, 2)), ("flat buffer",)),
    ("patch_embed", "a number for latents", dict(latents=3, grids=None), ("latents", "list")),
    ("patch_embed", "a clip of other channels", dict(latents=[torch.zeros(4, 1, 2, 2)], grids=None),
     ("latents[0]", "(4, 1, 2, 2)")),
    ("patch_embed", "clips of two dtypes", dict(latents=[torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2).half()],
                                               grids=None), ("latents[1]", "float16")),
    ("patch_embed", "a height that does not fit", dict(latents=[torch.zeros(3, 1, 7, 4)], grids=None),
     ("H of latents[0]", "multiple of the patch's 2", "got 7", "6 or 8")),
    ("patch_embed", "a width below the patch", dict(latents=torch.zeros(1, 3, 1, 2, 1), grids=None),
     ("W of latents", "got 1", "to 2")),
    ("patch_embed", "frames that do not fit", dict(latents=torch.zeros(1, 3, 5, 2, 2), grids=None,
                                                   weight=torch.zeros(5, 3, 4, 2, 2)), ("T of", "got 5", "4 or 8")),
    ("patch_embed", "grids on a device", dict(grids=_META), ("grids as host data", "meta")),
    ("patch_embed", "grids of floats", dict(grids=torch.tensor(GRIDS).float()), ("grids", "float32")),
    ("patch_embed", "grids of pairs", dict(grids=((1, 2),)), ("triples", "(1, 2)")),
    ("patch_embed", "grids below 0", dict(grids=((1, 2, -1),)), ("0 or more", "-1")),
    ("patch_embed", "a number for grids", dict(grids=4), ("grids", "int")),
    ("unpatchify", "tokens of another width", dict(tokens=torch.zeros(10, 11)), ("tokens", "12", "(10, 11)")),
    ("unpatchify", "tokens too few", dict(tokens=torch.zeros(9, 12)), ("at least the 10 tokens", "got 9")),
    ("unpatchify", "grids on a device", dict(grids=_META), ("grids as host data", "meta")),
    ("unpatchify", "a patch of two", dict(patch=(2, 2)), ("patch", "pt, ph, pw")),
    ("unpatchify", "a patch of 0", dict(patch=(0, 2, 2)), ("patch", "1 or more")),
    ("unpatchify", "a patch of one number", dict(patch=2), ("patch", "2")),
    ("unpatchify", "no channels", dict(channels=0), ("channels", "got 0")),
    ("unpatchify", "channels of a float", dict(channels=3.0), ("channels", "3.0")),
    ("unpatchify", "grids None", dict(grids=None), ("grids",)),
], good)


# --------------------------------------------------------------------------------------------------- gradcheck
test_gradcheck = op_checks.gradchecks([
    ("patch_embed, tail", lambda x, w, b: reference.patch_embed(x, w, b, grids=((1, 2, 1), (2, 1, 1))),
     (double(5 * 4), double(3, 2, 1, 1, 2), double(3))),
    ("unpatchify, tail", lambda t: reference.unpatchify(t, ((1, 2, 1), (2, 1, 1)), (1, 1, 2), 2), (double(5, 4),)),
])


# ---------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("patch", ((1, 2, 2), (2, 3, 1), (4, 1, 2), (1, 1, 1)))
@pytest.mark.parametrize("dtype", op_checks.DTYPES, ids=str)
def test_equals_conv3d_bit_for_bit(dtype, patch, backend):
    """On small integers, which every dtype sums exactly: a batch, a list of ragged clips, and their flat buffer."""
    draw = lambda *shape: torch.randint(-2, 3, shape).to(dtype)
    weight, bias = draw(4, 3, *patch), draw(4)
    pt, ph, pw = patch
    samples = [draw(3, t * pt, h * ph, w * pw) for t, h, w in GRIDS]
    want = [F.conv3d(x[None].float(), weight.float(), bias.float(), stride=patch)[0].flatten(1).t().to(dtype)
            if x.numel() else draw(0, 4) for x in samples]
    got = ops.patch_embed(samples, weight, bias, backend=backend)
    assert got.dtype == dtype and torch.equal(got, torch.cat(want))
    flat = torch.cat([x.flatten() for x in samples])
    for grids in (GRIDS, torch.tensor(GRIDS), Pack(GRIDS), [list(g) for g in GRIDS]):
        assert torch.equal(ops.patch_embed(flat, weight, bias, grids=grids, backend=backend), got)
    batch = torch.stack([samples[0], samples[0].flip(1)])
    got = ops.patch_embed(batch, weight, bias, backend=backend)
    assert torch.equal(got, torch.cat([ops.patch_embed([x], weight, bias, backend=backend) for x in batch]))
    assert torch.equal(ops.patch_embed(batch.transpose(3, 4).contiguous().transpose(3, 4), weight, bias), got)


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("patch", ((1, 2, 2), (2, 3, 1)))
def test_unpatchify_order_and_inverse(patch, backend):
    """A token's numbers are in (pt, ph, pw, C) order; with an identity weight of that order it undoes patch_embed."""
    pt, ph, pw = patch
    channels, numel = 3, 3 * pt * ph * pw
    tokens = torch.arange(10 * numel).reshape(10, numel).float()
    views = ops.unpatchify(tokens, GRIDS, patch, channels, backend=backend)
    assert [v.shape for v in views] == [(3, t * pt, h * ph, w * pw) for t, h, w in GRIDS]
    start = 0
    for view, (t, h, w) in zip(views, GRIDS, strict=True):
        for n in range(t * h * w):
            a, b, c = n // (h * w), n // w % h, n % w
            cube = view[:, a * pt : a * pt + pt, b * ph : b * ph + ph, c * pw : c * pw + pw]
            assert torch.equal(cube.permute(1, 2, 3, 0).flatten(), tokens[start + n])
        start += t * h * w
    flat = ops.unpatchify(tokens, GRIDS, patch, channels, flat=True, backend=backend)
    assert all(v.untyped_storage().data_ptr() == views[0].untyped_storage().data_ptr() for v in views)
    assert all(map(torch.equal, clips(flat, GRIDS, patch, channels), views))
    identity = torch.eye(numel).reshape(numel, pt, ph, pw, channels).permute(0, 4, 1, 2, 3)
    assert torch.equal(ops.patch_embed(views, identity, backend=backend), tokens)
    assert torch.equal(ops.patch_embed(flat, identity, grids=GRIDS, backend=backend), tokens)


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_is_that_of_linear(low):
    for dtype in op_checks.DTYPES:
        latents, weight, bias = (torch.randn(*s).to(dtype) for s in ((10 * 12,), (5, 3, 1, 2, 2), (5,)))
        patches = reference.patches.cut(latents, GRIDS, (1, 2, 2), 3)
        with torch.autocast("cpu", low):
            want = F.linear(patches, weight.flatten(1), bias)
            got = ops.patch_embed(latents, weight, bias, grids=GRIDS)
            exact = ops.patch_embed(latents, weight, bias, grids=GRIDS, backend="reference")
            empty = ops.patch_embed([], weight, bias)
        assert got.dtype == want.dtype == exact.dtype == empty.dtype
        assert same_bits(got, want) and empty.shape == (0, 5)
        cast = (t if dtype == torch.float64 else t.to(low) for t in (latents, weight, bias))
        assert same_bits(exact, reference.patch_embed(*cast, grids=GRIDS))


# ---------------------------------------------------------------------------------------------------- isolation
@pytest.mark.parametrize("poison", (1.0, float("nan"), float("inf")))
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_isolation_and_tail(op, backend, poison):
    inputs = {**good(op), "grids": GRIDS}
    name = "latents" if op == "patch_embed" else "tokens"
    whole = inputs[name].reshape(10, 12)
    tail = torch.full((3, 12), float("nan"))
    extra = {} if op == "patch_embed" else dict(flat=True)

    def outcome(change, bias):
        rows = whole.clone()
        if change:
            rows[6:] += poison
        rows = torch.cat([rows, tail])
        fresh, leaves = with_grad({**inputs, name: rows.flatten() if op == "patch_embed" else rows})
        if op == "patch_embed" and not bias:
            fresh["bias"] = None
            leaves.pop("bias")
        out = getattr(ops, op)(**fresh, **extra, backend=backend)
        cotangent = torch.ones_like(out)
        cotangent.view(13, -1)[10:] = float("nan")
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
        return out.reshape(13, -1), dict(zip(leaves, grads, strict=True))

    for bias in (True, False):
        (want, grads), (got, other) = outcome(False, bias), outcome(True, bias)
        assert not same_bits(want, got) and same_bits(want[:6], got[:6])
        assert not want[10:].any() and all(torch.isfinite(g).all() for g in (want, *grads.values()))
        assert same_bits(grads[name].reshape(13, 12)[:6], other[name].reshape(13, 12)[:6])
        assert not grads[name].reshape(13, 12)[10:].any()


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_empty(backend):
    weight = torch.randn(5, 3, 1, 2, 2).requires_grad_()
    for latents, grids in (([], None), (torch.zeros(0, 3, 2, 4, 4), None), (torch.zeros(0), ()),
                           (torch.zeros(0), ((0, 1, 1),)), ([torch.zeros(3, 0, 2, 2)], None)):
        out = ops.patch_embed(latents, weight, grids=grids, backend=backend)
        assert out.shape == (0, 5)
        assert not torch.autograd.grad(out.sum(), weight)[0].any()
    out = ops.patch_embed(torch.full((24,), float("nan")), weight, grids=(), backend=backend)
    assert out.shape == (2, 5) and not out.any()
    for grids in (((1, 1, 1),), torch.tensor([[1, 1, 1]], dtype=torch.int32)):  # no columns: tokens of no numbers
        latents, none = torch.ones(24, requires_grad=True), torch.zeros(0, 3, 1, 2, 2)
        out = ops.patch_embed(latents, none, grids=grids, backend=backend)
        assert out.shape == (2, 0)
        assert not torch.autograd.grad(out.sum(), latents)[0].any()
    assert ops.unpatchify(torch.zeros(0, 12), (), (1, 2, 2), 3, backend=backend) == []
    (one,) = ops.unpatchify(torch.ones(1, 12), ((1, 1, 1),), (1, 2, 2), 3, backend=backend)
    assert one.shape == (3, 1, 2, 2)


# --------------------------------------------------------------------------------------------- drawn and wrong
@op_checks.drawn
@given(grids=st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=4), tail=st.integers(0, 2),
       patch=st.tuples(*[st.integers(1, 3)] * 3), channels=st.integers(1, 4), bias=st.booleans(),
       dtype=st.sampled_from(op_checks.DTYPES))
def test_drawn_packs(grids, tail, patch, channels, bias, dtype):
    tokens, numel = sum(t * h * w for t, h, w in grids) + tail, channels * patch[0] * patch[1] * patch[2]
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    inputs = dict(latents=draw(tokens * numel), weight=draw(5, channels, *patch), bias=draw(5) if bias else None,
                  grids=grids)
    op_checks.assert_close_to_reference("patch_embed", lambda **a: ops.patch_embed(**a, backend="torch"), inputs)
    rows = draw(tokens, numel)
    flat = ops.unpatchify(rows, grids, patch, channels, flat=True)
    order = torch.arange(numel).reshape(*patch, channels).permute(3, 0, 1, 2).flatten()
    cut = reference.patches.cut(flat, grids, patch, channels)
    assert torch.equal(cut[: tokens - tail], rows[: tokens - tail, order])


def test_wrong_kernels_fail():
    """Height and width of the patch swapped; the last token dropped; channels last instead of first."""
    inputs = dict(latents=torch.randn(10 * 12).bfloat16(), weight=torch.randn(5, 3, 1, 2, 2).bfloat16(), grids=GRIDS)
    wrong = (
        lambda latents, weight, grids: ops.patch_embed(latents, weight.transpose(3, 4), grids=grids),
        lambda latents, weight, grids: ops.patch_embed(latents, weight, grids=(*grids[:-1], (1, 1, 3))),
    )
    for kernel in wrong:
        with pytest.raises(AssertionError, match="patch_embed"):
            assert_matches("patch_embed", kernel, inputs)
    tokens = dict(tokens=torch.randn(10, 12), grids=GRIDS, patch=(1, 2, 2), channels=3)
    swapped = lambda tokens, **a: ops.unpatchify(tokens.reshape(10, 3, 4).transpose(1, 2).flatten(1), **a)
    with pytest.raises(AssertionError, match="unpatchify"):
        assert_matches("unpatchify", swapped, tokens)
