"""The autoencoders of Wan 2.1 and 2.2 and of Qwen-Image, as diffusers has them.

Their past is in a StreamState instead of lists that are filled in the order of calls, so checkpointing and torch.compile
work; clips of any length take the memory of one chunk.

B batch, C channels, T frames, H height, W width; t, h, w of the latents.
"""

import sys

import torch

from .. import ops
from ..nn import StreamState
from ..nn.streaming import starts
from .swapping import Fast, as_built, grad_wanted, is_fast, original_of
from .video_vae import Whole, convolve, in_chunks, own_slots

_SILU = "expected SiLU as its activation, which it has not"


def _kind(module, name: str) -> str:
    """The class that is called WanX in this module's own family: QwenImageX there."""
    own = original_of(type(module)).__name__
    return ("QwenImage" if own.startswith(("QwenImage", "AutoencoderKLQwenImage")) else "Wan") + name


def _is_silu(activation) -> bool:
    return type(activation) is torch.nn.SiLU


def _norm(norm, act: str | None = "silu") -> dict:
    """Keywords of ops.norm_act_conv3d; gamma is (C, 1, 1, 1)."""
    return dict(norm_weight=norm.gamma.flatten(), norm="rms", eps=1e-24, act=act)


def _state(feat_cache) -> StreamState | None:
    """The stream behind diffusers' list of caches, as its tiled paths pass one: it is kept in the first place."""
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
    if is_fast(child):
        return child(x, feat_cache=state, **arguments)
    return own_slots(child, child, x, state, **arguments)


def _checkpointed(owner, child, x, state, **arguments):
    """``_call``, recomputed in the backward where ``enable_gradient_checkpointing`` asks for it."""
    if getattr(owner, "gradient_checkpointing", False) and torch.is_grad_enabled() and isinstance(state, Whole | None):
        return owner._gradient_checkpointing_func(lambda y: _call(child, y, state, **arguments), x)
    return _call(child, x, state, **arguments)


class CausalConv(Fast):
    runs = "causal_conv3d"

    def forward(self, x, cache_x=None):
        behind = self.kernel_size[0] - 1
        if self._padding[4] == behind:
            return ops.causal_conv3d(x, self.weight, self.bias, stride=self.stride, padding=_padding(self),
                                     cache=cache_x if behind else None)
        # No padding in time: what stands before the first output is the head of x itself.
        return ops.causal_conv3d(x[:, :, behind:], self.weight, self.bias, stride=self.stride, padding=_padding(self),
                                 cache=x[:, :, :behind])

    @staticmethod
    def unsuited(module):
        if module._padding[4] not in (0, module.kernel_size[0] - 1) or module.groups != 1 or module.dilation != (1, 1, 1):
            return "its padding, groups or dilation are none that Wan has"
        return None


class RMSNorm(Fast):
    runs = "norm_act"

    def forward(self, x):
        frames = x if x.dim() == 5 else x.unsqueeze(2)
        return ops.norm_act(frames, self.gamma.flatten(), norm="rms", eps=1e-24, act=None).view_as(x)

    @staticmethod
    def unsuited(module):
        if not module.channel_first or not isinstance(module.bias, float):
            return "it has a bias, or channels last, as none in Wan has"
        return None


class ResidualBlock(Fast):
    runs = "norm_act_conv3d twice, the shortcut added in the second"
    reads = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut", "nonlinearity", "dropout")

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006, diffusers' own signature
        if isinstance(feat_cache, list):
            return super().forward(x, feat_cache=feat_cache, feat_idx=feat_idx)
        state = feat_cache
        if not self._intact():  # an adapter or a hook has come to a child since
            return own_slots(self, super().forward, x, state)
        h = _convolve(self.conv1, x, state, norm=_norm(self.norm1))
        shortcut = x if isinstance(self.conv_shortcut, torch.nn.Identity) else _convolve(self.conv_shortcut, x, None)
        return _convolve(self.conv2, h, state, norm=_norm(self.norm2), residual=shortcut)

    def _intact(self) -> bool:
        conv, norm = _kind(self, "CausalConv3d"), _kind(self, "RMS_norm")
        shortcut = isinstance(self.conv_shortcut, torch.nn.Identity) or as_built(self.conv_shortcut, conv)
        act = as_built(self.nonlinearity, "SiLU")
        return act and shortcut and all(as_built(getattr(self, f"{kind}{n}"), of) for n in (1, 2)
                                        for kind, of in (("norm", norm), ("conv", conv)))

    @staticmethod
    def unsuited(module):
        if not _is_silu(module.nonlinearity):
            return _SILU
        if module.dropout.p:
            return f"dropout of {module.dropout.p:g} stands between norm and convolution"
        return None if ResidualBlock._intact(module) else "a child was replaced or has a hook"


