"""adaLN-Zero parts. (DiT: arXiv 2212.09748, section 3.2.) R modulation rows, D width, N tokens."""

from typing import NamedTuple

import torch
from torch import nn

from .. import checks, ops
from ..other_names import Named
from ..pack import Pack


class Residual(NamedTuple):
    """A residual stream ``x`` (N, D) and its last branch, ``gate`` (R, D) times ``y`` (N, D), not yet added.

    The addition is fused with the next norm and its modulation, even if that norm is the next block's.

    Args:
        x: (N, D), the stream.
        y: (N, D), the output of the last branch, or None.
        gate: (R, D), its gate, or None.

    >>> pack, (shift, scale, gate) = Pack([(2, 4, 4), (1, 2, 4)]), torch.randn(3, 2, 64)
    >>> layer, stream = torch.nn.Linear(64, 64), Residual(torch.randn(40, 64))
    >>> x, h = stream.norm_modulate(shift, scale, pack)
    >>> stream = Residual(x, layer(h), gate)        # x + gate[rows] * layer(h), added by the next norm
    >>> stream.joined(pack).shape
    torch.Size([40, 64])
    """

    x: torch.Tensor
    y: torch.Tensor | None = None
    gate: torch.Tensor | None = None

    def norm_modulate(self, shift, scale, rows: torch.Tensor | Pack):
        """Adds the branch; returns the stream, and its modulated norm for the next layer.

        shift, scale (R, D); ``rows`` (N,) or the Pack of the N tokens.
        """
        if self.y is None:  # under autocast the stream is float32, and the layers work in the modulation's 16 bits
            dtype = shift.dtype if isinstance(shift, torch.Tensor) else None
            return self.x, ops.norm_modulate(self.x, shift, scale, rows, dtype=dtype)
        return ops.gate_residual_norm_modulate(self.x, self.y, self.gate, shift, scale, rows)

    def joined(self, rows: torch.Tensor | Pack):
        """Adds the branch: the stream (N, D); ``rows`` as in ``norm_modulate``."""
        return self.x if self.y is None else ops.gate_residual(self.x, self.y, self.gate, rows)


def check_stream(op: str, stream: Residual) -> None:
    """Check that a layer that adds a branch gets a Residual, not the tokens alone."""
    if not isinstance(stream, Residual):
        raise TypeError(f"{op}: expected a Residual stream, got {checks.came(stream)}; pass Residual(x) for tokens x (N, D)")


class Modulation(nn.Sequential, Named):
    """``Linear(SiLU(c))`` to ``parts`` modulation vectors, zero-initialised: gates, scales and shifts are 0.

    Args:
        width: D.
        parts: how many modulation vectors.

    Raises:
        ValueError, TypeError: parts below 1.
    """

    def __init__(self, width: int, parts: int):
        checks.whole("Modulation", "parts", parts, 1)
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts
        nn.init.zeros_(self[1].weight)
        nn.init.zeros_(self[1].bias)

    def forward(self, c):
        """c (R, D) -> ``parts`` strided views (R, D)."""
        return super().forward(c).chunk(self.parts, dim=-1)


class FinalLayer(nn.Module, Named):
    """Modulated norm and a projection to a patch's elements, zero-initialised.

    Args:
        width: D.
        numbers: elements of a patch, pt * ph * pw * C.

    Raises:
        TypeError, when called: tokens alone, and no Residual.
    """

    def __init__(self, width: int, numbers: int):
        super().__init__()
        self.linear = nn.Linear(width, numbers)
        self.adaLN_modulation = Modulation(width, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, stream: Residual, c, rows: torch.Tensor | Pack):
        """The residual stream (N, D), c (R, D), rows (N,) or the Pack of the N tokens -> (N, numbers)."""
        check_stream("FinalLayer", stream)
        _, h = stream.norm_modulate(*self.adaLN_modulation(c), rows)
        return self.linear(h)
