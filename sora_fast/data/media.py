"""Clips and images on disk: find them, read a window of one.

Shapes: T frames, H lines, W columns, C = 3 channels (red, green, blue, 0..255). Times are in seconds from a
clip's first frame. An image is a clip of one frame.

Videos and animated gifs are decoded by PyAV, images by Pillow; both come with `pip install
"sora_fast[train]"` and are imported when the first file is read. Pictures are turned as their rotation tag
says and have square pixels. Transparent pixels are laid over white: pictures with a cut-out background are
mostly drawn for a page.
"""

from __future__ import annotations

import importlib
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CLIP_SUFFIXES = (".mp4", ".webm", ".gif")
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


@dataclass(frozen=True)
class Library:
    """What a folder holds. skipped: (path, reason) of every file that cannot be used."""

    items: tuple[MediaItem, ...]
    skipped: tuple[tuple[Path, str], ...] = ()

    @property
    def uncaptioned(self) -> int:
        """Items with an empty caption, which is legal."""
        return sum(not item.caption for item in self.items)

    def summary(self) -> str:
        """One line of counts, and one line per skipped file."""
        clips = sum(item.kind == "clip" for item in self.items)
        counts = f"{clips} clips, {len(self.items) - clips} images, {self.uncaptioned} without a caption, "
        return "\n".join(
            [f"{counts}{len(self.skipped)} skipped", *(f"skipped {p}: {why}" for p, why in self.skipped)]
        )


def require(module: str, package: str, extra: str = "train"):
    """The imported module, or an ImportError that says which extra brings its package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"sora_fast.data: {package} is needed here and could not be imported ({error}); install it with "
            f'pip install "sora_fast[{extra}]"'
        ) from error


# ---------------------------------------------------------------------------------------------------- folders


def scan(folder: str | os.PathLike, *, progress: bool = True) -> Library:
    """Every clip and image in `folder` and its sub-folders, ordered by path; hidden files are left out.

    A caption is the text of `name.txt` beside the file, else `text` or `caption` of the entry with its
    `file_name` or `path` (relative to that folder) in a `metadata.jsonl` in a folder above or beside it, else
    empty. Files that cannot be used are in `Library.skipped` and never end the scan. Every image is decoded
    once and of every clip one frame. progress: show a bar where tqdm is installed.

    FileNotFoundError: no such folder. ValueError: not a folder, no usable file, a malformed metadata.jsonl.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"scan: expected a folder of media, got {folder}, which is not there")
    if not folder.is_dir():
        raise ValueError(f"scan: expected a folder of media, got the file {folder}; pass the folder it is in")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    captions: dict[Path, str] = {}
    # Outer folders first: the metadata.jsonl nearest to an item has the last word.
    for path in sorted((p for p in files if p.name == "metadata.jsonl"), key=lambda p: len(p.parts)):
        captions.update(_read_metadata(path))
    media = [path for path in files if path.suffix.lower() in CLIP_SUFFIXES + IMAGE_SUFFIXES]
    if any(path.suffix.lower() in CLIP_SUFFIXES for path in media):
        require("av", "PyAV")
    if media:
        require("PIL.Image", "Pillow")

    def attempt(path: Path) -> MediaItem | str:
        try:
            return _probe(path, _caption(path, captions))
        except Exception as error:  # decoders raise anything on a damaged file: SyntaxError, struct.error
            return _reason(error)

    items, skipped = [], []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, found in zip(media, _bar(pool.map(attempt, media), len(media), progress), strict=True):
            if isinstance(found, str):
                skipped.append((path, found))
            else:
                items.append(found)
    skipped += [
        (path, "metadata.jsonl names it, but there is no such file") for path in captions if not path.exists()
    ]
    if not items:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in skipped[:3])
        raise ValueError(
            f"scan: expected at least one readable file of {' '.join(CLIP_SUFFIXES + IMAGE_SUFFIXES)} in "
            f"{str(folder)!r}, got {len(files)} files of which {len(media)} have such a name"
            + (f" and none can be read ({reasons})" if skipped else "; check the path")
        )
    return Library(tuple(items), tuple(skipped))


