"""Clips and images on disk: what a file is, and a window of it.

Shapes: T frames, H lines, W columns, C = 3 channels (red, green, blue, 0..255). Times are in seconds from a
clip's first frame. An image is a clip of one frame.

Videos and animated gifs are decoded by PyAV, images, animated PNGs and WebPs by Pillow; both come with `pip install
"sora_fast[train]"` and are imported when the first file is read. Pictures are turned and mirrored as their
orientation tag or display matrix says and have square pixels. HDR and wide gamuts become sRGB (`colours`). Transparent
pixels are laid over white.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from .colours import declared, is_srgb, tag, to_srgb
from .images import has_alpha, over_white, probe_image, read_animation, read_image, to_tensor
from .packages import require
from .truncation import shortfall

if TYPE_CHECKING:
    import torch

CLIP_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class UnreadableMedia(ValueError):
    """A file that is damaged, empty or holds no picture."""


@dataclass(frozen=True)
class MediaItem:
    """One clip or image; sizes as displayed. An image has 1 frame, 0 fps and 0 seconds."""

    path: Path
    kind: str  # "clip" | "image"
    caption: str
    width: int
    height: int
    frames: int
    fps: float  # mean rate; frames may stand at any times
    seconds: float  # to the end of the last frame


def reason(error: Exception) -> str:
    """What is wrong with a file, "kind: detail"; a plain ValueError is our own and has that form."""
    if type(error) is ValueError:
        return str(error)
    detail = getattr(error, "strerror", None) or str(error)
    if isinstance(error, OSError) and error.errno:  # Pillow's own errors are OSErrors without a number
        return f"not readable: {detail}"
    return f"not decodable: {type(error).__name__}: {detail}"


def shown(text: str | os.PathLike) -> str:
    """A name or a reason on one line that any UTF-8 terminal takes: names may hold line ends, or bytes of no encoding."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(text))


def probe(path: str | os.PathLike, caption: str = "") -> MediaItem:
    """The item that the file at ``path`` is, with this ``caption``.

    Raises:
        UnreadableMedia: it cannot be used; the file and the reason are named.
    """
    path = Path(path)
    if path.suffix.lower() in CLIP_SUFFIXES:
        require("av", "PyAV")
    require("PIL.Image", "Pillow")
    try:
        return probe_file(path, caption)
    except Exception as error:
        raise UnreadableMedia(f"probe: {shown(path)} cannot be used ({reason(error)}); replace it") from error


def probe_file(path: Path, caption: str) -> MediaItem:
    """`probe`, with the error as it comes."""
    if path.stat().st_size == 0:
        raise ValueError("empty: it has 0 bytes")
    if path.suffix.lower() in CLIP_SUFFIXES:
        width, height, frames, fps, seconds = _probe_clip(path)
        if frames > 1 or path.suffix.lower() != ".gif":
            return MediaItem(path, "clip", caption, width, height, frames, fps, seconds)
    width, height, shown = probe_image(path)
    if shown:
        return MediaItem(path, "clip", caption, width, height, len(shown), len(shown) / sum(shown), sum(shown))
    return MediaItem(path, "image", caption, width, height, 1, 0.0, 0.0)


# ---------------------------------------------------------------------------------------------------- windows


# Containers that clips come in, by whatever suffix. Without a list a text file named .mp4 may be a play list, and FFmpeg
# would open the other files it names.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,mpegts,mpeg,flv,asf,ogg"


@contextmanager
def _open(path: Path):
    """(container, its first video stream)."""
    av = require("av", "PyAV")
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    try:
        # absolute: FFmpeg takes "name:rest" for a protocol. Tags that are not UTF-8 are no reason to fail.
        container = av.open(str(path.absolute()), metadata_errors="ignore", container_options=options)
    except av.error.ArgumentError:  # what the list above ends in
        raise ValueError("another format: it is no clip of a format that is read, such as MP4, WebM or GIF, whatever its "
                         "name") from None
    with container:
        # The cover of a sound file is a video stream of one picture.
        cover = require("av.stream", "PyAV").Disposition.attached_pic
        streams = [each for each in container.streams.video if not each.disposition & cover]
        if not streams:
            raise ValueError("no video stream: it holds sound or text only")
        yield container, streams[0]


