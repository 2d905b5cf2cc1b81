"""One graph of every op for all sizes, and no new one after the second: forward, backward, both backends."""

import functools

import op_checks
import pytest
import test_convolution
import test_modulation
import test_pack_arguments
import torch
from op_checks import double
from test_attention import offsets

from sora_fast import Pack, ops

pytestmark = [pytest.mark.full, pytest.mark.ci]

BOTH = "torch", "reference"


# Rows: label, function, its inputs at a size, backends.
def _attention(label, **options):
    def fn(backend, **tensors):
        return ops.varlen_attention(**tensors, max_seqlen_q=tensors["q"].shape[0], **options, backend=backend)

    def inputs_of(size):
        cuts = {17: (9, 3), 16: (0, 16), 15: (1, 1), 33: (20, 13), 1: (1, 0)}[size]
        return dict(q=double(size, 4, 16), k=double(size + 2, 2, 16), v=double(size + 2, 2, 16),
                    cu_seqlens_q=offsets(*cuts), cu_seqlens_k=offsets(*(n + 1 for n in cuts)))

    return label, fn, inputs_of, ("reference",) if options.get("return_lse") else BOTH


def _convolution(op, label, axis, **options):
    def fn(backend, **tensors):
        return getattr(ops, op)(**tensors, **options, backend=backend)

    def inputs_of(size):
        sizes = dict(T=3, H=5, W=6)
        sizes[axis] = size
        inputs = test_convolution.good(op) | dict(x=torch.randn(1, 4, *sizes.values()),
                                                  cache=torch.randn(1, 4, 2, *sizes.values())[:, :, :, 0])
        return {name: value.double() for name, value in inputs.items() if name != "residual"}

    # the reference's other axes differ in nothing that is traced
    return f"{op} {label}", fn, inputs_of, BOTH if axis == "T" else ("torch",)


def _modulation(op):
    def fn(backend, **tensors):
        norm = {} if op == "gate_residual" else dict(norm="rms")
        return getattr(ops, op)(**tensors, **norm, backend=backend)

    def inputs_of(size):
        arguments = test_modulation.good(op)
        grid = [(1, 1, size)] if size < 3 else [(1, 1, 1), (0, 1, 1), (1, 1, size - 2)][: 2 + size % 2] + [(1, 1, 1)]
        rows = Pack(grid).rows[:size] if size < 3 else Pack(grid).pad_to(size + 2).rows
        arguments = {name: value.double() if value.is_floating_point() else value for name, value in arguments.items()}
        arguments |= {name: double(rows.shape[0], 8) for name in ("x", "y") if name in arguments}
        arguments |= {name: double(len(grid), 8) for name in ("shift", "scale", "gate") if name in arguments}
        return arguments | dict(rows=rows)

    return op, fn, inputs_of, BOTH


def _norm(norm, axis):
    def inputs_of(size):
        shape = [2, 4, 2, 3, 5]
        shape[axis] = size
        return dict(x=double(*shape), weight=double(4))

    return (f"{norm} {'BCTHW'[axis]}", lambda backend, **a: ops.norm_act(**a, norm=norm, groups=2, backend=backend),
            inputs_of, BOTH)


def _rotary(label, **options):
    def inputs_of(size):
        inputs = dict(q=double(size, 4, 16), k=double(size, 4, 16), coords=double(size, 3),
                      rows=torch.zeros(size, dtype=torch.int32))
        inputs["rows"][2:] = -1
        return inputs | ({"freqs": double(3, 4, 6)} if label == "freqs" else {})

    return (label, lambda backend, **a: ops.qk_norm_rope(**a, **options, backend=backend), inputs_of,
            ("torch",) if label == "axes" else ("reference",))


def _sample(label, inputs_of, backends):
    return label, lambda backend, **a: ops.kl_sample(**a, backend=backend), inputs_of, backends


test_attention_compiles = op_checks.compiles([
    _attention("causal", causal=True), _attention("window and lse", window=(3, 1), return_lse=True)])
test_convolution_compiles = op_checks.compiles([
    _convolution("causal_conv3d", "T", "T", return_cache=True),
    _convolution("norm_act_conv3d", "T", "T", return_cache=True, norm="group", groups=2),
    _convolution("norm_act_conv3d", "H", "H", stride=(1, 2, 2), padding=(0, 1, 1, 1)),
    _convolution("causal_conv3d", "W", "W", time_pad="replicate", space_pad="replicate"),
    _convolution("norm_act_conv3d", "upsampled, W", "W", upsample=2, return_cache=True),
])
test_modulation_compiles = op_checks.compiles([_modulation(op) for op in test_modulation.OPS])
test_norms_compile = op_checks.compiles([_norm("rms", 2), _norm("group", 4)])
test_rotary_compiles = op_checks.compiles([
    _rotary("axes", axes=(4, 4, 6)), _rotary("freqs", norm="rms_all", pairing="half")])
test_latents_compile = op_checks.compiles([
    _sample("frames", lambda size: dict(moments=double(2, 4, size, 3), noise=double(2, 2, size, 3)), BOTH),
    _sample("batch", lambda size: dict(moments=double(size, 4, 3)), ("torch",)),
])


