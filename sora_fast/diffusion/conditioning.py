"""Frames as prompts: from given pixels to known latents, and from the decoder's pixels back to the given ones.

T frames, H lines, W columns; pixels are uint8 (T, H, W, 3). A VAE of time factor f gives the first frame a latent frame of
its own and each further f frames one.
"""

from dataclasses import dataclass

import torch

from ..data import to_pixels
from .sampling import Known, place

# Generated frames over which a seam is faded out. Fewer leave more of the step in each, more carry the given frame's detail
# further from where it belongs.
FADE = 8
# A seam that is pulled down to the given clip's own largest step stays this far below, since video codecs round.
ROOM = 0.9


def jumps(clip: torch.Tensor) -> torch.Tensor:
    """(T - 1,) mean absolute difference of neighbouring frames of a uint8 ``clip`` (T, H, W, 3), in levels of 255.

    Raises nothing.
    """
    if len(clip) < 2:
        return torch.zeros(0, dtype=torch.float32, device=clip.device)
    return torch.stack([_jump(a, b) for a, b in zip(clip, clip[1:], strict=False)])


def _jump(one, other) -> torch.Tensor:
    return (one.float() - other.float()).abs().mean()


@dataclass(frozen=True)
class Seam:
    """A place where a given frame meets a generated one: its step, and the given clip's largest (None: images alone)."""

    place: str
    jump: float
    largest: float | None