def _bar(results: Iterator, total: int, progress: bool) -> Iterator:
    try:
        tqdm = importlib.import_module("tqdm").tqdm if progress and total else None
    except ImportError:
        tqdm = None
    return tqdm(results, total=total, desc="scan", unit="file") if tqdm else results


def _read_metadata(path: Path) -> dict[Path, str]:
    """{file: caption} of one metadata.jsonl; the caption of an entry without one is empty."""
    captions = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"scan: {path} must be UTF-8 text, got {error}; save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        known = entry if isinstance(entry, dict) else {}
        name = known.get("file_name") or known.get("path")
        text = known.get("text") or known.get("caption") or ""
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"scan: {path} line {number} must be one JSON object with file_name (or path) and text (or "
                f"caption), got {line.strip()[:80]!r}; correct that line"
            )
        captions[Path(os.path.normpath(path.parent / name))] = text.strip()
    return captions


def _caption(path: Path, captions: dict[Path, str]) -> str:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return captions.get(Path(os.path.normpath(path)), "")
    try:
        return beside.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {beside.name} is not UTF-8 text ({error})") from None


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def probe(path: str | os.PathLike, caption: str = "") -> MediaItem:
    """The item a file is. UnreadableMedia, naming the file and the reason, when it cannot be used."""
    path = Path(path)
    if path.suffix.lower() in CLIP_SUFFIXES:
        require("av", "PyAV")
    require("PIL.Image", "Pillow")
    try:
        return _probe(path, caption)
    except Exception as error:
        raise UnreadableMedia(f"probe: {path} cannot be used ({_reason(error)}); replace it") from error


def _probe(path: Path, caption: str) -> MediaItem:
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    if path.suffix.lower() in CLIP_SUFFIXES:
        width, height, frames, fps, seconds = _probe_clip(path)
        if frames > 1 or path.suffix.lower() != ".gif":
            return MediaItem(path, "clip", caption, width, height, frames, fps, seconds)
    width, height = _probe_image(path)
    return MediaItem(path, "image", caption, width, height, 1, 0.0, 0.0)


