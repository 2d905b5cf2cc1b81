"""The benchmark's cases of the DiT's layers and of the VAE's latent: their counts, their inputs, their peers."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sora_fast import Pack, ops
from sora_fast.benchmarks import providers as shared
from sora_fast.benchmarks.specs import latents, modulation, rotary, shapes, spec
from sora_fast.testing.rule import run

CPU = torch.device("cpu")
FAMILIES = ("patches", "modulation", "rotary", "latents")
EVERY = [case for family in FAMILIES for case in spec(family).CASES]
QUICK = [case for case in EVERY if "quick" in case.suites]
OPS = tuple(dict.fromkeys(case.op for case in EVERY))
ONE, EQUAL, RAGGED = ((2, 3, 4),), ((2, 3, 4),) * 2, ((2, 3, 4), (1, 4, 5), (1, 1, 1))


def providers(op):
    family = next(family for family in FAMILIES if any(case.op == op for case in spec(family).CASES))
    return {provider.name: provider for provider in spec(family).providers(op)}


def shrunk(case):
    """The same kind of case on a few tokens: one clip, some equal ones or a ragged pack, as before."""
    if isinstance(case, latents.Latents):
        batch, channels, *_ = case.latent
        return replace(case, latent=(min(batch, 2), channels, 2, 5, 3))
    return replace(case, grids=ONE if len(case.grids) == 1 else EQUAL if len(set(case.grids)) == 1 else RAGGED)


SMALL = [*QUICK, *(shrunk(case) for case in EVERY if "full" in case.suites)]


def failures(case, provider, seed=0):
    inputs = case.inputs(CPU, seed)
    call = lambda **given: provider.run(**provider.prepare(given))
    return [str(c) for c in case.truth(inputs, seed).compare(call) if not c.passed]


def names(cases):
    return [case.id for case in cases]


# -------------------------------------------------------------------------------------------------------- the cases
def test_every_op_has_quick_cases_and_real_ones():
    assert len(set(names(EVERY))) == len({(case.op, case.label) for case in EVERY}) == len(EVERY)
    for op in OPS:
        quick, full = ([case for case in EVERY if case.op == op and suite in case.suites] for suite in ("quick", "full"))
        assert 1 <= len(quick) <= 2 and len(full) >= 3, op
        assert {case.dtype for case in full} == {torch.bfloat16}
        assert torch.float32 in {case.dtype for case in quick}
    tokens = [case.tokens for case in EVERY if "full" in case.suites and not isinstance(case, latents.Latents)]
    assert min(tokens) == 256 and max(tokens) == 118_800
    for case in EVERY:
        assert json.loads(json.dumps(case.shape())) == case.shape()


def test_the_mixed_pack_holds_as_much_as_one_clip():
    assert Pack(shapes.MIXED_480).num_tokens == Pack([shapes.WAN_480]).num_tokens == 32_760
    assert len({t for t, _, _ in shapes.MIXED_480}) == 3 and len(set(shapes.MIXED_480)) > 4


@pytest.mark.parametrize("case", EVERY, ids=names(EVERY))
def test_inputs_are_reproducible_and_differ_by_seed(case):
    case = shrunk(case)
    first, again, other = (case.inputs(CPU, seed) for seed in (3, 3, 4))
    floating = {name for name, t in first.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    for name in floating:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]), name
    wanted = {name for direction in case.directions().values() for name in direction}
    assert wanted == floating - {"noise"}  # every floating input gets its gradient, but what is drawn
    outputs = run(partial(getattr(ops, case.op), backend="torch"), first, None)[0]
    assert all(bool(torch.isfinite(output).all()) for output in outputs)


@pytest.mark.parametrize("case", [c for c in EVERY if c.op in modulation.OPS], ids=lambda case: case.id)
def test_modulation_is_a_strided_view_and_its_rows_are_the_packs(case):
    case = shrunk(case)
    inputs, pack = case.inputs(CPU, 0), Pack(case.grids, modulation=case.per)
    assert (pack.num_tokens, pack.num_rows) == (case.tokens, case.rows) and torch.equal(inputs["rows"], pack.rows)
    for name in modulation.TABLES[case.op]:
        if inputs[name] is not None:
            assert inputs[name].shape == (case.rows, case.width) and inputs[name].stride(0) == 6 * case.width
    found = providers(case.op)["eager"].prepare(inputs)["batch"]
    assert found == (case.rows if case.batch else 0)


# -------------------------------------------------------------------------------------------------------- the counts
def counted(case, wanted):
    """Matrix FLOPs of a forward, and of the backward to ``wanted`` alone."""
    inputs = {name: t.requires_grad_(name in wanted) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
              for name, t in case.inputs(CPU, 0).items()}
    with FlopCounterMode(display=False) as forward:
        out = getattr(ops, case.op)(backend="torch", **inputs)
    with FlopCounterMode(display=False) as backward:
        if wanted:
            out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("case", [c for c in QUICK if c.op == "patch_embed"], ids=lambda case: case.id)
def test_patch_embed_flops_are_those_that_pytorch_counts(case):
    assert counted(case, ())[0] == case.flops("forward") > 0
    for direction in ("backward", "dgrad"):
        assert counted(case, case.directions()[direction])[1] == case.flops(direction) > 0


def test_the_others_have_no_matrix_product():
    for case in QUICK:
        if case.op != "patch_embed":
            assert counted(case, ())[0] == case.flops("forward") == case.flops("backward") == 0


# What a backward reads beside the incoming gradients, by op and direction; "output 0" is x_new.
READ_AGAIN = {
    ("patch_embed", "backward"): ("latents",), ("patch_embed", "dgrad"): ("weight",), ("unpatchify", "backward"): (),
    ("norm_modulate", "backward"): ("x", "scale", "rows", "weight", "bias"),
    ("gate_residual", "backward"): ("y", "gate", "rows"),
    ("gate_residual_norm_modulate", "backward"): ("output 0", "y", "gate", "scale", "rows", "weight", "bias"),
    ("qk_norm_rope", "backward"): ("q", "k", "coords", "q_weight", "k_weight", "freqs"),
    ("kl_sample", "backward"): ("moments", "noise"),
}


def extent(tensors):
    """Bytes of the distinct tensors among ``tensors``: one that is another's memory counts once."""
    distinct = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors if t is not None}
    return sum(t.numel() * t.element_size() for t in distinct.values())


