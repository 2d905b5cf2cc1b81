"""Training with frames given clean, so that a model can be prompted with images and clips.

Flat buffers hold the samples' latents (C, T, H, W) one after the other. S samples; R modulation rows, one per frame of
tokens; P pieces of the buffer that have one row each: a channel of a row's frames.
"""

import torch

from ..to_device import to_device
from .objectives import Objective


def draw_clean_frames(grids, share: float, generator: torch.Generator) -> torch.Tensor:
    """Which frames of tokens a model is shown clean in training: (R,) bools, one per modulation row of ``grids``.

    ``share`` of the samples with two frames or more have some: the first frame, the first few, the last few, or both ends,
    each as likely, so that the model has met every way that frames are given in when it samples.

    Args:
        grids: host data, the tokens in t, h, w of each sample.
        share: of the samples, 0 to 1.
        generator: of the CPU.

    Raises nothing.
    """
    drawn = torch.rand(len(grids), 4, generator=generator, dtype=torch.float32, device="cpu").tolist()
    rows = []
    for (frames, _, _), (chosen, kind, one, other) in zip(grids, drawn, strict=True):
        clean = torch.zeros(frames, dtype=torch.bool, device="cpu")
        if frames > 1 and chosen < share:
            kind = ("first", "start", "end", "both")[int((4 if frames > 2 else 3) * kind)]
            if kind == "both":
                start = 1 + int((frames - 2) * one)
                end = 1 + int((frames - 1 - start) * other)
            else:
                some = 1 if kind == "first" else 1 + int((frames - 1) * one)
                start, end = (0, some) if kind == "end" else (some, 0)
            clean[:start] = True
            clean[frames - end :] = True
        rows.append(clean)
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.bool, device="cpu")


class FrameTimesteps:
    """A pack's timesteps where some frames are clean: they are at 0, as they are, and leave the loss.

    The model's pack needs ``modulation="frame"``. All indices are made on the host, so that a GPU never waits for them.

    Args:
        timesteps: (S,) of the samples. clean: (R,) bools.
        counts: numel of each sample, grids: its tokens in t, h, w; host data. channels: C of the latents.

    Attributes:
        timesteps: (R,) on ``device``, for the model.

    Raises:
        ValueError: timesteps of other samples, clean of other frames than those of ``grids``.
    """

    def __init__(self, timesteps: torch.Tensor, clean: torch.Tensor, counts, grids, channels: int,
                 device: torch.device | str = "cpu"):
        frames = torch.tensor([grid[0] for grid in grids], dtype=torch.int64, device="cpu")
        if clean.shape != (int(frames.sum()),) or timesteps.shape != frames.shape:
            raise ValueError(f"FrameTimesteps: expected timesteps of {len(grids)} samples and clean of {int(frames.sum())} "
                             f"frames, got {tuple(timesteps.shape)} and {tuple(clean.shape)}; pass those of these grids")
        rows, counts_P = _pieces(counts, grids, channels)
        learned_P = ~clean[rows]
        timesteps = timesteps.cpu().repeat_interleave(frames).masked_fill(clean, 0.0)
        self.timesteps = to_device(timesteps, device)
        self._timesteps_P, self._counts_P = to_device(timesteps[rows], device), to_device(counts_P, device)
        self._learned = to_device(learned_P.repeat_interleave(counts_P).nonzero()[:, 0], device)
        self._learned_timesteps = to_device(timesteps[rows][learned_P], device)
        self._learned_counts = to_device(counts_P[learned_P], device)

    def add_noise(self, objective: Objective, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the model sees: clean frames bit for bit, the others noised."""
        noisy = objective.add_noise(x0, noise, self._timesteps_P, self._counts_P)
        return x0.index_copy(0, self._learned, noisy[self._learned])

    def loss(self, objective: Objective, predicted: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The objective's loss over the elements that are not clean; elements past the samples' (a tail) are not read.

        Where all are clean, nothing is learned: 0, and a gradient of 0.
        """
        if not self._learned.shape[0]:
            return predicted[self._learned].float().sum()
        return objective.loss(predicted[self._learned], x0[self._learned], noise[self._learned], self._learned_timesteps,
                              self._learned_counts)


def _pieces(counts, grids, channels: int):
    """rows (P,), the modulation row of each piece of the flat buffer, and counts (P,), its numel."""
    rows, numbers, first = [], [], 0
    for count, (frames, _, _) in zip(counts, grids, strict=True):
        rows.append(torch.arange(first, first + frames, device="cpu").repeat(channels))
        numbers.append(torch.full((channels * frames,), int(count) // (channels * frames), device="cpu"))
        first += frames
    return torch.cat(rows), torch.cat(numbers)
