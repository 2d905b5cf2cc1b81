"""The models, each readable in one sitting."""

from ..other_names import missing
from .checkpoints import load_dit, load_vae, save_dit, save_vae
from .dit import DiT, DiTBlock, DiTConfig
from .inflation import inflate, inflate_patches
from .mae import MAE, MAEConfig
from .text import ByteTextEncoder, HuggingFaceTextEncoder, Text, TextEncoder
from .vae import VAEConfig, VideoVAE
from .wan import WanDiT, WanDiTConfig, pad_text

__all__ = ["ByteTextEncoder", "DiT", "DiTBlock", "DiTConfig", "HuggingFaceTextEncoder", "MAE", "MAEConfig", "Text",
           "TextEncoder", "VAEConfig", "VideoVAE", "WanDiT", "WanDiTConfig", "inflate", "inflate_patches", "load_dit",
           "load_vae", "pad_text", "save_dit", "save_vae"]


def __getattr__(name: str):
    raise missing(__name__, __all__, name)
