"""DiT: a diffusion transformer on packs of spacetime patches.

Clips and images of any size are concatenated to one sequence of tokens (a Pack); every sample, or every frame, has its own
timestep. (DiT: Peebles and Xie, arXiv 2212.09748; packing: NaViT, arXiv 2307.06304.)

N tokens, S samples, R modulation rows (samples or frames), D width, C latent channels, L text tokens, Dt text width.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import checks, ops
from ..nn import FinalLayer, Modulation, PatchEmbed3d, Residual, VarlenAttention
from ..nn.modulation import check_stream
from ..ops.patches import clips as views
from ..other_names import Elsewhere, Named, preset
from ..pack import Pack, check_pack, check_text, token_grid
from .text import Text, check_encoded


def check_positions(op: str, positions: tuple[int, ...], fractional_side: float | None) -> None:
    """Check that the axes of a sin-cos embedding are among 0, 1 and 2, and that fractional_side is above 0."""
    if any(axis not in (0, 1, 2) for axis in positions):
        raise checks.error(op, "positions of 0 (t), 1 (h) and 2 (w)", positions, "name the axes by these numbers")
    if fractional_side is not None and not fractional_side > 0:
        raise checks.error(op, "fractional_side above 0, or None", fractional_side, "pass the side of a typical sample")


@dataclass(frozen=True)
class DiTConfig(Named):
    """Sizes and parts of a DiT.

    ``width`` D, ``depth`` blocks, ``heads`` (divides D), ``mlp_ratio``: hidden width of the MLP over D; ``patch``
    (pt, ph, pw) in latent frames and pixels; ``in_channels`` C of the latents; ``qk_norm``: RMS norm of each
    head's queries and keys; ``rope_theta``: base of the rotation's frequencies.

    ``classes``: number of class labels, 0 for none; one more is "no class". ``text_width``: width of the text tokens for
    cross-attention, 0 for none. ``positions``: axes (0 t, 1 h, 2 w) of the fixed sin-cos embedding added to the tokens;
    ``fractional_side``: its height and width coordinates are fractions of the sample's own size, times this number (NaViT,
    arXiv 2307.06304, section 2.1); None: token indices. ``rope_axes``: channels per head rotated for t, h, w; None: no
    rotation. ``learn_sigma``: the output has 2 C channels, the second half for the variance.

    Raises:
        ValueError: ``positions`` or ``fractional_side`` that do not fit. TypeError: an unknown field, with the right name.
    """

    width: int = 192
    depth: int = 6
    heads: int = 3
    mlp_ratio: float = 4.0
    patch: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    learn_sigma: bool = False
    classes: int = 0
    text_width: int = 0
    qk_norm: bool = True
    positions: tuple[int, ...] = (0, 1, 2)
    fractional_side: float | None = None
    rope_axes: tuple[int, int, int] | None = (16, 24, 24)
    rope_theta: float = 100.0

    def __post_init__(self):
        check_positions("DiTConfig", self.positions, self.fractional_side)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    def coords(self, pack: Pack):
        """Coordinates (N, 3) for the sin-cos embedding, with fractional height and width if configured."""
        return pack.coords if self.fractional_side is None else pack.fractional_coords(self.fractional_side)


_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}

# "tiny" is Sora-style: text, QK-norm, 3-D RoPE; "nano" is half as deep. The others are the paper's class-conditional models.
PRESETS = {"nano": DiTConfig(depth=3, text_width=128), "tiny": DiTConfig(text_width=128)} | {
    f"{size}/{p}": DiTConfig(width, depth, heads, patch=(1, p, p), in_channels=4, learn_sigma=True, classes=1000,
                             qk_norm=False, positions=(2, 1), rope_axes=None)
    for size, (width, depth, heads) in _SIZES.items() for p in (2, 4, 8)
}


class TimestepEmbedder(nn.Module):
    """Embeds timesteps (R,) in [0, 1000] to (R, D)."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps):
        half = self.frequencies // 2
        steps = torch.arange(half, device=timesteps.device, dtype=torch.float32)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * steps / half)  # bitwise as facebookresearch/DiT
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module, Named):
    """A DiT block with adaLN-Zero: self-attention, optional cross-attention to text, MLP. The identity at initialisation.

    Args:
        config: DiTConfig.

    Raises:
        TypeError, when called: tokens alone, and no Residual.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.attn = VarlenAttention(config.width, config.heads, qk_norm=config.qk_norm, rope_axes=config.rope_axes,
                                    theta=config.rope_theta)
        self.cross = VarlenAttention(config.width, config.heads, context_width=config.text_width,
                                     qk_norm=config.qk_norm) if config.text_width else None
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))
        self.adaLN_modulation = Modulation(config.width, 9 if config.text_width else 6)

    def forward(self, stream: Residual, c, pack, text=None) -> Residual:
        """The residual stream (N, D), conditioning c (R, D), text (L, Dt). The next norm adds the MLP's branch."""
        check_stream("DiTBlock", stream)
        shift, scale, gate, *rest = self.adaLN_modulation(c)  # 6 x (R, D), 9 x with text
        x, h = stream.norm_modulate(shift, scale, pack)  # (N, D) each
        stream = Residual(x, self.attn(h, pack), gate)  # x + gate[rows] * attention, added by the next norm
        if self.cross is not None:
            shift, scale, gate, *rest = rest
            x, h = stream.norm_modulate(shift, scale, pack)  # (N, D) each
            stream = Residual(x, self.cross(h, pack, text), gate)
        shift, scale, gate = rest
        x, h = stream.norm_modulate(shift, scale, pack)  # (N, D) each
        return Residual(x, self.mlp(h), gate)


