"""Clips and images to disk.

Shapes: T frames, H lines, W columns, 3 channels (red, green, blue). Every file is written beside its name and
then moved onto it, so a run that stops half-way leaves the old file or none.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

from sora_fast.data.packages import require
from sora_fast.files import writing


def write_video(path: str | os.PathLike, frames, fps: float, crf: int = 17) -> Path:
    """Write ``frames``, uint8 (T, H, W, 3), a tensor or array, at ``fps`` per second. Returns the path.

    .mp4: H.264 with halved colour (yuv420p) takes even sizes only; an odd H or W is padded by repeating the last line or
    column, so nothing is lost. Colours are tagged BT.709. .gif: shown for whole 1/100 s, the mean rate is kept
    to that; 256 colours a frame; it repeats for ever. The folder is made. crf: of H.264, 17 looks lossless, 1 nearly is.

    Raises:
        ValueError: another suffix, shape, dtype or rate. ImportError: PyAV (mp4) or Pillow (gif) is missing.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise ValueError(f"write_video: the name must end in .mp4 or .gif, got {path.name!r}")
    if not 0 < fps < 1e6:
        raise ValueError(f"write_video: fps must be above 0, got {fps!r}")
    frames_THWC = _array(frames, 4, "write_video: frames must be uint8 of shape (T, H, W, 3)")
    with _replacing(path) as temporary:
        if path.suffix.lower() == ".mp4":
            _write_mp4(temporary, frames_THWC, fps, crf)
        else:
            _write_gif(temporary, frames_THWC, fps)
    return path


def write_image(path: str | os.PathLike, picture) -> Path:
    """Write ``picture``, uint8 (H, W, 3), a tensor or array, as .png, .jpg, .webp or .bmp. Returns the path.

    Raises:
        ValueError: another suffix, shape or dtype. ImportError: Pillow is missing.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
        raise ValueError(f"write_image: the name must end in .png, .jpg, .webp or .bmp, got {path.name!r}")
    picture_HWC = _array(picture, 3, "write_image: the picture must be uint8 of shape (H, W, 3)")
    require("PIL.Image", "Pillow")
    quality = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
    with _replacing(path) as temporary:
        temporary.write_bytes(_encoded([picture_HWC], path.suffix, **quality))
    return path


def _encoded(pictures_HWC, suffix: str, **settings) -> bytes:
    """A file of one or more pictures. Pillow itself would take a disk that fills up for a file that is finished."""
    image = require("PIL.Image", "Pillow")
    first, *more = [image.fromarray(picture_HWC) for picture_HWC in pictures_HWC]
    data = io.BytesIO()
    first.save(data, image.registered_extensions()[suffix.lower()], **(dict(append_images=more) if more else {}), **settings)
    return data.getvalue()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name in the same folder (a move is atomic only there), moved onto `path` when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")  # hidden: scan passes it over
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _array(frames, dimensions: int, expected: str):
    """A contiguous numpy array of that form, not empty, or a ValueError that begins `expected`."""
    numpy = require("numpy", "NumPy")
    if hasattr(frames, "detach"):
        frames = frames.detach().cpu().numpy()
    array = numpy.ascontiguousarray(frames)
    if array.dtype != "uint8" or array.ndim != dimensions or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"{expected}, got {array.dtype} of shape {array.shape}; to_uint8 makes it")
    return array


def _write_mp4(path: Path, frames_THWC, fps: float, crf: int) -> None:
    av, numpy = require("av", "PyAV"), require("numpy", "NumPy")
    _, H, W, _ = frames_THWC.shape
    frames_THWC = numpy.pad(frames_THWC, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
    # 1001: 23.976, 29.97 and 59.94 are meant as 24000/1001, 30000/1001 and 60000/1001.
    rate = Fraction(fps).limit_denominator(1001)
    # faststart: the index stands first, so that a browser can begin before it has everything.
    with av.open(str(path.absolute()), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("h264", rate=rate, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = W + W % 2, H + H % 2, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709, in all three lists
        context.color_range = 1  # limited, what players expect of yuv420p
        for number, picture_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_gif(path: Path, frames_THWC, fps: float) -> None:
    # The format counts in 1/100 s: rounding the ends, not the durations, keeps the mean rate. Below 2/100 s
    # players show frames for a default of 10/100 s.
    ends = [round(100 * number / fps) for number in range(len(frames_THWC) + 1)]
    shown = [10 * max(2, end - begin) for begin, end in zip(ends, ends[1:], strict=False)]
    path.write_bytes(_encoded(frames_THWC, ".gif", save_all=True, duration=shown, loop=0))
