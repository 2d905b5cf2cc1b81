"""Accelerated models compile into one graph, and recompute what enable_gradient_checkpointing asks for."""

import accelerate_checks as checks
import pytest
import test_accelerate_other_vaes as others
import test_accelerate_structures as forms
import test_accelerate_training as training
import test_accelerate_transformers as transformers
import test_accelerate_trials as trials
import test_accelerate_wan_vae as wan
import torch
from accelerate_checks import draw

import sora_fast
from sora_fast.integrations import register_attention_backend

pytestmark = [pytest.mark.full, pytest.mark.ci]


@pytest.mark.parametrize("name", ["2.1"])
def test_it_compiles_in_one_graph(name):
    """fullgraph, encode and decode, with gradients and without."""
    fast, _ = checks.accelerated(wan.make(name))
    torch._dynamo.reset()
    for run, shape in ((lambda x: fast.encode(x, return_dict=False)[0].parameters, (1, 3, 5, 16, 16)),
                       (lambda z: fast.decode(z, return_dict=False)[0], (1, 4, 2, 2, 2))):
        compiled, x = torch.compile(run, fullgraph=True, backend="eager"), draw(*shape).float().requires_grad_()
        wanted, got = run(x), compiled(x)
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (wanted, got))
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()


@pytest.mark.parametrize("name", ["hunyuan"])
def test_gradient_checkpointing_and_one_graph_of_a_vae(name):
    fast, report = checks.accelerated(others.make(name))
    assert all(row.note for row in report.rows)
    z = draw(1, 4, 2, 2, 2).float()
    gradients = lambda: torch.autograd.grad(fast.decode(z).sample.square().sum(), list(fast.decoder.parameters()))
    wanted = gradients()
    fast.train().enable_gradient_checkpointing()
    for got, exact in zip(gradients(), wanted, strict=True):
        assert (got - exact).abs().max() <= 1e-5 * max(value.abs().max() for value in wanted)
    fast.disable_gradient_checkpointing()
    torch._dynamo.reset()
    run = lambda z: fast.decode(z, return_dict=False)[0]
    got = torch.compile(run, fullgraph=True, backend="eager")(z)
    assert (got - run(z)).abs().max() <= 1e-5 * got.abs().max()


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox 5b", "dit"])
def test_gradient_checkpointing_and_one_graph(name):
    fast, report = checks.accelerated(transformers.make(name))
    assert all(row.note for row in report.rows)
    run = transformers.run
    given = {key: value.float() if value.is_floating_point() else value
             for key, value in transformers.inputs_of(name).items()}
    gradients = lambda: torch.autograd.grad(run(fast, **given)[0].square().sum(), list(fast.parameters()), allow_unused=True)
    wanted = gradients()
    fast.enable_gradient_checkpointing()
    for got, exact in zip(gradients(), wanted, strict=True):
        largest = max(value.abs().max() for value in wanted if value is not None)
        assert got is exact is None or (got - exact).abs().max() <= 1e-5 * largest
    fast.disable_gradient_checkpointing()
    torch._dynamo.reset()
    got = torch.compile(fast, fullgraph=True, backend="eager")(return_dict=False, **given)[0]
    assert (got - transformers.run(fast, **given)[0]).abs().max() <= 1e-5 * got.abs().max()


def hunyuan_batch():
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return dict(hidden_states=draw(2, 4, 3, 4, 4).float(), timestep=torch.tensor([300, 600]), encoder_attention_mask=mask,
                encoder_hidden_states=draw(2, 7, 16, seed=1).float(), pooled_projections=draw(2, 8, seed=2).float())


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
@pytest.mark.parametrize("fast", [True])
def test_diffusers_attention_backend(kind, fast):
    """The same numbers as the native backend, padded text included, in plain and in accelerated models; one graph."""
    register_attention_backend()
    register_attention_backend()
    model = training.wan() if kind == "wan" else transformers.make("hunyuan")
    given = training.batch() if kind == "wan" else hunyuan_batch()
    if fast:
        sora_fast.accelerate(model)
    wanted = model(return_dict=False, **given)[0]
    calls = []
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    member = AttentionBackendName("sora_fast")
    registered = _AttentionBackendRegistry._backends[member]
    _AttentionBackendRegistry._backends[member] = lambda **arguments: calls.append(1) or registered(**arguments)
    try:
        model.set_attention_backend("sora_fast")
        got = model(return_dict=False, **given)[0]
    finally:
        _AttentionBackendRegistry._backends[member] = registered
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)  # the call above has set it for all
    assert len(calls) >= 2 and (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    torch._dynamo.reset()
    traced = torch.compile(model, fullgraph=True, backend="eager")(return_dict=False, **given)[0]
    assert (traced - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_blocks_known_by_trying_are_one_graph_that_notices_a_change():
    plain = checks.randomise(forms.DiT(lambda: trials.Scaled(1.0)))
    fast, _ = checks.accelerated(plain)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    trials.close(compiled(*trials.given()), plain(*trials.given()))
    for scale in (0.5, 1.0):
        fast.blocks[0].res_scale = plain.blocks[0].res_scale = scale
        trials.close(compiled(*trials.given()), plain(*trials.given()))


def test_pairs_in_a_sequence_are_one_graph():
    plain = checks.randomise(torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), torch.nn.ConstantPad3d(
        (0, 0, 0, 0, 2, 0), 0), torch.nn.Conv3d(4, 4, 3, padding=(0, 1, 1)), torch.nn.Conv3d(4, 4, 1)))
    fast, _ = checks.accelerated(plain)
    torch._dynamo.reset()
    compiled, x = torch.compile(fast, fullgraph=True, backend="eager"), draw(2, 4, 4, 6, 5).float()
    trials.close(compiled(x), plain(x))
    fast[2].value = plain[2].value = 1.0
    trials.close(compiled(x), plain(x))
