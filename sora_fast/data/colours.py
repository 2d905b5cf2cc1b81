"""Colours of other kinds to those of sRGB: HDR and wide-gamut video, ICC profiles of photos.

Shapes: H lines, W columns, 3 channels (red, green, blue). Pictures come out as uint8 R'G'B' of sRGB.

HDR (ITU-R BT.2100: PQ, and HLG for a display of 1,000 cd/m2) becomes SDR by the light that it shows: a pixel of F cd/m2 in
each primary is M F / 203, cut to [0, 1], with sRGB's transfer function (IEC 61966-2-1). 203 cd/m2 is HDR reference white
(ITU-R BT.2408, 2.1), so that diffuse white is 255 and what is brighter, highlights and lamps, is white too. M is the matrix
of one gamut's primaries to the other's (to BT.709, which are sRGB's; SMPTE RP 177), and cuts colours that it has not.
SDR video of BT.2020 or P3 primaries goes through M likewise, by the light of a display of gamma 2.4 (ITU-R BT.1886), which
leaves greys as they are.
"""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from pathlib import Path

from .packages import require

REFERENCE_WHITE = 203.0  # cd/m2
LINES = 16  # at a time, so that what is made of them stays in a core's cache
HLG_PEAK = 1000.0  # cd/m2 of the display that HLG is shown on; its gamma is 1.2 (BT.2100, table 5, note 5e)
PQ, HLG = 16, 18  # transfer characteristics, as all numbers here in ITU-T H.273
UNSAID = 2
NARROW = (1, 2, 5, 6)  # primaries that are sRGB's, unsaid, or SD's, which are near
# Primaries in x and y, with white at D65: BT.709, BT.2020, and P3 (DCI's, whose white is made D65, and Display P3).
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
_PRIMARIES = {1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)), 9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
              11: _P3, 12: _P3}
# Weights of red and blue in Y' (H.273, table 4). HDR that says none has BT.2020's.
_LUMA = {1: (0.2126, 0.0722), 2: (0.2627, 0.0593), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087),
         9: (0.2627, 0.0593)}


def declared(stream) -> dict[str, int]:
    """What the container of a stream that is just opened says of its colours."""
    return {name: int(getattr(stream.codec_context, name)) for name in ("color_trc", "color_primaries", "colorspace")}


def tag(frame, said: dict[str, int]) -> None:
    """Give a decoded frame what its container said and its own stream did not: FFmpeg's HEVC decoder drops it."""
    for name, value in said.items():
        unsaid = (0, UNSAID) if name == "colorspace" and not frame.format.is_rgb else (UNSAID,)  # 0 is RGB's
        if value != UNSAID and int(getattr(frame, name)) in unsaid:
            setattr(frame, name, value)


def is_srgb(frame) -> bool:
    """Whether a decoded frame's colours are read as they are.

    ValueError: HDR or a wide gamut coded in a way that is not read here.
    """
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    if transfer not in (PQ, HLG) and primaries not in (9, 11, 12):
        return True
    if int(frame.colorspace) not in _LUMA and not frame.format.is_rgb:
        raise ValueError(f"colours of another kind: HDR or a wide gamut in matrix {int(frame.colorspace)} of H.273, and "
                         f"Y'CbCr of BT.709, 601 or 2020 is read; convert it")
    if primaries not in _PRIMARIES and primaries not in NARROW:
        raise ValueError(f"colours of another kind: HDR with primaries {primaries} of H.273, and BT.709, BT.2020 or P3 is "
                         f"read; convert it")
    return False


def to_srgb(frame):
    """uint8 array (H, W, 3) of a frame that ``is_srgb`` says no of."""
    numpy = require("numpy", "NumPy")
    if frame.format.is_rgb:
        levels_HWC = frame.to_ndarray(format="rgb48le")
    else:  # planes and no R'G'B', since swscale's own matrix is off by up to 2 of 255
        levels_HWC = frame.reformat(format="yuv444p16le", dst_colorspace=frame.colorspace).to_ndarray()
    made_HWC = numpy.empty(levels_HWC.shape, numpy.uint8)
    for top in range(0, len(levels_HWC), LINES):
        lines = slice(top, top + LINES)
        made_HWC[lines] = _converted(_signal(levels_HWC[lines].astype(numpy.float32), frame), frame)
    return made_HWC


def _signal(levels_HWC, frame):
    """float32 (H, W, 3): R'G'B', 0 to 1, of 16-bit levels of R'G'B' or Y'CbCr."""
    numpy = require("numpy", "NumPy")
    if frame.format.is_rgb:
        return levels_HWC / 65535
    red, blue = _LUMA[int(frame.colorspace)]
    bits = frame.format.components[0].bits
    # Full range is 0 to 2^bits - 1, which swscale shifts to the left end of 16 bits.
    if int(frame.color_range) == 2 or frame.format.name.startswith("yuvj"):
        black, luma, chroma = 0, *[((1 << bits) - 1) << (16 - bits)] * 2
    else:
        black, luma, chroma = 16 * 256, 219 * 256, 224 * 256
    y_HW, b_HW, r_HW = (levels_HWC[..., channel] for channel in range(3))
    y_HW = (y_HW - black) / luma
    r_HW = y_HW + (r_HW - 32768) * (2 * (1 - red) / chroma)
    b_HW = y_HW + (b_HW - 32768) * (2 * (1 - blue) / chroma)
    return numpy.stack([r_HW, (y_HW - red * r_HW - blue * b_HW) / (1 - red - blue), b_HW], axis=-1)


