"""PatchEmbed3d: spacetime patches to tokens."""

from torch import nn

from .. import checks, ops
from ..other_names import Named


class PatchEmbed3d(nn.Module, Named):
    """Patches of (pt, ph, pw) pixels to tokens of ``width``; ``proj`` has the state_dict of the Conv3d it replaces.

    Args:
        channels: C of the latents.
        width: D of the tokens.
        patch: (pt, ph, pw).
        bias: whether there is one, (D,).

    Raises:
        ValueError, TypeError: a patch that is not three ints of 1 or more.
    """

    def __init__(self, channels: int, width: int, patch=(1, 2, 2), bias: bool = True):
        super().__init__()
        checks.several("PatchEmbed3d", "patch", patch, "pt, ph, pw", 1)
        self.patch = tuple(patch)
        self.proj = nn.Conv3d(channels, width, self.patch, self.patch, bias=bias)
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))

    def forward(self, latents, grids=None):
        """Latents as ``ops.patch_embed`` takes them (batch, list, or flat buffer with ``grids``) -> tokens (N, D)."""
        return ops.patch_embed(latents, self.proj.weight, self.proj.bias, grids=grids)
