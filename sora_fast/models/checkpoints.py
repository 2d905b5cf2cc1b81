"""Published checkpoints into our models and back: Wan's VAE, the official DiT, Wan's transformer.

A layout is a naming of the same weights: "diffusers" (AutoencoderKLWan, WanTransformer3DModel), "wan" (the original
repository of Wan 2.1), "official" (facebookresearch/DiT). One table per model, ``vae_keys``, ``dit_keys`` or ``wan_keys``,
says for each of our tensors which of theirs it holds and in what shapes; loading and saving both go by it, so that what
was loaded is saved bit for bit. Weights keep the dtype they have in the file.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..nn import RMSNorm
from ..pack import Pack
from .dit import _SIZES, DiT, DiTConfig, sincos
from .vae import PRESETS, VAEConfig, VideoVAE
from .wan import WanDiT, WanDiTConfig
from .weights import Keys, Tensors, build, check_layout, convert, export, fill, read, shape_of, write


# ------------------------------------------------------------------------------------------------ for users
def load_vae(path: str | Path, *, device="cpu", dtype: torch.dtype | None = None) -> VideoVAE:
    """A VideoVAE with the weights of Wan 2.1's VAE or one of other sizes with its graph.

    Args:
        path: a folder of diffusers (AutoencoderKLWan, or a pipeline's with ``vae/``), or a file (.safetensors, .pt, .pth)
            in either naming. Sizes come from the folder's config.json, without one from the tensors. So do the latents'
            mean and std; without config.json 16 channels have Wan 2.1's.
        device: where the weights go.
        dtype: of the weights; None: as in the file.

    Raises:
        ValueError, FileNotFoundError: one sentence, naming the first few tensors that are missing or do not fit.
    """
    own = Path(path) / "Wan2.1_VAE.pth"  # in Wan's own folders it lies beside the transformer
    state, config = read("load_vae", own if own.is_file() else path, ["AutoencoderKLWan"], "vae")
    return vae_from_state_dict(state, config, dtype=dtype).to(device).eval()


def save_vae(vae: VideoVAE, path: str | Path, layout: str = "diffusers") -> None:
    """Write ``vae``, which must have Wan's graph, as diffusers or Wan's own code reads it.

    Args:
        path: ``layout="diffusers"``: a folder, for config.json and the weights, which
            ``AutoencoderKLWan.from_pretrained`` loads. ``"wan"``, or a path with a suffix: one file of weights
            (.safetensors, .pt, .pth).

    Raises:
        ValueError: a VAE of another graph, a path without a suffix that it takes.
    """
    write("save_vae", path, vae_state_dict(vae, layout), _described(vae) if layout == "diffusers" else None)


def load_dit(path: str | Path, *, heads: int | None = None, device="cpu", dtype: torch.dtype | None = None) -> DiT | WanDiT:
    """A DiT with weights of facebookresearch/DiT, or a WanDiT with those of Wan's text-to-video transformer.

    Args:
        path: a file (.pt, .pth, .safetensors), or a folder: diffusers' WanTransformer3DModel (or a pipeline's with
            ``transformer/``), Wan's own. Of a training checkpoint of DiT the average ("ema") is taken.
        heads: attention heads, where neither a config.json nor the width tells them.
        device: where the weights go.
        dtype: of the weights; None: as in the file. Wan's affine norms, tables and timestep embedder are cast to no 16 bits.

    Raises:
        ValueError, FileNotFoundError: one sentence, naming the first few tensors that are missing or do not fit.
    """
    state, config = read("load_dit", path, ["WanTransformer3DModel", "WanModel"], "transformer")
    if config or "patch_embedding.weight" in state:
        return wan_from_state_dict(state, config, heads=heads, dtype=dtype).to(device).eval()
    return dit_from_state_dict(state, heads=heads, dtype=dtype).to(device).eval()


def save_dit(model: DiT | WanDiT, path: str | Path, layout: str = "diffusers", *, side: int | None = None) -> None:
    """Write a class-conditional DiT as facebookresearch/DiT reads it, or a WanDiT as diffusers or Wan's own code does.

    Args:
        model: the DiT or WanDiT.
        path: of a DiT a file (.pt, .safetensors); of a WanDiT as in ``save_vae``.
        layout: of a WanDiT "diffusers" or "wan"; a DiT has one layout only.
        side: height and width of the latents that the official DiT's table of positions is for; None: those of the
            checkpoint it came from, else 32 (256 x 256 pixels).

    Raises:
        ValueError: a model without that layout, a path without a suffix that it takes.
    """
    if isinstance(model, WanDiT):
        write("save_dit", path, wan_state_dict(model, layout), wan_description(model) if layout == "diffusers" else None)
    else:
        write("save_dit", path, dit_state_dict(model, side), None)


# ------------------------------------------------------------------------------------------------ Wan's VAE
_BLOCKS = {"diffusers": dict(norm1="norm1", conv1="conv1", norm2="norm2", conv2="conv2", shortcut="conv_shortcut"),
           "wan": dict(norm1="residual.0", conv1="residual.2", norm2="residual.3", conv2="residual.6", shortcut="shortcut")}
_PARTS = {"diffusers": ("conv_in", "down_blocks", "norm_out", "conv_out", "mid_block.resnets.0", "mid_block.attentions.0",
                        "mid_block.resnets.1", "quant_conv", "post_quant_conv"),
          "wan": ("conv1", "downsamples", "head.0", "head.2", "middle.0", "middle.1", "middle.2", "conv1", "conv2")}


def vae_keys(vae: VideoVAE, layout: str) -> Keys:
    """Their name and shape of each of our parameters."""
    check_layout(layout)
    stem, down, norm, head, block1, attention, block2, to_moments, from_latents = _PARTS[layout]
    names: dict[nn.Module, str] = {vae.to_moments: to_moments, vae.from_latents: from_latents}

    def block(ours, theirs):
        names.update({getattr(ours, part): f"{theirs}.{name}" for part, name in _BLOCKS[layout].items()})

    def resample(ours, theirs):
        names.update({ours.space_conv: f"{theirs}.resample.1", ours.time_conv: f"{theirs}.time_conv"})

    for side in ("encoder", "decoder"):
        ours, place = getattr(vae, side), 0
        names |= {ours.stem: f"{side}.{stem}", ours.norm: f"{side}.{norm}", ours.head: f"{side}.{head}"}
        block(ours.middle.block1, f"{side}.{block1}")
        block(ours.middle.block2, f"{side}.{block2}")
        names |= {getattr(ours.middle.attention, part): f"{side}.{attention}.{part}" for part in ("norm", "to_qkv", "proj")}
        for depth, level in enumerate(ours.levels):
            for number, part in enumerate([*level.blocks, level.resample]):
                theirs = f"{side}.{down if side == 'encoder' else 'upsamples'}.{place}"  # blocks and resamplers in one list
                if side == "decoder" and layout == "diffusers":
                    theirs = f"decoder.up_blocks.{depth}.{'upsamplers.0' if part is level.resample else f'resnets.{number}'}"
                if part is not None:
                    (resample if part is level.resample else block)(part, theirs)
                    place += 1
    names.pop(None, None)  # shortcuts and time_convs that are not there
    found: Keys = {}
    for name, module in vae.named_modules():
        if module not in names:
            continue
        theirs, flat = names[module], re.search(r"\.(resample\.1|to_qkv|proj|norm)$", names[module])  # per frame: no time
        if isinstance(module, RMSNorm):
            found[f"{name}.weight"] = [(f"{theirs}.gamma", (*module.weight.shape, *(1, 1, 1)[: 2 if flat else 3]))]
        else:
            shape = tuple(module.weight.shape)
            found[f"{name}.weight"] = [(f"{theirs}.weight", (*shape[:2], *shape[3:]) if flat else shape)]
            found[f"{name}.bias"] = [(f"{theirs}.bias", tuple(module.bias.shape))]
    return found


def vae_from_state_dict(state: Tensors, config: Mapping | None = None, *, dtype: torch.dtype | None = None) -> VideoVAE:
    """A VideoVAE of tensors by diffusers' or Wan's names; ``config``: diffusers' config.json, None: by the tensors."""
    layout = "wan" if any(name.startswith("encoder.downsamples.") for name in state) else "diffusers"
    made = _vae_config(state, layout) if config is None else _described_vae(config)
    vae = build(lambda: VideoVAE(made))
    values = convert("load_vae", vae_keys(vae, layout), state, dtype)
    wide = torch.promote_types(values["to_moments.weight"].dtype, torch.float32)
    channels = made.latent_channels
    values["latent_mean"] = torch.tensor(made.latent_mean or [0.0] * channels, dtype=wide, device="cpu")
    values["latent_std"] = torch.tensor(made.latent_std or [1.0] * channels, dtype=wide, device="cpu")
    fill(vae, values)
    return vae


