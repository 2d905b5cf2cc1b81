"""Pairs in an nn.Sequential that are one op here: a norm and its SiLU, padding towards the past and its nn.Conv3d.

The pairs may stand anywhere in it; all else in it is called as before.
"""

from itertools import pairwise

from torch import nn

from .. import ops
from .swapping import Fast, runs_alone

_PADS = {nn.ZeroPad3d: "zeros", nn.ConstantPad3d: "zeros", nn.ReplicationPad3d: "replicate"}


class Sequence(Fast):
    runs = "norm_act of a group norm and its SiLU, or causal_conv3d of a padding and its convolution"

    def forward(self, input):
        x, children = input, list(self)
        while children:
            first, *rest = children
            second = rest[0] if rest else None
            if _why_not(first, second) is not None:  # a hook or another child may have come since
                x, children = first(x), rest
                continue
            norm = type(first) is nn.GroupNorm
            if x.dim() not in ((4, 5) if norm else (5,)):
                x, children = second(first(x)), rest[1:]
                continue
            x, children = (_norm_act if norm else _convolve)(first, second, x), rest[1:]
        return x

    @classmethod
    def reads_of(cls, module):
        names, read = list(module._modules), []
        while names:
            pair = [module._modules[name] for name in names[:2]]
            found = len(pair) == 2 and _why_not(*pair) is None
            read += names[:2] if found else []
            names = names[2 if found else 1:]
        return read

    @staticmethod
    def unsuited(module):
        told = []
        for first, second in pairwise(module):
            reason = _why_not(first, second)
            if reason is None:
                return None
            told += [reason.format(first, second, type(first).__name__, type(second).__name__)] if reason else []
        return f"a container; {told[0]}" if told else "a container"


def _why_not(first, second) -> str | None:
    """Why two modules in a row are not one op here, None where they are; "" where nothing says that they might be.

    A reason is still to be formatted with both and their classes' names: a traced graph has no numbers to write out.
    """
    if type(first) is nn.GroupNorm and type(second) is nn.SiLU or type(first) in _PADS and type(second) is nn.Conv3d:
        if not (runs_alone(first) and runs_alone(second)):
            return "its {2} or {3} has a hook or a forward of its own"
        return None if type(first) is nn.GroupNorm else _why_not_causal(first, second)
    if type(first) is nn.GroupNorm:
        return "{3} behind {2} is not SiLU"
    if type(second) is nn.Conv3d and "Pad" in type(first).__name__:
        return "{2} is not a pad this library knows"
    return ""


def _why_not_causal(pad, conv) -> str | None:
    padding, weight = tuple(pad.padding), conv._parameters.get("weight")
    if _PADS[type(pad)] == "zeros" and pad.value != 0:
        return "{2} fills with {0.value:g}, not with 0"
    if weight is None:
        return "its convolution has no weight of its own"
    if padding[4] != weight.shape[2] - 1 or padding[5] != 0:
        return "{2} does not stand towards the past alone, before a kernel of {1.weight.shape[2]} frames"
    if min(padding) < 0:
        return "{2} cuts off what is at the border"
    if conv.groups != 1 or conv.dilation != (1, 1, 1):
        return "its convolution has groups or dilation"
    own = _own_padding(conv)
    if own is None or own[0] != 0:
        return "its convolution pads in time itself"
    if conv.padding_mode != "zeros" or any(own) and _PADS[type(pad)] != "zeros" and any(padding[:4]):
        return "its convolution pads with {1.padding_mode} around {2}"
    return None


def _own_padding(conv) -> tuple[int, ...] | None:
    """What a convolution pads on each side by itself; None of padding="same", which may differ from side to side."""
    if isinstance(conv.padding, str):
        return (0, 0, 0) if conv.padding == "valid" else None
    return tuple(conv.padding)


def _norm_act(norm, _, x):
    frames = x if x.dim() == 5 else x[:, :, None]
    y = ops.norm_act(frames, norm.weight, norm.bias, norm="group", groups=norm.num_groups, eps=norm.eps, act="silu")
    return y if x.dim() == 5 else y.squeeze(2)


def _convolve(pad, conv, x):
    left, right, top, bottom = pad.padding[:4]
    _, height, width = _own_padding(conv)
    in_time = _PADS[type(pad)]
    return ops.causal_conv3d(x, conv.weight, conv.bias, stride=conv.stride, time_pad=in_time,
                             padding=(left + width, right + width, top + height, bottom + height),
                             space_pad="zeros" if height or width else in_time)


SWAPS = {"torch.nn.modules.container.Sequential": Sequence}
