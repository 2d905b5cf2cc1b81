"""The autoencoders of Wan 2.1 and 2.2 and of Qwen-Image, as diffusers has them.

Caches are in a StreamState instead of lists filled in call order, so checkpointing and torch.compile work. Clips of any
length take the memory of one chunk.

B batch, C channels, T frames, H height, W width; t, h, w of the latents.
"""

import sys

import torch

from .. import ops
from ..nn import StreamState
from ..nn.streaming import starts
from .known import CONV2D, DROPOUT, IDENTITY, SEQUENTIAL, SILU, STRIDED_CONV2D, ZERO_PAD2D, any_of, is_none
from .mixin import Fast, Kind, accepts_our_arguments, get_member, has_hooks, is_sharded, may_need_grad, original_of
from .vae_streaming import WholeClip, convolve, process_in_chunks, with_own_caches

_WAN, _QWEN = (f"diffusers.models.autoencoders.autoencoder_kl_{name}" for name in ("wan", "qwenimage"))


def _kind(name: str, **settings) -> Kind:
    """A class of Wan's, or Qwen-Image's copy of it."""
    return Kind(f"{_WAN}.Wan{name}", f"{_QWEN}.QwenImage{name}", **settings)


def _has_causal_padding(conv) -> bool:
    """Whether it pads in time as a causal convolution (in front only, by the kernel size - 1) or not at all."""
    padding = conv._padding
    return len(padding) == 6 and padding[4] in (0, get_member(conv, "weight").shape[2] - 1) and padding[5] == 0


def _has_wan_scale(norm) -> bool:
    """Whether its scale is sqrt(C) for C channels, and it has no bias; a bias may be a parameter."""
    return isinstance(norm.bias, float) and norm.bias == 0 and norm.scale == get_member(norm, "gamma").numel() ** 0.5


_CONV = _kind("CausalConv3d", reads="weight bias stride _padding", methods=("forward", "_conv_forward"), groups=1,
              dilation=(1, 1, 1), padding=(0, 0, 0), padding_mode="zeros", rule=_has_causal_padding)
# diffusers caches two past frames and counts strides from a chunk's first frame, which is right for these sizes only.
_CONV3 = _CONV.with_settings(reads="weight bias", kernel=(3, 3, 3), stride=(1, 1, 1), _padding=(1, 1, 1, 1, 2, 0))
_CONV1 = _CONV.with_settings(reads="weight bias", kernel=(1, 1, 1), stride=(1, 1, 1), _padding=(0, 0, 0, 0, 0, 0))
_TIME_UP = _CONV.with_settings(reads="weight bias", kernel=(3, 1, 1), stride=(1, 1, 1), _padding=(0, 0, 0, 0, 2, 0))
_TIME_DOWN = _CONV.with_settings(reads="weight bias", kernel=(3, 1, 1), stride=(2, 1, 1), _padding=(0, 0, 0, 0, 0, 0))
_NORM = _kind("RMS_norm", reads="gamma bias scale", channel_first=True, rule=_has_wan_scale)
_VIDEO_NORM = _NORM.with_settings(rule=lambda norm: get_member(norm, "gamma").dim() == 4 and _has_wan_scale(norm))
_DOUBLE = _kind("Upsample", reads="", size=None, scale_factor=(2.0, 2.0), mode="nearest-exact", align_corners=None,
                recompute_scale_factor=None)
_HALVE = ZERO_PAD2D.with_settings(padding=(0, 1, 0, 1))
# mode -> the two layers of a resample, and its time_conv
_RESAMPLES = {"upsample2d": (_DOUBLE, CONV2D, is_none), "upsample3d": (_DOUBLE, CONV2D, _TIME_UP),
              "downsample2d": (_HALVE, STRIDED_CONV2D, is_none), "downsample3d": (_HALVE, STRIDED_CONV2D, _TIME_DOWN)}
# Besides swapped modules and absorbed children: modules that compute per frame, or per group of frames that no chunk splits.
_FRAMEWISE = Kind("torch.nn.modules.container.ModuleList", "torch.nn.modules.conv.Conv2d", f"{_WAN}.WanAttentionBlock",
                  f"{_WAN}.AvgDown3D", f"{_WAN}.DupUp3D", f"{_QWEN}.QwenImageAttentionBlock")


def _chunkable(part) -> bool:
    """Whether the results of ``part`` do not depend on how a clip is chunked. Those of modified modules may, so they get
    the chunks of diffusers. FSDP2's hooks only gather weights."""
    if not accepts_our_arguments(part):
        return _FRAMEWISE(part) and all(_chunkable(child) for child in part._modules.values() if child is not None)
    if part.why_not(part) or has_hooks(part) and not is_sharded(part):
        return False
    return all(child is None or name in part.absorbs or _chunkable(child) for name, child in part._modules.items())


