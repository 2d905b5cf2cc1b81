"""MAE: a masked autoencoder on packs of spacetime patches.

The trunk sees the visible patches of each sample and nothing else; a light decoder puts a learned token in the place of
every hidden patch and predicts its elements; the loss looks at hidden patches only. Clips and images of any sizes stand in
one row of tokens, each with its own share of hidden ones.
(MAE: He et al., arXiv 2111.06377; on video, with tubes: arXiv 2203.12602 and 2205.09113.)

N tokens, M visible and K hidden ones, S samples, D width, P = pt * ph * pw * C elements of a patch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import checks, ops
from ..nn import Masking, PatchEmbed3d, VarlenAttention, random_masking
from ..nn.masking import PATTERNS, check_ratio
from ..other_names import Named
from ..pack import Pack, check_pack
from ..precision import linear
from ..reference.patches import cut
from .dit import Mlp, check_grids, check_positions, sincos


@dataclass(frozen=True)
class MAEConfig(Named):
    """Sizes and parts of a MAE.

    ``in_channels`` C; ``patch`` (pt, ph, pw) in frames and pixels; ``width``, ``depth``, ``heads`` of the trunk,
    ``decoder_width``, ``decoder_depth``, ``decoder_heads`` of the decoder; ``mlp_ratio``: hidden width over width;
    ``qk_norm`` and ``rope_theta``: of the trunk's attention.

    ``ratio``: share of hidden tokens, where the call names none; ``pattern``: "token" or "tube" (see random_masking).
    ``normalise_target``: normalise each patch's target by its mean and standard deviation.
    ``positions``: axes (0 t, 1 h, 2 w) of the fixed sin-cos embedding that trunk and decoder add to their tokens;
    ``fractional_side``: height and width count as shares of the sample's own, times this number; None: as tokens.
    ``rope_axes``: entries of each of the trunk's heads rotated for t, h, w (in tokens); None: no rotation.

    Raises:
        ValueError, TypeError: settings that do not fit, or an unknown field, with the right name.
    """

    in_channels: int = 3
    patch: tuple[int, int, int] = (2, 16, 16)
    width: int = 192
    depth: int = 6
    heads: int = 3
    mlp_ratio: float = 4.0
    decoder_width: int = 96
    decoder_depth: int = 2
    decoder_heads: int = 3
    ratio: float = 0.75
    pattern: str = "token"
    normalise_target: bool = True
    positions: tuple[int, ...] = (0, 1, 2)
    fractional_side: float | None = None
    qk_norm: bool = False
    rope_axes: tuple[int, int, int] | None = None
    rope_theta: float = 100.0

    def __post_init__(self):
        if not self.positions:
            raise ValueError("MAEConfig: expected positions of at least one axis, got none; without positions a decoder "
                             "cannot tell one hidden patch from another")
        check_positions("MAEConfig", self.positions, self.fractional_side)
        checks.choice("MAEConfig", "pattern", self.pattern, PATTERNS)
        check_ratio("MAEConfig", self.ratio)
        if self.normalise_target and self.numbers < 2:
            raise ValueError("MAEConfig: expected patches of two elements or more with normalise_target, got one; set it to "
                             "False")

    @property
    def numbers(self) -> int:
        """P, the elements of a patch."""
        return math.prod(self.patch) * self.in_channels

    def embedding(self, pack: Pack, width: int, dtype: torch.dtype):
        """The sin-cos embedding (N, width) of the pack's tokens."""
        coords = pack.coords if self.fractional_side is None else pack.fractional_coords(self.fractional_side)
        return sincos(coords, self.positions, width, dtype)


class Norm(nn.LayerNorm):
    """nn.LayerNorm of tokens (N, D); 0 on tokens of no sample."""

    def forward(self, x, rows: torch.Tensor | Pack | None = None):
        return ops.norm_modulate(x, None, None, rows, weight=self.weight, bias=self.bias, eps=self.eps)


class ViTBlock(nn.Module):
    """Pre-norm transformer block. (ViT: arXiv 2010.11929, equations 2 and 3.)"""

    def __init__(self, width: int, heads: int, mlp_ratio: float, **attention):
        super().__init__()
        self.norm1, self.attn = Norm(width, eps=1e-6), VarlenAttention(width, heads, **attention)
        self.norm2, self.mlp = Norm(width, eps=1e-6), Mlp(width, int(width * mlp_ratio))

    def forward(self, x, pack: Pack):
        """x (N, D) -> (N, D)."""
        x = x + self.attn(self.norm1(x, pack), pack)
        return x + self.mlp(self.norm2(x, pack))


