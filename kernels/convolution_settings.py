"""What of a causal convolution is no tensor: one object from the public op to the launch. Neither torch nor Triton."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvSettings:
    """As in ``sora_fast.ops.norm_act_conv3d``, all given in full; ``norm`` is None where only a convolution is wanted."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int, int]
    time_pad: str
    space_pad: str
    phase: int
    lookahead: int
    upsample: int
    return_cache: bool = False
    norm: str | None = None
    groups: int = 1
    eps: float = 0.0
    act: str | None = None

    # Of an operator of PyTorch: all but the kernel, which its weight shows.
    SCHEMA = ("int[] stride, int[] padding, str time_pad, str space_pad, SymInt phase, int lookahead, int upsample, "
              "bool return_cache, str? norm, int groups, float eps, str? act")

    @classmethod
    def of(cls, weight, *values) -> "ConvSettings":
        """From ``values``, in the order of SCHEMA."""
        return cls(tuple(weight.shape[2:]), tuple(values[0]), tuple(values[1]), *values[2:])

    @property
    def values(self) -> tuple:
        # each by its name: torch.compile of PyTorch 2.11 does not go through vars()
        return (self.stride, self.padding, self.time_pad, self.space_pad, self.phase, self.lookahead, self.upsample,
                self.return_cache, self.norm, self.groups, self.eps, self.act)

    @property
    def of_convolution(self) -> dict:
        return dict(stride=self.stride, padding=self.padding, time_pad=self.time_pad, space_pad=self.space_pad,
                    phase=self.phase, lookahead=self.lookahead, upsample=self.upsample)

    @property
    def of_norm(self) -> dict:
        return dict(norm=self.norm, groups=self.groups, eps=self.eps, act=self.act)

    @property
    def keep(self) -> int:
        """Frames of cache_out, or as many as there are; 0: none is made."""
        return self.kernel[0] - 1 if self.return_cache else 0

    @property
    def pads_with_zeros(self) -> bool:
        return self.space_pad == "zeros" or not any(self.padding)

    @property
    def repeats_pixels(self) -> bool:
        """Whether a pixel stands in places that do not share their taps: its gradients there are added up in memory."""
        return not self.pads_with_zeros or self.upsample > 1 and max(self.stride[1:]) > 1

    def out_sizes(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """T', H', W' of the output."""
        left, right, top, bottom = self.padding
        (_, kh, kw), (st, sh, sw), u = self.kernel, self.stride, self.upsample
        return (max(0, -(-(frames - self.phase) // st)), (u * height + top + bottom - kh) // sh + 1,
                (u * width + left + right - kw) // sw + 1)
