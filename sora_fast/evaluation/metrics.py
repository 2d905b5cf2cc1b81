"""Figures of merit between clips, and between sets of features.

Shapes: T frames, H lines, W columns, C colours. A clip is (T, H, W, C): uint8 in 0..255, as ``read_clip`` and ``to_uint8``
give it, or floating; of floats ``peak`` says how far the largest value is from the smallest, 2 for [-1, 1], which models
use. (Pixels of a model are (C, T, H, W): ``pixels.permute(1, 2, 3, 0)``.) Everything is computed in float64.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

WINDOW = 7  # of SSIM, lines and columns


def _checked(op: str, got: torch.Tensor, real: torch.Tensor, peak: float | None) -> float:
    """The range of the values of two clips; one sentence where they cannot be compared."""
    if got.shape != real.shape or got.dim() != 4 or not got.numel():
        raise ValueError(f"{op}: expected two clips (T, H, W, C) of one size, got {tuple(got.shape)} and "
                         f"{tuple(real.shape)}; crop them to what both hold")
    if got.dtype != real.dtype or not (got.dtype == torch.uint8 or got.is_floating_point()):
        raise TypeError(f"{op}: expected two uint8 or two floating clips of one dtype, got {got.dtype} and {real.dtype}; "
                        f"to_uint8 and to_pixels convert")
    peak = peak or (255.0 if got.dtype == torch.uint8 else 2.0)
    if not peak > 0:
        raise ValueError(f"{op}: expected peak above 0, got {peak:g}; it is the largest value less the smallest")
    return peak


def decibels(squared_error: float, peak: float) -> float:
    """PSNR of a mean squared error; inf for none."""
    return math.inf if squared_error == 0 else 10 * math.log10(peak * peak / squared_error)


def _squared(got, real) -> torch.Tensor:
    return (got.double() - real.double()).square()


def psnr(got: torch.Tensor, real: torch.Tensor, *, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB over all elements of two clips (T, H, W, C); inf where they are equal."""
    peak = _checked("psnr", got, real, peak)
    return decibels(float(_squared(got, real).mean()), peak)


def temporal_psnr(got: torch.Tensor, real: torch.Tensor, *, peak: float | None = None) -> float:
    """PSNR in dB of the differences of neighbouring frames, against the same ``peak``: flicker and lost motion show here,
    a constant error does not. nan for one frame."""
    peak = _checked("temporal_psnr", got, real, peak)
    if len(got) < 2:
        return math.nan
    error = got.double() - real.double()
    return decibels(float(error.diff(dim=0).square().mean()), peak)


def ssim(got: torch.Tensor, real: torch.Tensor, *, peak: float | None = None) -> torch.Tensor:
    """Structural similarity (T,) float64 of each frame of two clips (T, H, W, C), at most 1.

    Wang et al. 2004 (IEEE TIP 13-4), as scikit-image computes it by default: windows of 7 x 7, uniform, that lie within the
    frame, sample covariance, K1 = 0.01, K2 = 0.03, the mean over windows and colours. Frames of at least 7 x 7.
    """
    peak = _checked("ssim", got, real, peak)
    if min(got.shape[1:3]) < WINDOW:
        raise ValueError(f"ssim: expected frames of at least {WINDOW} x {WINDOW}, got {got.shape[1]} x {got.shape[2]}; "
                         f"smaller ones have no window")
    return torch.stack([_ssim(a.permute(2, 0, 1).double(), b.permute(2, 0, 1).double(), peak)
                        for a, b in zip(got, real, strict=True)])


def _ssim(x_CHW, y_CHW, peak: float) -> torch.Tensor:
    """Of one frame: a clip in float64 would take eight times its memory, several times over."""
    over = lambda values: F.avg_pool2d(values[None], WINDOW, stride=1)[0]
    x, y = over(x_CHW), over(y_CHW)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    xx, yy = sample * (over(x_CHW.square()) - x * x), sample * (over(y_CHW.square()) - y * y)
    xy = sample * (over(x_CHW * y_CHW) - x * y)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    return ((2 * x * y + c1) * (2 * xy + c2) / ((x * x + y * y + c1) * (xx + yy + c2))).mean()


# ------------------------------------------------------------------------------------------------ part by part
@dataclass(frozen=True)
class Quality:
    """How near one clip is to another, over ``frames`` frames.

    psnr, temporal_psnr and worst_psnr (of the worst frame, number ``worst_frame``) in dB, inf where nothing differs; ssim:
    the mean over frames. temporal_psnr is nan of single frames, ssim of frames below 7 x 7.
    """

    frames: int
    psnr: float
    ssim: float
    temporal_psnr: float
    worst_psnr: float
    worst_frame: int


