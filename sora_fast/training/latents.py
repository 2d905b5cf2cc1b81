"""Latents of a media folder, encoded once, and packs of them.

C latent channels; t, h, w of a latent clip.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data import FitPolicy, MediaItem, Packer, UnreadableMedia, pack_stream, to_pixels
from ..data.frames import Frames
from ..models import VideoVAE
from ..pack import Pack, token_grid
from ..progress import bar
from . import checkpoint
from .latent_cache import LatentCache


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
        return token_grid("DiT", self.latent.shape[1:], patch)

    def tokens(self, patch) -> int:
        return _tokens(self.grid(patch))

    @property
    def name(self) -> str:
        """Where to look for it."""
        return f"{self.source}, frames {self.start} to {self.start + self.frames - 1}" if self.frames > 1 else self.source


def encode_library(vae: VideoVAE, items: Sequence[MediaItem], policy: FitPolicy, *, windows: int,
                   span: tuple[float, float] = (0.0, 1.0), progress: bool = True, cache: LatentCache | None = None
                   ) -> list[LatentClip]:
    """Posterior means of ``windows`` evenly spread windows of each clip, and of each image, from ``cache`` where there."""
    cache = cache or LatentCache(None, vae, policy, windows=windows, span=span)
    found = []
    for item in bar(items, "latents", progress):
        path = cache.path(item)
        cut = cache.read(path, item)
        if cut is None:
            try:
                cut = _encode(vae, item, policy, windows, span)
            except UnreadableMedia as error:  # a scan decodes one frame of a clip: damage further on shows here
                print(f"left out, since it is damaged: {error}", flush=True)
                continue  # and not kept in the cache, so that the next run says so too
            cache.write(path, cut)
        found += [LatentClip(latent, item.caption, str(item.path), **about) for latent, about in cut]
    return found


@torch.no_grad()
def _encode(vae: VideoVAE, item: MediaItem, policy: FitPolicy, windows: int, span) -> list[tuple[torch.Tensor, dict]]:
    """(latent, start, frames and fps) of each window of one item; none where the span holds no frame of it."""
    frames = Frames([item], policy, span=span, progress=False)
    if not len(frames):
        return []
    step, have = vae.config.time_factor, frames.frames(0)
    length = (min(have, policy.max_frames) - 1) // step * step + 1
    height, width = frames.size(0)
    limit = policy.max_tokens
    while limit is not None and length > 1 and policy.tokens(length, height, width) > limit:
        length -= step
    starts = sorted({(have - length) * i // max(windows - 1, 1) for i in range(windows)}) if have > length else [0]
    cut = []
    for start in starts:
        latent = vae.encode(to_pixels(frames.window(0, start, length))[None].to(vae.latent_mean.device))[0].cpu()
        if not torch.isfinite(latent).all():
            raise ValueError(f"train: expected finite latents of {item.path}, frames {start} to {start + length - 1}, got "
                             f"nan or inf; look at that file and at the VAE")
        cut.append((latent, dict(start=start, frames=length, fps=frames.fps(0))))
    return cut


def save_library(path: Path, clips: Sequence[LatentClip]) -> None:
    """Write ``path``.safetensors and then ``path``.json, which is there only if the tensors beside it are its own."""
    path.with_suffix(".json").unlink(missing_ok=True)
    checkpoint.save_tensors(path.with_suffix(".safetensors"), {str(i): clip.latent for i, clip in enumerate(clips)})
    checkpoint.save_json(path.with_suffix(".json"), [asdict(replace(clip, latent=None)) for clip in clips])


def load_library(path: Path) -> list[LatentClip]:
    tensors = checkpoint.load_tensors(path.with_suffix(".safetensors"))
    described = checkpoint.load_json(path.with_suffix(".json"))
    return [LatentClip(**{**entry, "latent": tensors[str(i)]}) for i, entry in enumerate(described)]


def held_out(names: Sequence[str], share: float) -> set[str]:
    """Which of ``names`` (files) are kept from training: ``share`` of the different ones, rounded down.

    The choice depends on the files' own names, so that it stays as the folder is moved, and almost stays as it grows.
    """
    order = sorted(set(names), key=lambda name: (hashlib.sha256(Path(name).name.encode()).digest(), name))
    return set(order[: int(share * len(order) + 1e-9)])


@dataclass(frozen=True)
class LatentBatch:
    """One pack: flat buffer of all latents, the numel of each, grids in tokens, captions, where each is from.

    ``length``: tokens of the pack, its tail included.
    """

    latents: torch.Tensor
    counts: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...]
    captions: tuple[str, ...]
    sources: tuple[str, ...]
    length: int

    @classmethod
    def of(cls, clips: Sequence[LatentClip], patch, length: int = 0) -> LatentBatch:
        """A pack of ``clips`` with ``length`` tokens, or as many as they have."""
        flats, grids = [clip.latent.reshape(-1) for clip in clips], tuple(clip.grid(patch) for clip in clips)
        return cls(torch.cat(flats), tuple(f.numel() for f in flats), grids, tuple(clip.caption for clip in clips),
                   tuple(clip.name for clip in clips), max(length, sum(map(_tokens, grids))))

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens (S,) of each sample."""
        return torch.tensor([_tokens(grid) for grid in self.grids], device="cpu")

    def pack(self, text_lengths, device) -> Pack:
        """A pack whose frames have timesteps of their own. All of a run have one length: ranks do equal work."""
        return Pack(self.grids, modulation="frame", text_lengths=text_lengths, tokens=self.length, device=device)

    def with_tail(self, flat: torch.Tensor) -> torch.Tensor:
        """The flat buffer of all samples, padded with zeros for the tail."""
        each = sum(self.counts) // max(int(self.tokens.sum()), 1)
        return F.pad(flat, (0, self.length * each - flat.shape[0]))

    def only(self, index: int) -> LatentBatch:
        """The pack of sample ``index`` alone, of the same length."""
        part = lambda values: values[index : index + 1]
        return replace(self, latents=self.latents.split(self.counts)[index], counts=part(self.counts),
                       grids=part(self.grids), captions=part(self.captions), sources=part(self.sources))


