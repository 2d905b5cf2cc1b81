"""DDPM with a learned variance: what the class-conditional DiT is trained and sampled with.

Predictions are pairs: (N, 2), the noise and a value v for each of N latent elements (``pairs`` makes them of a
model's 2 C channels). v = 1 stands for the variance beta of a step, v = -1 for its least, the posterior's beta tilde.
(Improved DDPM, arXiv 2102.09672, sections 3.1 and 3.2; DiT, arXiv 2212.09748, section 3.1.)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..other_names import called_as
from ..to_device import to_device
from .objectives import DDPM, TRAIN, spread


def pairs(predicted, counts_S):
    """(2 M,) of a model with 2 C channels -> (M, 2): pairs of the first and second half of each sample's elements.

    Args:
        predicted: flat buffer, sample after sample, channels first; what lies behind them (a tail) stays unread.
        counts_S: numel of each sample's latents of C channels; host data.

    Raises nothing.
    """
    ends = [2 * int(count) for count in counts_S]
    if predicted.shape[0] < sum(ends):
        raise ValueError(f"LearnedVariance: expected predictions of 2 C channels, {sum(ends):,} elements or more, got "
                         f"{predicted.shape[0]:,}; take a model with learn_sigma=True")
    parts = predicted[: sum(ends)].split(ends)
    return torch.cat([part.view(2, -1).t() for part in parts]) if parts else predicted.new_zeros((0, 2))


class Step(NamedTuple):
    """A step of the chain from t to an earlier timestep; made in float64, since 1 - alpha bar is 1e-4 at t = 0.

    ``x_t = signal x0 + sigma noise``; the mean of q(earlier x | x_t, x0) is ``of_x0 x0 + of_xt x_t``; then the logarithms of
    the largest and the least variance.
    """

    signal: torch.Tensor
    sigma: torch.Tensor
    of_x0: torch.Tensor
    of_xt: torch.Tensor
    log_most: torch.Tensor
    log_least: torch.Tensor


def steps_of(alpha_bars) -> Step:
    """Steps between neighbours of ``alpha_bars`` (K,), falling, float64; the first leads to the clean latents.

    The least variance of that one is 0, whose logarithm is none: the next step's stands in for it, as in the source.
    """
    earlier = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
    beta = 1 - alpha_bars / earlier
    least = beta * (1 - earlier) / (1 - alpha_bars)
    least = torch.cat([least[1:2] if least.shape[0] > 1 else beta[:1], least[1:]])
    return Step(alpha_bars.sqrt(), (1 - alpha_bars).sqrt(), earlier.sqrt() * beta / (1 - alpha_bars),
                (1 - beta).sqrt() * (1 - earlier) / (1 - alpha_bars), beta.log(), least.log())


def posterior_mean(step: Step, x0, x_t):
    """Mean of q(x at the earlier timestep | x_t, x0)."""
    return step.of_x0 * x0 + step.of_xt * x_t


def denoised(step: Step, noise, x_t):
    """x0 of x_t and the noise in it."""
    return (x_t - step.sigma * noise) / step.signal


def log_variance(step: Step, v):
    """Between the least and the largest, in logarithms."""
    share = (v + 1) / 2
    return share * step.log_most + (1 - share) * step.log_least


def gaussian_kl(mean, log_var, other_mean, other_log_var):
    """KL(N(mean, var) || N(other_mean, other_var)) in nats, number by number."""
    return 0.5 * (other_log_var - log_var + (log_var - other_log_var).exp() - 1
                  + (mean - other_mean).square() * (-other_log_var).exp())


def bin_log_likelihood(x, mean, log_var):
    """Log of the share of N(mean, var) in the bin of width 2 / 255 around x; the bins at -1 and 1 are open outwards.

    For pixels, which is what the source has it for; latents are treated alike, as DiT does. The source
    approximates the normal's integral; here it is the function itself.
    """
    scale = (-0.5 * log_var).exp()
    upper, lower = (torch.special.ndtr(scale * (x - mean + side)) for side in (1 / 255, -1 / 255))
    upper, lower = torch.where(x > 0.999, 1.0, upper), torch.where(x < -0.999, 0.0, lower)
    return (upper - lower).clamp(min=1e-12).log()


@dataclass(frozen=True)
class LearnedVariance(DDPM):
    """DDPM that predicts noise and its variance, for a model with ``learn_sigma``.

    The loss is the mean squared error of the noise plus the variational term in bits per number, unweighted, as DiT sums
    them; where improved DDPM rescales that term it is by timesteps / 1000, which is 1 here. In it the noise is detached: it
    teaches the variance alone.

    Args:
        prediction: "noise".
        schedule: of the betas, "linear" or "cosine".

    Raises:
        ValueError: another prediction or schedule. ImportError: diffusers is not installed.

    >>> clips = [torch.randn(4, 2, 4, 4), torch.randn(4, 1, 4, 6)]
    >>> model = DiT.preset("tiny", depth=1, in_channels=4, text_width=0, learn_sigma=True)
    >>> loss = training_loss(model, LearnedVariance(), clips)
    >>> loss.backward()
    """

    def __post_init__(self):
        super().__post_init__()
        if self.prediction != "noise":
            raise ValueError(f"LearnedVariance: expected prediction 'noise', got {self.prediction!r}; its variance is that "
                             f"of a step towards predicted noise")

    def variational(self, predicted, x0, noise, timesteps, counts):
        """The variational bound's term of each number, in bits, with no gradient to the noise. (N,), at least float32."""
        wide = torch.promote_types(predicted.dtype, torch.float32)
        total = x0.shape[0]
        tables = (to_device(table.to(wide), timesteps.device) for table in steps_of(self.alphas))
        step = Step(*(spread(table[timesteps.long()], counts, total) for table in tables))
        first = spread((timesteps < 1), counts, total)
        x0, noise, (eps, v) = x0.to(wide), noise.to(wide), predicted.to(wide).unbind(1)
        x_t = step.signal * x0 + step.sigma * noise
        mean = posterior_mean(step, denoised(step, eps.detach(), x_t), x_t)
        log_var = log_variance(step, v)
        kl = gaussian_kl(posterior_mean(step, x0, x_t), step.log_least, mean, log_var)
        return torch.where(first, -bin_log_likelihood(x0, mean, log_var), kl) / math.log(2)

    def split(self, predicted, counts):
        """(M, 2) of a model's 2 C channels: each element's noise and variance."""
        return pairs(predicted, counts)

    @called_as(TRAIN)
    def loss(self, predicted, x0, noise, timesteps, counts):
        """Mean over all elements, in float32. ``predicted``: (N, 2), see ``pairs``."""
        if predicted.dim() != 2 or predicted.shape[1] != 2:
            raise ValueError(f"LearnedVariance: expected predictions (N, 2), noise and variance, got "
                             f"{tuple(predicted.shape)}; make them with pairs(), of a model with learn_sigma=True")
        simple = (predicted[:, 0].float() - noise.float()).square().mean()
        return simple + self.variational(predicted, x0, noise, timesteps, counts).mean()

    def scheduler(self, steps, tokens):
        """Ancestral sampling in ``steps`` of the 1000 steps, evenly spaced, with the learned variance; DiT's own is 250."""
        return Ancestral(self.alphas, steps)


