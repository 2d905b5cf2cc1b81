"""The public ops. Each has a reference, backends, a backward, and an error message for each kind of invalid input."""

from ..other_names import missing
from .attention import *
from .convolution import *
from .latents import *
from .modulation import *
from .normalization import *
from .patches import *
from .rotary import *

FAMILIES = ("patches", "modulation", "rotary", "attention", "convolution", "normalization", "latents")

__all__ = sorted(name for family in FAMILIES for name in globals()[family].__all__)


def __getattr__(name: str):
    raise missing(__name__, __all__, name)