def _probe_clip(path: Path) -> tuple[int, int, int, float, float]:
    """(width, height, frames, fps, seconds), from the header, or from all packets where it cannot be right."""
    if cut := shortfall(path):
        raise ValueError(cut)
    with _open(path) as (container, stream):
        frames, fps = stream.frames, float(stream.average_rate or 0)
        seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
        end = max((entry.pos + entry.size for entry in getattr(stream, "index_entries", ())), default=0)
        if end > path.stat().st_size:
            raise ValueError(f"truncated: its index reaches {end:,} bytes, it has {path.stat().st_size:,}")
        said = declared(stream)
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError("no video frame: its video stream is empty")
        tag(first, said)
        is_srgb(first)  # or what cannot be read of its colours
        width, height = max(1, round(first.width * (stream.sample_aspect_ratio or 1))), first.height
        if _sides_swapped(_display_matrix(first)):
            width, height = height, width

        def agree() -> bool:
            return bool(frames) and 0.99 * frames <= fps * seconds <= 1.01 * frames

        if agree() and first.pts is not None:  # the header's sum goes by decoding times, which end before those of display
            seconds = _last_end(container, stream, seconds + float(first.pts * stream.time_base)) \
                - float(first.pts * stream.time_base)
    if not agree():  # a silent header, a rate guessed from the first packets, or frames that an edit list hides
        frames, seconds = _count(path)
        if not agree():
            fps = frames / seconds if seconds else 0.0
    return width, height, frames, fps, seconds


def _last_end(container, stream, told: float) -> float:
    """When the last frame of an open clip ends, in seconds of its own clock, by the packets from the last keyframe on.

    ``told``: where it is to be looked for, and the answer where it does not say.
    """
    try:
        container.seek(int(told / stream.time_base), stream=stream)
        ends = [(packet.pts, packet.duration) for packet in container.demux(stream)
                if packet.size and packet.pts is not None and not packet.is_discard]
    except require("av", "PyAV").FFmpegError:  # a container that cannot seek
        return told
    pts, shown = max(ends, default=(None, 0))
    return float((pts + shown) * stream.time_base) if shown else told


def _count(path: Path) -> tuple[int, float]:
    """(frames that are shown, seconds) of a clip whose header does not say."""
    with _open(path) as (container, stream):
        if stream.codec_context.name in ("vp8", "libvpx"):  # VP8 has packets that show nothing: decode
            found = container.decode(stream)
        else:
            found = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        times = sorted((each.pts, each.duration or 0) for each in found if each.pts is not None)
        if not times:
            raise ValueError("no video frame: its video stream is empty")
        span = times[-1][0] - times[0][0]
        return len(times), float((span + (times[-1][1] or span / max(1, len(times) - 1))) * stream.time_base)


def read_clip(
    item: MediaItem,
    *,
    frames: int,
    start: float = 0.0,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    crop: str | tuple[int, int] = "center",
    rng: random.Random | None = None,
) -> torch.Tensor:
    """A window of a clip, or an image: uint8 torch tensor (T, H, W, 3) on the CPU, T = frames.

    Args:
        item: of ``scan`` or ``probe``.
        frames: how many.
        start: seconds.
        fps: frame i is the one nearest to start + i / fps in time (the earlier
            one of two as near); None is the clip's mean rate; an image takes any. Decoding begins at the keyframe
            before `start`.
        size: (H, W) of the result. The picture is resized, in its aspect, to just cover it (antialiased bicubic;
            it is enlarged too where `size` asks for that), then cropped; None is the picture as displayed.
        crop: "center", "random" (needs rng, a random.Random), or (top, left) in pixels of the resized picture.

    Raises:
        ValueError: a window that leaves the clip, a crop that leaves the picture. UnreadableMedia: damage.
    """
    import torch

    from sora_fast.data.fitting import Placement

    animation = item.kind == "clip" and Path(item.path).suffix.lower() in IMAGE_SUFFIXES
    for module, package in (("numpy", "NumPy"), ("PIL.Image", "Pillow"), ("av", "PyAV")):
        if module != "av" or item.kind == "clip" and not animation:
            require(module, package)
    if frames < 1 or start < 0 or (fps is not None and fps <= 0 and item.kind == "clip"):
        raise ValueError(
            f"read_clip: frames >= 1, start >= 0 and fps > 0 are expected, got {frames}, {start} and {fps}; "
            f"FitPolicy.fit and FitPolicy.read_fps give legal ones"
        )
    if item.kind == "image" and frames != 1:
        raise ValueError(f"read_clip: {item.path} is an image of 1 frame, got frames={frames}; ask for 1")
    place = Placement.of(item.width, item.height, size, crop, rng)
    clip_THWC, latest = [], None
    try:
        if item.kind == "image":
            return place.cut(read_image(item.path))[None]
        wanted = [start + i / (fps or item.fps or 1.0) for i in range(frames)]
        decoded, pixels = (read_animation(item.path), lambda picture: picture) if animation else (
            _decode(item.path, start), _read_frame)
        for frame in _nearest(decoded, wanted):
            clip_THWC.append(clip_THWC[-1] if frame is latest else place.cut(pixels(frame)))
            latest = frame
        if len(clip_THWC) < frames and wanted[-1] < item.seconds:
            raise ValueError(f"truncated: it ends before the {item.seconds:.3f} s it promised")
    except Exception as error:  # see scan
        raise UnreadableMedia(
            f"read_clip: {shown(item.path)} cannot be read ({reason(error)}); replace it"
        ) from error
    if len(clip_THWC) < frames:
        raise ValueError(
            f"read_clip: {item.path} holds {item.seconds:.3f} s, got a window of {frames} frames from "
            f"{start:.3f} s to {wanted[-1]:.3f} s; ask for fewer frames, an earlier start or a higher fps"
        )
    return torch.stack(clip_THWC)