@pytest.mark.parametrize("backend", BOTH)
def test_other_sample_counts_make_no_new_graph(backend):
    def fn(q, cu, longest):
        return ops.varlen_attention(q, q, q, cu, cu, longest, longest, causal=True, backend=backend)

    packs = {0: (4, 5), 1: (3, 3, 0, 6), 2: (2, 1, 1, 1, 1), 3: (20, 1), 4: (7, 0, 0, 7, 7, 7)}

    def inputs_of(which):
        cu = offsets(*packs[which])
        return dict(q=torch.randn(int(cu[-1]) + which, 2, 16, dtype=torch.float64), cu=cu, longest=max(packs[which]))

    counts = op_checks.graphs(fn, inputs_of, range(5), None)
    assert counts[1] == counts[-1] <= 2, counts


@pytest.mark.parametrize("backend", BOTH)
def test_compiled_tail_with_nan(backend):
    """A traced graph is one block under a mask: NaN rows and NaN gradients of the tail must not pass through it."""
    q, k, v = (torch.randn(12, 2, 16, dtype=torch.float64) for _ in range(3))
    for t in (q, k, v):
        t[9:] = float("nan")
        t.requires_grad_()
    fn = torch.compile(lambda: ops.varlen_attention(q, k, v, offsets(4, 5), offsets(4, 5), backend=backend),
                       fullgraph=True, backend="aot_eager")
    cotangent = torch.full((12, 2, 16), float("nan"), dtype=torch.float64)
    cotangent[:9] = 1
    results = []
    for call in (fn, lambda: ops.varlen_attention(q, k, v, offsets(4, 5), offsets(4, 5), backend=backend)):
        out = call()
        results.append((out, *torch.autograd.grad(out, (q, k, v), cotangent)))
    for got, want in zip(*results, strict=True):
        assert not got[9:].any() and not want[9:].any()
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BOTH)
def test_phases_of_a_convolution(backend):
    """phase is a number of the call, not of the graph: 0, the frames in between, and those past the end."""
    weight = torch.randn(2, 3, 3, 1, 1, dtype=torch.float64)
    fn = lambda x, phase: ops.causal_conv3d(x, weight, stride=(2, 1, 1), phase=phase, padding=(0, 0, 0, 0),
                                            backend=backend)
    inputs_of = lambda phase: dict(x=torch.randn(1, 3, 8, 2, 3, dtype=torch.float64), phase=phase)
    counts = op_checks.graphs(fn, inputs_of, (0, 1, 2, 3, 4, 5, 8, 9, 10), None)
    assert counts[1] == counts[5] and counts[6] == counts[8], counts


PACKS = (Pack([(1, 2, 2), (1, 3, 3)]), Pack([(1, 2, 3), (2, 3, 3), (1, 1, 1)]), Pack([(2, 1, 2), (0, 1, 1)] * 4),
         Pack([(5, 4, 3), (1, 7, 1)]).pad_to(70), Pack([(1, 1, 1), (1, 4, 4)]))


@pytest.mark.parametrize("as_pack", (True, False))
@pytest.mark.parametrize("op", ("patch_embed", "unpatchify"))
def test_compiled_packs_make_no_new_graph(op, as_pack):
    """Grids of other sizes and other sample counts, given as a Pack or as its CPU tensor, are data of one graph."""
    weight = torch.randn(5, 3, 1, 2, 2, dtype=torch.float64)

    def fn(x, grids):
        if op == "patch_embed":
            return ops.patch_embed(x, weight, grids=grids, backend="torch")
        return ops.unpatchify(x, grids, (1, 2, 2), 3, flat=True, backend="torch")

    def inputs_of(which):
        pack = PACKS[which]
        tokens = torch.randn(pack.num_tokens, 12, dtype=torch.float64)
        return dict(x=tokens.flatten() if op == "patch_embed" else tokens, grids=pack if as_pack else pack.grids_cpu)

    counts = op_checks.graphs(fn, inputs_of, range(len(PACKS)), None)
    assert counts[1] == counts[-1] <= 2, counts


def test_compiled_batches():
    weight = torch.randn(5, 3, 1, 2, 2, dtype=torch.float64)
    for backend in BOTH:
        fn = lambda x, backend=backend: ops.patch_embed(x, weight, backend=backend)
        counts = op_checks.graphs(fn, lambda n: dict(x=torch.randn(2, 3, n, 2 * n, 4).double()), (17, 16, 15, 3), None)
        assert counts[1] == counts[-1] <= 2, counts


def test_traced_grids_that_the_reference_cannot_see():
    fn = torch.compile(lambda x, g: ops.unpatchify(x, g, (1, 2, 2), 3, flat=True, backend="reference"),
                       backend="eager")
    with pytest.raises(Exception, match="cannot see the values of a grids tensor"):
        fn(torch.randn(10, 12), torch.tensor(((1, 2, 2), (1, 2, 3))))


@pytest.mark.parametrize("op", ("varlen_attention", "qk_norm_rope", "gate_residual_norm_modulate"))
def test_compiled_pack_arguments_make_no_new_graph(op):
    """A Pack in place of rows, coords and cu_seqlens is data of one graph, as the bare tensors are; padded ones too."""
    fn = functools.partial(test_pack_arguments.apply, op, backend="torch")
    inputs_of = lambda which: {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in
                               test_pack_arguments.inputs(op, PACKS[which]).items()}
    counts = op_checks.graphs(fn, inputs_of, (0, 1, 3), None)
    assert counts[1] == counts[-1] <= 2, counts


def test_a_stale_pack_is_refused_in_a_graph():
    fn = torch.compile(lambda x, pack: ops.norm_modulate(x, None, None, pack, backend="torch"), backend="eager")
    with pytest.raises(ValueError, match="norm_modulate: expected x of one row for each of the pack's"):
        fn(torch.randn(48, 8), Pack([(1, 4, 4)]))
