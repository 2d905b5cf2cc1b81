"""Pictures and animations from image files, and arrays of pixels to tensors.

Shapes: H lines, W columns, C = 3 channels (red, green, blue, 0..255). Decoded by Pillow, PNGs of 16-bit colours by PyAV.
Colour profiles are converted to sRGB. Transparent pixels are laid over white: pictures with a cut-out background are mostly
drawn for a page.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .colours import HLG, PQ, from_profile, is_srgb, to_srgb
from .packages import require
from .truncation import shortfall

if TYPE_CHECKING:
    import torch


SLOWEST = 10.0  # ms: browsers and FFmpeg show frames of animations that ask for less for 100 ms
ANIMATED = ("GIF", "PNG", "WEBP")  # other formats hold pages or views
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # a PNG's white, red, green and blue
SHALLOW = {"L;2": 85, "L;4": 17}  # raw grey of a PNG, and what Pillow multiplies its levels by


def probe_image(path: Path) -> tuple[int, int, list[float]]:
    """(width, height, seconds of each frame), as displayed, after decoding all of it: a truncated file has a good header.

    A still picture has no seconds.
    """
    try:
        with require("PIL.Image", "Pillow").open(path) as picture:
            width, height = picture.size
            seconds = [shown for _, shown, _ in _animation(picture)]
            if not seconds:
                picture.draft("RGB", (max(1, width // 8), max(1, height // 8)))  # a JPEG decodes to an eighth, faster
            picture.load()
            if picture.mode == "F":  # a TIFF by another name; as 8 bits, numbers from 0 to 1 would be black
                raise ValueError("another format: its pixels are floating-point numbers of no known range")
            # After the pixels, since a PNG may hold its tags behind them; these orientations swap the sides.
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        if _is_deep(path):
            _decode_png(path)
    except ImportError:
        raise
    except Exception as error:  # Pillow's words for a cut file depend on the format and the place
        cut = "" if getattr(error, "errno", None) else shortfall(path)
        if cut or "truncated" in str(error).lower():
            raise ValueError(cut or f"truncated: {error}") from error
        raise
    return (height, width, seconds) if turned else (width, height, seconds)


def read_image(path: Path) -> torch.Tensor:
    """uint8 tensor (H, W, 3) of an image file, turned for display, in sRGB; 16 bits are rounded to 8, never cut off."""
    with require("PIL.Image", "Pillow").open(path) as file:
        return _pixels(file, path)


def read_animation(path: Path) -> Iterator[tuple[float, float, torch.Tensor]]:
    """(time, seconds on show, uint8 tensor (H, W, 3)) of each frame of an animated PNG, WebP or GIF."""
    if all(_png_header(path)):
        warnings.warn(f"{path}: an animation of 16-bit colours, HDR or a wide gamut: the high 8 bits are read, as sRGB's",
                      stacklevel=2)
    with require("PIL.Image", "Pillow").open(path) as file:
        for time, shown, frame in _animation(file):
            yield time, shown, _pixels(frame, path)


def _animation(picture) -> Iterator[tuple]:
    """(time, seconds on show, the picture at that frame, decoded) of two frames or more; nothing of a still picture."""
    first = int(bool(getattr(picture, "default_image", False)))  # an APNG's still for readers that know no animations
    if picture.format not in ANIMATED or getattr(picture, "n_frames", 1) - first < 2:
        return
    time = 0.0
    for number in range(first, picture.n_frames):
        picture.seek(number)
        picture.load()
        shown = picture.info.get("duration") or 0.0
        shown = (shown if shown > SLOWEST else 100.0) / 1000
        yield time, shown, picture
        time += shown


def _pixels(file, path: Path) -> torch.Tensor:
    """``read_image`` of an opened file, at the frame it is at."""
    image, ops, numpy = require("PIL.Image", "Pillow"), require("PIL.ImageOps", "Pillow"), require("numpy", "NumPy")
    if file.tile and file.tile[0][3] in SHALLOW and "transparency" in file.info:
        file.info["transparency"] *= SHALLOW[file.tile[0][3]]
    _tell_colours(file, path)
    picture = _deep(file, path) if _is_deep(path) else ops.exif_transpose(file)
    clear = picture.info.get("transparency")
    if picture.mode.startswith("I"):  # 16-bit grey: "I;16", in older Pillows "I"
        deep_HW = numpy.asarray(picture).astype("uint32").clip(0, 65535)
        if isinstance(clear, int):
            deep_HW[deep_HW == clear] = 65535
        profile, clear = picture.info.get("icc_profile"), None
        picture = image.fromarray(_rounded(deep_HW))
        picture.info["icc_profile"] = profile
    picture = from_profile(picture, path)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or clear is not None:
        return to_tensor(over_white(numpy.asarray(picture.convert("RGBA"))))
    return to_tensor(numpy.asarray(picture.convert("RGB")))


def _rounded(levels):
    """Levels of 16 bits to the nearest of 8, uint8."""
    return ((levels.astype("uint32") + 128) // 257).astype("uint8")


def _is_deep(path: Path) -> bool:
    """Whether a file is a still PNG of colours of 16 bits, or one that says HDR or a wide gamut: FFmpeg decodes these."""
    deep, animated = _png_header(path)
    return deep and not animated


def _png_header(path: Path) -> tuple[bool, bool]:
    """Whether a file is a PNG of more than 8 bits of sRGB a colour, and whether it is animated."""
    deep = False
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return False, False
        while len(header := file.read(8)) == 8 and header[4:] not in (b"IDAT", b"acTL"):
            data = file.read(int.from_bytes(header[:4], "big") + 4)
            if header[4:] == b"IHDR":
                deep = data[8] == 16 and data[9] != 0
            elif header[4:] == b"cICP":  # primaries and transfer of ITU-T H.273; 1 and 13 are sRGB's
                deep = deep or data[0] in (9, 11, 12) or data[1] in (PQ, HLG)
    return deep, header[4:] == b"acTL"


def _decode_png(path: Path):
    """PyAV's frame of a PNG; its levels, also where one of them is transparent, are the file's own."""
    av = require("av", "PyAV")
    context = av.CodecContext.create("png", "r")
    frames = [*context.decode(av.Packet(path.read_bytes())), *context.decode(None)]
    if not frames:
        raise ValueError("no picture: its data hold none")
    return frames[0]


def _deep(file, path: Path):
    """A Pillow image of 8 bits of what ``_is_deep``, turned for display, with the file's profile where it counts."""
    image, ops, frame = require("PIL.Image", "Pillow"), require("PIL.ImageOps", "Pillow"), _decode_png(path)
    profile = file.info.get("icc_profile")
    levels_HWC = frame.to_ndarray(format="rgba64le" if has_alpha(frame) else "rgb48le")
    levels_HWC = _rounded(levels_HWC)
    if not is_srgb(frame) and (profile is None or int(frame.color_trc) in (PQ, HLG)):
        levels_HWC[..., :3], profile = to_srgb(frame), None
    picture = image.fromarray(levels_HWC)
    picture.getexif()[0x0112] = file.getexif().get(0x0112, 1)
    picture = ops.exif_transpose(picture)
    picture.info["icc_profile"] = profile
    return picture


