"""PatchDiscriminator: which parts of a clip look real. (PatchGAN: arXiv 1611.07004; for latent diffusion: 2112.10752.)"""

from torch import nn
from torch.nn import functional as F

from ..nn import CausalConv3d, GroupNorm


class PatchDiscriminator(nn.Module):
    """(B, 3, T, H, W) in [-1, 1] -> (B, 1, t, h, w): large where a patch looks real. Images are clips of one frame.

    Each output judges 38 x 38 pixels and what was before them in time, apart from the norms, which see the whole clip; so
    clips of any length and size are judged. The norms keep no running averages, in which real and made clips would mix.
    """

    def __init__(self, width: int = 32, levels: int = 3):
        super().__init__()
        self.stem = CausalConv3d(3, width, (1, 4, 4), stride=(1, 2, 2), padding=(1, 1, 1, 1))
        self.levels, channels = nn.ModuleList(), width
        for level in range(1, levels):
            wider = width * 2**level
            self.levels.append(nn.ModuleList([
                CausalConv3d(channels, wider, (3, 4, 4), stride=(1, 2, 2), padding=(1, 1, 1, 1), time_pad="replicate"),
                GroupNorm(min(8, wider), wider)]))
            channels = wider
        self.head = CausalConv3d(channels, 1, 3, time_pad="replicate")

    def forward(self, video):
        x = F.leaky_relu(self.stem(video), 0.2)
        for conv, norm in self.levels:
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.head(x)
