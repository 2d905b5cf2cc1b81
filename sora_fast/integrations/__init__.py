"""Third-party models on this library's ops."""

from ..other_names import missing
from .attention_backend import register_attention_backend
from .swapping import Report, accelerate, restore

__all__ = ["Report", "accelerate", "register_attention_backend", "restore"]


def __getattr__(name: str):
    raise missing(__name__, __all__, name)