def has_alpha(frame) -> bool:
    """Whether a decoded video frame has transparent pixels, or could have."""
    return any(component.is_alpha for component in frame.format.components)


def _tell_colours(file, path: Path) -> None:
    """Say where a file names other colours in a form that is not converted: they are read as sRGB's."""
    info, said = file.info, ""
    if file.format == "PNG" and not {"icc_profile", "srgb"} & info.keys():
        gamma, places = info.get("gamma"), info.get("chromaticity")
        if gamma and abs(gamma - 1 / 2.2) > 0.01:
            said = f"a gamma of {gamma:.4g} (gAMA)"
        if places and max(abs(a - b) for a, b in zip(places, SRGB, strict=True)) > 0.005:
            said = "primaries that are not sRGB's (cHRM)"
    exif = file.getexif()
    if "icc_profile" not in info and exif and exif.get_ifd(0xA005).get(1) == "R03":  # DCF's optional colour space
        said = "Adobe RGB (Exif), without a profile"
    if said and not _is_deep(path):
        warnings.warn(f"{path}: its header says {said}: its pixels are read as sRGB", stacklevel=2)


def over_white(picture_HW4):
    """uint8 array (H, W, 4) -> (H, W, 3)."""
    colour_HWC, alpha_HW1 = picture_HW4[..., :3].astype("uint32"), picture_HW4[..., 3:].astype("uint32")
    return ((colour_HWC * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255).astype("uint8")


def to_tensor(picture_HWC) -> torch.Tensor:
    """A copy: decoders reuse or protect their memory, and torch takes no negative strides."""
    import numpy
    import torch

    return torch.from_numpy(numpy.array(picture_HWC, order="C"))
