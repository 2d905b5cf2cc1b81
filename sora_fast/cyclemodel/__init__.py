"""Predicts the cost of a kernel from its SASS, on a GPU that need not be present.

``predict(Kernel, GPU)`` for one kernel; ``facts.read`` for exact properties of its code; ``sora-fast predict`` for all of
our kernels. Imports nothing else of sora_fast.
"""

from .gpus import GPU, GPUS, blocks_per_sm
from .model import Kernel, Prediction, predict

__all__ = ["GPU", "GPUS", "Kernel", "Prediction", "blocks_per_sm", "predict"]
