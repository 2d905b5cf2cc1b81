"""qk_norm_rope."""

import op_checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_checks import double, same_bits, with_grad

from sora_fast import Pack, ops, reference
from sora_fast.testing import assert_matches

OPS = ("qk_norm_rope",)

test_error_rule = op_checks.error_rule(OPS)

PACK = Pack([(2, 1, 2), (0, 1, 1), (1, 2, 1)])


def good(op):
    return dict(q=torch.randn(6, 4, 16), k=torch.randn(6, 2, 16), coords=PACK.coords, axes=(4, 4, 6),
                q_weight=torch.randn(16), k_weight=torch.randn(16), q_bias=torch.randn(16), k_bias=torch.randn(16),
                rows=PACK.rows)


test_every_tensor_is_checked = op_checks.every_tensor_is_checked(OPS, good, free=("coords",))


def test_freqs_are_checked():
    inputs = {name: value for name, value in good("").items() if name != "axes"}
    for freqs, part in ((torch.zeros(3, 9), "16"), (torch.zeros(2, 4), "(3, R/2)"), (torch.zeros(4), "(3, R/2)"),
                        (torch.zeros(3, 2, 4), "(3, 4, R/2)"), (torch.zeros(3, 4, 8), "key heads"),
                        (torch.zeros(3, 4).int(), "int32"), (torch.zeros(3, 4, device="meta"), "device"),
                        ([1.0], "tensor")):
        op_checks.assert_refused(lambda freqs=freqs: ops.qk_norm_rope(**inputs, freqs=freqs), "qk_norm_rope", part)


test_refusals = op_checks.refusals([("qk_norm_rope", *row) for row in (
    ("q of rank 2", dict(q=torch.zeros(6, 64)), ("q", "(N, H, E)", "(6, 64)")),
    ("k of another length", dict(k=torch.zeros(5, 2, 16)), ("k", "(5, 2, 16)")),
    ("k of another head dim", dict(k=torch.zeros(6, 2, 8)), ("k", "16", "(6, 2, 8)")),
    ("k in another dtype", dict(k=torch.zeros(6, 2, 16).half()), ("k", "float16")),
    ("coords of two axes", dict(coords=torch.zeros(6, 2)), ("coords", "(6, 3)", "(6, 2)")),
    ("coords of another length", dict(coords=torch.zeros(5, 3)), ("coords", "(5, 3)")),
    ("coords of truth values", dict(coords=torch.zeros(6, 3).bool()), ("coords", "bool")),
    ("unknown norm", dict(norm="rms"), ("'rms_head'", "'rms'")),
    ("unknown pairing", dict(pairing="pairs"), ("'interleaved', 'half'", "'pairs'")),
    ("weights without a norm", dict(norm=None), ("q_weight", "norm")),
    ("weights of a head for all heads", dict(norm="rms_all"), ("q_weight", "(64,)", "(16,)")),
    ("k_weight without k", dict(k=None), ("k_weight", "k=None")),
    ("q_weight of another length", dict(q_weight=torch.zeros(8)), ("q_weight", "(16,)", "(8,)")),
    ("an odd axis", dict(axes=(3, 4, 4)), ("even", "(3, 4, 4)")),
    ("two axes", dict(axes=(4, 4)), ("axes", "(4, 4)")),
    ("axes of floats", dict(axes=(4.0, 4, 4)), ("axes", "4.0")),
    ("more axes than a head has", dict(axes=(8, 8, 8)), ("16", "24")),
    ("two thetas", dict(theta=(1e4, 1e3)), ("theta",)),
    ("theta 0", dict(theta=0), ("theta", "got 0")),
    ("theta as text", dict(theta="1e4"), ("theta",)),
    ("eps None", dict(eps=None), ("eps", "None")),
    ("rows of another length", dict(rows=torch.zeros(5, dtype=torch.int32)), ("rows", "(6,)")),
    ("rows that fall", dict(rows=torch.tensor([1, 0, 0, 0, 0, 0], dtype=torch.int32)), ("never to fall",)),
)], good)