def _norm(norm, act: str | None = "silu") -> dict:
    """Keywords of ops.norm_act_conv3d; gamma is (C, 1, 1, 1)."""
    return dict(norm_weight=norm.gamma.flatten(), norm="rms", eps=1e-24, act=act)


def _state(feat_cache) -> StreamState | None:
    """The state for diffusers' list of caches, as its tiled paths pass one: it is stored in the list's first entry."""
    if not isinstance(feat_cache, list):
        return feat_cache
    if not isinstance(feat_cache[0], StreamState):
        feat_cache[0] = StreamState()
    return feat_cache[0]


def _padding(conv) -> tuple[int, ...]:
    return tuple(conv._padding[:4])


def _convolve(conv, x, state, **settings):
    return convolve(conv, x, state, padding=_padding(conv), **settings)


def _call(child, x, state, **arguments):
    if accepts_our_arguments(child):
        return child(x, feat_cache=state, **arguments)
    return with_own_caches(child, child, x, state, **arguments)


def _checkpointed(owner, child, x, state, **arguments):
    """``_call``, recomputed in the backward if gradient checkpointing is enabled."""
    if getattr(owner, "gradient_checkpointing", False) and torch.is_grad_enabled() and isinstance(state, WholeClip | None):
        return owner._gradient_checkpointing_func(lambda y: _call(child, y, state, **arguments), x)
    return _call(child, x, state, **arguments)


class CausalConv(Fast):
    report = "causal_conv3d"

    def forward(self, x, cache_x=None):
        if not _CONV.matches_settings(self):
            return super().forward(x, cache_x)
        past_frames = self.weight.shape[2] - 1
        if self._padding[4] == past_frames:
            return ops.causal_conv3d(x, self.weight, self.bias, stride=self.stride, padding=_padding(self),
                                     cache=cache_x if past_frames else None)
        # No padding in time: the first frames of x serve as the cache.
        return ops.causal_conv3d(x[:, :, past_frames:], self.weight, self.bias, stride=self.stride, padding=_padding(self),
                                 cache=x[:, :, :past_frames])

    @staticmethod
    def why_not(module):
        return None if _CONV.matches_settings(module) else "its padding, groups or dilation are not a configuration of Wan"


class RMSNorm(Fast):
    report = "norm_act"

    def forward(self, x):
        if x.dim() != self.gamma.dim() + 1 or x.dim() not in (4, 5) or not _NORM.matches_settings(self):
            return super().forward(x)
        frames = x if x.dim() == 5 else x.unsqueeze(2)
        return ops.norm_act(frames, self.gamma.flatten(), norm="rms", eps=1e-24, act=None).view_as(x)

    @staticmethod
    def why_not(module):
        if _NORM.matches_settings(module):
            return None
        return "it has a bias, channels last, or another scale, which is not a configuration of Wan"


class ResidualBlock(Fast):
    report = "norm_act_conv3d twice, the shortcut added in the second"
    absorbs = dict(norm1=_VIDEO_NORM, conv1=_CONV3, norm2=_VIDEO_NORM, conv2=_CONV3, conv_shortcut=any_of(IDENTITY, _CONV1),
                 nonlinearity=SILU, dropout=DROPOUT)

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006, diffusers' own signature
        if isinstance(feat_cache, list):
            return super().forward(x, feat_cache=feat_cache, feat_idx=feat_idx)
        state = feat_cache
        if ResidualBlock.why_not(self):  # a child got an adapter or a hook since
            return with_own_caches(self, super().forward, x, state)
        h = _convolve(self.conv1, x, state, norm=_norm(self.norm1))
        shortcut = x if isinstance(self.conv_shortcut, torch.nn.Identity) else _convolve(self.conv_shortcut, x, None)
        return _convolve(self.conv2, h, state, norm=_norm(self.norm2), residual=shortcut)