@pytest.mark.parametrize("case", SMALL, ids=names(SMALL))
def test_least_bytes_are_those_of_the_tensors_of_a_real_run(case):
    inputs = case.inputs(CPU, 0)
    plain = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    outputs = run(partial(getattr(ops, case.op), backend="torch"), inputs, None)[0]
    assert case.least_bytes("forward") == extent([*plain, *outputs])
    for direction, wanted in case.directions().items():
        if not wanted:
            continue
        again = READ_AGAIN[case.op, direction]
        given = {name: t.detach().requires_grad_(name in wanted) if isinstance(t, torch.Tensor) and t.is_floating_point()
                 else t for name, t in inputs.items()}
        outputs = getattr(ops, case.op)(backend="torch", **given)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        incoming = [torch.ones_like(output) for output in outputs]
        grads = torch.autograd.grad(outputs, [given[name] for name in wanted], incoming)
        read = [outputs[0] if name == "output 0" else given.get(name) for name in again]
        if case.op == "gate_residual":  # dx is the incoming gradient, which 16-bit autograd casts there and back
            grads = [incoming[0] if name == "x" else grad for name, grad in zip(wanted, grads, strict=True)]
        assert case.least_bytes(direction) == extent([*incoming, *read, *grads])


def test_the_residual_gradient_is_the_incoming_one():
    case = next(case for case in QUICK if case.op == "gate_residual")
    inputs = case.inputs(CPU, 0)
    truth = case.truth(inputs, 0)
    assert torch.equal(truth.ref[1]["x"], truth.cotangents[0].double())