@dataclass(frozen=True)
class MediaPrompt:
    """Given frames of one clip, all at its own height and width.

    Use ``after`` (image-to-video, extension forward), ``before`` (extension backward), ``between`` (interpolation),
    ``loop`` and ``edit`` (SDEdit) to make one.

    Args:
        start: (1 + k f, H, W, 3) uint8, the first frames; an image is one.
        end: (m f, H, W, 3) uint8, the last frames, or an image, which is held for f of them: it fills a latent frame.
        source: (T, H, W, 3) uint8, all frames, which are changed with ``strength`` (0, 1].
        cut: last frames that are sampled but left out: a loop's, which are the first frames again.

    Raises:
        ValueError: clips that are not uint8 (T, H, W, 3) of one size; start or end beside source.
    """

    start: torch.Tensor | None = None
    end: torch.Tensor | None = None
    source: torch.Tensor | None = None
    strength: float = 1.0
    cut: int = 0

    def __post_init__(self):
        clips = [clip for clip in (self.start, self.end, self.source) if clip is not None]
        if not clips or (self.source is not None and len(clips) > 1):
            raise ValueError(f"MediaPrompt: expected start, end or both, or source alone, got {len(clips)} clips; "
                             f"after, before, between, loop and edit make the usual ones")
        for clip in clips:
            if clip.dtype != torch.uint8 or clip.dim() != 4 or clip.shape[3] != 3 or not len(clip):
                raise ValueError(f"MediaPrompt: expected uint8 clips (T, H, W, 3), got {clip.dtype} of "
                                 f"{tuple(clip.shape)}; read_clip gives that form")
            if clip.shape[1:] != clips[0].shape[1:]:
                raise ValueError(f"MediaPrompt: expected clips of one size, got {tuple(clips[0].shape[1:3])} and "
                                 f"{tuple(clip.shape[1:3])}; read both with the same size=")

    # ------------------------------------------------------------------------------------------------ modes
    @classmethod
    def after(cls, clip: torch.Tensor, time_factor: int) -> "MediaPrompt":
        """The sample begins with the last 1 + k f frames of ``clip``, or with an image."""
        return cls(start=clip[(len(clip) - 1) % time_factor :])

    @classmethod
    def before(cls, clip: torch.Tensor, time_factor: int) -> "MediaPrompt":
        """The sample ends with the first m f frames of ``clip``, or with an image."""
        if 1 < len(clip) < time_factor:
            raise ValueError(f"MediaPrompt: expected an image or at least {time_factor} frames to end with, got "
                             f"{len(clip)}; a latent frame is made of so many")
        return cls(end=clip[: max(1, len(clip) // time_factor * time_factor)])

    @classmethod
    def between(cls, one: torch.Tensor, other: torch.Tensor, time_factor: int) -> "MediaPrompt":
        """The sample leads from the end of ``one`` to the beginning of ``other``."""
        return cls(start=cls.after(one, time_factor).start, end=cls.before(other, time_factor).end)

    @classmethod
    def loop(cls, clip: torch.Tensor, time_factor: int) -> "MediaPrompt":
        """The sample begins as ``after`` does and leads back to its own first frame.

        Its first frames stand at its end once more while it is sampled, so that it returns to their motion too, and are
        then left out.
        """
        start = cls.after(clip, time_factor).start
        return cls(start=start, end=cls.before(start, time_factor).end[:time_factor], cut=time_factor)

    @classmethod
    def edit(cls, clip: torch.Tensor, strength: float) -> "MediaPrompt":
        """The sample is ``clip``, noised by ``strength`` and denoised to another caption. (SDEdit: arXiv 2108.01073.)"""
        return cls(source=clip, strength=strength)

    # ------------------------------------------------------------------------------------------------ latents
    def given(self, time_factor: int) -> tuple[int, int]:
        """Frames given at the beginning and at the end of what is sampled."""
        end = 0 if self.end is None else len(self.end)
        return 0 if self.start is None else len(self.start), time_factor if end == 1 else end

    @torch.no_grad()
    def known(self, vae, frames: int) -> Known:
        """Known latents of a sample of ``frames`` frames, ``cut`` not counted.

        The VAE is causal: a latent frame holds its own frames and something of those before. First frames are encoded as
        they are. Last frames stand behind frames that nobody knows yet, so they are encoded behind their first one, at
        rest, for exactly as long as what will be generated, and only their own latents are kept. What was before hardly
        matters: on the demo's clips and VAE their latents differ from those with the real past by an RMS of 0.001, where a
        latent's is 1. How far they are from the clip's beginning does, by 0.06, since there the convolutions see zeros.
        """
        step, total = vae.config.time_factor, frames + self.cut
        encode = lambda clip: vae.encode_clip(to_pixels(clip)[None].to(vae.latent_mean.device))[0]
        if self.source is not None:
            if len(self.source) != frames:
                raise ValueError(f"MediaPrompt: expected a source of the sample's {frames} frames, got {len(self.source)}; "
                                 f"read as many")
            latents = encode(self.source)
            return Known(latents, (False,) * latents.shape[1], self.strength)
        a, b = self.given(step)
        if (a - 1) % step * (a > 0) or b % step:
            raise ValueError(f"MediaPrompt: expected 1 + {step} k first and {step} m last frames, got {a} and {b}; after, "
                             f"before, between and loop cut clips to that")
        if a + b >= total:
            raise ValueError(f"MediaPrompt: expected frames that leave some to generate, got {a + b} given of {total}; give "
                             f"fewer, or make the sample longer")
        start = end = None
        if a:
            start = encode(self.start)
        if b:
            held = self.end[:1].expand(total - len(self.end), -1, -1, -1)
            end = encode(torch.cat([held, self.end]))[:, -(b // step):]
        size = vae.latent_shape(total, *(self.end if self.start is None else self.start).shape[1:3])
        return place(size, start, end)

    # ------------------------------------------------------------------------------------------------ pixels
    def finish(self, decoded: torch.Tensor, time_factor: int) -> torch.Tensor:
        """The decoded clip with the given frames in their places, and without a seam; uint8 in and out.

        The decoder's copy of the given frames is blurred. So that the sharp ones do not pop in, what the decoder missed of
        the given frame next to the generated ones is added to them, less and less over FADE frames. Where even so the step
        is larger than any of the given clip's own, as a model may make it, as much of the rest as exceeds it is faded out
        over the same frames.
        """
        if self.source is not None:
            return decoded
        a, b = self.given(time_factor)
        total, out = len(decoded), decoded.clone()
        free = decoded[a : total - b].float()
        near = list(range(len(free)))[:FADE]
        sides = []  # the given clip, its frame at the seam, the decoder's copy of that, generated frames from there on
        if a:
            out[:a] = self.start
            sides.append((self.start, self.start[-1], decoded[a - 1], near))
        if b:
            out[total - b :] = self.end  # an image is held
            sides.append((self.end, self.end[0], decoded[total - b], [len(free) - 1 - i for i in near]))
        for _, seam, copy, frames in sides:
            missed = seam.float() - copy.float()
            for distance, frame in enumerate(frames, 1):
                free[frame] += (1 - distance / (len(frames) + 1)) * missed
        for clip, seam, _, frames in sides:
            largest = self._largest(clip)
            if largest is not None:
                _limit(free, frames, seam, largest, last=0.0 if len(sides) > 1 else 1 / len(frames))
        out[a : total - b] = _levels(free)
        return out[: total - self.cut]

    def seams(self, clip: torch.Tensor, time_factor: int) -> list[Seam]:
        """The step at each seam of a finished (or decoded) clip, beside the largest of the given clip's own frames."""
        if self.source is not None:
            return []
        (a, b), found = self.given(time_factor), []
        if a:
            found.append(Seam("after the given start", float(_jump(clip[a - 1], clip[a])), self._largest(self.start)))
        if self.cut:
            found.append(Seam("from the end to the beginning", float(_jump(clip[-1], clip[0])), self._largest(self.start)))
        elif b:
            found.append(Seam("before the given end", float(_jump(clip[-b - 1], clip[-b])), self._largest(self.end)))
        return found

    def _largest(self, given: torch.Tensor) -> float | None:
        """The largest step of a given clip; of the other one where this is an image; None of images alone."""
        for clip in (given, self.start, self.end):
            if clip is not None and len(clip) > 1:
                return float(jumps(clip).max())
        return None


def _levels(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _limit(free: torch.Tensor, frames: list[int], seam: torch.Tensor, largest: float, last: float) -> None:
    """Pull ``free[frames]`` (the nearest to the seam first) towards it in place, until its step is below ``largest``.

    ``last`` is the share of the farthest frame: 0 where another seam lies behind it.
    """
    first = free[frames[0]].clone()
    if _jump(_levels(first), seam) <= largest:
        return
    missing = seam.float() - first
    low, share = 0.0, 1.0  # at 1 there is no step; rounded frames are measured, since rounding may lift it
    for _ in range(10):
        middle = (low + share) / 2
        small = _jump(_levels(first + middle * missing), seam) <= ROOM * largest
        low, share = (low, middle) if small else (middle, share)
    for distance, frame in enumerate(frames):
        free[frame] += share * (1 - distance * (1 - last) / max(len(frames) - 1, 1)) * missing