class DiT(nn.Module, Named):
    """Predicts noise, velocity or clean latents from noisy latents, timesteps and conditions.

    Args:
        config: DiTConfig; ``DiT.preset(name, **changes)`` has the usual ones.

    Raises:
        ValueError, TypeError: when called, latents, timesteps or conditions that do not fit the config.

    >>> model = DiT.preset("tiny")
    >>> clips = [torch.randn(16, 5, 16, 24), torch.randn(16, 1, 32, 32)]        # a clip and an image
    >>> text = ByteTextEncoder(128)(["a bunny", "a rocket"])
    >>> prediction = model(clips, torch.tensor([300.0, 800.0]), text=text)       # a list like clips
    """

    def __init__(self, config: DiTConfig = PRESETS["tiny"]):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed3d(config.in_channels, config.width, config.patch)
        self.t_embedder = TimestepEmbedder(config.width)
        if config.classes:
            self.y_embedder = nn.Embedding(config.classes + 1, config.width)
        if config.text_width:
            self.text_embedder = nn.Sequential(nn.Linear(config.text_width, config.width), nn.SiLU(),
                                               nn.Linear(config.width, config.width))
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, math.prod(config.patch) * config.out_channels)
        self.register_buffer("pos_embed", None, persistent=False)  # a checkpoint's own table (1, side * side, D)
        self.gradient_checkpointing = False
        self._initialise()

    @classmethod
    def preset(cls, name: str, **changes) -> "DiT":
        """``"tiny"``, or the paper's ``"S/2"`` ... ``"XL/8"``, with fields of DiTConfig changed by keyword."""
        return cls(replace(preset("DiT", PRESETS, name), **changes))

    from_pretrained = Elsewhere("sora_fast.models.load_dit(path)")

    def forward(self, latents, timesteps, pack: Pack | None = None, *, labels=None, text: Text | None = None):
        """Predict from noisy latents.

        Args:
            latents: (B, C, T, H, W), a list of (C, T, H, W), or, with ``pack``, one flat buffer of all samples.
            timesteps: (S,) in [0, 1000], 0 clean, or (R,), one per modulation row of the pack (per frame); of any float or
                int dtype.
            pack: the samples' sizes in tokens, as ``Pack.of(latents, model.config.patch)`` makes it; with text it holds the
                text's lengths.
            labels: (S,) int64 class labels; ``config.classes`` stands for none.
            text: a TextEncoder's result for the S samples.

        Returns:
            The prediction in latents' form, with ``config.out_channels`` channels.
        """
        flat, pack, reform = self._to_flat(latents, pack, text)  # (N * C * pt * ph * pw,)
        x = self.x_embedder(flat, pack)  # (N, D)
        x = x + self._positions(pack)  # (N, D)
        c = self._conditions(timesteps, pack, labels, text)  # (R, D)
        stream, tokens = Residual(x), None if text is None else text.tokens  # (N, D), (L, Dt)
        for block in self.blocks:
            arguments = (stream, c, pack, tokens)
            stream = checkpoint(block, *arguments, use_reentrant=False) if self.gradient_checkpointing else block(*arguments)
        tokens = self.final_layer(stream, c, pack)  # (N, pt * ph * pw * out_channels)
        flat = ops.unpatchify(tokens, pack, self.config.patch, self.config.out_channels, flat=True)  # 1-D
        return reform(flat)  # (B, out_channels, T, H, W), a list of (out_channels, T, H, W), or flat

    def _positions(self, pack):
        """Position embedding (N, D): sin-cos, or a checkpoint's learned table for images of its size."""
        config, dtype, table = self.config, self.x_embedder.proj.weight.dtype, self.pos_embed
        fixed = sincos(config.coords(pack), config.positions, config.width, dtype) if config.positions else None
        if table is None:
            return fixed
        side = math.isqrt(table.shape[1])
        if fixed is None and any(grid != (1, side, side) for grid in pack.grids):
            raise ValueError(f"DiT: expected images of {side} x {side} tokens, the size of the checkpoint's learned "
                             f"positions, got {pack}; crop or scale to that size")
        _, rows, columns = pack.coords.clamp(max=side - 1).long().unbind(1)
        given = table[0, rows * side + columns].to(dtype)
        if fixed is None:
            return given
        frames, height, width = pack.grids_device.unbind(1)
        own_S = (frames == 1) & (height == side) & (width == side)
        own_N = F.pad(own_S, (0, 1))[pack.segment_ids.clamp(min=0)]  # the padding is for a pack with no sample
        return torch.where(own_N[:, None], given, fixed)

    def _conditions(self, timesteps, pack, labels, text):
        """c (R, D): embeddings of the row's timestep and of its sample's class and text."""
        check_timesteps(self, timesteps, pack)
        of_row = lambda values_S: values_S if pack.modulation == "sample" else values_S[pack.row_samples]
        per_sample = timesteps.shape[0] == pack.num_samples
        c = of_row(self.t_embedder(timesteps)) if per_sample else self.t_embedder(timesteps)
        for name, given, wanted in (("labels", labels, self.config.classes), ("text", text, self.config.text_width)):
            if (given is not None) != bool(wanted):
                raise ValueError(f"DiT: expected {name} {'for' if wanted else 'to be None with'} this model, got "
                                 f"{type(given).__name__}; its config has classes={self.config.classes} and "
                                 f"text_width={self.config.text_width}")
            if name == "labels" and given is not None:
                checks.integers("DiT", "labels", given, (torch.int64, torch.int32))
            rows = given if name == "labels" or given is None else given.pooled
            if rows is not None and rows.shape[0] != pack.num_samples:
                raise ValueError(f"DiT: expected {name} of {pack.num_samples} samples, got {rows.shape[0]}; give one for "
                                 f"every sample of the pack")
        if labels is not None:
            c = c + of_row(self.y_embedder(labels))
        if text is not None:
            c = c + of_row(self.text_embedder(text.pooled))
        return c

    def _to_flat(self, latents, pack, text):
        """The flat buffer, its pack, and a function that brings a prediction to the form of ``latents``."""
        op, config, weight = type(self).__name__, self.config, self.x_embedder.proj.weight
        token_numel = weight[0].numel()
        if text is not None:
            check_encoded(op, text)
        if pack is not None:
            check_pack(op, pack)
            if pack.device != weight.device:
                raise checks.error(op, f"the pack on the model's device {weight.device}", f"a pack on {pack.device}",
                                   "pass pack.to(device)")
        if isinstance(latents, torch.Tensor) and latents.dim() == 1:
            if pack is None:
                raise ValueError(f"{op}: expected a pack with a flat buffer, got none; pass Pack(grids)")
            flat, reform = latents, lambda out: out
        else:
            if not isinstance(latents, torch.Tensor):
                checks.sequence(op, "latents", latents, "clips (C, T, H, W)")
            clips = list(latents)
            for clip in clips:
                checks.tensor(op, "every clip of latents", clip)
                if clip.dim() != 4 or clip.shape[0] != config.in_channels:
                    raise ValueError(f"{op}: expected clips of shape ({config.in_channels}, T, H, W), got "
                                     f"{tuple(clip.shape)}; an image is a clip of one frame")
            grids = tuple(token_grid(op, clip.shape[1:], config.patch) for clip in clips)
            if pack is None:
                pack = Pack(grids, text_lengths=None if text is None else text.lengths, device=weight.device)
            check_grids(op, pack, grids, "latents")
            flat = torch.cat([clip.reshape(-1) for clip in clips]) if clips else weight.new_zeros(0)
            flat = F.pad(flat, (0, max(0, pack.num_tokens * token_numel - flat.shape[0])))  # the pack's tail
            reform = lambda out: views(out, grids, config.patch, config.out_channels)
            if isinstance(latents, torch.Tensor):
                reform = lambda out: out[: latents[:, :1].numel() * config.out_channels].reshape(
                    latents.shape[0], config.out_channels, *latents.shape[2:])
        if flat.shape[0] != pack.num_tokens * token_numel:
            raise ValueError(f"{op}: expected {token_numel} elements for each of the pack's {pack.num_tokens} tokens, got "
                             f"{flat.shape[0]}; pass the pack of these latents, tail included")
        if text is not None:
            if pack.text_cu_seqlens is not None and text.pooled.shape[0] != pack.num_samples:
                raise ValueError(f"{op}: expected text of {pack.num_samples} samples, got {text.pooled.shape[0]}; give one "
                                 f"for every sample of the pack")
            check_text(op, pack, text.tokens)
            if not torch.compiler.is_compiling() and pack.text_lengths != tuple(text.lengths):  # a graph holds no lengths
                raise checks.error(op, "the text's own lengths in the pack", "those of another text",
                                   "pass Pack(grids, text_lengths=text.lengths), samples in one order")
        return flat, pack, reform

    def _initialise(self):
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "adaLN" not in name and "final_layer" not in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.x_embedder.proj.bias)
        if self.config.classes:
            nn.init.normal_(self.y_embedder.weight, std=0.02)