# -------------------------------------------------------------------------------------------------------- the peers
@pytest.mark.parametrize("op", modulation.OPS)
def test_eager_sums_a_long_ragged_row_in_float32(op):
    case = next(case for case in EVERY if case.op == op and "full" in case.suites and case.tables is None)
    case = replace(case, grids=((3, 20, 20), (1, 4, 5)), width=48)  # 1,200 tokens share a row
    assert not case.batch and not failures(case, providers(op)["eager"])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_one_element_off_fails(op, wrong):
    case = next(case for case in QUICK if case.op == op)
    right = providers(op)["eager" if op not in ("patch_embed", "unpatchify") else "torch"]

    class Off(torch.autograd.Function):
        """Adds to one element, on the way out or on the way back."""

        @staticmethod
        def forward(ctx, out):
            return Off.moved(out, wrong == "output")

        @staticmethod
        def backward(ctx, grad):
            return Off.moved(grad, wrong == "gradient")

        @staticmethod
        def moved(t, here):
            t = t.clone()
            if here:
                t.view(-1)[t.numel() // 3] += 1e-2 * t.abs().max()
            return t

    def planted(**inputs):
        outputs = right.run(**inputs)
        return Off.apply(outputs) if isinstance(outputs, torch.Tensor) else (Off.apply(outputs[0]), *outputs[1:])

    assert not failures(case, right)
    found = failures(case, replace(right, run=planted))
    assert found and any(text.startswith("d ") == (wrong == "gradient") for text in found)


@pytest.mark.parametrize("family, changed", [("modulation", "rows"), ("rotary", "coords")])
def test_a_token_with_its_neighbours_place_fails(family, changed):
    case = next(case for case in spec(family).CASES if "quick" in case.suites and case.dtype == torch.float32)
    right = providers(case.op)["eager"]

    def shifted(inputs):
        place = int((inputs[changed].view(case.tokens, -1).diff(dim=0) != 0).any(1).nonzero()[0])
        wrong = inputs[changed].clone()
        wrong[place] = wrong[place + 1]
        return right.prepare(inputs | {changed: wrong})

    assert not failures(case, right) and failures(case, replace(right, prepare=shifted))


# ------------------------------------------------------------------------------------------------------------ Liger
@pytest.mark.parametrize("op", ["norm_modulate", "qk_norm_rope"])
def test_liger_says_in_one_sentence_what_it_cannot_do(op, monkeypatch):
    provider = providers(op)["liger"]
    cases = [case for case in EVERY if case.op == op]
    for case in cases:
        for direction in case.directions():
            reason = provider.unavailable(case, direction, CPU)
            assert reason.endswith(".") and ". " not in reason and "\n" not in reason, reason
    monkeypatch.setattr(shared, "installed", lambda module: "")
    monkeypatch.setattr(shared, "liger_ops", lambda: object())
    reasons = {provider.unavailable(case, "forward", torch.device("cuda")) for case in cases}
    assert any(reason.startswith("The installed liger_kernel has no Liger") for reason in reasons)
    known = dict.fromkeys(("LigerModulatedRMSNormFunction", "LigerRMSNormFunction", "LigerRopeFunction"))
    monkeypatch.setattr(shared, "liger_ops", lambda: type("Library", (), known))
    able = {case.label for case in cases if not provider.unavailable(case, "forward", torch.device("cuda"))}
    assert able == {"norm_modulate": {"Mochi, small clip", "Mochi, 480p"},
                    "qk_norm_rope": {"Open-Sora 2, 256px", "Open-Sora 2, 768px"}}[op]
    trained = {case.label for case in cases if not provider.unavailable(case, "backward", torch.device("cuda"))}
    assert trained == (able if op == "norm_modulate" else set())  # its rope overwrites the incoming gradient


def test_tables_of_a_step_are_made_before_the_call():
    learned = next(case for case in rotary.CASES if case.learned)
    for case, made in ((rotary.CASES[0], True), (shrunk(learned), False)):
        assert ("tables" in providers(case.op)["eager"].prepare(case.inputs(CPU, 0))) is made