@dataclass(frozen=True)
class NoisyBatch:
    """A pack with what was drawn for it: noise like its latents, timesteps (S,), and which frames of tokens are given
    clean (R,); captions that were dropped are "".
    """

    batch: LatentBatch
    noise: torch.Tensor
    timesteps: torch.Tensor
    clean: torch.Tensor

    @property
    def names(self) -> list[str]:
        """Each sample, for people."""
        return [f"{source}, timestep {t:g}" for source, t in zip(self.batch.sources, self.timesteps.tolist(), strict=True)]

    @property
    def learned(self) -> int:
        """Latent elements that are not given clean: the loss is a mean over these."""
        frames = [t for t, _, _ in self.batch.grids]
        return sum(count // t * int((~clean).sum())
                   for count, t, clean in zip(self.batch.counts, frames, self.clean.split(frames), strict=True))

    def only(self, index: int) -> NoisyBatch:
        """Sample ``index`` alone, as it was drawn."""
        frames = [t for t, _, _ in self.batch.grids]
        return replace(self, batch=self.batch.only(index), noise=self.noise.split(self.batch.counts)[index],
                       timesteps=self.timesteps[index : index + 1], clean=self.clean.split(frames)[index])


def held_out_batches(clips: Sequence[LatentClip], patch, budget: int, timesteps: Sequence[int], seed: int, most: int = 64):
    """("t100", batch) and so on: packs of at most ``most`` of ``clips``, each at every one of ``timesteps``.

    A clip's noise is its own, the same at every timestep and every call.
    """
    chosen = list(clips)[:: -(-len(clips) // most)]
    noises = [torch.randn(clip.latent.numel(), generator=checkpoint.generator(seed, "held out", index),
                          dtype=torch.float32, device="cpu") for index, clip in enumerate(chosen)]
    packs = pack_stream(range(len(chosen)), lambda index: chosen[index].tokens(patch), budget)
    for places in packs:
        batch = LatentBatch.of([chosen[i] for i in places], patch, budget)
        clean = torch.zeros(sum(frames for frames, _, _ in batch.grids), dtype=torch.bool, device="cpu")
        noise = torch.cat([noises[i] for i in places])
        for t in timesteps:
            alike = torch.full((len(places),), float(t), dtype=torch.float32, device="cpu")
            yield f"t{t}", NoisyBatch(batch, noise, alike, clean)


@dataclass(frozen=True)
class PackPlan:
    """The pack of running number ``number``: a key for each sample, "draw:clip"; a draw is never repeated."""

    number: int
    keys: tuple[str, ...]


class LatentPacks:
    """Endless shuffled epochs of latent clips, packed online to a token budget.

    ``next()`` only plans, and is cheap: every rank plans every pack and loads those of its share. Epoch e's order depends
    on (seed, e), so the state is two counts and the packer's queue.
    """

    def __init__(self, clips: Sequence[LatentClip], patch, budget: int, *, look_ahead: int = 1000, seed: int = 0):
        if not clips:
            raise ValueError("train: expected at least one latent clip to pack, got none; pass what encode_library gives")
        self.clips, self.patch, self.budget, self.seed = list(clips), patch, budget, seed
        self.tokens = [clip.tokens(patch) for clip in self.clips]
        self.packer = Packer(budget, look_ahead=look_ahead)
        self.drawn, self.number = 0, 0
        self._epoch, self._order = -1, []

    def _index(self, draw: int) -> int:
        """The clip of a draw."""
        epoch, place = divmod(draw, len(self.clips))
        if epoch != self._epoch:
            order = torch.randperm(len(self.clips), generator=checkpoint.generator(self.seed, "epoch", epoch), device="cpu")
            self._epoch, self._order = epoch, order.tolist()
        return self._order[place]

    def next(self) -> PackPlan:
        while not self.packer.ready:
            index = self._index(self.drawn)
            # Keys are the running number of the draw: an item may wait in the buffer from two epochs at once.
            self.packer.add(f"{self.drawn}:{index}", self.tokens[index])
            self.drawn += 1
        plan = PackPlan(self.number, tuple(self.packer.next()))
        self.number += 1
        return plan

    def load(self, plan: PackPlan) -> LatentBatch:
        chosen = [self.clips[int(key.partition(":")[2])] for key in plan.keys]
        return LatentBatch.of(chosen, self.patch, self.budget)

    def probe(self, copies: int) -> tuple[LatentBatch, float]:
        """A pack of ``copies`` times the clip nearest to the mean size, and how many of it a full pack holds."""
        return probe(self.clips, self.patch, copies), self.budget / int(probe(self.clips, self.patch, 1).length)

    def state_dict(self) -> dict:
        return dict(drawn=self.drawn, number=self.number, clips=len(self.clips), sources=self._sources(),
                    packer=self.packer.state_dict())

    def _sources(self) -> str:
        """A digest of which clips these are, wherever their files lie."""
        about = [(Path(clip.source).name, clip.start, clip.frames, clip.caption, *clip.latent.shape) for clip in self.clips]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def load_state_dict(self, state: dict) -> None:
        if state["clips"] != len(self.clips):
            raise ValueError(f"--resume: expected the run's own {state['clips']} latent clips, got {len(self.clips)}; keep "
                             f"latents.safetensors and latents.json of the run folder, or begin another run")
        if state.get("sources", self._sources()) != self._sources():  # older checkpoints do not say
            raise ValueError(f"--resume: expected the run's own {state['clips']} latent clips, got as many others; keep "
                             f"latents.safetensors and latents.json of the run folder, or begin another run")
        self.drawn, self.number = state["drawn"], state["number"]
        self.packer.load_state_dict(state["packer"])


def probe(clips: Sequence[LatentClip], patch, copies: int) -> LatentBatch:
    """A pack without tail of ``copies`` times the clip nearest to the mean size."""
    sizes = [clip.tokens(patch) for clip in clips]
    mean = sum(sizes) / len(sizes)
    index = min(range(len(clips)), key=lambda i: abs(sizes[i] - mean))
    return LatentBatch.of([clips[index]] * copies, patch)


def _tokens(grid) -> int:
    return grid[0] * grid[1] * grid[2]