class Encoder(nn.Module):
    """The trunk: a ViT over whichever patches it is given."""

    def __init__(self, config: MAEConfig):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed3d(config.in_channels, config.width, config.patch)
        self.blocks = nn.ModuleList(
            ViTBlock(config.width, config.heads, config.mlp_ratio, qk_norm=config.qk_norm, rope_axes=config.rope_axes,
                     theta=config.rope_theta) for _ in range(config.depth))
        self.norm = Norm(config.width, eps=1e-6)

    def forward(self, patches, pack: Pack):
        """Patches (M, P) as ``MAE.patches`` cuts them, those of ``pack`` -> tokens (M, D)."""
        check_pack("MAE", pack, patches=patches)
        proj = self.x_embedder.proj
        x = linear(patches, proj.weight.flatten(1), proj.bias)  # what ops.patch_embed does once patches are cut
        x = x + self.config.embedding(pack, self.config.width, proj.weight.dtype)
        for block in self.blocks:
            x = block(x, pack)
        return self.norm(x, pack)


class MAEOutput(NamedTuple):
    """What a MAE gives.

    ``loss``: mean of ``per_sample`` over the samples with hidden tokens: every sample counts the same, whatever its size;
    packs of a step weigh by how many such samples they have.
    ``per_sample``: (S,) mean squared error of a sample's hidden patches, 0 for a sample without any; both float32.
    ``prediction``: (K, P) elements of the hidden patches in (pt, ph, pw, C) order, as ``ops.unpatchify`` takes them; in
    units of each patch's standard deviation with ``normalise_target``.
    """

    loss: torch.Tensor
    per_sample: torch.Tensor
    prediction: torch.Tensor
    masking: Masking


