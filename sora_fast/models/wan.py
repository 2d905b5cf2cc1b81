"""WanDiT: the text-to-video transformer of Wan 2.1 and 2.2 on packs of clips of any size.

Every sample, or every frame of one (Wan 2.2 5B), has its own timestep. Published weights load with
``sora_fast.models.load_dit``.
(Wan: arXiv 2503.20314.)

N tokens, S samples, R modulation rows (samples or frames), D width, H heads, E head dim, C latent channels, L text tokens.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import checks, ops
from ..nn import PatchEmbed3d, Residual
from ..nn.modulation import check_stream
from ..other_names import Elsewhere, Named, preset
from ..pack import Pack, check_pack, check_text
from .dit import DiT, Mlp, TimestepEmbedder, check_timesteps
from .text import Text, check_encoded


@dataclass(frozen=True)
class WanDiTConfig(Named):
    """Sizes of a WanDiT.

    ``width`` D, ``depth`` blocks, ``heads``; ``patch`` (pt, ph, pw) in latent frames and pixels; ``eps`` of the norms.
    ``mlp_width``: hidden width of the MLP. ``text_width``: width of the text tokens. ``frequencies``: width of a
    timestep's sin-cos embedding. ``out_channels`` differs from ``in_channels`` where the input has a condition beside
    the noise (Wan 2.2's image-to-video models).

    Raises:
        TypeError: an unknown field, with the right name.
    """

    width: int = 1536
    depth: int = 30
    heads: int = 12
    mlp_width: int = 8960
    patch: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int = 16
    text_width: int = 4096
    frequencies: int = 256
    eps: float = 1e-6

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Entries of each head rotated for t, h, w: a third each for h and w, in pairs, and the rest for t."""
        head = self.width // self.heads
        side = head // 6 * 2
        return head - 2 * side, side, side


PRESETS = {"1.3B": WanDiTConfig(), "14B": WanDiTConfig(5120, 40, 40, 13824)}


class WanAttention(nn.Module):
    """Attention among a sample's tokens (with 3-D RoPE), or to its text; RMS norm of q and k over all heads together."""

    def __init__(self, config: WanDiTConfig, to_text: bool):
        super().__init__()
        width = config.width
        self.config = config
        if to_text:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x, pack: Pack, text=None):
        """x (N, D), for attention to text its tokens (L, D) with the pack's text lengths -> (N, D)."""
        c = self.config
        heads = lambda t, *parts: t.unflatten(-1, (*parts, c.heads, -1))
        check_pack("WanAttention", pack, x=x)
        if text is None:
            q, k, v = heads(self.qkv(x), 3).unbind(1)
        else:
            check_text("WanAttention", pack, text)
            q, (k, v) = heads(self.q(x)), heads(self.kv(text), 2).unbind(1)
        q, k = ops.qk_norm_rope(q, k, pack if text is None else None, q_weight=self.q_norm, k_weight=self.k_norm,
                                norm="rms_all", axes=c.rope_axes, eps=c.eps)
        head = q.shape[-1]
        if more := max(16, head + -head % 8) - head:  # kernels take heads of whole vectors; zeros change no product
            q, k, v = (F.pad(t, (0, more)) for t in (q, k, v))
        out = ops.varlen_attention(q, k, v, pack, None if text is None else pack.text_cu_seqlens, softmax_scale=head**-0.5)
        return self.proj(out[..., :head].flatten(1))


class WanBlock(nn.Module):
    """Attention, attention to text, MLP. Modulation is a table plus a projection of the timestep that all blocks share."""

    def __init__(self, config: WanDiTConfig):
        super().__init__()
        self.eps = config.eps
        self.attn, self.cross = WanAttention(config, False), WanAttention(config, True)
        self.cross_norm = nn.LayerNorm(config.width, config.eps)
        self.mlp = Mlp(config.width, config.mlp_width)
        self.table = nn.Parameter(torch.randn(6, config.width) / config.width**0.5)

    def forward(self, stream: Residual, modulation_R6D, pack, text) -> Residual:
        """A stream of N tokens, text (L, D); the branch of the MLP is left for the next norm to add."""
        check_stream("WanBlock", stream)
        shift, scale, gate, *mlp = (self.table + modulation_R6D).unbind(1)
        x, h = add_norm(stream, shift, scale, pack, eps=self.eps)
        x, h = add_norm(Residual(x, self.attn(h, pack), gate), None, None, pack, eps=self.eps,
                        weight=self.cross_norm.weight, bias=self.cross_norm.bias)
        shift, scale, gate = mlp
        # the branch to the text has no gate: one of 1 keeps its sum in the pass of the next norm
        x, h = add_norm(Residual(x, self.cross(h, pack, text), torch.ones_like(gate)), shift, scale, pack, eps=self.eps)
        return Residual(x, self.mlp(h), gate)