def _converted(signal_HWC, frame):
    """uint8 (H, W, 3) of float32 R'G'B'."""
    numpy = require("numpy", "NumPy")
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    light_HWC = _light(transfer)[(signal_HWC.clip(0, 1) * 65535 + 0.5).astype(numpy.uint16)]
    if transfer == HLG:  # the display's gamma acts on luminance (BT.2100, table 5, OOTF); these weights are BT.2020's
        luminance_HW1 = light_HWC @ numpy.array([[0.2627], [0.6780], [0.0593]], numpy.float32)
        light_HWC = light_HWC * luminance_HW1 ** 0.2 * (HLG_PEAK / REFERENCE_WHITE)
    if transfer in (PQ, HLG) and primaries == 2:
        primaries = 9
    if primaries in _PRIMARIES:
        light_HWC = light_HWC @ _to_709(primaries).T.astype(numpy.float32)
    light_HWC = light_HWC.clip(0, 1)
    if transfer not in (PQ, HLG):
        return numpy.rint(255 * light_HWC ** (1 / 2.4)).astype(numpy.uint8)
    return _codes()[(light_HWC * 65535 + 0.5).astype(numpy.uint16)]


@lru_cache(4)
def _light(transfer: int):
    """Light of every 16-bit signal, float32 (65536,): of PQ in reference whites, of HLG the scene's, of SDR its white's."""
    numpy = require("numpy", "NumPy")
    signal = numpy.linspace(0, 1, 65536)
    if transfer == PQ:  # SMPTE ST 2084; BT.2100, table 4
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        root = signal ** (1 / m2)
        light = 10000 * ((root - c1).clip(0) / (c2 - c3 * root)) ** (1 / m1) / REFERENCE_WHITE
    elif transfer == HLG:  # BT.2100, table 5, inverse OETF
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * numpy.log(4 * a)
        light = numpy.where(signal <= 0.5, signal**2 / 3, (numpy.exp((signal - c) / a) + b) / 12)
    else:
        light = signal**2.4
    return light.astype(numpy.float32)


@lru_cache(1)
def _codes():
    """uint8 (65536,): sRGB's code of every 16-bit amount of light."""
    numpy = require("numpy", "NumPy")
    light = numpy.linspace(0, 1, 65536)
    code = numpy.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return numpy.rint(255 * code).astype(numpy.uint8)


@lru_cache(4)
def _to_709(primaries: int):
    """float64 (3, 3): linear RGB of these primaries to that of BT.709 (SMPTE RP 177)."""
    numpy = require("numpy", "NumPy")
    white = numpy.array([0.3127 / 0.3290, 1.0, (1 - 0.3127 - 0.3290) / 0.3290])

    def to_xyz(xy):
        columns = numpy.array([(x / y, 1.0, (1 - x - y) / y) for x, y in xy]).T
        return columns * numpy.linalg.solve(columns, white)

    return numpy.linalg.solve(to_xyz(_PRIMARIES[1]), to_xyz(_PRIMARIES[primaries]))


# ---------------------------------------------------------------------------------------------------- profiles
def from_profile(picture, path: Path):
    """A Pillow image with an ICC profile as "RGB" or "RGBA" of sRGB, by relative colorimetry with black points met (lcms).

    A profile that moves no pixel by more than a level, as sRGB's own, leaves the pixels as they are. One that cannot be
    used is told by the file's name, and the pixels are read as sRGB.
    """
    data = picture.info.get("icc_profile")
    if not data:
        return picture
    numpy = require("numpy", "NumPy")
    clear = picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info
    plain = picture.convert("RGBA" if clear else "RGB")
    try:
        mode, transform = _transform(data)
        alike = picture.mode == mode or (mode == "L" and picture.mode in ("LA", "1"))
        if mode in ("L", "CMYK") and not alike:
            raise ValueError(f"it is for {mode} pixels, these are {picture.mode}")
        source = plain.convert("RGB") if mode == "RGB" else picture.convert(mode)
        made = require("PIL.ImageCms", "Pillow").applyTransform(source, transform)
    except Exception as error:  # lcms has an error of its own for each fault
        warnings.warn(f"{path}: its colour profile cannot be used ({error}): its pixels are read as sRGB", stacklevel=2)
        return plain
    before, after = (numpy.asarray(each.convert("RGB")).astype(numpy.int16) for each in (plain, made))
    if abs(before - after).max(initial=0) <= 1:
        return plain
    if clear:
        made.putalpha(plain.getchannel("A"))
    return made


@lru_cache(16)
def _transform(data: bytes):
    """(mode of the pixels it takes, lcms's transform to sRGB) of an ICC profile."""
    cms = require("PIL.ImageCms", "Pillow")
    profile = cms.ImageCmsProfile(io.BytesIO(data))
    space = profile.profile.xcolor_space.strip()
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
    if mode is None:
        raise ValueError(f"it is for {space} pixels")
    flags = cms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":  # its table of 33 points is too coarse near black
        flags |= cms.Flags.NOOPTIMIZE
    return mode, cms.buildTransform(profile, cms.createProfile("sRGB"), mode, "RGB",
                                    renderingIntent=cms.Intent.RELATIVE_COLORIMETRIC, flags=flags)
