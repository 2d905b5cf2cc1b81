"""Images and clips as prompts, as the flags of sora-fast generate ask for them.

T frames, H lines, W columns; clips are uint8 (T, H, W, 3).
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data import MediaItem, probe, read_clip
from ..diffusion import MediaPrompt
from ..training.dit import FPS, Generator, policy_for, sample


def open_media(flag: str, file: str) -> MediaItem:
    """The item at ``file``; an image for --image, a clip for --clip."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"generate: expected a file for {flag}, got {file}, which is not there; check the path")
    item = probe(file)
    wanted = {"--image": "image", "--clip": "clip"}.get(flag, item.kind)
    if item.kind != wanted:
        raise ValueError(f"generate: expected {'an image' if wanted == 'image' else 'a clip'} for {flag}, got the "
                         f"{item.kind} {file}; give it as --{item.kind}")
    return item


def _frames(item: MediaItem, fps: float) -> int:
    """How many frames of ``item`` there are at ``fps``."""
    last = item.seconds - 1 / item.fps if item.fps > 0 else 0.0
    return 1 + math.floor(max(last, 0.0) * fps + 1e-6)


def _read(item: MediaItem, count: int, size, fps: float, *, start: float | None, last: bool) -> torch.Tensor:
    """``count`` fitted frames from ``start``, or the last or first ones; as many as there are where there are fewer."""
    have = _frames(item, fps)
    if item.kind == "image" or have == 1:
        return read_clip(item, frames=1, size=size)
    if start is None:
        start = max(have - count, 0) / fps if last else 0.0
    held = have - math.ceil(start * fps - 1e-6)
    if held < 1:
        raise ValueError(f"generate: expected --start within the {item.seconds:.2f} s of {item.path}, got {start:g}; give "
                         f"an earlier one")
    return read_clip(item, frames=min(count, held), start=start, fps=fps, size=size)


def usual_given(t: int, mode: str) -> tuple[int, int]:
    """Latent frames to give at the beginning and at the end of a sample that has ``t``: about half, or a third of each."""
    if mode == "to":  # the first latent frame is one picture: motion shows in two
        return max(1, t // 3) + (t > 3), max(1, t // 3)
    return -(-t // 2), max(1, t // 2)


def media_prompt(a: Namespace, item: MediaItem, other: MediaItem | None, size: tuple[int, int, int], fps: float,
                 step: int) -> MediaPrompt:
    """What the flags ask for, of fitted frames of ``item`` (and ``other`` of --to)."""
    frames, picture = size[0], size[1:]
    t = 1 + (frames - 1) // step
    if a.strength is not None:
        clip = _read(item, frames, picture, fps, start=a.start, last=False)
        if item.kind == "image":
            clip = clip.expand(frames, -1, -1, -1)
        if len(clip) < frames:
            fits = (len(clip) - 1) // step * step + 1
            raise ValueError(f"generate: expected a clip of the {frames} frames of --size at {fps:g} a second, got "
                             f"{len(clip)} in {item.path}; give --size {fits}x{picture[0]}x{picture[1]}, an earlier --start "
                             f"or a higher --fps")
        return MediaPrompt.edit(clip, a.strength)
    mode = "loop" if a.loop else "to" if other else a.extend or "after"
    least = 2 * step + 1 if mode == "to" else step + 1
    if frames < least:
        raise ValueError(f"generate: expected --size of at least {least} frames, so that some are left to generate, got "
                         f"{frames}; raise T, or give --strength to change the given picture")
    begin, end = usual_given(t, mode)
    first, last = a.given or 1 + (begin - 1) * step, a.given or end * step
    read = lambda item, count, last: _read(item, count, picture, fps, start=a.start, last=last)
    if mode == "before":
        clip = read(item, last, False)
        prompt = MediaPrompt.before(clip, step) if len(clip) == 1 or len(clip) >= step else None
    elif mode == "to":
        one, two = read(item, first, True), _read(other, last, picture, fps, start=None, last=False)
        prompt = MediaPrompt.between(one, two, step) if len(two) == 1 or len(two) >= step else None
    else:
        clip = read(item, first, mode == "after")
        prompt = MediaPrompt.loop(clip, step) if mode == "loop" else MediaPrompt.after(clip, step)
    if prompt is None:
        raise ValueError(f"generate: expected at least {step} frames to lead to at {fps:g} a second, got fewer; give a "
                         f"longer clip, --given {step} or more, or an image of it")
    begin, end = prompt.given(step)
    if begin + end >= frames + prompt.cut:
        raise ValueError(f"generate: expected --given to leave some of the {frames} frames of --size to generate, got "
                         f"{begin + end - prompt.cut}; give fewer, or raise T")
    return prompt


def size_of(item: MediaItem, run: Generator, edit: bool) -> str:
    """--size where none is given: the item fitted as for training, and as long as training's clips unless it is edited."""
    policy = policy_for(run.training, run.vae, run.dit.config.patch)
    seconds, fps = (item.seconds, item.fps) if edit else (1e6, policy.fps or 1.0)
    return "x".join(map(str, policy.fit(item.width, item.height, seconds, fps)))


def rate_of(a: Namespace, run: Generator, items: Sequence[MediaItem]) -> float:
    """Frames per second that clips are read and written at: --fps, training's, the clips' own; never above their own."""
    own = [item.fps for item in items if item.kind == "clip" and item.fps > 0]
    return min([a.fps or run.training.fps or (math.inf if own else FPS), *own])


def first_halves(found: Generator, prompts, sizes, *, seed: int, **settings) -> list[MediaPrompt]:
    """The beginnings of loops of which nothing but the caption is given, from the caption."""
    step = found.vae.config.time_factor
    if min(frames for frames, _, _ in sizes) < step + 1:
        raise ValueError(f"generate: expected --size of at least {step + 1} frames for --loop, got "
                         f"{min(frames for frames, _, _ in sizes)}; raise T")
    halves = [(1 + (usual_given(1 + (frames - 1) // step, "loop")[0] - 1) * step, *picture) for frames, *picture in sizes]
    return [MediaPrompt.loop(clip, step) for clip in sample(found, prompts, halves, seed=seed, **settings)]
