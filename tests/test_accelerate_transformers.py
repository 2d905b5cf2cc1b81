"""The video transformers of diffusers, accelerated: the same numbers as the real classes."""

import copy

import accelerate_checks as checks
import pytest
import torch
from accelerate_checks import draw

import sora_fast

diffusers = pytest.importorskip("diffusers")

WAN = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
           freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
HUNYUAN = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
               num_single_layers=1, num_refiner_layers=1, patch_size=2, text_embed_dim=16, pooled_projection_dim=8,
               rope_axes_dim=(4, 6, 6), guidance_embeds=False)
COG = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
           num_layers=2, sample_width=6, sample_height=8, sample_frames=9, max_text_seq_length=7)
MODELS = {
    "wan": (diffusers.WanTransformer3DModel, WAN),
    "wan without norm": (diffusers.WanTransformer3DModel, WAN | dict(cross_attn_norm=False, attention_head_dim=16)),
    "wan image": (diffusers.WanTransformer3DModel, WAN | dict(image_dim=8, added_kv_proj_dim=24)),
    "hunyuan": (diffusers.HunyuanVideoTransformer3DModel, HUNYUAN),
    "hunyuan image": (diffusers.HunyuanVideoTransformer3DModel, HUNYUAN | dict(image_condition_type="token_replace")),
    "cogvideox": (diffusers.CogVideoXTransformer3DModel, COG),
    "cogvideox 5b": (diffusers.CogVideoXTransformer3DModel, COG | dict(use_rotary_positional_embeddings=True)),
    "dit": (diffusers.DiTTransformer2DModel, dict(num_attention_heads=2, attention_head_dim=12, in_channels=4,
                                                  out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=5,
                                                  norm_eps=1e-6)),
}


def make(name, seed=0):
    kind, config = MODELS[name]
    torch.manual_seed(seed)
    return checks.randomise(kind(**config), seed).eval()


def run(model, **given):
    return [model(return_dict=False, **given)[0]]


def inputs_of(name, batch=2, frames=3, seed=0):
    if name.startswith("wan"):
        text = 512 if name == "wan image" else 7
        given = dict(hidden_states=draw(batch, 4, frames, 6, 4, seed=seed), timestep=torch.arange(1, 1 + batch) * 300,
                     encoder_hidden_states=draw(batch, text, 16, seed=seed + 1))
        if name == "wan image":
            given["encoder_hidden_states_image"] = draw(batch, 5, 8, seed=seed + 2)
        return given
    if name == "dit":
        return dict(hidden_states=draw(batch, 4, 8, 8, seed=seed), timestep=torch.arange(1, 1 + batch) * 300,
                    class_labels=torch.arange(batch) % 5)
    given = dict(timestep=torch.arange(1, 1 + batch) * 300, encoder_hidden_states=draw(batch, 7, 16, seed=seed + 1))
    if name.startswith("hunyuan"):
        mask = torch.ones(batch, 7, dtype=torch.int64)
        mask[-1, 4:] = 0
        return given | dict(hidden_states=draw(batch, 4, frames, 6, 4, seed=seed), encoder_attention_mask=mask,
                            pooled_projections=draw(batch, 8, seed=seed + 2))
    given["hidden_states"] = draw(batch, frames, 4, 8, 6, seed=seed)
    if name == "cogvideox 5b":
        angles = draw(frames * 12, 8, seed=3).repeat_interleave(2, 1)
        given["image_rotary_emb"] = torch.stack([angles.cos(), angles.sin()]).float().double()
    return given


@pytest.mark.parametrize("batch, frames", [(2, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_as_right_as_the_original(name, batch, frames):
    """Images and clips, alone and in batches, and without gradients."""
    model = make(name)
    checks.assert_catches(*checks.assert_accelerates(model, run, inputs_of(name, batch, frames)))
    checks.assert_accelerates(model, run, inputs_of(name, batch, frames), grads=False)


@pytest.mark.parametrize("name", ["wan", "dit"])
def test_it_is_as_right_in_bfloat16(name):
    checks.assert_accelerates(make(name), run, [inputs_of(name, seed=10 * n) for n in range(6)], torch.bfloat16)


def test_wan_with_a_timestep_per_token():
    given = inputs_of("wan") | dict(timestep=torch.arange(2 * 18).reshape(2, 18) * 20)
    checks.assert_accelerates(make("wan"), run, given)


@pytest.mark.parametrize("name", MODELS)
def test_an_altered_block_is_left_alone_and_its_neighbours_go_on(name):
    """One block of a changed subclass, one with a hook on its norm: left, said so, and the numbers stay."""
    def hook(model):
        block = getattr(model, where)[-1]
        norm = next(m for n, m in block.named_modules() if n.startswith("norm") and "Norm" in type(m).__name__
                    and not list(m.children()))
        norm.register_forward_hook(lambda module, inputs, output: 1.5 * output)

    where = "blocks" if name.startswith("wan") else "transformer_blocks"
    model = make(name)
    blocks = getattr(model, where)
    blocks[0].__class__ = type("Altered", (type(blocks[0]),), {})
    report = sora_fast.accelerate(copy.deepcopy(model))
    notes = {row.name: row.note for row in report.left}
    assert report.swapped and ("an altered" in notes[f"{where}.0"] or name == "hunyuan image")
    checks.assert_accelerates(model, run, inputs_of(name))
    model = make(name)
    hook(model)
    checks.assert_accelerates(model, run, inputs_of(name))
    fast, _ = checks.accelerated(make(name))
    plain = make(name)
    hook(fast)
    hook(plain)
    given = {key: value.float() if value.is_floating_point() else value for key, value in inputs_of(name).items()}
    with torch.no_grad():
        got, wanted = run(fast, **given)[0], run(plain, **given)[0]
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