# --------------------------------------------------------------------------------------------------- gradcheck
AT = double(3, 3)
test_gradcheck = op_checks.gradchecks([
    ("rms_head, weights, float coords", lambda q, k, c, w, v: reference.qk_norm_rope(
        q, k, c, axes=(2, 2, 0), q_weight=w, k_weight=v),
     (double(3, 2, 6), double(3, 1, 6), AT, double(6), double(6) + 1)),
    ("rms_all, freqs", lambda q, k, f, w: reference.qk_norm_rope(q, k, AT, freqs=f, norm="rms_all", q_weight=w),
     (double(3, 2, 4), double(3, 1, 4), double(3, 2), double(8))),
    ("layer_head, bias, freqs per head, half", lambda q, k, f, b: reference.qk_norm_rope(
        q, k, AT, freqs=f, norm="layer_head", q_bias=b, pairing="half"),
     (double(3, 2, 6), double(3, 2, 6) + 1, double(3, 2, 2), double(6))),
    ("no norm, rows", lambda q, k: reference.qk_norm_rope(
        q, k, AT, axes=(2, 0, 2), norm=None, rows=torch.tensor([0, 0, -1])), (double(3, 2, 4), double(3, 1, 4))),
])


@pytest.mark.parametrize("head_dim, axes", ((128, (44, 42, 42)), (72, (24, 24, 24)), (64, (24, 20, 20)), (16, (8, 4, 4)),
                                            (256, (44, 42, 42))))
def test_axes_fit_the_head(head_dim, axes):
    """Wan's share is the default, for every head dim; all is rotated of a head of up to 128."""
    q = torch.randn(6, 1, head_dim)
    given = [ops.qk_norm_rope(q, None, PACK.coords, axes=chosen, backend=backend)[0]
             for chosen in (None, axes) for backend in ("reference", "torch")]
    assert torch.equal(given[0], given[2]) and torch.equal(given[1], given[3])


