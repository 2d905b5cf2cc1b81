"""adaLN-Zero parts. (DiT: arXiv 2212.09748, section 3.2.) R modulation rows, D width, N tokens."""

from torch import nn

from .. import ops


class Modulation(nn.Sequential):
    """``Linear(SiLU(c))`` to ``parts`` rows of modulation, zero at the start: gates closed, scales and shifts 0."""

    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts
        nn.init.zeros_(self[1].weight)
        nn.init.zeros_(self[1].bias)

    def forward(self, c):
        """c (R, D) -> ``parts`` strided views (R, D)."""
        return super().forward(c).chunk(self.parts, dim=-1)


class FinalLayer(nn.Module):
    """Modulated norm and a projection to a patch's numbers, zero at the start."""

    def __init__(self, width: int, numbers: int):
        super().__init__()
        self.linear = nn.Linear(width, numbers)
        self.adaLN_modulation = Modulation(width, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, c, rows):
        """x (N, D), c (R, D), rows (N,) -> (N, numbers)."""
        shift, scale = self.adaLN_modulation(c)
        return self.linear(ops.norm_modulate(x, shift, scale, rows))