class Resample(Fast):
    runs = "causal_conv3d, upsampling by address"
    reads = ("resample", "time_conv")

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        if isinstance(feat_cache, list):
            return super().forward(x, feat_cache=feat_cache, feat_idx=feat_idx)
        state = feat_cache
        if not self._intact():
            return own_slots(self, super().forward, x, state)
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

    def _intact(self) -> bool:
        time_conv = getattr(self, "time_conv", None)
        plain = time_conv is None or as_built(time_conv, _kind(self, "CausalConv3d"))
        return plain and as_built(self.resample[1], "Conv2d")

    @staticmethod
    def unsuited(module):
        if module.mode not in ("upsample2d", "upsample3d", "downsample2d", "downsample3d"):
            return f"mode {module.mode!r} changes no size"
        return None if Resample._intact(module) else "a child was replaced or has a hook"


class MidBlock(Fast):
    runs = "its children, whose past is in a StreamState"

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        if isinstance(feat_cache, list):
            return super().forward(x, feat_cache=feat_cache, feat_idx=feat_idx)
        x = _call(self.resnets[0], x, feat_cache)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = x if attention is None else attention(x)
            x = _call(resnet, x, feat_cache)
        return x


class DownBlock(Fast):
    """Wan 2.2's, around an average of pixels."""

    runs = MidBlock.runs

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        if isinstance(feat_cache, list):
            return super().forward(x, feat_cache=feat_cache, feat_idx=feat_idx)
        shortcut = self.avg_shortcut(x)
        for layer in (*self.resnets, self.downsampler):
            x = x if layer is None else _call(layer, x, feat_cache)
        return x + shortcut


class UpBlock(Fast):
    """Wan 2.1's, and Wan 2.2's around repeated pixels."""

    runs = MidBlock.runs

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
    runs = MidBlock.runs
    reads = ("conv_in", "norm_out", "conv_out", "nonlinearity")

    def forward(self, x, feat_cache=None, feat_idx=[0]):  # noqa: B006
        state = _state(feat_cache)
        if Encoder.unsuited(self):
            return own_slots(self, super().forward, x, state)
        x = _convolve(self.conv_in, x, state)
        for layer in self.down_blocks:
            x = layer(x) if _is_attention(layer) else _checkpointed(self, layer, x, state)
        x = _checkpointed(self, self.mid_block, x, state)
        return _convolve(self.conv_out, x, state, norm=_norm(self.norm_out))

    @staticmethod
    def unsuited(module):
        ends = [as_built(getattr(module, name), _kind(module, kind)) for name, kind in
                (("conv_in", "CausalConv3d"), ("conv_out", "CausalConv3d"), ("norm_out", "RMS_norm"))]
        if not _is_silu(module.nonlinearity):
            return _SILU
        return None if all(ends) and as_built(module.nonlinearity, "SiLU") else "a child was replaced or has a hook"


class Decoder(Fast):
    runs = MidBlock.runs
    reads = Encoder.reads
    unsuited = Encoder.unsuited

    def forward(self, x, feat_cache=None, feat_idx=[0], first_chunk=False):  # noqa: B006
        state = _state(feat_cache)
        if state is not None:
            first_chunk = starts(self.up_blocks, x, state)  # the decoder's own place may hold its list of caches
        if Encoder.unsuited(self):
            more = dict(first_chunk=first_chunk) if _kind(self, "") == "Wan" else {}
            return own_slots(self, super().forward, x, state, **more)
        x = _convolve(self.conv_in, x, state)
        x = _checkpointed(self, self.mid_block, x, state)
        for layer in self.up_blocks:
            more = dict(first_chunk=first_chunk) if hasattr(layer, "avg_shortcut") else {}
            x = _checkpointed(self, layer, x, state, **more)
        return _convolve(self.conv_out, x, state, norm=_norm(self.norm_out))


def _some_frames(model, name: str, clip) -> None:
    if clip.shape[2] == 0:
        raise ValueError(f"{original_of(type(model)).__name__}.{name}: expected a clip of one frame or more, got none; "
                         f"leave clips without frames out")


def _is_attention(layer) -> bool:
    return original_of(type(layer)).__name__.endswith("AttentionBlock")


