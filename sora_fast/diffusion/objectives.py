"""Objectives: how clean latents get noisy, and what the model predicts from them.

All tensors of latents are flat buffers (all samples of a pack one after the other); ``counts`` (S,) says how many
elements each sample has. Every sample has a timestep of its own, t in [0, 1000]: 0 is clean. Where timesteps differ from
frame to frame, the buffer is cut further, and timesteps and counts are those of its pieces (``FrameTimesteps``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from ..other_names import Named, called_as
from ..to_device import to_device

Prediction = Literal["x0", "velocity", "noise"]
TRAIN = "for a model's loss write training_loss(model, objective, latents, text=...)"


class Objective(Protocol):
    """What training and sampling need of an objective.

    ``split`` makes of a model's flat output, of C or 2 C channels per sample, what ``loss`` and ``for_scheduler`` take. Its
    ``counts`` are host data, of C channels.
    """

    prediction: Prediction

    def draw_timesteps(self, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Timesteps (S,) for samples of ``tokens`` (S,) tokens."""

    def add_noise(self, x0, noise, timesteps, counts):
        """The noisy latents x_t of clean ones."""

    def split(self, predicted, counts: Sequence[int]):
        """What ``loss`` and ``for_scheduler`` take, of a model's output."""

    def loss(self, predicted, x0, noise, timesteps, counts) -> torch.Tensor:
        """A float32 scalar, the mean over all elements."""

    def scheduler(self, steps: int, tokens: int):
        """A scheduler of diffusers, set to ``steps`` steps for a sample of ``tokens`` tokens."""

    def for_scheduler(self, predicted, x_t, timesteps, counts):
        """What that scheduler's ``step`` takes, of a model's prediction."""


def spread(values_S, counts_S, total: int | None = None):
    """Each sample's value on all of its elements: (S,) -> (sum of counts,)."""
    return torch.repeat_interleave(values_S, counts_S, output_size=total)


def first_channels(predicted, counts: Sequence[int]):
    """(M,) of C or 2 C channels per sample -> those of the first C."""
    if predicted.shape[0] != 2 * sum(counts):
        return predicted
    return torch.cat([part.chunk(2)[0] for part in predicted.split([2 * count for count in counts])])


def _check_prediction(op: str, prediction: str) -> None:
    if prediction not in ("x0", "velocity", "noise"):
        raise ValueError(f"{op}: expected prediction to be 'x0', 'velocity' or 'noise', got {prediction!r}; choose one "
                         f"of them")


