"""nn.Sequential pairs that are one op here: a norm and its SiLU, padding towards the past and its nn.Conv3d."""

from torch import nn

from .. import ops
from .swapping import Fast


def _kinds(module) -> tuple[type, ...]:
    return tuple(type(child) for child in module)


class Sequence(Fast):
    runs = "norm_act of the group norm and its SiLU, or causal_conv3d of the padding and its convolution"
    reads = ("0", "1")

    def forward(self, x):
        first, second = self
        if Sequence.unsuited(self) is not None:  # a child has been replaced since, by an adapter for one
            return super().forward(x)
        if isinstance(first, nn.GroupNorm):
            frames = x if x.dim() == 5 else x[:, :, None]
            y = ops.norm_act(frames, first.weight, first.bias, norm="group", groups=first.num_groups, eps=first.eps,
                             act="silu")
            return y if x.dim() == 5 else y.squeeze(2)
        return ops.causal_conv3d(x, second.weight, second.bias, stride=second.stride, padding=first.padding[:4],
                                 time_pad="replicate" if type(first) is nn.ReplicationPad3d else "zeros",
                                 space_pad="replicate" if type(first) is nn.ReplicationPad3d else "zeros")

    @staticmethod
    def unsuited(module):
        kinds = _kinds(module)
        if any(child._forward_hooks or child._forward_pre_hooks or child._backward_hooks for child in module):
            return "a container of children with hooks"
        if kinds == (nn.GroupNorm, nn.SiLU):
            return None
        if kinds in ((nn.ZeroPad3d, nn.Conv3d), (nn.ReplicationPad3d, nn.Conv3d)):
            pad, conv = module
            causal = pad.padding[4:] == (conv.kernel_size[0] - 1, 0)
            plain = conv.padding == (0, 0, 0) and conv.dilation == (1, 1, 1) and conv.groups == 1
            return None if causal and plain else "a container; its padding is not causal, or its convolution not plain"
        return "a container"


SWAPS = {"torch.nn.modules.container.Sequential": Sequence}
