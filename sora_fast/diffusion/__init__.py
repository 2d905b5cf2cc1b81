"""What is learned and how it is sampled: objectives on packs, and generation from a grid of noise patches.

Timesteps are counted in [0, 1000], 0 clean, as diffusion schedules do.
"""

from .objectives import DDPM, FlowMatching, Objective, make_objective
from .sampling import generate

__all__ = ["DDPM", "FlowMatching", "Objective", "generate", "make_objective"]
