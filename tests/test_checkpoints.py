"""Checkpoints: Wan's VAE in both namings and the official DiT into our models, their outputs, and back bit for bit.

Wan's transformer has a module of its own, test_wan. diffusers' own classes and its converter of Wan's names are the
judges of the VAE; the official DiT's formula stands in test_dit.
"""

import argparse
import json
import math
import warnings
from collections import OrderedDict
from functools import partial

import pytest
import torch
from float64_checks import draw
from test_dit import official, official_positions
from torch import nn

from sora_fast.models import DiT, VideoVAE, load_dit, load_vae, save_dit, save_vae
from sora_fast.models.checkpoints import dit_from_state_dict, dit_state_dict, vae_from_state_dict, vae_state_dict
from sora_fast.models.vae import PRESETS
from sora_fast.training import vae as training_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
WAN = dict(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
SMALL = dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.5, 1, 2, 3],
             latents_std=[1.1, 2, 3, 4])


def make_wan(dtype=torch.float32, **sizes):
    """diffusers' AutoencoderKLWan, every parameter random, features near 1, pixels within its clamp."""
    diffusers = pytest.importorskip("diffusers")
    wan = nn.Module.to(diffusers.AutoencoderKLWan(**sizes), dtype).eval()  # its own to() has a warning here
    with torch.no_grad():
        for place, p in enumerate(wan.parameters()):
            p.copy_(draw(*p.shape, seed=place) / (p[0].numel() if p.dim() > 1 else 4) ** 0.5)
        wan.decoder.conv_out.weight *= 0.02
        wan.decoder.conv_out.bias *= 0.02
    for module in wan.modules():
        if isinstance(module, nn.Upsample):  # diffusers repeats pixels in float32, whatever their dtype
            module.forward = partial(nn.Upsample.forward, module)
    return wan