class MAE(nn.Module, Named):
    """Hide most patches of clips and images, and predict them from the rest.

    Args:
        config: MAEConfig; None: its defaults.

    Raises:
        ValueError, TypeError: when called, clips that the patch does not divide, ratios outside [0, 1).

    >>> model = MAE(MAEConfig(patch=(2, 8, 8)))
    >>> clips = [torch.randn(3, 8, 64, 96), torch.randn(3, 2, 128, 128)]
    >>> loss = model(clips, ratio=[0.9, 0.75]).loss
    >>> tokens, pack = model.encode(clips)              # after training: all patches through the trunk
    >>> features = pack.pool(tokens)                    # (2, 192)
    """

    def __init__(self, config: MAEConfig | None = None):
        super().__init__()
        self.config = config = MAEConfig() if config is None else config
        self.encoder = Encoder(config)
        self.decoder_embed = nn.Linear(config.width, config.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(config.decoder_width))
        self.decoder_blocks = nn.ModuleList(
            ViTBlock(config.decoder_width, config.decoder_heads, config.mlp_ratio) for _ in range(config.decoder_depth))
        self.decoder_norm = Norm(config.decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(config.decoder_width, config.numbers)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.encoder.x_embedder.proj.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, clips, pack: Pack | None = None, *, ratio=None, masking: Masking | None = None,
                generator: torch.Generator | None = None) -> MAEOutput:
        """Loss and predictions of clips (see ``patches``).

        Args:
            ratio: share of hidden tokens, a number or one per sample; None: the config's.
            masking: a choice of tokens of one's own, instead of ``ratio``.
            generator: of the CPU, for the random choice.
        """
        patches, pack = self.patches(clips, pack)
        if masking is None:
            ratio = self.config.ratio if ratio is None else ratio
            masking = random_masking(pack, ratio, pattern=self.config.pattern, generator=generator)
        check_masking(pack, masking)
        tokens = self.encoder(patches[masking.visible], pack.keep(masking.visible))
        prediction = self.decode(tokens, pack, masking)
        return MAEOutput(*self.loss(prediction, patches, pack, masking), prediction, masking)

    def encode(self, clips, pack: Pack | None = None, *, masking: Masking | None = None):
        """Patches of clips through the trunk, all or the visible ones: tokens (N or M, D), and the pack of just these."""
        patches, pack = self.patches(clips, pack)
        if masking is not None:
            check_masking(pack, masking)
            patches, pack = patches[masking.visible], pack.keep(masking.visible)
        return self.encoder(patches, pack), pack

    def decode(self, tokens, pack: Pack, masking: Masking):
        """The trunk's visible tokens (M, D) -> predictions (K, P) of the hidden patches of the whole ``pack``."""
        x = self.decoder_embed(tokens)
        check_masking(pack, masking)
        x = masking.unshuffle(x, self.mask_token.to(x.dtype).expand(masking.hidden.shape[0], -1))
        x = x + self.config.embedding(pack, self.config.decoder_width, self.mask_token.dtype)
        for block in self.decoder_blocks:
            x = block(x, pack)
        return self.decoder_pred(self.decoder_norm(x[masking.hidden]))

    def loss(self, prediction, patches, pack: Pack, masking: Masking):
        """``(loss, per_sample)`` of MAEOutput; rows of ``patches`` (N, P) that are visible are never read."""
        check_pack("MAE", pack, patches=patches)
        check_masking(pack, masking)
        error = (prediction.to(torch.promote_types(prediction.dtype, torch.float32))
                 - self.target(patches[masking.hidden])).square().mean(1)
        sample = pack.segment_ids[masking.hidden].long()
        sums = error.new_zeros((2, pack.num_samples)).index_add(1, sample, torch.stack([error, torch.ones_like(error)]))
        per_sample = sums[0] / sums[1].clamp(min=1)
        return per_sample.sum() / (sums[1] > 0).sum().clamp(min=1), per_sample

    def target(self, patches):
        """What is to be predicted of ``patches`` (K, P), at least float32, in (pt, ph, pw, C) order."""
        wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
        wide = wide.unflatten(1, (self.config.in_channels, -1)).transpose(1, 2).flatten(1)
        if self.config.normalise_target:
            wide = wide - wide.mean(1, keepdim=True)
            wide = wide / (wide.square().sum(1, keepdim=True) / (self.config.numbers - 1) + 1e-6).sqrt()
        return wide

    def patches(self, clips, pack: Pack | None = None):
        """Patches (N, P) in (C, pt, ph, pw) order, 0 in the tail, and their pack.

        Args:
            clips: (B, C, T, H, W), a list of (C, T, H, W), or, with ``pack``, one flat buffer of all samples.
        """
        channels, patch, device = self.config.in_channels, self.config.patch, self.mask_token.device
        if pack is not None:
            check_pack("MAE", pack)
        if isinstance(clips, torch.Tensor) and clips.dim() == 1:
            if pack is None or clips.shape[0] != pack.num_tokens * self.config.numbers:
                raise ValueError(f"MAE: expected with a flat buffer a pack of {self.config.numbers} elements per token, got "
                                 f"{clips.shape[0]} elements and {pack}; pass the pack of these samples, tail included")
            return cut(clips, pack.grids, patch, channels), pack
        if not isinstance(clips, torch.Tensor):
            checks.sequence("MAE", "clips", clips, "tensors (C, T, H, W)")
        clips = list(clips)
        grids = tuple(self._grid(clip) for clip in clips)
        pack = Pack(grids, device=device) if pack is None else pack
        check_grids("MAE", pack, grids, "clips")
        flat = torch.cat([clip.reshape(-1) for clip in clips]) if clips else self.mask_token.new_zeros(0)
        return cut(F.pad(flat, (0, pack.num_tokens * self.config.numbers - flat.shape[0])), grids, patch, channels), pack

    def _grid(self, clip) -> tuple[int, int, int]:
        channels, patch = self.config.in_channels, self.config.patch
        checks.tensor("MAE", "every clip", clip)
        fits = clip.dim() == 4 and clip.shape[0] == channels
        if not fits or any(size % step for size, step in zip(clip.shape[1:], patch, strict=True)):
            raise ValueError(f"MAE: expected clips ({channels}, T, H, W) with T, H, W multiples of the patch {patch}, got "
                             f"{tuple(clip.shape)}; crop or pad them, an image is a clip of one frame")
        return tuple(size // step for size, step in zip(clip.shape[1:], patch, strict=True))


def check_masking(pack: Pack, masking: Masking) -> None:
    """The masking is one of all tokens of the pack."""
    check_pack("MAE", pack)
    if not isinstance(masking, Masking):
        raise TypeError(f"MAE: expected masking as a Masking, got {checks.came(masking)}; pass random_masking(pack, ratio)")
    if masking.tokens != pack.num_tokens:
        raise checks.error("MAE", f"a masking of the pack's {checks.shown(pack.num_tokens)} tokens",
                           f"one of {checks.shown(masking.tokens)}", "pass random_masking(pack, ratio) of this very pack")