# ---------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("pairing", ("interleaved", "half"))
@pytest.mark.parametrize("theta", (1e4, (1e4, 100.0, 7.0)))
@pytest.mark.parametrize("axes", ((4, 4, 6), (0, 8, 8), (2, 0, 0), (0, 0, 0)))
def test_complex_multiplication(axes, theta, pairing, backend):
    """Each pair is one complex number, turned by exp(i angle); entries past R pass through with their own bits."""
    q, coords = double(6, 3, 16), PACK.coords
    thetas = theta if isinstance(theta, tuple) else (theta,) * 3
    angles = [[float(at[a]) * thetas[a] ** (-2 * j / axes[a]) for a in range(3) for j in range(axes[a] // 2)]
              for at in coords]
    turn = torch.polar(torch.ones(6, sum(axes) // 2, dtype=torch.float64), torch.tensor(angles).double().reshape(
        6, sum(axes) // 2))
    rotated = sum(axes)
    head = q[..., :rotated]
    pairs = head.unflatten(-1, (-1, 2)) if pairing == "interleaved" else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn[:, None]) if rotated else pairs
    turned = turned.flatten(-2) if pairing == "interleaved" else turned.transpose(-1, -2).flatten(-2)
    got, other = ops.qk_norm_rope(q, None, coords, norm=None, axes=axes, theta=theta, pairing=pairing,
                                  backend=backend)
    assert other is None
    torch.testing.assert_close(got[..., :rotated], turned, rtol=1e-6, atol=1e-6)
    assert same_bits(got[..., rotated:], q[..., rotated:])


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("pairing", ("interleaved", "half"))
@pytest.mark.parametrize("dtype", op_checks.DTYPES, ids=str)
def test_which_entries_are_paired_bit_for_bit(dtype, pairing, backend):
    """At the origin nothing turns; with one rotated axis the other axes' pairs keep their bits."""
    q = torch.randint(-8, 9, (6, 2, 16)).to(dtype)
    still, _ = ops.qk_norm_rope(q, None, torch.zeros(6, 3), norm=None, axes=(4, 4, 6), pairing=pairing, backend=backend)
    assert torch.equal(still, q)
    coords = torch.zeros(6, 3, dtype=torch.int64)
    coords[:, 1] = 1
    got, _ = ops.qk_norm_rope(q, None, coords, norm=None, axes=(4, 4, 6), pairing=pairing, backend=backend)
    moved = {4, 5, 6, 7} if pairing == "interleaved" else {2, 3, 9, 10}
    for entry in range(16):
        assert torch.equal(got[..., entry], q[..., entry]) == (entry not in moved), entry


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_freqs(backend):
    q, k, coords, freqs = double(6, 4, 16), double(6, 4, 16) + 1, double(6, 3), double(3, 4, 5)
    got_q, got_k = ops.qk_norm_rope(q, k, coords, norm=None, freqs=freqs, backend=backend)
    for n in range(6):
        for h in range(4):
            angle = sum(coords[n, a] * freqs[a, h] for a in range(3))
            for got, x in ((got_q, q), (got_k, k)):
                a, b = x[n, h, 0:10:2], x[n, h, 1:10:2]
                torch.testing.assert_close(got[n, h, 0:10:2], a * angle.cos() - b * angle.sin())
                torch.testing.assert_close(got[n, h, 1:10:2], a * angle.sin() + b * angle.cos())
    # axes and theta are the frequencies that freqs would hold
    steps = lambda size: 1e4 ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
    table = torch.block_diag(*(steps(size)[None] for size in (4, 4, 6)))
    a = ops.qk_norm_rope(q, k, coords, freqs=table, backend=backend)
    b = ops.qk_norm_rope(q, k, coords, axes=(4, 4, 6), backend=backend)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_norms(backend):
    q, k = double(6, 4, 16), double(5, 2, 16)
    weight, bias = double(16), double(16) + 1
    run = lambda **options: ops.qk_norm_rope(q, k, None, **options, backend=backend)
    settings = dict(q_weight=weight, k_weight=weight, q_bias=bias, k_bias=bias, eps=0.1)
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(run(**settings), (rms(q) * weight + bias, rms(k) * weight + bias))
    layer = lambda x: F.layer_norm(x, (16,), weight, bias, 0.1)
    torch.testing.assert_close(run(norm="layer_head", **settings), (layer(q), layer(k)))
    wide = double(64)
    got = run(norm="rms_all", q_weight=wide, k_weight=wide[:32], eps=0.1)
    torch.testing.assert_close(got, ((rms(q.flatten(1)) * wide).view_as(q), (rms(k.flatten(1)) * wide[:32]).view_as(k)))
    assert all(map(same_bits, run(norm=None), (q, k)))


def test_autocast_keeps_angles_exact():
    """The angles of learned frequencies are a matrix product, which autocast would round to 8 bits."""
    q, freqs = torch.randn(4, 2, 16), torch.randn(3, 2, 8)
    coords = torch.tensor([[0, 0, 0], [16, 250, 3], [100, 31, 77], [1, 1, 1]])
    for backend in op_checks.BACKENDS:
        want = ops.qk_norm_rope(q, None, coords, freqs=freqs, backend=backend)[0]
        with torch.autocast("cpu", torch.bfloat16):
            got = ops.qk_norm_rope(q, None, coords, freqs=freqs, backend=backend)[0]
        assert same_bits(got, want)


# ---------------------------------------------------------------------------------------------------- isolation
@pytest.mark.parametrize("poison", (1.0, float("nan"), float("inf")))
@pytest.mark.parametrize("backend", op_checks.BACKENDS)
@pytest.mark.parametrize("norm", ("rms_head", "rms_all"))
def test_isolation_and_tail(norm, backend, poison):
    pack = PACK.pad_to(9)
    width = 16 if norm == "rms_head" else 64
    inputs = dict(q=torch.randn(9, 4, 16), k=torch.randn(9, 4, 16), coords=pack.coords.float(),
                  q_weight=torch.randn(width), freqs=torch.randn(3, 8))

    def outcome(change):
        fresh, leaves = with_grad(inputs)
        with torch.no_grad():
            for name in ("q", "k", "coords"):
                fresh[name][6:] = float("nan")
                if change:
                    fresh[name][4:6] += poison
        q, k = ops.qk_norm_rope(**fresh, norm=norm, rows=pack.rows, backend=backend)
        cotangent = torch.ones_like(q)
        cotangent[6:] = float("nan")
        torch.autograd.backward([q, k], [cotangent, cotangent])
        return q, k, {name: leaf.grad for name, leaf in leaves.items()}

    (q, k, grads), (other_q, other_k, other_grads) = outcome(False), outcome(True)
    assert not same_bits(q, other_q)
    assert same_bits(q[:4], other_q[:4]) and same_bits(k[:4], other_k[:4])
    assert not q[6:].any() and not k[6:].any()
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), name
        if name in ("q", "k", "coords"):
            assert same_bits(grad[:4], other_grads[name][:4]) and not grad[6:].any(), name


@pytest.mark.parametrize("backend", op_checks.BACKENDS)
def test_empty(backend):
    for tokens in (0, 1):
        fresh, leaves = with_grad(dict(q=torch.randn(tokens, 4, 16), k=torch.randn(tokens, 2, 16),
                                       q_weight=torch.randn(64)))
        q, k = ops.qk_norm_rope(**fresh, coords=torch.zeros(tokens, 3), axes=(4, 4, 4), norm="rms_all",
                                backend=backend)
        assert q.shape == (tokens, 4, 16) and k.shape == (tokens, 2, 16)
        (q.sum() + k.sum()).backward()
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.values())


@op_checks.drawn
@given(tokens=st.integers(1, 9), heads=st.integers(1, 3), copies=st.integers(1, 2), pairs=st.integers(2, 6),
       norm=st.sampled_from(("rms_head", "rms_all", "layer_head", None)), learned=st.booleans(),
       pairing=st.sampled_from(("interleaved", "half")), whole=st.booleans(),
       dtype=st.sampled_from(op_checks.DTYPES))
def test_drawn_shapes(tokens, heads, copies, pairs, norm, learned, pairing, whole, dtype):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    head_dim = 2 * pairs + 2
    inputs = dict(q=draw(tokens, heads * copies, head_dim), k=draw(tokens, heads, head_dim), norm=norm,
                  pairing=pairing, coords=torch.randint(0, 9, (tokens, 3)) if whole else draw(tokens, 3), eps=0.1)
    inputs |= dict(freqs=torch.randn(3, pairs)) if learned else dict(axes=(2, 0, 2 * pairs - 2))
    if norm is not None:
        inputs |= dict(q_weight=draw(heads * copies * head_dim if norm == "rms_all" else head_dim))
    op_checks.assert_close_to_reference("qk_norm_rope", lambda **a: ops.qk_norm_rope(**a, backend="torch"), inputs)


def test_wrong_kernels_fail():
    """The other pairing; height and width swapped; the rotation turned backwards; a weight left out."""
    inputs = dict(q=torch.randn(6, 4, 16).bfloat16(), k=torch.randn(6, 4, 16).bfloat16(),
                  coords=Pack([(1, 2, 3)]).coords, q_weight=torch.randn(16).bfloat16())
    wrong = (
        dict(pairing="half"), dict(coords=inputs["coords"][:, [0, 2, 1]]), dict(coords=-inputs["coords"]),
        dict(q_weight=torch.ones(16).bfloat16()), dict(theta=1e3),
    )
    for change in wrong:
        kernel = lambda change=change, **a: ops.qk_norm_rope(**a | change)
        with pytest.raises(AssertionError, match="qk_norm_rope"):
            assert_matches("qk_norm_rope", kernel, inputs | dict(axes=(4, 4, 6)), grads=False)
