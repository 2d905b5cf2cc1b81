"""What is learned and how it is sampled: objectives on packs, and generation from a grid of noise patches.

Timesteps are counted in [0, 1000], 0 clean, as diffusion schedules do. Images and clips as prompts are ``MediaPrompt`` in
pixels and ``Known`` in latents.
"""

from ..other_names import missing
from .clean_frames import FrameTimesteps, draw_clean_frames
from .conditioning import MediaPrompt, Seam, jumps
from .learned_variance import LearnedVariance, pairs
from .objectives import DDPM, FlowMatching, Objective
from .sampling import Known, generate, place
from .training_loss import training_loss

__all__ = ["DDPM", "FlowMatching", "FrameTimesteps", "Known", "LearnedVariance", "MediaPrompt", "Objective", "Seam",
           "draw_clean_frames", "generate", "jumps", "make_objective", "pairs", "place",
           "training_loss"]


def make_objective(kind: str, prediction: str | None = None, *, learn_sigma: bool = False, **options) -> Objective:
    """``"flow"`` or ``"ddpm"``, with that objective's usual prediction unless one is given.

    Args:
        kind: "flow" or "ddpm".
        prediction: "x0", "velocity" or "noise"; None: the objective's usual one.
        learn_sigma: DDPM with a learned variance, for a model with ``learn_sigma``.
        options: further arguments of the objective, such as ``shift=``.

    Raises:
        ValueError: another kind or prediction, ``learn_sigma`` with "flow".

    >>> make_objective("flow", shift=3.0).prediction
    'velocity'
    """
    kinds = {"flow": FlowMatching, "ddpm": LearnedVariance if learn_sigma else DDPM}
    if learn_sigma and kind == "flow":
        raise ValueError("make_objective: expected learn_sigma with 'ddpm' alone, got it with 'flow', whose paths have no "
                         "variance; leave it out, or take 'ddpm'")
    if kind not in kinds:
        raise ValueError(f"make_objective: expected 'flow' or 'ddpm', got {kind!r}; choose one of them")
    return kinds[kind](**options) if prediction is None else kinds[kind](prediction=prediction, **options)


def __getattr__(name: str):
    raise missing(__name__, __all__, name)
