"""What a swapped module may read past: children of exactly a known class that compute with nothing but what is read.

A mixin reads the weights of some children and leaves their forward out. That is right only while such a child is of the
very class that was proven, has no hook and nothing replaced on it, and every setting that its forward computes with is
either read at each call too or has the one value that the mixin computes with. Those values are in a Kind; a mixin's
``reads`` names one for each child. It is asked when the model is swapped and again at each call, so the order of changes
does not matter.
"""

import sys
from collections.abc import Callable

from torch import nn

from .swapping import as_built, genuine, held, original_of

KINDS: list["Kind"] = []


class Kind:
    """A class, by the names of its module and its own, and the settings that its objects must have to be read past.

    Call it with a child. ``read``: what the reader reads itself, None where it calls the child and only asks for its class;
    ``methods``: what the class's forward calls on itself; ``kernel``: the sizes of its weight behind the channels;
    ``rule(child)``: what no table of values can say.
    """

    def __init__(self, *paths: str, read: str | None = None, methods: tuple[str, ...] = ("forward",), kernel=None,
                 rule: Callable[[nn.Module], bool] | None = None, **fixed):
        self.paths, self.read, self.methods, self.kernel, self.rule, self.fixed = paths, read, methods, kernel, rule, fixed
        self.classes: tuple[type, ...] = ()
        KINDS.append(self)

    def but(self, **more) -> "Kind":
        """The same class in one place, where fewer settings are right."""
        own = dict(read=self.read, methods=self.methods, kernel=self.kernel, rule=self.rule)
        return Kind(*self.paths, **(own | self.fixed | more))

    def __call__(self, child) -> bool:
        return as_built(child, self.classes) and self.settled(child)

    def is_of(self, value) -> bool:
        """Whether ``value``, not a module, is of the very class."""
        return type(value) in self.classes

    def built(self, module: nn.Module) -> bool:
        """Whether ``module`` was built of the very class, whatever has been set and hooked since."""
        return original_of(type(module)) in self.classes

    def settled(self, module: nn.Module) -> bool:
        """Whether its settings are those; its class and hooks aside, as a swapped module asks of itself."""
        own = module.__dict__
        for name in self.methods:
            if name != "forward" and name in own:
                return False
        for name, value in self.fixed.items():  # no attrgetter: torch.compile does not trace one
            if getattr(module, name) != value:
                return False
        if self.kernel is not None and held(module, "weight").shape[2:] != self.kernel:
            return False
        return self.rule is None or self.rule(module)


def resolve() -> None:
    """Look the classes up among the modules that are imported by now; nothing is imported for it."""
    for kind in KINDS:
        kind.classes = tuple(cls for cls in map(_find, kind.paths) if cls is not None)


def _find(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) and genuine(cls, ("forward",)) else None


def either(*checks: Callable) -> Callable:
    return lambda child: any(check(child) for check in checks)


def absent(child) -> bool:
    return child is None


def anything(child) -> bool:
    """Of children that a mixin asks about itself, where it reads them."""
    return True


def _weighted(norm) -> bool:
    weight = held(norm, "weight")
    return weight is not None and weight.dim() == 1


def _one_axis(norm) -> bool:
    return len(norm.normalized_shape) == 1


_NN = "torch.nn.modules"
_CONV = dict(methods=("forward", "_conv_forward"), padding_mode="zeros", groups=1)
CONV2D = Kind(f"{_NN}.conv.Conv2d", read="weight bias", dilation=(1, 1), kernel=(3, 3), stride=(1, 1), padding=(1, 1),
              **_CONV)
STRIDED_CONV2D = CONV2D.but(stride=(2, 2), padding=(0, 0))
CONV3D = Kind(f"{_NN}.conv.Conv3d", read="weight bias stride", dilation=(1, 1, 1), padding=(0, 0, 0), **_CONV)
GROUP_NORM = Kind(f"{_NN}.normalization.GroupNorm", read="num_groups weight bias eps")
# Its width is compared with that of the tokens where it is read.
LAYER_NORM = Kind(f"{_NN}.normalization.LayerNorm", "diffusers.models.normalization.FP32LayerNorm",
                  read="normalized_shape weight bias eps", rule=_one_axis)
# Of queries and keys. The ops compare the weight's width with theirs; without an eps a norm takes that of its input's dtype,
# which no op here does.
QK_LAYER_NORM = LAYER_NORM.but(rule=lambda norm: _weighted(norm) and _one_axis(norm))
RMS_NORM = Kind(f"{_NN}.normalization.RMSNorm", read="normalized_shape weight eps",
                rule=lambda norm: _weighted(norm) and _one_axis(norm) and isinstance(norm.eps, float))
DIFFUSERS_RMS_NORM = Kind("diffusers.models.normalization.RMSNorm", read="weight bias eps", rule=_weighted)
SILU = Kind(f"{_NN}.activation.SiLU", read="inplace")  # in place or not, the same numbers
DROPOUT = Kind(f"{_NN}.dropout.Dropout", read="training inplace", p=0.0)
IDENTITY = Kind(f"{_NN}.linear.Identity", read="")
SEQUENTIAL = Kind(f"{_NN}.container.Sequential", read="_modules")
ZERO_PAD2D = Kind(f"{_NN}.padding.ZeroPad2d", read="padding", value=0.0)