class Ancestral:
    """x at the next timestep, drawn from N(mean, the model's variance); stands where diffusers' schedulers stand.

    ``generator``: a CPU generator for the noise of the steps.
    """

    def __init__(self, alphas, steps: int):
        last = alphas.shape[0] - 1
        if not 1 <= steps <= last + 1:
            raise ValueError(f"LearnedVariance: expected 1 to {last + 1:,} steps, got {steps:,}; its schedule has no more")
        # A single step begins, like the first of many, where there is noise alone.
        times = torch.linspace(0 if steps > 1 else last, last, steps, dtype=torch.float64, device="cpu").round().long()
        self.timesteps, self._steps = times.flip(0), steps_of(alphas[times])
        self._places = {int(t): place for place, t in enumerate(times)}
        self.generator: torch.Generator | None = None

    def step(self, predicted, timestep, x_t, return_dict: bool = False):
        """``(x,)`` of pairs (N, 2) at ``timestep`` and x_t (N,); at the last step the mean."""
        place = self._places[int(timestep)]
        step = Step(*(t[place].to(x_t.dtype) for t in self._steps))  # on the host: scalars that are passed with a launch
        eps, v = predicted.unbind(1)
        mean = posterior_mean(step, denoised(step, eps, x_t), x_t)
        if place == 0:
            return (mean,)
        noise = torch.randn(x_t.shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return (mean + (0.5 * log_variance(step, v)).exp() * to_device(noise.to(x_t.dtype), x_t.device),)
