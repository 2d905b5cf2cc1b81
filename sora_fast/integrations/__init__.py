"""Third-party models on this library's ops."""

from .attention_backend import register_attention_backend
from .swapping import Report, accelerate, restore

__all__ = ["Report", "accelerate", "register_attention_backend", "restore"]
