"""The size and length at which clips and images are read, and conversion of pixels to and from model inputs.

Shapes: T frames, H lines, W columns, C = 3 channels (red, green, blue). An image is a clip of one frame.
`FitPolicy` is pure arithmetic on host numbers; the same numbers in give the same (T, H, W) out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FitPolicy:
    """How items are cut to sizes a model takes: native aspect, never enlarged, a bounded number of tokens.

    Args:
        short_side: pixels of the shorter side; smaller items keep their own.
        fps: frames per second to read at; None reads every frame. A slower clip keeps its own rate, since repeating frames
            to reach a higher one would teach a model to stutter.
        max_frames: upper limit of T.
        space_multiple: H and W are rounded down to multiples of it, and are at least one of it. (Only where a side is
            shorter than one multiple is a picture enlarged.)
        time_factor: T is ``time_factor * k + 1``, the lengths a causal VAE of that time factor takes.
        max_tokens: upper limit of ``tokens(T, H, W)``, or None: first the clip is shortened, down to one frame, then the
            picture is made smaller.
        token_pixels: frames, height and width of pixels under one token, each a divisor of time_factor or space_multiple;
            None is (time_factor, space_multiple, space_multiple). The first frame has tokens of its own.

    Raises:
        ValueError: sizes below 1, or that do not divide each other.
    """

    short_side: int = 256
    fps: float | None = 8.0
    max_frames: int = 17
    space_multiple: int = 16
    time_factor: int = 4
    max_tokens: int | None = None
    token_pixels: tuple[int, int, int] | None = None

    def __post_init__(self):
        for name in ("short_side", "max_frames", "space_multiple", "time_factor"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"FitPolicy: {name} must be a whole number of at least 1, got {value!r}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(
                f"FitPolicy: fps must be above 0, or None for the clip's own rate, got {self.fps!r}"
            )
        t, h, w = self._token
        if min(t, h, w) < 1 or self.time_factor % t or self.space_multiple % h or self.space_multiple % w:
            raise ValueError(
                f"FitPolicy: token_pixels (t, h, w) must divide time_factor {self.time_factor} and "
                f"space_multiple {self.space_multiple}, got {self._token}; choose divisors"
            )
        least = self.tokens(1, self.space_multiple, self.space_multiple)
        if self.max_tokens is not None and self.max_tokens < least:
            raise ValueError(
                f"FitPolicy: max_tokens must be at least {least}, the tokens of the smallest picture "
                f"({self.space_multiple} x {self.space_multiple}), got {self.max_tokens}"
            )

    @property
    def _token(self) -> tuple[int, int, int]:
        # Resolved on use: dataclasses.replace(policy, space_multiple=32) must move the default with it.
        return self.token_pixels or (self.time_factor, self.space_multiple, self.space_multiple)

    def tokens(self, T: int, H: int, W: int) -> int:
        """Tokens of a fitted clip: (1 + (T - 1) / t) * (H / h) * (W / w) with token_pixels (t, h, w)."""
        t, h, w = self._token
        return (1 + (T - 1) // t) * (H // h) * (W // w)

    def read_fps(self, native_fps: float) -> float:
        """Frames per second to read a clip at, for `read_clip(fps=...)`: `fps`, but never above the clip's
        own."""
        return native_fps if self.fps is None else min(float(self.fps), native_fps)

    def fit(
        self, width: int, height: int, seconds: float = 0.0, native_fps: float = 0.0
    ) -> tuple[int, int, int]:
        """(T, H, W) to read an item at: frames, lines, columns.

        width, height: the picture as displayed, in pixels. seconds, native_fps: the clip's length and rate; 0
        for an image. H x W is at most the picture, in its aspect up to the rounding; the rest is cropped by
        `read_clip`.
        """
        if width < 1 or height < 1:
            raise ValueError(
                f"FitPolicy.fit: width and height must be at least 1 pixel, got {width} x {height}"
            )
        T = self._frames(seconds, native_fps)
        short = min(self.short_side, width, height)
        H, W = self._picture(width, height, short)
        limit = self.max_tokens
        if limit is None or self.tokens(T, H, W) <= limit:
            return T, H, W
        while T > 1 and self.tokens(T, H, W) > limit:
            T -= self.time_factor
        if self.tokens(1, H, W) > limit:
            # Tokens never fall as the short side grows, so the largest side within the limit is found by
            # bisection.
            sides = range(1, short + 1)
            fitting = bisect_right(
                sides, limit, key=lambda side: self.tokens(1, *self._picture(width, height, side))
            )
            H, W = self._picture(width, height, max(fitting, 1))
            # A strip so long that even one line of it is too much is cropped.
            while self.tokens(1, H, W) > limit:
                H, W = (H, W - self.space_multiple) if W > H else (H - self.space_multiple, W)
        return T, H, W

    def fit_item(self, item) -> tuple[int, int, int]:
        """`fit` of a `MediaItem`."""
        return self.fit(item.width, item.height, item.seconds, item.fps)

    def latest_start(self, T: int, seconds: float, native_fps: float) -> float:
        """Seconds into the clip at which the last window of T frames begins; windows start anywhere in [0,
        this]."""
        if T == 1 or native_fps <= 0:
            return 0.0
        return max(0.0, seconds - 1 / native_fps - (T - 1) / self.read_fps(native_fps))

    def _frames(self, seconds: float, native_fps: float) -> int:
        """The longest time_factor * k + 1 frames within the clip and max_frames."""
        if seconds <= 0 or native_fps <= 0:
            return 1
        # The last frame begins one native frame before the end. The small term keeps float error (10 * 0.1 s
        # read at 10 a second) from costing a frame.
        last = seconds - 1 / native_fps
        held = 1 + math.floor(max(0.0, last * self.read_fps(native_fps)) + 1e-6)
        return (min(held, self.max_frames) - 1) // self.time_factor * self.time_factor + 1

    def _picture(self, width: int, height: int, short: int) -> tuple[int, int]:
        """(H, W) for a short side of `short` pixels: native aspect, each rounded down to a legal size."""
        native = min(width, height)
        return tuple(
            max(self.space_multiple, side * short // native // self.space_multiple * self.space_multiple)
            for side in (height, width)
        )


@dataclass(frozen=True)
class Placement:
    """Where a window of (H, W) lies in a picture that is first resized to (lines, columns); all in pixels."""

    lines: int
    columns: int
    top: int
    left: int
    H: int
    W: int

    @classmethod
    def of(cls, width: int, height: int, size=None, crop="center", rng=None) -> Placement:
        """For a picture of width x height: resized in its aspect to just cover `size` (H, W), then cropped.

        size: None is the picture itself. crop: "center", "random" (rng: a random.Random) or (top, left).
        """
        H, W = size or (height, width)
        if H < 1 or W < 1:
            raise ValueError(f"read_clip: size (H, W) must be at least 1 pixel each way, got {size}")
        scale = max(H / height, W / width)
        lines, columns = max(H, round(height * scale)), max(W, round(width * scale))
        if crop == "center":
            top, left = (lines - H) // 2, (columns - W) // 2
        elif crop == "random" and rng is not None:
            top, left = rng.randint(0, lines - H), rng.randint(0, columns - W)
        elif not isinstance(crop, str) and 0 <= crop[0] <= lines - H and 0 <= crop[1] <= columns - W:
            top, left = crop
        else:
            raise ValueError(
                f'read_clip: crop must be "center", "random" with rng=random.Random(seed), or (top, left) '
                f"within ({lines - H}, {columns - W}), got {crop!r} with rng={rng}"
            )
        return cls(lines, columns, top, left, H, W)

    def cut(self, picture_HWC: torch.Tensor) -> torch.Tensor:
        """uint8 (any, any, 3) -> uint8 (H, W, 3), contiguous: antialiased bicubic, then the window."""
        if picture_HWC.shape[:2] != (self.lines, self.columns):
            picture_1CHW = torch.nn.functional.interpolate(
                picture_HWC.permute(2, 0, 1)[None],
                (self.lines, self.columns),
                mode="bicubic",
                antialias=True,
                align_corners=False,
            )
            picture_HWC = picture_1CHW[0].permute(1, 2, 0)
        return picture_HWC[self.top : self.top + self.H, self.left : self.left + self.W].contiguous()


def to_pixels(clip_THWC: torch.Tensor) -> torch.Tensor:
    """``clip_THWC``, uint8 (T, H, W, 3) in 0..255 -> float32 (3, T, H, W) in [-1, 1], contiguous, on the same device.

    Raises:
        ValueError: another dtype or shape.
    """
    if clip_THWC.dtype != torch.uint8 or clip_THWC.ndim != 4 or clip_THWC.shape[-1] != 3:
        raise ValueError(
            f"to_pixels: the clip must be uint8 of shape (T, H, W, 3), got {clip_THWC.dtype} of shape "
            f"{tuple(clip_THWC.shape)}; read_clip returns that form"
        )
    return (
        clip_THWC.permute(3, 0, 1, 2)
        .to(torch.float32, memory_format=torch.contiguous_format)
        .div_(127.5)
        .sub_(1)
    )


def to_uint8(pixels_CTHW: torch.Tensor) -> torch.Tensor:
    """``pixels_CTHW``, float (3, T, H, W) -> uint8 (T, H, W, 3), rounded, values beyond [-1, 1] clamped; `to_pixels` undone
    exactly.

    Raises:
        ValueError: another shape, whole numbers, and NaN, which has no colour.
    """
    if not pixels_CTHW.is_floating_point() or pixels_CTHW.ndim != 4 or pixels_CTHW.shape[0] != 3:
        raise ValueError(
            f"to_uint8: pixels must be a floating tensor of shape (3, T, H, W), got {pixels_CTHW.dtype} of "
            f"shape {tuple(pixels_CTHW.shape)}; take one sample of a batch"
        )
    levels_CTHW = pixels_CTHW.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    if torch.isnan(levels_CTHW).any():
        raise ValueError("to_uint8: pixels must be numbers, got NaN; look for the layer that made them")
    return levels_CTHW.to(torch.uint8).permute(1, 2, 3, 0).contiguous()