class ClipQuality:
    """``Quality`` of a clip that comes in parts: ``add`` them in order. Memory is that of a part and a number per frame.

    Those of several clips of one ``peak`` may be added (``+``): the figures over all their elements and frames.
    """

    def __init__(self, peak: float | None = None):
        self.peak = peak
        self.errors: list[float] = []  # mean square of each frame
        self.error, self.steps, self.similarity = [0.0, 0], [0.0, 0], [0.0, 0]  # a sum, and of how many
        self._last = None  # error of the last frame

    def add(self, got: torch.Tensor, real: torch.Tensor) -> None:
        """The next frames of both, (T, H, W, C); of any number, none included."""
        if got.shape == real.shape and not len(got):
            return
        self.peak = _checked("ClipQuality", got, real, self.peak)
        if min(got.shape[1:3]) >= WINDOW:
            _count(self.similarity, float(ssim(got, real, peak=self.peak).sum()), len(got))
        for a, b in zip(got, real, strict=True):  # float64 of one frame at a time
            error = a.double() - b.double()
            if self._last is not None:
                _count(self.steps, float((error - self._last).square().sum()), error.numel())
            squares = float(error.square().sum())
            _count(self.error, squares, error.numel())
            self.errors.append(squares / error.numel())
            self._last = error

    def __add__(self, other: "ClipQuality") -> "ClipQuality":
        if None not in (self.peak, other.peak) and self.peak != other.peak:
            raise ValueError(f"ClipQuality: expected clips of one peak, got {self.peak:g} and {other.peak:g}; convert one")
        total = ClipQuality(self.peak or other.peak)
        total.errors = self.errors + other.errors
        for each in (self, other):
            for name in ("error", "steps", "similarity"):
                _count(getattr(total, name), *getattr(each, name))
        return total

    @property
    def frame_psnr(self) -> list[float]:
        """PSNR in dB of each frame."""
        return [decibels(error, self.peak) for error in self.errors]

    def result(self) -> Quality:
        if not self.errors:
            raise ValueError("ClipQuality: expected at least one frame, got none; add them first")
        mean = lambda pair: pair[0] / pair[1] if pair[1] else math.nan
        steps = decibels(mean(self.steps), self.peak) if self.steps[1] else math.nan
        worst = max(range(len(self.errors)), key=self.errors.__getitem__)
        return Quality(len(self.errors), decibels(mean(self.error), self.peak), mean(self.similarity), steps,
                       decibels(self.errors[worst], self.peak), worst)


def _count(pair: list, value: float, of: int) -> None:
    pair[0] += value
    pair[1] += of


# ------------------------------------------------------------------------------------------------ sets
def frechet(got: torch.Tensor, real: torch.Tensor) -> float:
    """Frechet distance (squared) between Gaussians with the means and covariances of two sets of features, at least 0.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Dowson and Landau 1982; of Inception features: FID, arXiv 1706.08500).

    Args:
        got, real: (N, D) and (M, D), floating, N and M of 2 or more. Below D samples the covariances are singular and the
            distance says more about the number of samples than about the sets.

    With centred features A and B over the roots of N - 1 and M - 1, C1 C2 has the non-zero eigenvalues of (A B^T)(A B^T)^T,
    so the trace of its root is the sum of A B^T's singular values: no root of a matrix is taken, nothing complex comes
    out, and singular covariances cost nothing. Both are first reduced to D rows by QR where they have more.
    """
    for name, features in (("got", got), ("real", real)):
        if features.dim() != 2 or features.shape[0] < 2 or not features.is_floating_point():
            raise ValueError(f"frechet: expected {name} as floating features (N, D) of 2 samples or more, got "
                             f"{features.dtype} of {tuple(features.shape)}; collect them first")
        if not torch.isfinite(features).all():
            raise ValueError(f"frechet: expected finite features, got nan or inf in {name}; look at the function that made "
                             f"them")
    if got.shape[1] != real.shape[1]:
        raise ValueError(f"frechet: expected features of one width, got {got.shape[1]} and {real.shape[1]}; take both from "
                         f"one function")
    means, roots = [], []
    for features in (got.double(), real.double()):
        mean = features.mean(0)
        root = (features - mean) / math.sqrt(features.shape[0] - 1)
        means.append(mean)
        roots.append(torch.linalg.qr(root, mode="r")[1] if root.shape[0] > root.shape[1] else root)
    a, b = roots
    spread = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float((means[0] - means[1]).square().sum() + spread))
