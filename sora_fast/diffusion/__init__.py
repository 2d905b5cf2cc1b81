"""What is learned and how it is sampled: objectives on packs, and generation from a grid of noise patches.

Timesteps are counted in [0, 1000], 0 clean, as diffusion schedules do. Images and clips as prompts are ``MediaPrompt`` in
pixels and ``Known`` in latents.
"""

from .clean_frames import FrameTimesteps, draw_clean_frames
from .conditioning import MediaPrompt, Seam, jumps
from .learned_variance import LearnedVariance, pairs
from .objectives import DDPM, FlowMatching, Objective, make_objective
from .sampling import Known, generate, place

__all__ = ["DDPM", "FlowMatching", "FrameTimesteps", "Known", "LearnedVariance", "MediaPrompt", "Objective", "Seam",
           "draw_clean_frames", "generate", "jumps", "make_objective", "pairs", "place"]