class Resample(Fast):
    report = "causal_conv3d, upsampling by address"
    absorbs = dict(resample=SEQUENTIAL, time_conv=any_of(is_none, _CONV))

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        if isinstance(feat_cache, list):
            return super().forward(x, feat_cache=feat_cache, feat_idx=feat_idx)
        state = feat_cache
        if Resample.why_not(self):
            return with_own_caches(self, super().forward, x, state)
        if self.mode == "upsample3d" and state is not None:
            split = 1 if starts(self, x, state) else 0
            first, rest = x[:, :, :split], x[:, :, split:]
            pairs = _convolve(self.time_conv, rest, state).unflatten(1, (2, -1))  # (B, 2, C, T, H, W)
            x = torch.cat([first, pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
        conv = self.resample[1]
        weight = conv.weight[:, :, None]
        if self.mode.startswith("upsample"):
            return convolve(conv, x, None, weight=weight, stride=(1, 1, 1), padding=(1, 1, 1, 1), upsample=2)
        x = convolve(conv, x, None, weight=weight, stride=(1, 2, 2), padding=(0, 1, 0, 1))
        if self.mode == "downsample2d" or state is None:
            return x
        first = x[:, :, :1] if starts(self, x, state) else x[:, :, :0]
        return torch.cat([first, _convolve(self.time_conv, x, state, phase=2)], dim=2)

    @classmethod
    def why_not(cls, module):
        if module.mode not in _RESAMPLES:
            return f"mode {module.mode!r} changes no size"
        if not SEQUENTIAL(module.resample) or len(module.resample) != 2:
            return super().why_not(module) or "its resample is not a pair of layers"
        found = (*module.resample._modules.values(), getattr(module, "time_conv", None))
        plain = all(may_absorb(child) for may_absorb, child in zip(_RESAMPLES[module.mode], found, strict=True))
        return None if plain else "a child was replaced, has a hook, or has settings that are not supported"


class MidBlock(Fast):
    report = "its children, with caches in a StreamState"

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        if isinstance(feat_cache, list):
            return super().forward(x, feat_cache=feat_cache, feat_idx=feat_idx)
        x = _call(self.resnets[0], x, feat_cache)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = x if attention is None else attention(x)
            x = _call(resnet, x, feat_cache)
        return x


class DownBlock(Fast):
    """Wan 2.2's, with an average-pooled shortcut."""

    report = MidBlock.report

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        if isinstance(feat_cache, list):
            return super().forward(x, feat_cache=feat_cache, feat_idx=feat_idx)
        shortcut = self.avg_shortcut(x)
        for layer in (*self.resnets, self.downsampler):
            x = x if layer is None else _call(layer, x, feat_cache)
        return x + shortcut


class UpBlock(Fast):
    """Wan 2.1's, and Wan 2.2's with a shortcut of repeated pixels."""

    report = MidBlock.report

    def forward(self, x, feat_cache=None, feat_idx=[0], first_chunk=None):  # noqa: B006
        if isinstance(feat_cache, list):
            more = {} if first_chunk is None else dict(first_chunk=first_chunk)
            return super().forward(x, feat_cache=feat_cache, feat_idx=feat_idx, **more)
        shortcut = getattr(self, "avg_shortcut", None)
        skip = None if shortcut is None else shortcut(x, first_chunk=first_chunk)
        upsamplers = self.upsamplers if hasattr(self, "upsamplers") else [self.upsampler]
        for layer in (*self.resnets, *(upsamplers or ())):
            x = x if layer is None else _call(layer, x, feat_cache)
        return x if skip is None else x + skip


class Encoder(Fast):
    report = MidBlock.report
    absorbs = dict(conv_in=_CONV3, norm_out=_VIDEO_NORM, conv_out=_CONV3, nonlinearity=SILU)

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        state = _state(feat_cache)
        if Encoder.why_not(self):
            return with_own_caches(self, super().forward, x, state)
        x = _convolve(self.conv_in, x, state)
        for layer in self.down_blocks:
            x = layer(x) if _is_attention(layer) else _checkpointed(self, layer, x, state)
        x = _checkpointed(self, self.mid_block, x, state)
        return _convolve(self.conv_out, x, state, norm=_norm(self.norm_out))


class Decoder(Fast):
    report = MidBlock.report
    absorbs = Encoder.absorbs

    def forward(self, x, feat_cache=None, feat_idx=[0], first_chunk=False):  # noqa: B006
        state = _state(feat_cache)
        if state is not None:
            first_chunk = starts(self.up_blocks, x, state)  # not of self, whose entry may be its list of caches
        if Decoder.why_not(self):
            more = dict(first_chunk=first_chunk) if original_of(type(self)).__module__ == _WAN else {}
            return with_own_caches(self, super().forward, x, state, **more)
        x = _convolve(self.conv_in, x, state)
        x = _checkpointed(self, self.mid_block, x, state)
        for layer in self.up_blocks:
            more = dict(first_chunk=first_chunk) if hasattr(layer, "avg_shortcut") else {}
            x = _checkpointed(self, layer, x, state, **more)
        return _convolve(self.conv_out, x, state, norm=_norm(self.norm_out))


def _check_frames(model, name: str, clip) -> None:
    if clip.shape[2] == 0:
        raise ValueError(f"{original_of(type(model)).__name__}.{name}: expected a clip of one frame or more, got none; "
                         f"skip clips without frames")


def _is_attention(layer) -> bool:
    return original_of(type(layer)).__name__.endswith("AttentionBlock")


class Autoencoder(Fast):
    """encode and decode have diffusers' signatures and results, slicing and tiling included."""

    report = "chunks of any length, written into one tensor; whole clips for gradients or under torch.compile"
    streams = True
    _supports_gradient_checkpointing = True

    def _encode(self, x):
        _check_frames(self, "encode", x)
        if self._tiled(x, 1) or not _chunkable(self.encoder):  # diffusers' chunks and lists of caches
            return super()._encode(x)
        patch = getattr(self.config, "patch_size", None)
        x = x[:, :, : 1 + (x.shape[2] - 1) // 4 * 4]  # diffusers drops an incomplete group of four
        to_patches = self._function("patchify")
        step = lambda part, state: self.encoder(to_patches(part, patch_size=patch) if patch else part, feat_cache=state)
        factor = 2 ** sum(self.config.temperal_downsample)
        if x.shape[2] == 1 or torch.compiler.is_compiling() or may_need_grad(self, x):
            moments = step(x, WholeClip())
        else:
            moments = process_in_chunks(self, x, step, 1, 4, 1 + (x.shape[2] - 1) // factor, self._peak_bytes(x, 1))
        return self.quant_conv(moments)

    def _decode(self, z, return_dict=True):
        _check_frames(self, "decode", z)
        if self._tiled(z, self.spatial_compression_ratio) or not _chunkable(self.decoder):
            return super()._decode(z, return_dict=return_dict)
        patch = getattr(self.config, "patch_size", None)
        from_patches = self._function("unpatchify")

        def step(part, state):
            y = self.decoder(part, feat_cache=state)
            return torch.clamp(from_patches(y, patch_size=patch) if patch else y, min=-1.0, max=1.0)

        x = self.post_quant_conv(z)
        factor = 2 ** sum(self.config.temperal_downsample)
        if x.shape[2] == 1 or torch.compiler.is_compiling() or may_need_grad(self, x):
            video = step(x, WholeClip())
        else:
            video = process_in_chunks(self, x, step, 1, 1, 1 + (x.shape[2] - 1) * factor,
                                      self._peak_bytes(z, self.spatial_compression_ratio))
        if not return_dict:
            return (video,)
        return self._function("DecoderOutput")(sample=video)

    def _tiled(self, clip, scale: int) -> bool:
        lines, columns = self.tile_sample_min_height // scale, self.tile_sample_min_width // scale
        return self.use_tiling and (clip.shape[3] > lines or clip.shape[4] > columns)

    def _function(self, name: str):
        """The object of that name in diffusers' module, or None: Qwen-Image has no patchify."""
        return getattr(sys.modules[original_of(type(self)).__module__], name, None)

    def _peak_bytes(self, clip, scale: int) -> int:
        """Peak bytes per latent frame: four tensors of the widest level and four of its norm in float32."""
        width = max(self.config.base_dim, getattr(self.config, "decoder_base_dim", None) or 0)
        patch = getattr(self.config, "patch_size", None) or 1
        pixels = 4 * clip.shape[0] * clip.shape[3] * clip.shape[4] * scale**2 // patch**2
        return 4 * width * pixels * (clip.dtype.itemsize + 4)


_PARTS = {"CausalConv3d": CausalConv, "RMS_norm": RMSNorm, "ResidualBlock": ResidualBlock, "Resample": Resample,
          "MidBlock": MidBlock, "UpBlock": UpBlock}

SWAPS = {f"{_WAN}.Wan{name}": mixin for name, mixin in (_PARTS | {
    "Encoder3d": Encoder, "Decoder3d": Decoder, "ResidualDownBlock": DownBlock, "ResidualUpBlock": UpBlock}).items()}
SWAPS |= {f"{_QWEN}.QwenImage{name}": mixin for name, mixin in (_PARTS | {
    "Encoder3d": Encoder, "Decoder3d": Decoder}).items()}
SWAPS |= {f"{_WAN}.AutoencoderKLWan": Autoencoder, f"{_QWEN}.AutoencoderKLQwenImage": Autoencoder}
_ATTENTION = "one head among the pixels of a frame: PyTorch's own attention, 0.1 % of the work"
KNOWN = {f"{_WAN}.WanAttentionBlock": _ATTENTION, f"{_QWEN}.QwenImageAttentionBlock": _ATTENTION,
         f"{_WAN}.AvgDown3D": "a mean of pixels", f"{_WAN}.DupUp3D": "pixels repeated"}
