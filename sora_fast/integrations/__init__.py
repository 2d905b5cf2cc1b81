"""Other people's models on this library's layers."""

from .swapping import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