class Autoencoder(Fast):
    """encode and decode keep diffusers' signatures and results, slicing and tiling included."""

    runs = "chunks of any length, written into one tensor; whole clips where gradients are wanted or a graph is traced"
    streams = True
    _supports_gradient_checkpointing = True

    def _encode(self, x):
        _some_frames(self, "encode", x)
        if self._tiled(x, 1) or not is_fast(self.encoder):  # a changed encoder takes diffusers' lists of caches
            return super()._encode(x)
        patch = getattr(self.config, "patch_size", None)
        x = x[:, :, : 1 + (x.shape[2] - 1) // 4 * 4]  # diffusers leaves out what is no whole group of four
        to_patches = self._function("patchify")
        step = lambda part, state: self.encoder(to_patches(part, patch_size=patch) if patch else part, feat_cache=state)
        factor = 2 ** sum(self.config.temperal_downsample)
        if x.shape[2] == 1 or torch.compiler.is_compiling() or grad_wanted(self, x):
            moments = step(x, Whole())
        else:
            moments = in_chunks(self, x, step, 1, 4, 1 + (x.shape[2] - 1) // factor, self._bytes(x, 1))
        return self.quant_conv(moments)

    def _decode(self, z, return_dict=True):
        _some_frames(self, "decode", z)
        if self._tiled(z, self.spatial_compression_ratio) or not is_fast(self.decoder):
            return super()._decode(z, return_dict=return_dict)
        patch = getattr(self.config, "patch_size", None)
        from_patches = self._function("unpatchify")

        def step(part, state):
            y = self.decoder(part, feat_cache=state)
            return torch.clamp(from_patches(y, patch_size=patch) if patch else y, min=-1.0, max=1.0)

        x = self.post_quant_conv(z)
        factor = 2 ** sum(self.config.temperal_downsample)
        if x.shape[2] == 1 or torch.compiler.is_compiling() or grad_wanted(self, x):
            video = step(x, Whole())
        else:
            video = in_chunks(self, x, step, 1, 1, 1 + (x.shape[2] - 1) * factor,
                              self._bytes(z, self.spatial_compression_ratio))
        if not return_dict:
            return (video,)
        return self._function("DecoderOutput")(sample=video)

    def _tiled(self, clip, scale: int) -> bool:
        lines, columns = self.tile_sample_min_height // scale, self.tile_sample_min_width // scale
        return self.use_tiling and (clip.shape[3] > lines or clip.shape[4] > columns)

    def _function(self, name: str):
        """What diffusers' own module has under that name; Qwen-Image has no patches."""
        return getattr(sys.modules[original_of(type(self)).__module__], name, None)

    def _bytes(self, clip, scale: int) -> int:
        """What a latent frame takes at the peak: four tensors of the widest level and four of its norm in float32."""
        width = max(self.config.base_dim, getattr(self.config, "decoder_base_dim", None) or 0)
        patch = getattr(self.config, "patch_size", None) or 1
        pixels = 4 * clip.shape[0] * clip.shape[3] * clip.shape[4] * scale**2 // patch**2
        return 4 * width * pixels * (clip.dtype.itemsize + 4)


_PARTS = {"CausalConv3d": CausalConv, "RMS_norm": RMSNorm, "ResidualBlock": ResidualBlock, "Resample": Resample,
          "MidBlock": MidBlock, "UpBlock": UpBlock}
_WAN, _QWEN = (f"diffusers.models.autoencoders.autoencoder_kl_{name}" for name in ("wan", "qwenimage"))

SWAPS = {f"{_WAN}.Wan{name}": mixin for name, mixin in (_PARTS | {
    "Encoder3d": Encoder, "Decoder3d": Decoder, "ResidualDownBlock": DownBlock, "ResidualUpBlock": UpBlock}).items()}
SWAPS |= {f"{_QWEN}.QwenImage{name}": mixin for name, mixin in (_PARTS | {
    "Encoder3d": Encoder, "Decoder3d": Decoder}).items()}
SWAPS |= {f"{_WAN}.AutoencoderKLWan": Autoencoder, f"{_QWEN}.AutoencoderKLQwenImage": Autoencoder}
_ATTENTION = "one head among the pixels of a frame: PyTorch's own attention, 0.1 % of the work"
KNOWN = {f"{_WAN}.WanAttentionBlock": _ATTENTION, f"{_QWEN}.QwenImageAttentionBlock": _ATTENTION,
         f"{_WAN}.AvgDown3D": "a mean of pixels", f"{_WAN}.DupUp3D": "pixels repeated"}