def vae_state_dict(vae: VideoVAE, layout: str = "diffusers") -> dict[str, torch.Tensor]:
    """The weights by diffusers' or Wan's names and in their shapes; views of ours."""
    c = vae.config
    wrong = [name for name, same in (("linear_path", not c.linear_path), ("linear_heads", not c.linear_heads),
                                     ("attention", c.attention), ("regularisation", c.regularisation == "kl"),
                                     ("decoder_blocks", c.decoder_blocks == c.encoder_blocks + 1),
                                     ("patch", c.patch == 1 or layout == "diffusers"),
                                     ("space_factor", all(space for space, _ in c.resamples))) if not same]
    if wrong:
        raise ValueError(f"save_vae: expected a VAE with the graph of Wan 2.1, got one with another {', '.join(wrong)}; "
                         f"only VAEs like VideoVAE.preset('wan2.1') have a place in its layouts")
    return export(vae_keys(vae, layout), vae.state_dict())


def vae_description(config: VAEConfig) -> dict:
    """diffusers' config.json of a VideoVAE of these sizes."""
    c, count, channels = config, config.latent_channels, config.in_channels * config.patch**2
    return dict(
        _class_name="AutoencoderKLWan", attn_scales=[], base_dim=c.width, decoder_base_dim=None,
        dim_mult=[width // c.width for width in c.widths], dropout=0.0, in_channels=channels, is_residual=False,
        latents_mean=list(c.latent_mean or [0.0] * count), latents_std=list(c.latent_std or [1.0] * count),
        num_res_blocks=c.encoder_blocks, out_channels=channels, patch_size=c.patch if c.patch > 1 else None,
        scale_factor_spatial=c.space_factor, scale_factor_temporal=c.time_factor,
        temperal_downsample=[time for _, time in c.resamples], z_dim=count)


def _described(vae: VideoVAE) -> dict:
    """``vae_description``, with the statistics that the VAE has been given since it was made."""
    found = vae_description(vae.config)
    for name, now in (("latents_mean", vae.latent_mean.cpu()), ("latents_std", vae.latent_std.cpu())):
        if not torch.equal(torch.tensor(found[name], dtype=now.dtype, device="cpu"), now):
            found[name] = now.tolist()
    return found


def _described_vae(config: Mapping) -> VAEConfig:
    """The sizes in diffusers' config.json; what older ones leave out is Wan 2.1's."""
    c = vae_description(PRESETS["wan2.1"]) | dict(config)
    for name, wanted in (("is_residual", False), ("attn_scales", []), ("out_channels", c["in_channels"]),
                         ("decoder_base_dim", c["base_dim"])):
        if c[name] != wanted and c[name] is not None:
            raise ValueError(f"load_vae: expected the graph of Wan 2.1 with {name} {wanted} in config.json, got {c[name]}; "
                             f"VideoVAE has no such form (Wan 2.2's 48-channel VAE is one)")
    patch, count = c["patch_size"] or 1, c["z_dim"]
    statistics = [tuple(c[name] or ()) for name in ("latents_mean", "latents_std")]
    if any(len(values) != count for values in statistics):
        warnings.warn(f"load_vae: expected latents_mean and latents_std of {count} elements in config.json, got "
                      f"{len(statistics[0])} and {len(statistics[1])}; latents are not normalised", stacklevel=4)
        statistics = [None, None]
    return _sizes(c["in_channels"] // patch**2, count, c["base_dim"], c["dim_mult"], c["num_res_blocks"],
                  c["num_res_blocks"] + 1, c["temperal_downsample"], patch, *statistics)


def _sizes(in_channels, channels, width, multipliers, encoder_blocks, decoder_blocks, halves, patch=1, mean=None, std=None):
    """A VAEConfig; ``halves``: whether each level but the last halves time."""
    halves = tuple(map(bool, halves))[: len(multipliers) - 1]
    made = dict(in_channels=in_channels, latent_channels=channels, width=width, multipliers=tuple(multipliers),
                encoder_blocks=encoder_blocks, decoder_blocks=decoder_blocks, patch=patch,
                space_factor=patch * 2 ** len(halves), time_factor=2 ** sum(halves), latent_mean=mean, latent_std=std)
    late = halves == tuple(sorted(halves))
    return VAEConfig(**made, time_levels=None if late else halves)


def _vae_config(state: Tensors, layout: str) -> VAEConfig:
    """The sizes that tensors tell."""
    stem, down, _, _, _, _, _, _, from_latents = _PARTS[layout]
    conv = _BLOCKS[layout]["conv2"]
    entry = shape_of("load_vae", state, f"encoder.{stem}.weight")
    channels = shape_of("load_vae", state, f"{from_latents}.weight")[0]
    parts: dict[int, list[str]] = {}  # of each place in the encoder's list of blocks and resamplers
    for key in state:
        if found := re.match(rf"encoder\.{down}\.(\d+)\.(.*)", key):
            parts.setdefault(int(found[1]), []).append(found[2])
    widths, halves, counts = [], [], Counter()
    for place in sorted(parts):
        if odd := [part for part in parts[place] if part.startswith(("to_qkv", "resnets"))]:
            raise ValueError(f"load_vae: expected blocks and resamplers in encoder.{down}, got {odd[0]} at {place}; "
                             f"VideoVAE has no such form (Wan 2.2's 48-channel VAE is one)")
        if any(part.startswith(("resample", "time_conv")) for part in parts[place]):
            halves.append(any(part.startswith("time_conv") for part in parts[place]))
        else:
            counts[len(halves)] += 1
            if counts[len(halves)] == 1:
                widths.append(shape_of("load_vae", state, f"encoder.{down}.{place}.{conv}.weight")[0])
    if layout == "diffusers":
        decoder = {int(n[1]) for key in state if (n := re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", key))}
    else:
        places = {int(n[1]): n[2] for key in state if (n := re.match(r"decoder\.upsamples\.(\d+)\.(\w+)", key))}
        decoder = {p for p in places if not any(places[q] in ("resample", "time_conv") for q in places if q <= p)}
    statistics = (PRESETS["wan2.1"].latent_mean, PRESETS["wan2.1"].latent_std) if channels == 16 else (None, None)
    return _sizes(entry[1], channels, entry[0], [width // entry[0] for width in widths], max(counts.values(), default=1),
                  max(len(decoder), 1), halves, 1, *statistics)


# ------------------------------------------------------------------------------------------------ the official DiT
def dit_keys(dit: DiT) -> Keys:
    """The official name and shape of each of our parameters: an image's 2-D kernel, a table of classes."""
    keys = {name: [(name, tuple(p.shape))] for name, p in dit.named_parameters()}
    width, channels, _, p, _ = dit.x_embedder.proj.weight.shape
    keys["x_embedder.proj.weight"] = [("x_embedder.proj.weight", (width, channels, p, p))]
    keys["y_embedder.weight"] = [("y_embedder.embedding_table.weight", tuple(dit.y_embedder.weight.shape))]
    return keys


def dit_from_state_dict(state: Tensors, *, heads: int | None = None, dtype: torch.dtype | None = None) -> DiT:
    """A DiT of tensors by the official names; the table of positions may be left out."""
    state = dict(state)
    kernel = shape_of("load_dit", state, "x_embedder.proj.weight", 4)
    (width, channels, patch, _), table = kernel, state.pop("pos_embed", None)
    known = {size: count for size, _, count in _SIZES.values()}
    if heads is None and width not in known:
        raise ValueError(f"load_dit: expected a width of {', '.join(map(str, known))} (S, B, L, XL), got {width}; pass "
                         f"heads=, which the weights do not tell")
    hidden = shape_of("load_dit", state, "blocks.0.mlp.fc1.weight")[0]
    made = DiTConfig(
        width, _depth(state), heads or known[width], hidden / width, (1, patch, patch), channels,
        learn_sigma=shape_of("load_dit", state, "final_layer.linear.weight")[0] == 2 * channels * patch**2,
        classes=shape_of("load_dit", state, "y_embedder.embedding_table.weight")[0] - 1, qk_norm=False, positions=(2, 1),
        rope_axes=None)
    dit = build(lambda: DiT(made))
    fill(dit, convert("load_dit", dit_keys(dit), state, dtype))
    if table is not None:
        side = math.isqrt(table.shape[-2]) if table.dim() == 3 else 0
        if not side or tuple(table.shape) != (1, side**2, width):
            raise ValueError(f"load_dit: expected pos_embed of shape (1, side * side, {width}), got {tuple(table.shape)}; "
                             f"images of the official DiT are square")
        dit.pos_embed = table if dtype is None else table.to(dtype)
        if (positions(dit, side) - table.cpu()).abs().max() > 0.01:  # a learned table: it says nothing of other sizes
            dit.config = replace(dit.config, positions=())
    return dit


def dit_state_dict(dit: DiT, side: int | None = None) -> dict[str, torch.Tensor]:
    """The weights by the official names, with the table of positions for latents of ``side`` x ``side``."""
    c = dit.config
    if c.text_width or c.qk_norm or c.rope_axes or not c.classes or c.patch[0] != 1 or c.patch[1] != c.patch[2]:
        raise ValueError("save_dit: expected a class-conditional DiT of the paper, got one with text, QK-norm, RoPE, "
                         "patches of several frames, or no classes; only DiTs like DiT.preset('XL/2') have a place in its "
                         "layout")
    table = dit.pos_embed
    if table is None or side is not None:
        table = positions(dit, (side or 32) // c.patch[1]).to(dit.x_embedder.proj.weight)
    return {"pos_embed": table} | export(dit_keys(dit), dit.state_dict())


def positions(dit: DiT, side: int) -> torch.Tensor:
    """The official table of positions (1, side * side, D), float64: sin-cos of the column, then of the row."""
    return sincos(Pack([(1, side, side)]).coords, (2, 1), dit.config.width, torch.float64)[None]


def _depth(state: Tensors) -> int:
    return 1 + max((int(n[1]) for key in state if (n := re.match(r"blocks\.(\d+)\.", key))), default=0)


# ------------------------------------------------------------------------------------------------ Wan's transformer
_WAN = {  # our name: diffusers' names, Wan's names; a space between the layers that are one in ours
    "x_embedder.proj": ("patch_embedding", "patch_embedding"),
    "t_embedder.mlp.0": ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    "t_embedder.mlp.2": ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    "time_proj": ("condition_embedder.time_proj", "time_projection.1"),
    "text_embedder.0": ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    "text_embedder.2": ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    "attn.qkv": ("attn1.to_q attn1.to_k attn1.to_v", "self_attn.q self_attn.k self_attn.v"),
    "attn.q_norm": ("attn1.norm_q.weight", "self_attn.norm_q.weight"),
    "attn.k_norm": ("attn1.norm_k.weight", "self_attn.norm_k.weight"),
    "attn.proj": ("attn1.to_out.0", "self_attn.o"),
    "cross_norm": ("norm2", "norm3"),
    "cross.q": ("attn2.to_q", "cross_attn.q"),
    "cross.kv": ("attn2.to_k attn2.to_v", "cross_attn.k cross_attn.v"),
    "cross.q_norm": ("attn2.norm_q.weight", "cross_attn.norm_q.weight"),
    "cross.k_norm": ("attn2.norm_k.weight", "cross_attn.norm_k.weight"),
    "cross.proj": ("attn2.to_out.0", "cross_attn.o"),
    "mlp.fc1": ("ffn.net.0.proj", "ffn.0"),
    "mlp.fc2": ("ffn.net.2", "ffn.2"),
    "blocks.table": ("scale_shift_table", "modulation"),
    "table": ("scale_shift_table", "head.modulation"),
    "final": ("proj_out", "head.head"),
}


def wan_keys(dit: WanDiT, layout: str) -> Keys:
    """Their names and shapes of each of our parameters."""
    check_layout(layout)
    keys: Keys = {}
    for name, p in dit.named_parameters():
        prefix, inner = re.fullmatch(r"(blocks\.\d+\.)?(.*)", name).groups("")
        stem, _, kind = inner.rpartition(".") if inner.endswith((".weight", ".bias")) else (inner, "", "")
        theirs = _WAN["blocks.table" if prefix and stem == "table" else stem][layout == "wan"].split()
        shape = (1, *p.shape) if stem == "table" else (p.shape[0] // len(theirs), *p.shape[1:])
        keys[name] = [(f"{prefix}{part}{'.' if kind else ''}{kind}", shape) for part in theirs]
    return keys


def wan_from_state_dict(state: Tensors, config: Mapping | None = None, *, heads: int | None = None,
                        dtype: torch.dtype | None = None) -> WanDiT:
    """A WanDiT of tensors by diffusers' or Wan's names; ``config``: either's config.json, None: heads are 128 wide."""
    config = config or {}
    layout = "wan" if "time_projection.1.weight" in state else "diffusers"
    added = [key for key in state if re.search(r"add_[kv]_proj|image_embedder|img_emb|[kv]_img|vace|motion_encoder", key)]
    if added or config.get("image_dim") or config.get("added_kv_proj_dim"):
        raise ValueError(f"load_dit: expected a text-to-video transformer of Wan, got one with other inputs "
                         f"({', '.join(added[:3]) or 'image_dim in config.json'}); WanDiT has no such form")
    for name, wanted in (("cross_attn_norm", True), ("qk_norm", "rms_norm_across_heads" if layout == "diffusers" else True)):
        if config.get(name, wanted) != wanted:
            raise ValueError(f"load_dit: expected {name} {wanted!r} in config.json, got {config[name]!r}; WanDiT has no "
                             f"such form")
    kernel = shape_of("load_dit", state, "patch_embedding.weight", 5)
    names = {name: pair[layout == "wan"] for name, pair in _WAN.items()}
    heads = heads or config.get("num_attention_heads") or config.get("num_heads") or kernel[0] // 128
    if not heads or kernel[0] % heads:
        raise ValueError(f"load_dit: expected heads that divide the width {kernel[0]}, got {heads}; pass heads=, which the "
                         f"weights do not tell")
    made = WanDiTConfig(
        kernel[0], _depth(state), heads, shape_of("load_dit", state, f"blocks.0.{names['mlp.fc1']}.weight")[0],
        tuple(kernel[2:]), kernel[1], shape_of("load_dit", state, f"{names['final']}.weight")[0] // math.prod(kernel[2:]),
        shape_of("load_dit", state, f"{names['text_embedder.0']}.weight")[1],
        shape_of("load_dit", state, f"{names['t_embedder.mlp.0']}.weight")[1], config.get("eps", 1e-6))
    dit = build(lambda: WanDiT(made))
    # in float32 wherever the rest is in 16 bits, as diffusers keeps them
    fill(dit, convert("load_dit", wan_keys(dit, layout), state, dtype, r"^t_embedder|table$|cross_norm"))
    return dit


def wan_state_dict(dit: WanDiT, layout: str = "diffusers") -> dict[str, torch.Tensor]:
    """The weights by diffusers' or Wan's names and in their shapes; views of ours."""
    return export(wan_keys(dit, layout), dit.state_dict())


def wan_description(dit: WanDiT) -> dict:
    """diffusers' config.json of a WanDiT."""
    c = dit.config
    return dict(_class_name="WanTransformer3DModel", added_kv_proj_dim=None, attention_head_dim=c.width // c.heads,
                cross_attn_norm=True, eps=c.eps, ffn_dim=c.mlp_width, freq_dim=c.frequencies, image_dim=None,
                in_channels=c.in_channels, num_attention_heads=c.heads, num_layers=c.depth, out_channels=c.out_channels,
                patch_size=list(c.patch), pos_embed_seq_len=None, qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
                text_dim=c.text_width)
