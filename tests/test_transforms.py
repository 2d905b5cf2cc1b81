"""torch.func: gradients of every op and module; what has no rule says so in a sentence and names what has."""

import op_checks
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from sora_fast import Pack, nn, ops, reference
from sora_fast.dispatch import ORDER
from sora_fast.testing.cases import cases

ALL = [op for family in ops.FAMILIES for op in getattr(ops, family).OPS]
NAMES = [op.name for op in ALL]
RAW = ("varlen_attention_forward", "varlen_attention_backward")


def is_leaf(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point() or isinstance(value, list)


def call_of(op):
    """A loss of ``op``'s floating inputs, and these; the others are fixed."""
    _, inputs = next(iter(cases(op, torch.float32)))
    leaves = {name: value for name, value in inputs.items() if is_leaf(value)}

    def loss(leaves, backend="auto"):
        found = op_checks.tensors(getattr(ops, op)(**{**inputs, **leaves}, backend=backend))
        return sum(torch.where(out.isfinite(), out, 0).sin().sum() for out in found)

    return loss, leaves


def by_autograd(loss, leaves):
    fresh, flat = op_checks.with_grad(leaves)
    return dict(zip(flat, torch.autograd.grad(loss(fresh), list(flat.values())), strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", [name for name in NAMES if name not in RAW])
def test_grad_of_ops(op, backend):
    loss, leaves = call_of(op)
    got = grad(lambda leaves: loss(leaves, backend))(leaves)
    want = by_autograd(lambda leaves: loss(leaves, backend), leaves)
    flat = {f"{name}[{place}]" if isinstance(value, list) else name: part for name, value in got.items()
            for place, part in enumerate(value if isinstance(value, list) else [value])}
    assert flat.keys() == want.keys() and any(part.any() for part in flat.values())
    for name, part in flat.items():
        torch.testing.assert_close(part, want[name], rtol=1e-5, atol=1e-5)


def first(leaves):
    """The first tensor, and the leaves with another in its place."""
    name, value = next(iter(leaves.items()))
    if isinstance(value, list):
        return value[0], lambda x: {**leaves, name: [x, *value[1:]]}
    return value, lambda x: {**leaves, name: x}


def forward_mode(fn, x):
    with forward_ad.dual_level():
        return fn(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("op", NAMES)
def test_what_has_no_rule_is_refused(op):
    loss, leaves = call_of(op)
    x, put = first(leaves)
    fn = lambda x: loss(put(x))
    rows, ones = torch.stack([x, x]), torch.ones_like(x)
    refused = {"vmap": lambda: vmap(fn)(rows), "vmap of grad": lambda: vmap(grad(fn))(rows),
               "tangent": lambda: jvp(fn, (x,), (ones,)), "a tangent": lambda: forward_mode(fn, x)}
    for words, call in refused.items():
        with pytest.raises(NotImplementedError) as caught:
            call()
        op_checks.assert_sentence(str(caught.value), op)
        assert words.split()[-1 if "tangent" in words else 0] in str(caught.value)
        assert f"sora_fast.reference.{op}" in str(caught.value) and hasattr(reference, op)
    if op not in RAW:
        with pytest.raises(RuntimeError, match="differentiated once") as caught:
            grad(lambda x: grad(fn)(x).square().sum())(x)
        op_checks.assert_sentence(str(caught.value), op)


def test_index_tensors_of_a_batch_are_refused_too():
    rows, x, shift = torch.zeros(2, 6, dtype=torch.int32), torch.randn(6, 8), torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match=r"norm_modulate: .* torch.func.vmap"):
        vmap(lambda rows: ops.norm_modulate(x, shift, None, rows))(rows)


def test_what_the_sentences_name_works():
    weight, x = torch.randn(3, 4, 3, 3, 3), torch.randn(2, 1, 4, 2, 5, 5)
    got = vmap(lambda x: reference.causal_conv3d(x, weight, padding=(1, 1, 1, 1)))(x)
    torch.testing.assert_close(got, torch.stack([ops.causal_conv3d(part, weight) for part in x]), rtol=1e-5, atol=1e-5)
    _, change = jvp(lambda x: reference.norm_act(x, norm="rms"), (x[0],), (x[1],))
    step = 1e-6
    wide = [reference.norm_act(x[0].double() + sign * step * x[1].double(), norm="rms") for sign in (1, -1)]
    torch.testing.assert_close(change.double(), (wide[0] - wide[1]) / (2 * step), rtol=1e-4, atol=1e-4)


def test_jacobians_in_reverse():
    """vmap over a backward alone: the op itself saw no batch."""
    x, weight = torch.randn(1, 2, 2, 3, 3), torch.randn(2, 2, 1, 3, 3)
    fn = lambda x: ops.causal_conv3d(x, weight).flatten()
    want = torch.stack([torch.autograd.grad(fn(y := x.clone().requires_grad_())[place], y)[0] for place in range(36)])
    torch.testing.assert_close(jacrev(fn)(x), want, rtol=1e-5, atol=1e-5)
    y = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(fn(y), y, torch.eye(36), is_grads_batched=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    out = fn(y)
    with pytest.raises(NotImplementedError, match="causal_conv3d: .* torch.func.vmap"):  # its node runs autograd inside
        vmap(lambda row: torch.autograd.grad(out, y, row)[0])(torch.eye(36))


@pytest.mark.parametrize("op", ALL, ids=NAMES)
def test_kernels_are_refused(op, monkeypatch):
    """They are called by autograd functions of their own, through which transforms do not see."""
    kernels = [backend for backend in op.backends.values() if backend.name not in ("torch", "reference")]
    problem = op.example("cuda:sm90", torch.bfloat16, False)
    assert kernels or op.name in ("merge_attention", "kl_sample")

    def reasons(x):
        for backend in kernels:
            monkeypatch.setitem(op.backends, backend.name, type(backend)(backend.name, backend.run, kernel=backend.kernel))
            with pytest.raises(NotImplementedError, match="torch.func"):
                op.choose(problem, backend.name)
        chosen = op.choose(problem, assume_validated=True)
        assert chosen.name in ("torch", "reference")
        return x.sum()

    grad(reasons)(torch.ones(2))
    if kernels and any(backend.name in ORDER for backend in kernels):
        assert op.choose(problem, assume_validated=True).name not in ("torch", "reference")


PACK = Pack([(1, 2, 2), (2, 1, 1)], text_lengths=(2, 1))
VIDEO = torch.linspace(-1, 1, 2 * 4 * 3 * 4 * 4).view(2, 4, 3, 4, 4).sin()
TOKENS, TEXT = torch.linspace(-2, 2, 6 * 32).view(6, 32).cos(), torch.linspace(-2, 1, 3 * 8).view(3, 8)


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.RMSNorm(4, act="silu"), nn.CausalConv3d(4, 4, 3)

    def forward(self, x):
        return nn.norm_act_conv(self.norm, self.conv, x, residual=x)


class Final(nn.FinalLayer):
    def forward(self, x):
        return super().forward(nn.Residual(x), x[:2], PACK.rows)


MODULES = {
    "CausalConv3d": (lambda: nn.CausalConv3d(4, 3, 3, stride=(1, 2, 2), time_pad="replicate"), (VIDEO,)),
    "norm_act_conv": (Pair, (VIDEO,)), "GroupNorm": (lambda: nn.GroupNorm(2, 4, act="silu"), (VIDEO,)),
    "PatchEmbed3d": (lambda: nn.PatchEmbed3d(4, 6), (VIDEO,)),
    "VarlenAttention": (lambda: nn.VarlenAttention(32, 2, qk_norm=True, rope_axes=(4, 4, 8)), (TOKENS, PACK)),
    "cross-attention": (lambda: nn.VarlenAttention(32, 2, context_width=8), (TOKENS, PACK, TEXT)),
    "Modulation": (lambda: nn.Modulation(32, 3), (TOKENS,)), "FinalLayer": (lambda: Final(32, 8), (TOKENS,)),
    "VectorQuantizer": (lambda: nn.VectorQuantizer(5, 4).eval(), (VIDEO,)),
}


def test_a_quantizer_that_counts_is_refused():
    quantizer = nn.VectorQuantizer(5, 4)
    with pytest.raises(NotImplementedError) as caught:
        grad(lambda z: quantizer(z).loss.sum())(VIDEO)
    op_checks.assert_sentence(str(caught.value), "VectorQuantizer")
    assert not quantizer.counts.any() and grad(lambda z: quantizer.eval()(z).loss.sum())(VIDEO).any()


@pytest.mark.parametrize("make, inputs", MODULES.values(), ids=MODULES)
def test_grad_of_modules(make, inputs):
    torch.manual_seed(0)
    module = make()
    for p in module.parameters():
        torch.nn.init.normal_(p)

    def loss(parameters):
        found = op_checks.tensors(functional_call(module, parameters, inputs))
        return sum(out.sin().sum() for out in found if out.is_floating_point())

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    got, want = grad(loss)(parameters), by_autograd(loss, parameters)
    assert got.keys() == want.keys()
    for name, part in got.items():
        assert part.any()
        torch.testing.assert_close(part, want[name], rtol=1e-5, atol=1e-5)
