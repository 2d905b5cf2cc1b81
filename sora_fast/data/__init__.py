"""Clips and images from disk, fitted to a grid and packed to a token budget.

`scan` a folder, `FitPolicy.fit` each item to the (T, H, W) it is read at, `read_clip` the window, and let a
`Packer` collect items into packs of one static token budget. Names are loaded when they are first used, so
that importing `sora_fast.data.packing` needs the standard library only; reading and writing media needs
`pip install "sora_fast[train]"`.
"""

import importlib

from ..other_names import missing

_HOME = {name: module for module, names in dict(
    folders=("Library", "scan"), media=("MediaItem", "UnreadableMedia", "probe", "read_clip"),
    fitting=("FitPolicy", "to_pixels", "to_uint8"), packing=("Packer", "pack_stream"), samples=("demo_media",),
    writing=("write_image", "write_video")).items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise missing(__name__, __all__, name)


def __dir__():
    return __all__