class WanDiT(nn.Module, Named):
    """Noisy latents, timesteps and text to the velocity, noise minus clean latents.

    Args:
        config: WanDiTConfig; ``WanDiT.preset("1.3B")`` and ``"14B"`` are the published ones.

    Raises:
        ValueError, TypeError: when called, latents, timesteps or text that do not fit the config.

    >>> # needs: the published weights
    >>> model = load_dit("Wan2.1-T2V-1.3B-Diffusers")
    >>> text = pad_text(HuggingFaceTextEncoder("Wan2.1-T2V-1.3B-Diffusers/text_encoder")(["a bunny"]))
    >>> velocity = model(latents, torch.tensor([980.0]), text=text)        # (1, 16, 21, 60, 104), as latents
    """

    def __init__(self, config: WanDiTConfig = PRESETS["1.3B"]):
        super().__init__()
        if config.width % config.heads or config.width // config.heads % 2:
            raise ValueError(f"WanDiT: expected heads of an even width, got {config.heads} of width {config.width}; choose "
                             f"heads that divide half the width")
        self.config, width = config, config.width
        self.x_embedder = PatchEmbed3d(config.in_channels, width, config.patch)
        self.t_embedder = TimestepEmbedder(width, config.frequencies)
        self.time_proj = nn.Linear(width, 6 * width)
        self.text_embedder = nn.Sequential(nn.Linear(config.text_width, width), nn.GELU(approximate="tanh"),
                                           nn.Linear(width, width))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.depth))
        self.table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.final = nn.Linear(width, math.prod(config.patch) * config.out_channels)
        self.gradient_checkpointing = False

    @classmethod
    def preset(cls, name: str, **changes) -> "WanDiT":
        """``"1.3B"`` or ``"14B"``, with fields of WanDiTConfig changed by keyword."""
        return cls(replace(preset("WanDiT", PRESETS, name), **changes))

    from_pretrained = Elsewhere("sora_fast.models.load_dit(path)")

    def forward(self, latents, timesteps, pack: Pack | None = None, *, text: Text | torch.Tensor):
        """Predict from noisy latents.

        Args:
            latents: (B, C, T, H, W), a list of (C, T, H, W), or, with ``pack``, one flat buffer of all samples.
            timesteps: (S,) in [0, 1000], 0 clean, or (R,), one per modulation row of the pack (per frame); of any float or
                int dtype.
            pack: the samples' sizes in tokens, as ``Pack.of(latents, model.config.patch)`` makes it, and the text's
                lengths.
            text: a TextEncoder's result for the S samples, or a batch (S, L, W) of texts of one length. Every token
                given is attended to; the published models were trained on texts padded with zeros (``pad_text``).

        Returns:
            The prediction in latents' form, with ``config.out_channels`` channels.
        """
        config = self.config
        if isinstance(text, torch.Tensor):
            checks.shape("WanDiT", "text", text, ("S", "L", config.text_width), "pass a batch of texts of one length")
            text = Text(text.flatten(0, 1), text.mean(1), (text.shape[1],) * text.shape[0])
        check_encoded("WanDiT", text)
        flat, pack, reform = self._to_flat(latents, pack, text)
        time_RD, modulation_R6D = self._times(timesteps, pack)
        tokens = self.text_embedder(text.tokens)
        stream = Residual(self.x_embedder(flat, pack))
        for block in self.blocks:
            arguments = (stream, modulation_R6D, pack, tokens)
            stream = checkpoint(block, *arguments, use_reentrant=False) if self.gradient_checkpointing else block(*arguments)
        shift, scale = (self.table + time_RD[:, None]).unbind(1)
        _, h = add_norm(stream, shift, scale, pack, eps=config.eps)
        return reform(ops.unpatchify(self.final(h), pack, config.patch, config.out_channels, flat=True))

    _to_flat = DiT._to_flat  # packs of latents are the same for both

    def _times(self, timesteps, pack):
        """Of every modulation row: its timestep's embedding (R, D) and the blocks' modulation (R, 6, D), in float32."""
        check_timesteps(self, timesteps, pack)
        time = self.t_embedder(timesteps)
        if timesteps.shape[0] == pack.num_samples and pack.modulation == "frame":
            time = time[pack.row_samples]
        # published weights keep the embedder and the tables in float32 where the rest has 16 bits
        modulation = self.time_proj(F.silu(time).to(self.time_proj.weight.dtype)).unflatten(1, (6, -1))
        return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in (time, modulation))


def add_norm(stream: Residual, shift, scale, pack: Pack, **norm):
    """The stream with its branch added, and its modulated layer norm for the next layer, in one pass."""
    if stream.y is None:
        return stream.x, ops.norm_modulate(stream.x, shift, scale, pack, **norm)
    return ops.gate_residual_norm_modulate(*stream, shift, scale, pack, **norm)


def pad_text(text: Text, length: int = 512) -> Text:
    """``text`` with zeros after each sample's tokens, up to ``length`` of them.

    Wan's models were trained on texts of 512 tokens so padded, and attend to the padding: without it their pictures
    change.

    Raises:
        TypeError: captions in place of a TextEncoder's result. ValueError: longer texts.
    """
    check_encoded("pad_text", text)
    checks.whole("pad_text", "length", length)
    if max(text.lengths, default=0) > length:
        raise ValueError(f"pad_text: expected texts of at most {length} tokens, got one of {max(text.lengths)}; shorten it, "
                         f"or raise length")
    parts = [F.pad(part, (0, 0, 0, length - part.shape[0])) for part in text.tokens.split(text.lengths)]
    tokens = torch.cat(parts) if parts else text.tokens
    return replace(text, tokens=tokens, lengths=(length,) * len(text.lengths))
