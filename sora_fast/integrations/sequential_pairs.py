"""Pairs in an nn.Sequential that are fused to one op: a norm and its SiLU, causal padding and its nn.Conv3d.

The pairs may be anywhere in it; its other children are called as before.
"""

from torch import nn

from .. import ops
from ..ops.convolution import SPACE_PADS
from .mixin import Fast, runs_only_forward

_PADS = {nn.ZeroPad3d: "zeros", nn.ConstantPad3d: "zeros", nn.ReplicationPad3d: "replicate"}


class FusedSequential(Fast):
    report = "norm_act, causal_conv3d"  # or one of them: see report_of

    def forward(self, input):
        x, children = input, list(self)
        while children:
            first, *rest = children
            second = rest[0] if rest else None
            if _why_not(first, second) is not None:  # a hook or another child may have been added since
                x, children = first(x), rest
                continue
            norm = type(first) is nn.GroupNorm
            if x.dim() not in ((4, 5) if norm else (5,)):
                x, children = second(first(x)), rest[1:]
                continue
            x, children = (_norm_act if norm else _convolve)(first, second, x), rest[1:]
        return x

    @classmethod
    def report_of(cls, module):
        found = _pairs(module)
        names = dict.fromkeys("norm_act" if type(first) is nn.GroupNorm else "causal_conv3d" for first, _ in found)
        return "; unchanged in it: ".join([" and ".join(names), *filter(None, [_why_others_not(module, found)])])

    @classmethod
    def absorbed(cls, module):
        fused = {child for pair in _pairs(module) for child in pair}
        return [name for name, child in module._modules.items() if child in fused]

    @staticmethod
    def why_not(module):
        found = _pairs(module)
        return None if found else "; ".join(["a container", *filter(None, [_why_others_not(module, found)])])


def _pairs(module) -> list[tuple[nn.Module, nn.Module]]:
    """The pairs of children that are fused."""
    children, found = list(module), []
    while children:
        pair = tuple(children[:2])
        is_one = len(pair) == 2 and _why_not(*pair) is None
        found += [pair] if is_one else []
        children = children[2 if is_one else 1:]
    return found


def _why_others_not(module, found) -> str:
    """Why the other children are not fused, each reason once."""
    fused = {child for pair in found for child in pair}
    reasons = {}
    for first, second in zip(module, [*list(module)[1:], None], strict=True):
        reason = "" if first in fused or second in fused else _why_not(first, second)
        if reason:
            reasons[reason.format(first, second, type(first).__name__, type(second).__name__)] = None
    return ", ".join(reasons)


def _why_not(first, second) -> str | None:
    """Why two consecutive modules are not fused; None if they are, "" for modules that are no candidates.

    A reason is a template, to be formatted with both modules and their classes' names: a traced graph has no values to
    format. ``second`` is None after the last module.
    """
    norm, pad = type(first) is nn.GroupNorm, "Pad" in type(first).__name__
    if norm and type(second) is nn.SiLU or type(first) in _PADS and type(second) is nn.Conv3d:
        if not (runs_only_forward(first) and runs_only_forward(second)):
            return "its {2} or {3} has a hook or a forward of its own"
        return None if norm else _why_not_causal(first, second)
    if norm:
        return "{2} has no SiLU behind it" if second is None else "{3} behind {2} is not SiLU"
    if pad and type(second) is nn.Conv3d:
        return "{2} is not a pad this library knows"
    if type(first) in _PADS:
        return "{2} has no Conv3d behind it" if second is None else "{3} behind {2} is not Conv3d"
    if type(second) is nn.SiLU and "Norm" in type(first).__name__:
        return "{2} before {3} is not a norm this library knows"
    return ""


def _why_not_causal(pad, conv) -> str | None:
    padding, weight = tuple(pad.padding), conv._parameters.get("weight")
    if _PADS[type(pad)] == "zeros" and pad.value != 0:
        return "{2} fills with {0.value:g}, not with 0"
    if weight is None:
        return "its convolution has no weight of its own"
    if padding[4] != weight.shape[2] - 1 or padding[5] != 0:
        return "{2} does not pad the past alone, as a causal kernel of {1.weight.shape[2]} frames needs"
    if min(padding) < 0:
        return "{2} cuts off what is at the border"
    if conv.groups != 1 or conv.dilation != (1, 1, 1):
        return "its convolution has groups or dilation"
    time, *own = _own_padding(conv)
    if time:
        return "its convolution pads in time itself"
    if _space_pad(pad, conv, own) is None:
        return "its convolution pads with {1.padding_mode} around {2}"
    return None


def _own_padding(conv) -> tuple[int, ...]:
    """A convolution's own padding: frames in total, then (left, right, top, bottom)."""
    if conv.padding_mode != "zeros":
        left, right, top, bottom, front, back = conv._reversed_padding_repeated_twice
        return front + back, left, right, top, bottom
    if conv.padding == "same":  # an odd number is one more at the far side
        t, (top, bottom), (left, right) = conv.kernel_size[0] - 1, *((n - 1 - n // 2, n // 2) for n in conv.kernel_size[1:])
    else:
        t, height, width = (0, 0, 0) if conv.padding == "valid" else conv.padding
        top, bottom, left, right = height, height, width, width
    return t, left, right, top, bottom


def _space_pad(pad, conv, own) -> str | None:
    """The spatial padding mode of the two together; None if they differ."""
    if not any(own):
        return _PADS[type(pad)]
    if any(pad.padding[:4]) and conv.padding_mode != _PADS[type(pad)]:
        return None
    return conv.padding_mode if conv.padding_mode in SPACE_PADS else None


def _norm_act(norm, _, x):
    frames = x if x.dim() == 5 else x[:, :, None]
    y = ops.norm_act(frames, norm.weight, norm.bias, norm="group", groups=norm.num_groups, eps=norm.eps, act="silu")
    return y if x.dim() == 5 else y.squeeze(2)


def _convolve(pad, conv, x):
    _, *own = _own_padding(conv)
    return ops.causal_conv3d(x, conv.weight, conv.bias, stride=conv.stride, time_pad=_PADS[type(pad)],
                             padding=tuple(a + b for a, b in zip(pad.padding, own, strict=False)),
                             space_pad=_space_pad(pad, conv, own))


SWAPS = {"torch.nn.modules.container.Sequential": FusedSequential}