def original(wan):
    """The weights of a two-blocks-per-level AutoencoderKLWan by the names of Wan's repository, found by asking diffusers'
    own converter about every name that Wan's code can have."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    block = [f"{part}.{kind}" for part, kinds in (("residual.0", ["gamma"]), ("residual.2", ["weight", "bias"]), (
        "residual.3", ["gamma"]), ("residual.6", ["weight", "bias"]), ("shortcut", ["weight", "bias"])) for kind in kinds]
    sampler = [f"{part}.{kind}" for part in ("resample.1", "time_conv") for kind in ("weight", "bias")]
    places = {"encoder.downsamples": (2, 11), "decoder.upsamples": (3, 15)}
    names = [f"{part}.{kind}" for part in ("conv1", "conv2", "encoder.conv1", "decoder.conv1", "encoder.head.2",
                                           "decoder.head.2") for kind in ("weight", "bias")]
    names += ["encoder.head.0.gamma", "decoder.head.0.gamma"]
    for side in ("encoder", "decoder"):
        names += [f"{side}.middle.{n}.{part}" for n in (0, 2) for part in block[:6]]
        names += [f"{side}.middle.1.{part}" for part in ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight",
                                                         "proj.bias")]
    for stack, (blocks, count) in places.items():
        for place in range(count):
            names += [f"{stack}.{place}.{part}" for part in (sampler if place % (blocks + 1) == blocks else block)]
    state = wan.state_dict()
    to_theirs = {name: next(iter(convert_wan_vae_to_diffusers({name: None}))) for name in names}
    return OrderedDict((name, state[theirs]) for name, theirs in to_theirs.items() if theirs in state)


def assert_close(got, wanted, tolerance):
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def assert_same(got, wanted):
    assert list(got) == list(wanted) or set(got) == set(wanted)
    for name, t in wanted.items():
        assert got[name].dtype == t.dtype and got[name].shape == t.shape and torch.equal(got[name], t), name


def tensors(path):
    from safetensors.torch import load_file
    return load_file(path)


# ------------------------------------------------------------------------------------------------ Wan's VAE
OTHER_SIZES = [
    dict(base_dim=16, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, False]),
    dict(base_dim=24, z_dim=3, dim_mult=[2, 1], num_res_blocks=3, temperal_downsample=[False]),
    dict(base_dim=32, z_dim=16, dim_mult=[1], num_res_blocks=1, temperal_downsample=[]),
    dict(base_dim=8, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True, False]),
]


@pytest.mark.parametrize("sizes, dtype, tolerance", [(SMALL, torch.float32, 1e-5), (SMALL, torch.float64, 1e-12),
                                                     (OTHER_SIZES[1], torch.float64, 1e-12)])
def test_a_saved_wan_vae_loads_agrees_and_comes_back(tmp_path, sizes, dtype, tolerance):
    """Latents and pixels of diffusers' streamed encode and decode; the very bytes of its file; both namings."""
    wan = make_wan(dtype, **sizes)
    wan.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of statistics that are not of so many channels: a test of its own
        vae = load_vae(tmp_path / "theirs")
    assert vae.to_moments.weight.dtype == dtype and not vae.training and vae.to_moments.weight.requires_grad
    video = draw(2, 3, 9, 2 * vae.config.space_factor, vae.config.space_factor, dtype=dtype)
    z = draw(2, sizes["z_dim"], 1 + 8 // vae.config.time_factor, 2, 1, seed=1, dtype=dtype)
    count = sizes["z_dim"]
    mean, std = (torch.tensor(wan.config[name] if len(wan.config[name]) == count else [other] * count, dtype=dtype).view(
        -1, 1, 1, 1) for name, other in (("latents_mean", 0.0), ("latents_std", 1.0)))
    with torch.no_grad():
        latents, pixels = wan.encode(video).latent_dist.mean, wan.decode(z).sample
        assert pixels.abs().max() < 1
        assert_close(vae.encode(video), (latents - mean) / std, tolerance)
        assert_close(torch.cat(list(vae.encode_stream(video)), 2), (latents - mean) / std, tolerance)
        assert_close(vae.decode((z - mean) / std), pixels, tolerance)
        assert_close(torch.cat(list(vae.decode_stream((z - mean) / std)), 2), pixels, tolerance)
    save_vae(vae, tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    again = type(wan).from_pretrained(tmp_path / "ours", torch_dtype=dtype, low_cpu_mem_usage=False)
    assert_same(again.state_dict(), wan.state_dict())
    for name in ("wan.safetensors", "wan.pth"):
        save_vae(vae, tmp_path / name, "wan")
        back = load_vae(tmp_path / name)
        assert back.config.widths == vae.config.widths and back.config.resamples == vae.config.resamples
        assert_same(dict(back.named_parameters()), dict(vae.named_parameters()))
        save_vae(back, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()


def test_the_original_names_are_those_of_diffusers_converter(tmp_path):
    wan = make_wan(**WAN)
    state = original(wan)
    assert len(state) == len(wan.state_dict())
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    for path in (tmp_path / "Wan2.1_VAE.pth", tmp_path):  # the folder: as Wan's own repositories have it
        vae = load_vae(path)
        assert_same(vae_state_dict(vae, "diffusers"), wan.state_dict())
        assert_same(vae_state_dict(vae, "wan"), state)
        assert vae.config.latent_mean == PRESETS["wan2.1"].latent_mean and vae.config.width == 8
    save_vae(vae, tmp_path / "ours.pth", "wan")
    assert_same(torch.load(tmp_path / "ours.pth", weights_only=True), state)


def test_the_published_sizes_are_the_preset_s():
    """Names and shapes of every tensor of Wan 2.1's VAE, from which its sizes are read again."""
    with torch.device("meta"):
        vae = VideoVAE.preset("wan2.1")
    for layout, names in (("diffusers", {"encoder.down_blocks.5.resample.1.weight": (192, 192, 3, 3),
                                         "decoder.up_blocks.1.upsamplers.0.time_conv.weight": (768, 384, 3, 1, 1),
                                         "decoder.mid_block.attentions.0.norm.gamma": (384, 1, 1)}),
                          ("wan", {"encoder.downsamples.5.resample.1.weight": (192, 192, 3, 3),
                                   "decoder.upsamples.7.time_conv.weight": (768, 384, 3, 1, 1),
                                   "decoder.upsamples.12.residual.6.weight": (96, 96, 3, 3, 3),
                                   "decoder.middle.1.norm.gamma": (384, 1, 1), "decoder.head.0.gamma": (96, 1, 1, 1),
                                   "conv1.weight": (32, 32, 1, 1, 1), "conv2.weight": (16, 16, 1, 1, 1)})):
        state = vae_state_dict(vae, layout)
        assert len(state) == 194
        for name, shape in names.items():
            assert state[name].shape == shape
        assert vae_from_state_dict({name: torch.empty(t.shape) for name, t in state.items()}).config == vae.config


def test_statistics_come_from_the_folder_and_go_back(tmp_path):
    make_wan(**SMALL).save_pretrained(tmp_path / "theirs")
    vae = load_vae(tmp_path / "theirs", dtype=torch.float64)
    assert vae.latent_mean.tolist() == [0.5, 1, 2, 3] and vae.latent_std.tolist() == [1.1, 2, 3, 4]
    save_vae(load_vae(tmp_path / "theirs"), tmp_path / "ours")
    read = lambda folder: json.loads((tmp_path / folder / "config.json").read_text())
    theirs, ours = read("theirs"), read("ours")
    assert ours["latents_std"] == [1.1, 2, 3, 4]  # as they were written, not as float32 has them
    assert {k: v for k, v in theirs.items() if k[0] != "_" and "scale" not in k} == {
        k: v for k, v in ours.items() if k[0] != "_" and "scale" not in k}
    vae.set_latent_statistics(torch.zeros(4), torch.ones(4) / 4)
    save_vae(vae, tmp_path / "ours")
    assert read("ours")["latents_mean"] == [0] * 4 and read("ours")["latents_std"] == [0.25] * 4
    other = json.loads((tmp_path / "theirs" / "config.json").read_text()) | dict(latents_mean=[0.0] * 16)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(other))
    with pytest.warns(UserWarning, match="elements in config.json, got 16 and 4; latents are not normalised$"):
        assert load_vae(tmp_path / "theirs").latent_std.tolist() == [1] * 4


def test_folders_of_every_kind(tmp_path):
    """In several files, within a pipeline, as one file beside its config.json, in another dtype."""
    wan = make_wan(**SMALL)
    wan.save_pretrained(tmp_path / "vae", max_shard_size="50KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 2
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    for path in (tmp_path / "vae", tmp_path, str(tmp_path)):
        assert_same(vae_state_dict(load_vae(path)), wan.state_dict())
    half = load_vae(tmp_path, dtype=torch.bfloat16)
    assert half.to_moments.weight.dtype == torch.bfloat16 and half.latent_std.dtype == torch.float32
    assert half.encode(draw(1, 3, 5, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="without weights in several files"):
        save_vae(half, tmp_path / "vae")
    wan.save_pretrained(tmp_path / "one")
    assert load_vae(tmp_path / "one" / WEIGHTS).latent_mean.tolist() == [0.5, 1, 2, 3]
    for path in (tmp_path, tmp_path / "one" / WEIGHTS):  # what --vae takes in place of a run folder
        vae = training_vae.load_vae(str(path))
        assert_same(vae_state_dict(vae), wan.state_dict())
    with pytest.raises(FileNotFoundError, match="expected a run folder of sora-fast train-vae"):
        training_vae.load_vae(str(tmp_path / "nowhere"))


def test_a_loaded_vae_trains_and_is_saved_as_trained(tmp_path):
    make_wan(**SMALL).save_pretrained(tmp_path / "theirs")
    vae = load_vae(tmp_path / "theirs").train()
    optimizer = torch.optim.SGD(vae.parameters(), 1e-3)
    reconstruction, kl = vae(draw(1, 3, 5, 4, 4, dtype=torch.float32))
    (reconstruction.square().mean() + kl.mean()).backward()
    assert all(p.grad is not None for p in vae.parameters())
    optimizer.step()
    save_vae(vae, tmp_path / "ours")
    saved, before = tensors(tmp_path / "ours" / WEIGHTS), tensors(tmp_path / "theirs" / WEIGHTS)
    assert_same(saved, vae_state_dict(vae))
    assert not torch.equal(saved["encoder.conv_in.weight"], before["encoder.conv_in.weight"])


def test_what_is_wrong_with_a_vae_is_one_sentence(tmp_path):
    wan = make_wan(**SMALL)
    wan.save_pretrained(tmp_path / "good")
    state, config = wan.state_dict(), dict(wan.config)
    wide = state["encoder.conv_in.weight"].repeat(2, 1, 1, 1, 1)
    few = {name: t for name, t in state.items() if not name.startswith("decoder.mid_block")}
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "pickle.pth")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    tiny, good = VideoVAE.preset("tiny"), load_vae(tmp_path / "good")
    calls = {
        "without decoder.mid_block.resnets.0.norm1.gamma, .* and 14 more": lambda: vae_from_state_dict(few, config),
        "with unknown more; pass": lambda: vae_from_state_dict(state | dict(more=torch.zeros(1)), config),
        r"with encoder.conv_in.weight of \(16, 3, 3, 3, 3\) for \(8, 3, 3, 3, 3\)": lambda: vae_from_state_dict(
            state | {"encoder.conv_in.weight": wide}, config),
        "without encoder.down_blocks.0.norm1.gamma, with unknown x, y, z and 1 more, with": lambda: vae_from_state_dict(
            {k: v for k, v in state.items() if k != "encoder.down_blocks.0.norm1.gamma"} | {k: wide for k in "xyzw"}
            | {"encoder.conv_in.weight": wide}, config),
        "expected a tensor encoder.conv_in.weight, got a, b": lambda: vae_from_state_dict(dict(a=wide, b=wide)),
        "got no tensors": lambda: vae_from_state_dict({}),
        "is_residual False in config.json, got True": lambda: vae_from_state_dict(state, config | dict(is_residual=True)),
        r"decoder_base_dim 8 in config.json, got 16": lambda: vae_from_state_dict(state, config | dict(decoder_base_dim=16)),
        "attn_scales": lambda: vae_from_state_dict(state, config | dict(attn_scales=[1.0])),
        "got resnets.0.conv1.weight at 0": lambda: vae_from_state_dict(
            state | {"encoder.down_blocks.0.resnets.0.conv1.weight": wide}),
        "got nothing at": lambda: load_vae(tmp_path / "nowhere"),
        "expected one file of weights .* got none": lambda: load_vae(tmp_path / "empty"),
        "expected one file of weights .* got broken.pth": lambda: load_vae_of_two(tmp_path),
        "expected a file of tensors at": lambda: load_vae(tmp_path / "broken.pth"),
        "expected a whole safetensors file": lambda: load_vae(tmp_path / "broken.safetensors"),
        "expected a state dict of tensors .* got list": lambda: load_vae(tmp_path / "list.pth"),
        "got UnpicklingError": lambda: load_vae(tmp_path / "pickle.pth"),
        "a folder of AutoencoderKLWan, got one of AutoencoderKL in": lambda: load_vae(tmp_path / "other"),
        "got none of a.safetensors": lambda: load_vae(tmp_path / "lost"),
        "with another linear_path, linear_heads, attention, decoder_blocks": lambda: save_vae(tiny, tmp_path / "tiny"),
        "expected a file of .safetensors, .pt, .pth": lambda: save_vae(good, tmp_path / "a", "wan"),
        "layout to be 'diffusers' or 'wan', got 'comfy'": lambda: save_vae(good, tmp_path / "a", "comfy"),
    }
    for words, call in calls.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and ";" in str(caught.value), caught.value
    assert not (tmp_path / "tiny").exists() and not (tmp_path / "a").exists()


def load_vae_of_two(tmp_path):
    (tmp_path / "two").mkdir(exist_ok=True)
    for name in ("broken.pth", "list.pth"):
        (tmp_path / "two" / name).write_bytes((tmp_path / name).read_bytes())
    return load_vae(tmp_path / "two")


# ------------------------------------------------------------------------------------------------ the official DiT
WIDTHS = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1152, 16)}


def official_state(preset, depth, classes=10, side=16, dtype=torch.float64, out=8):
    """Random numbers under the official DiT's names and in its shapes, features near 1."""
    size, patch = preset.split("/")
    width, patch = WIDTHS[size][0], int(patch)
    shapes = {"x_embedder.proj": (width, 4, patch, patch), "t_embedder.mlp.0": (width, 256),
              "t_embedder.mlp.2": (width, width), "final_layer.linear": (patch * patch * out, width),
              "final_layer.adaLN_modulation.1": (2 * width, width)}
    for n in range(depth):
        shapes |= {f"blocks.{n}.attn.qkv": (3 * width, width), f"blocks.{n}.attn.proj": (width, width),
                   f"blocks.{n}.mlp.fc1": (4 * width, width), f"blocks.{n}.mlp.fc2": (width, 4 * width),
                   f"blocks.{n}.adaLN_modulation.1": (6 * width, width)}
    state = {"pos_embed": official_positions(width, side // patch).to(dtype),
             "y_embedder.embedding_table.weight": draw(classes + 1, width, dtype=dtype)}
    for place, (name, shape) in enumerate(shapes.items()):
        state[f"{name}.weight"] = draw(*shape, seed=place, dtype=dtype) / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = draw(shape[0], seed=place + 999, dtype=dtype) / 2
    return state


def both(state, dit, preset, depth, side=16):
    """Our prediction and the official formula's."""
    x, t, y = draw(2, 4, side, side), torch.tensor([3, 871]), torch.tensor([10, 4])
    with torch.no_grad():
        return (dit(x[:, :, None], t, labels=y)[:, :, 0],
                official(state, x, t, y, depth, WIDTHS[preset.split("/")[0]][1], int(preset.split("/")[1])))


@pytest.mark.parametrize("preset, depth", [("S/2", 2), ("XL/4", 1)])
def test_an_official_state_dict_gives_the_official_output(preset, depth):
    state = official_state(preset, depth)
    dit = dit_from_state_dict(state)
    assert dit.config == DiT.preset(preset, depth=depth, classes=10).config if depth < 12 else True
    got, wanted = both(state, dit, preset, depth)
    assert_close(got, wanted, 1e-12)
    swapped = state | {f"blocks.0.mlp.fc1.{kind}": state[f"blocks.0.mlp.fc1.{kind}"].flip(0) for kind in ("weight", "bias")}
    with pytest.raises(AssertionError):
        assert_close(both(swapped, dit, preset, depth)[1], got, 1e-12)
    assert_same(dit_state_dict(dit), state)


def test_official_files_of_every_kind(tmp_path):
    """A plain state dict, a training checkpoint with its command line, safetensors; and back."""
    state = official_state("S/4", 1, dtype=torch.float32)
    older = {name: t + 1 for name, t in state.items()}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": older, "ema": state, "opt": {"state": {0: older["pos_embed"]}},
                "args": argparse.Namespace(model="DiT-S/4")}, tmp_path / "training.pt")
    torch.save({"model": state}, tmp_path / "model.pt")
    for name in ("plain.pt", "training.pt", "model.pt"):
        dit = load_dit(tmp_path / name)
        assert_same(dit_state_dict(dit), state)
    save_dit(dit, tmp_path / "ours.pt")
    assert_same(torch.load(tmp_path / "ours.pt", weights_only=True), state)
    save_dit(dit, tmp_path / "ours.safetensors")
    assert_same(tensors(tmp_path / "ours.safetensors"), state)
    assert_same(dit_state_dict(load_dit(tmp_path / "ours.safetensors")), state)
    assert load_dit(tmp_path / "plain.pt", dtype=torch.bfloat16).pos_embed.dtype == torch.bfloat16
    with torch.no_grad():
        for p in (fresh := DiT.preset("S/4", depth=1, classes=10)).parameters():
            p.copy_(torch.randn(p.shape))
    save_dit(fresh, tmp_path / "fresh.pt")
    assert load_dit(tmp_path / "fresh.pt").pos_embed.shape == (1, 64, 384)  # 256 x 256 pixels
    save_dit(dit, tmp_path / "large.pt", side=64)
    assert torch.equal(load_dit(tmp_path / "large.pt").pos_embed, official_positions(384, 16).float())