def _decode(path: Path, start: float) -> Iterator[tuple]:
    """(time, seconds on show, frame) in order of time, from a keyframe at or before `start`."""
    back = 0.0  # how far before `start` to seek; from `start` on: no seek, decode from the beginning
    while True:
        late = False
        with _open(path) as (container, stream):
            base, step = stream.time_base, float(1 / stream.average_rate) if stream.average_rate else 0.0
            said, frames = declared(stream), container.decode(stream)
            first = next(frames, None)
            if first is None:
                return
            # Not the stream's own start: AVI counts the frames that a decoder waits for.
            origin, frames = first.pts or 0, chain([first], frames)
            if back < start:
                try:
                    container.seek(origin + int((start - back) / base), stream=stream)
                except require("av", "PyAV").FFmpegError:  # a container that cannot seek
                    back = start
                    continue
                frames = container.decode(stream)
            for number, frame in enumerate(frames):
                if frame.pts is None:
                    raise ValueError("no timestamp: a frame does not say when it is shown")
                tag(frame, said)
                time = float((frame.pts - origin) * base)
                if number == 0 and time > start > back:
                    late = True  # containers seek by decoding time and may land after `start`
                    break
                yield time, float((frame.duration or 0) * base) or step, frame
        if not late:
            return
        back = max(1.0, 4 * back)


def _nearest(decoded: Iterator[tuple], wanted: list[float]) -> Iterator:
    """For each wanted time, ascending, the decoded frame nearest to it; ends early where the clip does."""
    before, place = None, 0
    for now in decoded:
        while place < len(wanted) and wanted[place] <= now[0]:
            earlier = before is not None and wanted[place] - before[0] <= now[0] - wanted[place]
            yield (before if earlier else now)[2]
            place += 1
        if place == len(wanted):
            return
        before = now
    while before is not None and place < len(wanted) and wanted[place] < before[0] + before[1] - 1e-6:
        yield before[2]  # the last frame, for as long as it is on show
        place += 1


def _read_frame(frame) -> torch.Tensor:
    """uint8 tensor (H, W, 3) of a decoded video frame, turned and mirrored for display."""
    if has_alpha(frame):
        picture_HWC = frame.to_ndarray(format="rgba")
        if not is_srgb(frame):
            picture_HWC[..., :3] = to_srgb(frame)
        picture_HWC = over_white(picture_HWC)
    else:
        picture_HWC = frame.to_ndarray(format="rgb24") if is_srgb(frame) else to_srgb(frame)
    a, b, c, d = matrix = _display_matrix(frame)
    if _sides_swapped(matrix):
        a, d, picture_HWC = c, b, picture_HWC.swapaxes(0, 1)
    return to_tensor(picture_HWC[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _display_matrix(frame) -> tuple[int, int, int, int]:
    """(a, b, c, d): the pixel stored at column x and line y is shown at column a x + c y and line b x + d y."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])  # FFmpeg's display.h: three columns, the third unused
    return a, b, c, d


def _sides_swapped(matrix: tuple[int, int, int, int]) -> bool:
    """Whether a display matrix is nearer to a quarter turn, mirrored or not, than to none."""
    a, b, c, d = matrix
    return abs(b) + abs(c) > abs(a) + abs(d)
