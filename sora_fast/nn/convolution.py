"""CausalConv3d: nn.Conv3d, causal in time."""

from torch import nn

from .. import checks, ops
from ..ops.convolution import SPACE_PADS, TIME_PADS
from .normalization import GroupNorm, RMSNorm
from .streaming import StreamState, renew


class CausalConv3d(nn.Conv3d):
    """Drop-in for ``nn.Conv3d`` (same parameters, same state_dict, same initialisation), causal in time.

    The number of frames is kept (divided by the time stride): kT - 1 frames of padding or of the stream's cache precede the
    clip, none follow it.

    Args:
        in_channels, out_channels, kernel_size, stride, bias, device, dtype: as in nn.Conv3d.
        padding: of space: None or "same" for half the kernel; "valid" for none; an int; (T, H, W) as in nn.Conv3d, of
            which T is not used because time is padded causally; or (left, right, top, bottom).
        padding_mode: of space: "zeros", "replicate" or "reflect".
        time_pad: before the first frame: "zeros", or "replicate", the first frame again.
        phase: the first frame with an output.
        lookahead: future frames that each output depends on (not causal, no streaming).
        upsample: nearest-neighbour upsampling in space by this factor, before padding and convolution.

    Raises:
        ValueError, TypeError: dilation or groups other than 1, a padding or a count that the op rejects.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=None, dilation=1, groups=1, bias=True,
                 padding_mode="zeros", device=None, dtype=None, *, time_pad="zeros", phase=0, lookahead=0,
                 upsample=1):
        if dilation not in (1, (1, 1, 1), [1, 1, 1]) or groups != 1:
            raise ValueError(f"CausalConv3d: expected dilation 1 and groups 1, got {dilation} and {groups}; "
                             f"use nn.Conv3d for those")
        super().__init__(in_channels, out_channels, kernel_size, stride, 0, bias=bias, device=device, dtype=dtype)
        checks.choice("CausalConv3d", "padding_mode", padding_mode, SPACE_PADS)
        checks.choice("CausalConv3d", "time_pad", time_pad, TIME_PADS)
        for name, value, least in (("phase", phase, 0), ("lookahead", lookahead, 0), ("upsample", upsample, 1)):
            checks.whole("CausalConv3d", name, value, least)
        if lookahead >= self.kernel_size[0]:
            raise checks.error("CausalConv3d", f"lookahead of at most the kernel's {self.kernel_size[0]} frames less one",
                               lookahead, "use less lookahead")
        self.space_padding = _space_padding(padding, self.kernel_size)
        self.space_pad, self.time_pad, self.phase = padding_mode, time_pad, phase
        self.lookahead, self.upsample = lookahead, upsample

    def forward(self, x, state: StreamState | None = None, residual=None):
        """x (B, Cin, T, H, W) -> (B, Cout, T', H', W'); ``state`` carries the stream, ``residual`` is added."""
        return self._run(ops.causal_conv3d, x, state, residual)

    def _run(self, op, x, state, residual, **norm):
        settings = dict(stride=self.stride, padding=self.space_padding, time_pad=self.time_pad,
                        space_pad=self.space_pad, lookahead=self.lookahead, upsample=self.upsample,
                        residual=residual, **norm)
        if state is None:
            return op(x, self.weight, self.bias, phase=self.phase, **settings)
        if not isinstance(state, StreamState):
            raise TypeError(f"CausalConv3d: expected state as a StreamState, got {checks.came(state)}; pass StreamState(), "
                            f"or nothing for a whole clip")
        past, phase = state.get(self, (None, self.phase))
        y, cache = op(x, self.weight, self.bias, cache=past, phase=phase, return_cache=True, **settings)
        state.set(self, (renew(past, cache), phase + y.shape[2] * self.stride[0] - x.shape[2]))
        return y

    def extra_repr(self) -> str:
        upsample = f", upsample={self.upsample}" if self.upsample > 1 else ""
        return (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
                f"padding={self.space_padding}, time_pad={self.time_pad!r}, space_pad={self.space_pad!r}{upsample}")


def norm_act_conv(norm, conv: CausalConv3d, x, state: StreamState | None = None, residual=None):
    """``conv(norm(x))`` as one op, for a ``sora_fast.nn`` norm and CausalConv3d.

    Args:
        norm: an RMSNorm or GroupNorm of sora_fast.nn.
        conv: a CausalConv3d.
        x: (B, Cin, T, H, W).
        state: StreamState of the stream; None: a whole clip.
        residual: (B, Cout, T', H', W') that is added, or None.

    Returns:
        (B, Cout, T', H', W').

    Raises:
        TypeError: other layers. ValueError: a GroupNorm with a state, since it mixes frames.
    """
    if not isinstance(norm, (RMSNorm, GroupNorm)) or not isinstance(conv, CausalConv3d):
        raise TypeError(f"norm_act_conv: expected a norm and a CausalConv3d of sora_fast.nn, got {checks.came(norm)} and "
                        f"{checks.came(conv)}; call others one after the other")
    if state is not None and norm.settings["norm"] == "group":
        raise ValueError("norm_act_conv: expected a norm within each frame with a StreamState, got a GroupNorm, which "
                         "mixes frames; use RMSNorm, or run the whole clip at once")
    return conv._run(ops.norm_act_conv3d, x, state, residual, norm_weight=norm.weight, norm_bias=norm.bias,
                     **norm.settings)


def _space_padding(padding, kernel) -> tuple[int, int, int, int]:
    if padding is None or isinstance(padding, str):
        padding = {None: [k // 2 for k in kernel], "same": [k // 2 for k in kernel], "valid": 0}.get(padding, padding)
    if isinstance(padding, int):
        return (padding,) * 4
    if not isinstance(padding, str) and len(padding) == 3:
        return (padding[2], padding[2], padding[1], padding[1])
    if not isinstance(padding, str) and len(padding) == 4:
        return tuple(padding)
    raise ValueError(f"CausalConv3d: expected padding as None, 'same', 'valid', an int, (T, H, W) or (left, right, "
                     f"top, bottom), got {padding!r}; pass one of these")