def _probe_image(path: Path) -> tuple[int, int]:
    """(width, height) as displayed, after decoding all of it: a truncated file has a good header."""
    with require("PIL.Image", "Pillow").open(path) as picture:
        width, height = picture.size
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the EXIF orientations that swap the sides
        picture.draft("RGB", (max(1, width // 8), max(1, height // 8)))  # a JPEG decodes to an eighth, faster
        picture.load()
    return (height, width) if turned else (width, height)


# ---------------------------------------------------------------------------------------------------- windows


@contextmanager
def _open(path: Path):
    """(container, its first video stream)."""
    # absolute: FFmpeg takes "name:rest" for a protocol. Tags that are not UTF-8 are no reason to fail.
    with require("av", "PyAV").open(str(path.absolute()), metadata_errors="ignore") as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        yield container, container.streams.video[0]


def _probe_clip(path: Path) -> tuple[int, int, int, float, float]:
    """(width, height, frames, fps, seconds), from the header, or from all packets where it is silent."""
    with _open(path) as (container, stream):
        frames, fps = stream.frames, float(stream.average_rate or 0)
        seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
        end = max((entry.pos + entry.size for entry in getattr(stream, "index_entries", ())), default=0)
        if end > path.stat().st_size:
            raise ValueError(
                f"it is truncated: its index reaches {end:,} bytes, it has {path.stat().st_size:,}"
            )
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError("it has no video frame")
        width, height = round(first.width * (stream.sample_aspect_ratio or 1)), first.height
        if round(first.rotation / 90) % 2:
            width, height = height, width
    if not frames or not seconds:
        frames, seconds = _count(path)
    if not 0.99 * frames <= fps * seconds <= 1.01 * frames:  # a guess from the first packets, or none
        fps = frames / seconds if seconds else 0.0
    return width, height, frames, fps, seconds


def _count(path: Path) -> tuple[int, float]:
    """(frames, seconds) of a clip whose header does not say."""
    with _open(path) as (container, stream):
        if stream.codec_context.name in ("vp8", "libvpx"):  # VP8 has packets that show nothing: decode
            found = container.decode(stream)
        else:
            found = (packet for packet in container.demux(stream) if packet.size)
        times = sorted((each.pts, each.duration or 0) for each in found if each.pts is not None)
        if not times:
            raise ValueError("it has no video frame")
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

    frames: how many. start: seconds. fps: frame i is the one nearest to start + i / fps in time (the earlier
    one of two as near); None is the clip's mean rate; an image takes any. Decoding begins at the keyframe
    before `start`.
    size: (H, W) of the result. The picture is resized, in its aspect, to just cover it (antialiased bicubic;
    it is enlarged too where `size` asks for that), then cropped; None is the picture as displayed.
    crop: "center", "random" (needs rng, a random.Random), or (top, left) in pixels of the resized picture.

    ValueError: a window that leaves the clip, a crop that leaves the picture. UnreadableMedia: damage.
    """
    import torch

    from sora_fast.data.fitting import Placement

    for module, package in (("numpy", "NumPy"), ("PIL.Image", "Pillow"), ("av", "PyAV")):
        if module != "av" or item.kind == "clip":
            require(module, package)
    if frames < 1 or start < 0 or (fps is not None and fps <= 0 and item.kind == "clip"):
        raise ValueError(
            f"read_clip: frames >= 1, start >= 0 and fps > 0 are expected, got {frames}, {start} and {fps}; "
            f"FitPolicy.fit and FitPolicy.read_fps give legal ones"
        )
    if item.kind == "image" and frames != 1:
        raise ValueError(f"read_clip: {item.path} is an image of 1 frame, got frames={frames}; ask for 1")
    place = Placement.of(item.width, item.height, size, crop, rng)
    clip_THWC, shown = [], None
    try:
        if item.kind == "image":
            return place.cut(_read_image(item.path))[None]
        wanted = [start + i / (fps or item.fps or 1.0) for i in range(frames)]
        for frame in _nearest(_decode(item.path, start), wanted):
            clip_THWC.append(clip_THWC[-1] if frame is shown else place.cut(_read_frame(frame)))
            shown = frame
        if len(clip_THWC) < frames and wanted[-1] < item.seconds:
            raise ValueError(f"it ends before the {item.seconds:.3f} s it promised")
    except Exception as error:  # see scan
        raise UnreadableMedia(
            f"read_clip: {item.path} cannot be read ({_reason(error)}); replace it"
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
            origin, base = stream.start_time or 0, stream.time_base
            step = float(1 / stream.average_rate) if stream.average_rate else 0.0
            if back < start:
                try:
                    container.seek(origin + int((start - back) / base), stream=stream)
                except require("av", "PyAV").FFmpegError:  # a container that cannot seek
                    back = start
                    continue
            for number, frame in enumerate(container.decode(stream)):
                if frame.pts is None:
                    raise ValueError("it has a frame without a timestamp")
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
    """uint8 tensor (H, W, 3) of a decoded video frame, turned for display."""
    import numpy

    if any(component.is_alpha for component in frame.format.components):
        picture_HWC = _over_white(frame.to_ndarray(format="rgba"))
    else:
        picture_HWC = frame.to_ndarray(format="rgb24")
    return _tensor(numpy.rot90(picture_HWC, round(frame.rotation / 90)))  # both count counter-clockwise


def _read_image(path: Path) -> torch.Tensor:
    """uint8 tensor (H, W, 3) of an image file, turned for display; 16-bit grey is scaled, never cut off."""
    import numpy
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I"):  # 16-bit grey: "I;16", in older Pillows "I"
            grey_HW = (numpy.asarray(picture).astype("uint32").clip(0, 65535) + 128) // 257
            return _tensor(grey_HW.astype("uint8")[..., None].repeat(3, axis=-1))
        if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
            return _tensor(_over_white(numpy.asarray(picture.convert("RGBA"))))
        return _tensor(numpy.asarray(picture.convert("RGB")))


def _over_white(picture_HW4):
    """uint8 array (H, W, 4) -> (H, W, 3)."""
    colour_HWC, alpha_HW1 = picture_HW4[..., :3].astype("uint32"), picture_HW4[..., 3:].astype("uint32")
    return ((colour_HWC * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255).astype("uint8")


def _tensor(picture_HWC) -> torch.Tensor:
    """A copy: decoders reuse or protect their memory, and torch takes no negative strides."""
    import numpy
    import torch

    return torch.from_numpy(numpy.array(picture_HWC, order="C"))
