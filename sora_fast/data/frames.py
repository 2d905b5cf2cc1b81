"""Decoded clips and images in memory, as far as they fit, and windows of them.

T frames, H lines, W columns, 3 colours, uint8.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..progress import bar
from .fitting import FitPolicy
from .media import MediaItem, UnreadableMedia, read_clip


@dataclass(frozen=True)
class _Source:
    item: MediaItem
    frames: int
    size: tuple[int, int]
    fps: float
    start: float


class Frames:
    """Every item at the policy's size and rate, decoded once and kept while ``memory_gb`` lasts, then read on demand.

    An item that cannot be decoded is left out, with a warning that names it and why, and is in ``unreadable``: a scan
    decodes one frame of a clip, so damage further on shows only here. Where nothing is left, UnreadableMedia is raised.

    Args:
        policy: size and rate; its max_frames is not used here, since windows are cut later.
        span: the part of each clip, from 0 to 1, that exists here (training and held-out parts); images always do.
        progress: show a bar while decoding, where tqdm is installed.
    """

    def __init__(self, items: Sequence[MediaItem], policy: FitPolicy, *, span: tuple[float, float] = (0.0, 1.0),
                 memory_gb: float = 4.0, progress: bool = True):
        policy = replace(policy, max_frames=1)
        self.sources = []
        for item in items:
            _, height, width = policy.fit_item(item)
            frames, fps, start = 1, 0.0, 0.0
            if item.kind == "clip":
                fps = policy.read_fps(item.fps)
                # The last frame begins one native frame before the end; a clip without a rate or a length is its first.
                last = item.seconds - 1 / item.fps if item.fps > 0 else 0.0
                total = 1 + math.floor(max(last, 0.0) * fps + 1e-6)
                first = math.ceil(span[0] * total)
                frames, start = math.ceil(span[1] * total) - first, first / fps if first else 0.0
            if frames > 0:
                self.sources.append(_Source(item, frames, (height, width), fps, start))
        left, self._kept, whole = memory_gb * 2**30, {}, []
        self.unreadable: list[tuple[Path, str]] = []
        for source in bar(self.sources, "decode", progress):
            size = source.frames * source.size[0] * source.size[1] * 3
            if size <= left:
                try:
                    self._kept[len(whole)], left = self._read(source, 0, source.frames), left - size
                except UnreadableMedia as error:
                    self.unreadable.append((source.item.path, str(error)))
                    continue
            whole.append(source)
        if self.unreadable and not whole:
            raise UnreadableMedia("\n".join(why for _, why in self.unreadable))
        for _, why in self.unreadable:
            warnings.warn(f"left out, since it is damaged: {why}", stacklevel=2)
        self.sources = whole

    def __len__(self) -> int:
        return len(self.sources)

    def item(self, index: int) -> MediaItem:
        return self.sources[index].item

    def frames(self, index: int) -> int:
        """Frames of item ``index`` here; 1 for an image."""
        return self.sources[index].frames

    def size(self, index: int) -> tuple[int, int]:
        """(H, W) of item ``index``."""
        return self.sources[index].size

    def fps(self, index: int) -> float:
        return self.sources[index].fps

    def window(self, index: int, start: int, frames: int) -> torch.Tensor:
        """(frames, H, W, 3) uint8 of item ``index`` from frame ``start`` on."""
        source = self.sources[index]
        if start < 0 or start + frames > source.frames:
            raise ValueError(f"Frames.window: expected frames within the {source.frames} of {source.item.path.name}, got "
                             f"{start} to {start + frames}; ask for a shorter window")
        if index in self._kept:
            return self._kept[index][start : start + frames]
        return self._read(source, start, frames)

    @staticmethod
    def _read(source: _Source, start: int, frames: int) -> torch.Tensor:
        if source.item.kind == "image":
            return read_clip(source.item, frames=1, size=source.size)
        later = start / source.fps if start else 0.0
        return read_clip(source.item, frames=frames, start=source.start + later, fps=source.fps or None, size=source.size)