def check_timesteps(model: nn.Module, timesteps, pack: Pack) -> None:
    """Check that timesteps are a tensor (S,) or (R,) up to 1000. A Python number is rejected: it has no device."""
    op = type(model).__name__
    tensor = isinstance(timesteps, torch.Tensor)
    if not tensor or timesteps.dim() != 1 or timesteps.shape[0] not in (pack.num_samples, pack.num_rows):
        came = f"shape {tuple(timesteps.shape)}" if tensor else repr(timesteps)
        raise ValueError(f"{op}: expected one timestep per sample ({pack.num_samples}) or modulation row ({pack.num_rows}), "
                         f"got {came}; pass a tensor of one of these lengths")
    if checks.looked_at(timesteps) and timesteps.is_floating_point() and timesteps.numel():
        low, high = (float(t) for t in timesteps.aminmax())
        if low >= 0 and high <= 1 and bool(((timesteps > 0) & (timesteps < 1)).any()):
            checks.warn_once(model, "timesteps", f"{op}: expected timesteps from 0 (clean) to 1000 (noise), got all of them "
                             f"between 0 and 1; multiply them by 1000")


def check_grids(op: str, pack: Pack, grids: tuple, what: str) -> None:
    """Check that the pack's grids are those of these ``what``."""
    if pack.grids != grids:
        more = " and more" if len(grids) > 4 else ""
        raise ValueError(f"{op}: expected the {what}' own pack, with grids {list(grids[:4])}{more}, got {pack}; leave pack "
                         f"out, or build it from these {what}, as Pack.of({what}, patch) does")


def sincos(coords_N3, axes: tuple[int, ...], width: int, dtype: torch.dtype):
    """Fixed sin-cos embedding (N, D) of the coordinates along ``axes``, D split evenly among them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    share = width // len(axes) // 2 * 2
    steps = torch.arange(share // 2, device=coords_N3.device, dtype=wide) / (share // 2)
    parts = []
    for axis in axes:
        angles = coords_N3[:, axis : axis + 1].to(wide) * 10000.0**-steps
        parts += [angles.sin(), angles.cos()]
    rest = width - share * len(axes)
    return torch.cat([*parts, steps.new_zeros((coords_N3.shape[0], rest))], dim=1).to(dtype)
