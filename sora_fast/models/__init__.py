"""The models, each readable in one sitting."""

from .dit import DiT, DiTConfig
from .inflation import inflate, inflate_patches
from .mae import MAE, MAEConfig
from .text import ByteTextEncoder, HuggingFaceTextEncoder, Text, TextEncoder
from .vae import VAEConfig, VideoVAE

__all__ = [
    "ByteTextEncoder",
    "DiT",
    "DiTConfig",
    "HuggingFaceTextEncoder",
    "MAE",
    "MAEConfig",
    "Text",
    "TextEncoder",
    "VAEConfig",
    "VideoVAE",
    "inflate",
    "inflate_patches",
]
