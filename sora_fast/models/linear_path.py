"""A linear codec of pixel blocks, around the network of a small VideoVAE.

B batch, C channels, T frames, H height, W width; t, h, w of the latents.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..nn import CausalConv3d
from ..nn.streaming import renew, starts


class Fold(nn.Module):
    """The pixels of each latent's own block of frames, lines and columns as channels.

    The first frame stands for a block of equal frames, so that an image is a clip at rest.
    """

    def __init__(self, time: int, f: int):
        super().__init__()
        self.time, self.f = time, f

    def forward(self, x, state):
        waiting = x[:, :, :1].expand(-1, -1, self.time - 1, -1, -1) if starts(self, x, state) else state.get(self)
        x = torch.cat([waiting, x], dim=2)
        whole = x.shape[2] // self.time * self.time
        if state is not None:
            old = state.get(self)  # True after the first chunk's start
            state.set(self, renew(old if isinstance(old, torch.Tensor) else None, x[:, :, whole:].clone()))
        t, h, w = whole // self.time, x.shape[3] // self.f, x.shape[4] // self.f
        batch, channels = x.shape[:2]
        x = x[:, :, :whole].reshape(batch, channels, t, self.time, h, self.f, w, self.f)
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(batch, channels * self.time * self.f**2, t, h, w)


class Unfold(nn.Module):
    """Channels back to blocks of pixels; the first block gives its last frame only."""

    def __init__(self, time: int, f: int):
        super().__init__()
        self.time, self.f = time, f

    def forward(self, x, state):
        drop = self.time - 1 if starts(self, x, state) else 0
        batch, _, t, h, w = x.shape
        x = x.reshape(batch, -1, self.time, self.f, self.f, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(batch, -1, t * self.time, h * self.f, w * self.f)[:, :, drop:]


class LinearPath(nn.Module):
    """A linear codec around the whole network: blocks of pixels straight to the latent's mean, and back.

    Set to the principal components of some blocks (``start``), it is a fair codec before the first step, and the network
    learns what it leaves. The state_dict holds ``down`` and ``up``, 1x1x1 convolutions.
    """

    def __init__(self, channels: int, latent_channels: int, time: int, f: int):
        super().__init__()
        block = channels * time * f * f
        self.fold, self.unfold = Fold(time, f), Unfold(time, f)
        self.down, self.up = CausalConv3d(block, latent_channels, 1), CausalConv3d(latent_channels, block, 1)

    @torch.no_grad()
    def start(self, videos: Iterable[torch.Tensor]) -> None:
        """Principal components of the blocks of ``videos`` (B, C, T, H, W), on one scale that gives latents unit variance.

        One scale for all: an error of the same size costs the same in pixels whichever component it is in.
        """
        blocks = torch.cat([self.fold(video, None).transpose(0, 1).flatten(1) for video in videos], dim=1).double()
        mean = blocks.mean(dim=1, keepdim=True)
        values, vectors = torch.linalg.eigh((blocks - mean) @ (blocks - mean).t() / blocks.shape[1])
        count = self.down.out_channels
        basis, scale = vectors[:, -count:].flip(1), values[-count:].mean().clamp(min=1e-8).sqrt()
        self.down.weight.copy_(basis.t()[:, :, None, None, None] / scale)
        self.down.bias.copy_(-(basis.t() @ mean)[:, 0] / scale)
        self.up.weight.copy_(basis[:, :, None, None, None] * scale)
        self.up.bias.copy_(mean[:, 0])
