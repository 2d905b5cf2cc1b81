"""Clips through a VAE and back, part by part: memory does not grow with their length.

T frames, H lines, W columns; pixels are uint8 (T, H, W, 3).
"""

from collections import deque
from collections.abc import Iterator

import torch

from ..data import to_pixels, to_uint8
from ..data.frames import Frames
from ..models import VideoVAE

READ = 16  # frames at a time: each reading seeks, and decodes from the keyframe before


def length_of(vae: VideoVAE, frames: int, most: int = 0) -> int:
    """The most frames that the VAE takes of ``frames``, and of ``most`` unless that is 0: 1 + time_factor * k."""
    step = vae.config.time_factor
    return (min(frames, most or frames) - 1) // step * step + 1


@torch.no_grad()
def reconstruct(vae: VideoVAE, frames: Frames, index: int, *, most: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(what the VAE makes of it, the clip itself), part by part, of item ``index``: posterior means, decoded.

    Args:
        frames: sizes as the VAE takes them; with ``memory_gb=0`` nothing but the part at hand is held.
        most: frames at most; 0: all that ``length_of`` allows.

    Raises:
        UnreadableMedia: the file is damaged at the part that was to come.
    """
    waiting: deque[torch.Tensor] = deque()
    total, device = length_of(vae, frames.frames(index), most), vae.latent_mean.device
    piece = READ if device.type == "cuda" else vae.config.time_factor

    def pixels():
        for start in range(0, total, READ):
            for real in frames.window(index, start, min(READ, total - start)).split(piece):
                waiting.append(real)
                yield to_pixels(real)[None].to(device)

    for part in vae.decode_stream(vae.encode_stream(pixels())):
        got = to_uint8(part[0].cpu())
        yield got, _take(waiting, len(got))


def _take(waiting: deque[torch.Tensor], count: int) -> torch.Tensor:
    """The next ``count`` frames of a queue of parts."""
    parts = []
    while count:
        part = waiting.popleft()
        if len(part) > count:
            waiting.appendleft(part[count:])
        parts.append(part[:count])
        count -= len(parts[-1])
    return torch.cat(parts)
