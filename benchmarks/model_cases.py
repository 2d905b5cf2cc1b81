"""Steps of whole models to measure: the VAE of Wan 2.1, a DiT's block and a DiT; see ``model`` for how each is made."""

from .model import dit, vae
from .model.case import ModelCase, ModelProvider

CASES: list[ModelCase] = [*vae.CASES, *dit.CASES]

__all__ = ["CASES", "ModelCase", "ModelProvider"]
