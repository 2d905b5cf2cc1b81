"""Classes of PyTorch and diffusers that several families absorb, with the settings required; see mixin.py."""

from collections.abc import Callable

from .mixin import Kind, get_member

ITS_CHILDREN = "diffusers' own; its children are replaced one by one"  # why a class in KNOWN is unchanged


def any_of(*checks: Callable) -> Callable:
    return lambda child: any(check(child) for check in checks)


def is_none(child) -> bool:
    return child is None


def always(child) -> bool:
    """For children that a mixin checks itself."""
    return True


def _weighted(norm) -> bool:
    weight = get_member(norm, "weight")
    return weight is not None and weight.dim() == 1


def _one_axis(norm) -> bool:
    return len(norm.normalized_shape) == 1


_NN = "torch.nn.modules"
_CONV = dict(methods=("forward", "_conv_forward"), padding_mode="zeros", groups=1)
CONV2D = Kind(f"{_NN}.conv.Conv2d", reads="weight bias", dilation=(1, 1), kernel=(3, 3), stride=(1, 1), padding=(1, 1),
              **_CONV)
STRIDED_CONV2D = CONV2D.with_settings(stride=(2, 2), padding=(0, 0))
CONV3D = Kind(f"{_NN}.conv.Conv3d", reads="weight bias stride", dilation=(1, 1, 1), padding=(0, 0, 0), **_CONV)
GROUP_NORM = Kind(f"{_NN}.normalization.GroupNorm", reads="num_groups weight bias eps")
# Its width is compared with the tokens' where it is used.
LAYER_NORM = Kind(f"{_NN}.normalization.LayerNorm", "diffusers.models.normalization.FP32LayerNorm",
                  reads="normalized_shape weight bias eps", rule=_one_axis)
# For queries and keys. The ops compare the weight's width with theirs. Without an eps, nn.RMSNorm takes that of its input's
# dtype, which no op here does.
QK_LAYER_NORM = LAYER_NORM.with_settings(rule=lambda norm: _weighted(norm) and _one_axis(norm))
RMS_NORM = Kind(f"{_NN}.normalization.RMSNorm", reads="normalized_shape weight eps",
                rule=lambda norm: _weighted(norm) and _one_axis(norm) and isinstance(norm.eps, float))
DIFFUSERS_RMS_NORM = Kind("diffusers.models.normalization.RMSNorm", reads="weight bias eps", rule=_weighted)
SILU = Kind(f"{_NN}.activation.SiLU", reads="inplace")  # in place or not, with the same result
DROPOUT = Kind(f"{_NN}.dropout.Dropout", reads="training inplace", p=0.0)
IDENTITY = Kind(f"{_NN}.linear.Identity", reads="")
SEQUENTIAL = Kind(f"{_NN}.container.Sequential", reads="_modules")
ZERO_PAD2D = Kind(f"{_NN}.padding.ZeroPad2d", reads="padding", value=0.0)
