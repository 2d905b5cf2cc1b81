"""Pictures from image files, and arrays of pixels to tensors.

Shapes: H lines, W columns, C = 3 channels (red, green, blue, 0..255). Decoded by Pillow. Transparent pixels are laid
over white: pictures with a cut-out background are mostly drawn for a page.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .packages import require
from .truncation import shortfall

if TYPE_CHECKING:
    import torch


def probe_image(path: Path) -> tuple[int, int]:
    """(width, height) as displayed, after decoding all of it: a truncated file has a good header."""
    try:
        with require("PIL.Image", "Pillow").open(path) as picture:
            width, height = picture.size
            picture.draft("RGB", (max(1, width // 8), max(1, height // 8)))  # a JPEG decodes to an eighth, faster
            picture.load()
            if picture.mode == "F":  # a TIFF by another name; as 8 bits, numbers from 0 to 1 would be black
                raise ValueError("another format: its pixels are floating-point numbers of no known range")
            # After the pixels, since a PNG may hold its tags behind them; these orientations swap the sides.
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except ImportError:
        raise
    except Exception as error:  # Pillow's words for a cut file depend on the format and the place
        cut = "" if getattr(error, "errno", None) else shortfall(path)
        if cut or "truncated" in str(error).lower():
            raise ValueError(cut or f"truncated: {error}") from error
        raise
    return (height, width) if turned else (width, height)


def read_image(path: Path) -> torch.Tensor:
    """uint8 tensor (H, W, 3) of an image file, turned for display; 16 bits are scaled to 8, never cut off."""
    import numpy
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        clear = picture.info.get("transparency")
        if picture.mode.startswith("I"):  # 16-bit grey: "I;16", in older Pillows "I"
            deep_HW = numpy.asarray(picture).astype("uint32").clip(0, 65535)
            if isinstance(clear, int):
                deep_HW[deep_HW == clear] = 65535
            return to_tensor(((deep_HW + 128) // 257).astype("uint8")[..., None].repeat(3, axis=-1))
        if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or clear is not None:
            return to_tensor(over_white(numpy.asarray(picture.convert("RGBA"))))
        return to_tensor(numpy.asarray(picture.convert("RGB")))


def over_white(picture_HW4):
    """uint8 array (H, W, 4) -> (H, W, 3)."""
    colour_HWC, alpha_HW1 = picture_HW4[..., :3].astype("uint32"), picture_HW4[..., 3:].astype("uint32")
    return ((colour_HWC * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255).astype("uint8")


def to_tensor(picture_HWC) -> torch.Tensor:
    """A copy: decoders reuse or protect their memory, and torch takes no negative strides."""
    import numpy
    import torch

    return torch.from_numpy(numpy.array(picture_HWC, order="C"))