def test_the_table_of_positions_is_the_checkpoint_s_at_its_own_size():
    """A float32 table in float64 weights, as upcast checkpoints have it; other sizes in the same pack have sin-cos."""
    state = official_state("S/4", 1)
    state["pos_embed"] = state["pos_embed"].float().double()
    dit = dit_from_state_dict(state)
    assert_close(*both(state, dit, "S/4", 1), 1e-12)
    larger = state | dict(pos_embed=official_positions(384, 6))
    assert_close(*both(larger, dit, "S/4", 1, side=24), 1e-12)
    images, given = [draw(4, 1, 16, 16), draw(4, 1, 24, 24)], dict(labels=torch.tensor([1, 2]))
    together = dit(images, torch.tensor([5, 9]), **given)
    for place, image in enumerate(images):
        alone = dit([image], torch.tensor([5, 9])[place : place + 1], labels=given["labels"][place : place + 1])
        assert_close(together[place], alone[0], 1e-12)
    without = {name: t for name, t in state.items() if name != "pos_embed"}
    assert dit_from_state_dict(without).pos_embed is None


def test_learned_positions_are_used_at_their_size_and_refused_at_others():
    state = official_state("S/4", 1)
    state["pos_embed"] = draw(1, 16, 384, seed=5)
    dit = dit_from_state_dict(state)
    assert_close(*both(state, dit, "S/4", 1), 1e-12)
    assert_same(dit_state_dict(dit), state)
    with pytest.raises(ValueError, match="images of 4 x 4 tokens, the size of the checkpoint's learned positions"):
        both(state, dit, "S/4", 1, side=24)


