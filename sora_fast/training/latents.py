"""Latents of a media folder, encoded once, and packs of them.

C latent channels; t, h, w of a latent clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..data import FitPolicy, MediaItem, Packer, to_pixels
from ..data.frames import Frames, bar
from ..models import VideoVAE
from ..models.dit import token_grid
from ..pack import Pack
from . import checkpoint


@dataclass(frozen=True)
class LatentClip:
    """One window of one item: latent (C, t, h, w), its caption, and where it comes from (frames of the read rate)."""

    latent: torch.Tensor
    caption: str
    source: str
    start: int
    frames: int
    fps: float

    def grid(self, patch) -> tuple[int, int, int]:
        return token_grid(self.latent.shape[1:], patch)


@torch.no_grad()
def encode_library(vae: VideoVAE, items: Sequence[MediaItem], policy: FitPolicy, *, windows: int,
                   span: tuple[float, float] = (0.0, 1.0), memory_gb: float = 4.0, progress: bool = True
                   ) -> list[LatentClip]:
    """Posterior means of ``windows`` evenly spread windows of each clip, and of each image."""
    frames = Frames(items, policy, span=span, memory_gb=memory_gb, progress=progress)
    step, found = vae.config.time_factor, []
    for index in bar(range(len(frames)), "latents", progress):
        have = frames.frames(index)
        length = (min(have, policy.max_frames) - 1) // step * step + 1
        height, width = frames.size(index)
        limit = policy.max_tokens
        while limit is not None and length > 1 and policy.tokens(length, height, width) > limit:
            length -= step
        starts = sorted({(have - length) * i // max(windows - 1, 1) for i in range(windows)}) if have > length else [0]
        for start in starts:
            video = to_pixels(frames.window(index, start, length))[None].to(vae.latent_mean.device)
            item = frames.item(index)
            found.append(LatentClip(vae.encode(video)[0].cpu(), item.caption, item.path.name, start, length,
                                    frames.fps(index)))
    return found


def save_library(path: Path, clips: Sequence[LatentClip]) -> None:
    """Write ``path``.safetensors and then ``path``.json, which is there only if the tensors beside it are its own."""
    path.with_suffix(".json").unlink(missing_ok=True)
    checkpoint.save_tensors(path.with_suffix(".safetensors"), {str(i): clip.latent for i, clip in enumerate(clips)})
    checkpoint.save_json(path.with_suffix(".json"), [asdict(replace(clip, latent=None)) for clip in clips])


def load_library(path: Path) -> list[LatentClip]:
    tensors = checkpoint.load_tensors(path.with_suffix(".safetensors"))
    described = checkpoint.load_json(path.with_suffix(".json"))
    return [LatentClip(**{**entry, "latent": tensors[str(i)]}) for i, entry in enumerate(described)]


@dataclass(frozen=True)
class LatentBatch:
    """One pack: flat buffer of all latents, their numbers each, grids in tokens, captions."""

    latents: torch.Tensor
    counts: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...]
    captions: tuple[str, ...]

    def pack(self, text_lengths, device) -> Pack:
        return Pack(self.grids, text_lengths=text_lengths, device=device)


class LatentPacks:
    """Endless shuffled epochs of latent clips, packed online to a token budget."""

    def __init__(self, clips: Sequence[LatentClip], patch, budget: int, *, look_ahead: int = 1000, seed: int = 0):
        if not clips:
            raise ValueError("train: expected at least one latent clip to pack, got none; pass what encode_library gives")
        self.clips, self.budget = list(clips), budget
        self.grids = [clip.grid(patch) for clip in self.clips]
        self.packer = Packer(budget, look_ahead=look_ahead)
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.drawn = 0

    def next(self) -> LatentBatch:
        while not self.packer.ready:
            if not self.order:
                self.order = torch.randperm(len(self.clips), generator=self.generator).tolist()
            index = self.order.pop()
            # Keys are the running number of the draw: an item may wait in the buffer from two epochs at once.
            self.packer.add(f"{self.drawn}:{index}", _tokens(self.grids[index]))
            self.drawn += 1
        chosen = [int(key.partition(":")[2]) for key in self.packer.next()]
        flats = [self.clips[i].latent.reshape(-1) for i in chosen]
        return LatentBatch(torch.cat(flats), tuple(f.numel() for f in flats), tuple(self.grids[i] for i in chosen),
                           tuple(self.clips[i].caption for i in chosen))

    def probe(self, copies: int) -> tuple[LatentBatch, float]:
        """A pack of ``copies`` times the clip nearest to the mean size, and how many of it a full pack holds."""
        mean = sum(_tokens(grid) for grid in self.grids) / len(self.grids)
        index = min(range(len(self.clips)), key=lambda i: abs(_tokens(self.grids[i]) - mean))
        clip, grid = self.clips[index], self.grids[index]
        batch = LatentBatch(clip.latent.reshape(-1).repeat(copies), (clip.latent.numel(),) * copies, (grid,) * copies,
                            (clip.caption,) * copies)
        return batch, self.budget / _tokens(grid)

    def state_dict(self) -> dict:
        return dict(generator=self.generator.get_state(), order=list(self.order), drawn=self.drawn,
                    clips=len(self.clips), packer=self.packer.state_dict())

    def load_state_dict(self, state: dict) -> None:
        if state["clips"] != len(self.clips):
            raise ValueError(f"--resume: expected the run's own {state['clips']} latent clips, got {len(self.clips)}; keep "
                             f"latents.safetensors and latents.json of the run folder, or begin another run")
        self.generator.set_state(state["generator"])
        self.order, self.drawn = list(state["order"]), state["drawn"]
        self.packer.load_state_dict(state["packer"])


def _tokens(grid) -> int:
    return grid[0] * grid[1] * grid[2]
