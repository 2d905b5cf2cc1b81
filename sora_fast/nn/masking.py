"""Masking of a pack's tokens: MAE's masking and NaViT's token dropping.

Random numbers are drawn on the CPU, from the generator that is passed, and sizes are the pack's host data, so nothing
waits for a GPU and a seed gives the same tokens on every device.

N tokens, M visible and K hidden ones, S samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .. import checks
from ..pack import Pack, check_pack
from ..to_device import to_device

PATTERNS = ("token", "tube")


@dataclass(frozen=True)
class Masking:
    """A division of a pack's tokens: ``visible`` (M,) and ``hidden`` (K,) indices, int64, ascending; ``tokens``: N.

    ``pack.keep(masking.visible)`` is the pack of the visible tokens, which keep their coords. Tail tokens are in neither.
    """

    visible: torch.Tensor
    hidden: torch.Tensor
    tokens: int

    def shuffle(self, x):
        """x (N, ...) -> its visible rows (M, ...) and its hidden rows (K, ...)."""
        checks.tensor("Masking.shuffle", "x", x)
        expected = (self.tokens, *(f"D{place}" for place in range(1, x.dim())))
        checks.shape("Masking.shuffle", "x", x, expected, "pass one row per token of the pack")
        return x[self.visible], x[self.hidden]

    def unshuffle(self, visible, hidden):
        """The inverse of ``shuffle``, exactly: (M, ...) and (K, ...) -> (N, ...), 0 in the tail."""
        checks.tensor("Masking.unshuffle", "visible", visible)
        for name, rows, index in (("visible", visible, self.visible), ("hidden", hidden, self.hidden)):
            checks.shape("Masking.unshuffle", name, rows, (index.shape[0], *visible.shape[1:]),
                         "pass what shuffle gives, or rows for these places")
        empty = visible.new_zeros((self.tokens, *visible.shape[1:]))
        return empty.index_copy(0, self.visible, visible).index_copy(0, self.hidden, hidden)


def random_masking(pack: Pack, ratio: float | Sequence[float], *, pattern: str = "token",
                   generator: torch.Generator | None = None) -> Masking:
    """Hide tokens of every sample at random.

    Args:
        pack: of whole samples (nothing dropped yet).
        ratio: share of hidden tokens, in [0, 1): a number, or one per sample. Of n tokens ``round((1 - ratio) * n)`` stay
            visible, at least one.
        pattern: ``"token"``: each token by itself; ``"tube"``: the same places of every frame, so that a hidden patch
            cannot be copied from the frame before.
        generator: of the CPU; None: torch's own.

    Returns:
        Masking, on the pack's device.

    Raises:
        ValueError, TypeError: ratios outside [0, 1), an unknown pattern, a pack that has dropped tokens already.

    Source: MAE, arXiv 2111.06377, section 3 (token); VideoMAE, arXiv 2203.12602, section 3.3 (tube).
    """
    check_pack("random_masking", pack)
    checks.choice("random_masking", "pattern", pattern, PATTERNS)
    checks.require(pack.kept is None, "random_masking", "a pack that has dropped nothing yet", "one that has",
                   "choose all tokens in one call")
    ratios = _ratios(ratio, pack.num_samples)
    seen = [_seen(grid, share, pattern, generator) for grid, share in zip(pack.grids, ratios, strict=True)]
    seen_n = torch.cat([torch.zeros(0, dtype=torch.bool, device="cpu"), *seen])
    places = lambda mask: to_device(mask.nonzero()[:, 0], pack.device)
    return Masking(places(seen_n), places(~seen_n), pack.num_tokens)


def _ratios(ratio, samples: int) -> list[float]:
    if isinstance(ratio, torch.Tensor):
        ratio = ratio.tolist()
    ratios = list(ratio) if isinstance(ratio, (tuple, list)) else [ratio] * samples
    if len(ratios) != samples:
        raise ValueError(f"random_masking: expected one ratio, or one for each of {samples} samples, got {len(ratios)}; "
                         f"pass as many as the pack has samples")
    for each in ratios:
        check_ratio("random_masking", each)
    return ratios


def check_ratio(op: str, ratio: float) -> None:
    checks.number(op, "every ratio", ratio)
    if not 0 <= ratio < 1:
        raise ValueError(f"{op}: expected ratios from 0 up to but not including 1, got {ratio}; 0.75 hides three of four "
                         f"tokens")


def _seen(grid, ratio: float, pattern: str, generator) -> torch.Tensor:
    """Which tokens of one sample are visible: (t * h * w,) bool."""
    t, h, w = grid
    places, repeats = (h * w, t) if pattern == "tube" else (t * h * w, 1)
    seen = torch.zeros(places, dtype=torch.bool, device="cpu")
    count = max(1, round((1 - ratio) * places))
    seen[torch.randperm(places, generator=generator, device="cpu")[:count]] = True
    return seen.repeat(repeats)


# ------------------------------------------------------------------------------------------------ dropping rates
def continuous_drop_rates(samples: int, mean: float = 0.5, std: float = 0.15, *,
                          generator: torch.Generator | None = None) -> list[float]:
    """A rate per sample from the Beta distribution of this mean and standard deviation, for ``random_masking``.

    Some samples are then seen whole or nearly so, as at inference, where a constant rate never shows one.
    (NaViT, arXiv 2307.06304, section 2.2, continuous token dropping.)

    Args:
        samples: how many rates.
        mean: of the rates, between 0 and 1.
        std: of the rates.
        generator: of the CPU; None: torch's own.

    Raises:
        ValueError, TypeError: a mean or std that no Beta distribution has.
    """
    for name, value in (("mean", mean), ("std", std)):
        checks.number("continuous_drop_rates", name, value)
    if not (0 < mean < 1 and 0 < std**2 < mean * (1 - mean)):
        raise ValueError(f"continuous_drop_rates: expected a mean between 0 and 1 and a std between 0 and "
                         f"sqrt(mean * (1 - mean)), got {mean} and {std}; for example 0.5 and 0.15")
    weight = mean * (1 - mean) / std**2 - 1  # a + b of Beta(a, b)
    shapes = torch.tensor([[mean * weight], [(1 - mean) * weight]], dtype=torch.float64, device="cpu")
    shapes = shapes.expand(2, samples).contiguous()
    a, b = torch._standard_gamma(shapes, generator=generator)  # torch.distributions takes no generator
    return (a / (a + b)).nan_to_num(mean).clamp(max=_HIGHEST).tolist()


def size_drop_rates(tokens: Sequence[int], shortest: tuple[int, float] = (64, 0.2), longest: tuple[int, float] = (1024, 0.8),
                    *, std: float = 0.02, generator: torch.Generator | None = None) -> list[float]:
    """A rate per sample that grows (or falls) with its size, for ``random_masking``: large samples have tokens to spare.

    The mean is linear in the sample's ``tokens`` between ``shortest`` and ``longest``, pairs of (tokens, rate), and
    constant beyond them; a normal deviation of ``std``, cut off at two of them, is added. ``generator``: of the CPU.
    (NaViT, arXiv 2307.06304, section 2.2, resolution-dependent token dropping; the ends are the caller's.)

    Raises:
        ValueError, TypeError: pairs that do not rise, rates outside [0, 1), a negative std.
    """
    (low, low_rate), (high, high_rate) = shortest, longest
    if not (0 < low < high and 0 <= low_rate < 1 and 0 <= high_rate < 1 and std >= 0):
        raise ValueError(f"size_drop_rates: expected (tokens, rate) pairs with rising tokens and rates in [0, 1), and a std "
                         f"of 0 or more, got {shortest}, {longest} and {std}; for example (64, 0.2), (1024, 0.8) and 0.02")
    share = ((torch.tensor(list(tokens), dtype=torch.float64, device="cpu") - low) / (high - low)).clamp(0, 1)
    noise = torch.zeros_like(share)
    if std:
        nn.init.trunc_normal_(noise, std=std, a=-2 * std, b=2 * std, generator=generator)
    return (low_rate + share * (high_rate - low_rate) + noise).clamp(0, _HIGHEST).tolist()


_HIGHEST = 1 - 2.0**-20  # random_masking takes rates below 1; at least one token stays anyway
