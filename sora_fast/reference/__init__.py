"""The definition of every op in plain PyTorch: any floating dtype, any device, any number of derivatives.

Everything is computed in at least float32 and rounded once, where a tensor of the contract is produced. On float64
inputs these functions are the truth that every kernel is measured against.
"""

from .attention import *
from .convolution import *
from .latents import *
from .modulation import *
from .normalization import *
from .patches import *
from .rotary import *