def test_what_is_wrong_with_a_dit_is_one_sentence(tmp_path):
    state = official_state("S/4", 1)
    narrow = {name: t[..., :192] if name == "x_embedder.proj.bias" else t for name, t in state.items()}
    few = {name: t for name, t in state.items() if "adaLN" not in name}
    calls = {
        "without blocks.0.adaLN_modulation.1.weight, .* and 1 more": lambda: dit_from_state_dict(few),
        "with unknown more": lambda: dit_from_state_dict(state | dict(more=torch.zeros(1))),
        r"with x_embedder.proj.bias of \(192,\) for \(384,\)": lambda: dit_from_state_dict(narrow),
        r"expected a tensor x_embedder.proj.weight of 4 dimensions, got pos_embed, .* more": lambda: dit_from_state_dict(
            {k: v for k, v in state.items() if k != "x_embedder.proj.weight"}),
        r"4 dimensions, got x_embedder.proj.weight of \(1, 2, 3\)": lambda: dit_from_state_dict(
            state | {"x_embedder.proj.weight": torch.zeros(1, 2, 3)}),
        r"a width of 384, 768, 1024, 1152 \(S, B, L, XL\), got 100; pass heads=": lambda: dit_from_state_dict(
            state | {"x_embedder.proj.weight": torch.zeros(100, 4, 2, 2)}),
        "pos_embed of shape": lambda: dit_from_state_dict(state | dict(pos_embed=draw(1, 15, 384))),
        "class-conditional DiT of the paper": lambda: save_dit(DiT.preset("tiny", depth=1), tmp_path / "a.pt"),
        "expected a file of": lambda: save_dit(dit_from_state_dict(state), tmp_path / "a"),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and ";" in str(caught.value), caught.value
