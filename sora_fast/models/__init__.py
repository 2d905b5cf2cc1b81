"""The models, each readable in one sitting."""

from .dit import DiT, DiTConfig
from .text import ByteTextEncoder, HuggingFaceTextEncoder, Text, TextEncoder
from .vae import VAEConfig, VideoVAE

__all__ = [
    "ByteTextEncoder",
    "DiT",
    "DiTConfig",
    "HuggingFaceTextEncoder",
    "Text",
    "TextEncoder",
    "VAEConfig",
    "VideoVAE",
]
