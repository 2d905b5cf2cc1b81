"""What training does around an accelerated model: LoRA, FSDP2, optimisers made before, saving, attention backends."""

import copy

import accelerate_checks as checks
import pytest
import test_accelerate_transformers as transformers
import test_accelerate_wan_vae as vaes
import torch
from accelerate_checks import draw
from torch import nn

import sora_fast
from sora_fast.integrations.attention_backend import attend
from sora_fast.integrations.mixin import is_fast

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

WAN = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16,
           freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
def wan(seed=0):
    torch.manual_seed(seed)
    return checks.randomise(diffusers.WanTransformer3DModel(**WAN), seed)


def batch(count=2, seed=0):
    return dict(hidden_states=draw(count, 4, 2, 4, 4, seed=seed).float(), timestep=torch.arange(1, 1 + count) * 300,
                encoder_hidden_states=draw(count, 5, 16, seed=seed + 1).float())


def loss_of(model, given):
    return model(return_dict=False, **given)[0].square().mean()


def train(model, steps=4, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(seed=step))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_an_optimiser_made_before_trains_on():
    model, plain = wan(), wan()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sora_fast.accelerate(model)
    assert train(model, optimizer=optimizer) == pytest.approx(train(plain), rel=1e-5)


# ------------------------------------------------------------------------------------------------ LoRA
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_act_and_train_and_frozen_weights_cost_no_gradient(when):
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj"],
                             init_lora_weights=False)
    plain, fast = wan(), wan()
    torch.manual_seed(1)
    plain.add_adapter(config)
    if when == "after":
        sora_fast.accelerate(fast)
    torch.manual_seed(1)
    fast.add_adapter(config)
    if when == "before":
        report = sora_fast.accelerate(fast)
        assert "WanTransformerBlock" in {row.kind for row in report.swapped}
    with torch.no_grad():
        without = loss_of(wan(), batch())
        assert abs(loss_of(fast, batch()) - without) > 1e-3 * without  # the adapters act
    assert train(fast) == pytest.approx(train(plain), rel=1e-5)
    for (name, a), (_, b) in zip(fast.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6) and (a.grad is None) == ("lora" not in name)


# ------------------------------------------------------------------------------------------------ FSDP2
def test_selective_checkpointing_around_blocks():
    """torch.utils.checkpoint by hand around every second block, with a policy that keeps the matrix products."""
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    fast, _ = checks.accelerated(wan())
    wanted = torch.autograd.grad(loss_of(fast, batch()), list(fast.parameters()), allow_unused=True)

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    block, calls = fast.blocks[0], []
    inner = block.forward

    def recomputed(*args):
        calls.append(1)
        return inner(*args)

    block.forward = lambda *args: checkpoint(recomputed, *args, use_reentrant=False,
                                             context_fn=partial(create_selective_checkpoint_contexts, policy))
    got = torch.autograd.grad(loss_of(fast, batch()), list(fast.parameters()), allow_unused=True)
    assert len(calls) == 2
    for a, b in zip(got, wanted, strict=True):
        assert a is b is None or torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ saving
def test_save_and_load(tmp_path):
    fast, _ = checks.accelerated(wan())
    fast.save_pretrained(tmp_path)
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
    assert not any(is_fast(module) for module in loaded.modules())
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), fast.state_dict().values(), strict=True))
    with torch.no_grad():
        assert torch.allclose(loss_of(loaded, batch()), loss_of(fast, batch()))


# ------------------------------------------------------------------------------------------------ attention backend
def test_the_attention_backend_by_itself():
    """Against SDPA in float64: masks of keys, causal, GQA, a scale; what it cannot do is one sentence."""
    q, k, v = draw(2, 5, 4, 16), draw(2, 6, 2, 16, seed=1), draw(2, 6, 2, 16, seed=2)
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False]])

    def right(q, k, v, **options):
        return nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True,
                                                          **options).transpose(1, 2)

    for options in ({}, dict(attn_mask=mask), dict(attn_mask=mask[:, None, None]), dict(scale=0.3)):
        dense = {name: value.reshape(2, 1, 1, 6) if name == "attn_mask" else value for name, value in options.items()}
        assert (attend(q, k, v, **options) - right(q, k, v, **dense)).abs().max() < 1e-12
    assert (attend(q, k[:, :5], v[:, :5], is_causal=True) - right(q, k[:, :5], v[:, :5], is_causal=True)).abs().max() < 1e-12
    nan = v.clone()
    nan[1, 4:] = float("nan")
    assert torch.equal(attend(q, k, nan, attn_mask=mask), attend(q, k, v, attn_mask=mask))
    for words, options in (("dropout 0.1", dict(dropout_p=0.1)),
                           ("bool mask of the keys alone", dict(attn_mask=mask.double())),
                           ("bool mask", dict(attn_mask=torch.ones(2, 1, 5, 6, dtype=torch.bool))),
                           ("causal attention with a mask", dict(is_causal=True))):
        with pytest.raises(ValueError, match=words):
            attend(q, k, v, **options)


def test_a_copy_of_an_accelerated_model_is_fast_and_its_own():
    fast, _ = checks.accelerated(wan())
    other = copy.deepcopy(fast)
    assert [is_fast(a) for a in other.modules()] == [is_fast(b) for b in fast.modules()]
    with torch.no_grad():
        other.blocks[0].scale_shift_table.add_(1)
        assert not torch.equal(loss_of(other, batch()), loss_of(fast, batch()))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["cast", "offload"])
@pytest.mark.parametrize("name", ["2.1", "wan", "hunyuan", "cogvideox"])
def test_hooks_that_bring_weights_only_inside_a_forward(name, kind, when):
    """Layerwise casting and sequential offloading replace forward on an object: such a child's weights are not read."""
    offload = pytest.importorskip("accelerate").cpu_offload
    plain = (vaes if name == "2.1" else transformers).make(name).eval()
    given = dict(z=draw(1, 4, 2, 2, 2)) if name == "2.1" else transformers.inputs_of(name)
    given = {key: value.float() if value.is_floating_point() else value for key, value in given.items()}
    run = lambda model: model.decode(**given).sample if name == "2.1" else transformers.run(model, **given)[0]
    cast = lambda model: model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    hook = cast if kind == "cast" else lambda model: offload(model, torch.device("cpu"))
    fast = copy.deepcopy(plain)
    for step in (hook, sora_fast.accelerate) if when == "before" else (sora_fast.accelerate, hook):
        step(fast)
    hook(plain)
    with torch.no_grad():
        wanted, got = run(plain), run(fast)
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