def _diffusers(name: str):
    """A scheduler class of diffusers, or an ImportError that says how to get it."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"diffusion: expected the diffusers package for its {name}, got none ({error}); run "
                          f"pip install 'sora_fast[train]'") from error
    return getattr(diffusers, name)


def _stratified(count: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform numbers (S,) in [0, 1), one from each S-th of the range, in random order."""
    order = torch.randperm(count, generator=generator, device="cpu")
    u = (order + torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")) / max(count, 1)
    return u.clamp(max=1 - 2**-24)  # the sum above may round up to S


@dataclass(frozen=True)
class FlowMatching(Named):
    """Straight paths from clean latents to noise: ``x_t = (1 - s) x0 + s noise`` with s = t / 1000.

    (Rectified flow: arXiv 2209.03003; logit-normal timesteps and the shift: SD3, arXiv 2403.03206.)

    Args:
        prediction: "velocity" (noise - x0), "x0" (the clean patches; its loss is weighted by 1 / max(s, 0.05)^2, the
            velocity's own scale) or "noise".
        timesteps: "logit_normal" or "uniform", each stratified over the samples of a pack.
        shift: moves timesteps to the noisy end, ``s -> shift s / (1 + (shift - 1) s)``; a number, or "tokens":
            sqrt(tokens of the sample / base_tokens), at least 1, since more tokens need more noise to hide.
        base_tokens: of a sample that needs no shift.

    Raises:
        ValueError: another prediction, timesteps or shift. TypeError: an unknown argument, with the right name.

    >>> clips = [torch.randn(4, 2, 4, 4), torch.randn(4, 1, 4, 6)]
    >>> model = DiT.preset("tiny", depth=1, in_channels=4, text_width=0)
    >>> loss = training_loss(model, FlowMatching(prediction="x0"), clips)
    >>> loss.backward()
    """

    prediction: Prediction = "velocity"
    timesteps: Literal["logit_normal", "uniform"] = "logit_normal"
    shift: float | Literal["tokens"] = "tokens"
    base_tokens: int = 256

    def __post_init__(self):
        _check_prediction("FlowMatching", self.prediction)
        if self.timesteps not in ("logit_normal", "uniform"):
            raise ValueError(f"FlowMatching: expected timesteps to be 'logit_normal' or 'uniform', got "
                             f"{self.timesteps!r}; choose one of them")
        number = isinstance(self.shift, (int, float)) and not isinstance(self.shift, bool)
        if self.shift != "tokens" and not (number and 0 < self.shift < math.inf):
            raise ValueError(f"FlowMatching: expected shift to be 'tokens' or a number above 0, got {self.shift!r}; 1 "
                             f"shifts nothing")
        if self.base_tokens < 1:
            raise ValueError(f"FlowMatching: expected base_tokens of 1 or more, got {self.base_tokens}; pass the tokens "
                             f"of a sample that needs no shift")

    def shift_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The shift of samples with ``tokens`` (S,) tokens."""
        if self.shift == "tokens":
            return (tokens.float() / self.base_tokens).sqrt().clamp(min=1.0)
        return torch.full(tokens.shape, float(self.shift), dtype=torch.float32, device=tokens.device)

    def draw_timesteps(self, tokens, generator):
        """Timesteps (S,) for samples of ``tokens`` (S,) tokens, stratified: one from each S-th of the range."""
        u = _stratified(tokens.shape[0], generator)
        s = torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))) if self.timesteps == "logit_normal" else u
        shift = self.shift_of(tokens)
        return 1000.0 * shift * s / (1 + (shift - 1) * s)

    def add_noise(self, x0, noise, timesteps, counts):
        """``x_t`` (M,) of ``x0`` and ``noise`` (M,)."""
        s = spread(timesteps / 1000.0, counts, x0.shape[0])
        return torch.lerp(x0, noise, s)

    def target(self, x0, noise, timesteps, counts):
        """What the model is to predict, (M,)."""
        return {"velocity": noise - x0, "x0": x0, "noise": noise}[self.prediction]

    def split(self, predicted, counts):
        """The prediction's first C channels: a learned variance is not used."""
        return first_channels(predicted, counts)

    @called_as(TRAIN)
    def loss(self, predicted, x0, noise, timesteps, counts):
        """Mean squared error over all elements, in float32."""
        error = (predicted.float() - self.target(x0, noise, timesteps, counts).float()).square()
        if self.prediction == "x0":
            error = error * spread((timesteps / 1000.0).clamp(min=0.05) ** -2, counts, x0.shape[0])
        return error.mean()

    def scheduler(self, steps, tokens):
        """diffusers' Euler scheduler set to ``steps`` steps for a sample of ``tokens`` tokens."""
        shift = float(self.shift_of(torch.tensor([tokens], device="cpu"))[0])
        scheduler = _diffusers("FlowMatchEulerDiscreteScheduler")(num_train_timesteps=1000, shift=shift)
        # Its own default ends at s = 0.001 * shift^2, one call of the model for next to nothing.
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
        return scheduler

    def for_scheduler(self, predicted, x_t, timesteps, counts):
        """The velocity, which the scheduler wants, from the model's prediction.

        From noise it is (noise - x_t) / (1 - s): at s = 1, where noise says nothing about the picture, any error of the
        model would grow without bound, so 1 - s counts as 0.05 at least.
        """
        if self.prediction == "velocity":
            return predicted
        s = spread(timesteps / 1000.0, counts, x_t.shape[0])
        if self.prediction == "x0":
            return (x_t - predicted) / s.clamp(min=1e-3)
        return (predicted - x_t) / (1 - s).clamp(min=0.05)


@dataclass(frozen=True)
class DDPM(Named):
    """Variance-preserving diffusion: ``x_t = sqrt(a) x0 + sqrt(1 - a) noise`` with a the cumulated alphas.

    (arXiv 2006.11239; cosine schedule: 2102.09672; velocity ``sqrt(a) noise - sqrt(1 - a) x0``: 2202.00512.)

    Args:
        prediction: "noise", "x0" or "velocity".
        schedule: of the betas, "linear" or "cosine".

    Raises:
        ValueError: another prediction or schedule. ImportError: diffusers is not installed, whose schedules these are.

    >>> clips = [torch.randn(4, 2, 4, 4), torch.randn(4, 1, 4, 6)]
    >>> model = DiT.preset("tiny", depth=1, in_channels=4, text_width=0)
    >>> loss = training_loss(model, DDPM(), clips)
    >>> loss.backward()
    """

    prediction: Prediction = "noise"
    schedule: Literal["linear", "cosine"] = "linear"
    alphas: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        _check_prediction("DDPM", self.prediction)
        # In float64: of 1 - alphas at t = 0, which is 1e-4, a product in float32 keeps four digits.
        object.__setattr__(self, "alphas", (1 - self._diffusers().betas.double()).cumprod(0))

    def _diffusers(self):
        names = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
        if self.schedule not in names:
            raise ValueError(f"DDPM: expected schedule to be 'linear' or 'cosine', got {self.schedule!r}; choose one")
        kinds = {"noise": "epsilon", "x0": "sample", "velocity": "v_prediction"}
        # "trailing" begins at t = 999. There the cosine schedule leaves 5e-5 of the signal, and noise divided by that
        # is no picture: that pair begins at the first "leading" timestep (960 of 25 steps), as DDIM itself did.
        spacing = "leading" if (self.prediction, self.schedule) == ("noise", "cosine") else "trailing"
        return _diffusers("DDIMScheduler")(
            num_train_timesteps=1000, beta_schedule=names[self.schedule], clip_sample=False,
            prediction_type=kinds[self.prediction], timestep_spacing=spacing)

    def draw_timesteps(self, tokens, generator):
        """Whole timesteps 0..999 (S,), stratified over the samples."""
        return (_stratified(tokens.shape[0], generator) * 1000).floor().clamp(max=999)

    def _scales(self, timesteps, counts, total):
        scales = (to_device(scale.float(), timesteps.device) for scale in (self.alphas.sqrt(), (1 - self.alphas).sqrt()))
        return tuple(spread(scale[timesteps.long()], counts, total) for scale in scales)

    def add_noise(self, x0, noise, timesteps, counts):
        """``x_t`` (M,) of ``x0`` and ``noise`` (M,)."""
        signal, sigma = self._scales(timesteps, counts, x0.shape[0])
        return signal * x0 + sigma * noise

    def target(self, x0, noise, timesteps, counts):
        """What the model is to predict, (M,)."""
        if self.prediction == "velocity":
            signal, sigma = self._scales(timesteps, counts, x0.shape[0])
            return signal * noise - sigma * x0
        return x0 if self.prediction == "x0" else noise

    def split(self, predicted, counts):
        """The prediction's first C channels: a learned variance is not used."""
        return first_channels(predicted, counts)

    @called_as(TRAIN)
    def loss(self, predicted, x0, noise, timesteps, counts):
        """Mean squared error over all elements, in float32."""
        return (predicted.float() - self.target(x0, noise, timesteps, counts).float()).square().mean()

    def scheduler(self, steps, tokens):
        """diffusers' DDIM scheduler set to ``steps`` steps."""
        scheduler = self._diffusers()
        scheduler.set_timesteps(steps)
        return scheduler

    def for_scheduler(self, predicted, x_t, timesteps, counts):
        """The prediction itself: the scheduler knows what it is."""
        return predicted
