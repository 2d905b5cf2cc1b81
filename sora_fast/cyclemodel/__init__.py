"""Reads a kernel's machine code and predicts what it costs on a GPU that is not here.

``predict(Kernel, GPU)`` for one kernel; ``facts.read`` for what its code says exactly; ``sora-fast predict`` for all of
ours. Imports nothing else of sora_fast.
"""

from .gpus import GPU, GPUS, blocks_per_sm
from .model import Kernel, Prediction, predict

__all__ = ["GPU", "GPUS", "Kernel", "Prediction", "blocks_per_sm", "predict"]
