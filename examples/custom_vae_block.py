"""A residual block of your own from sora_fast's layers: causal, fused, and the same whether a clip comes whole or in chunks.

    python examples/custom_vae_block.py
"""

import torch
from torch import nn

from sora_fast.nn import CausalConv3d, RMSNorm, StreamState, norm_act_conv


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C, T, H, W); each norm, SiLU and convolution is one op."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = RMSNorm(channels, act="silu"), CausalConv3d(channels, channels, 3)
        self.norm2, self.conv2 = RMSNorm(channels, act="silu"), CausalConv3d(channels, channels, 3)

    def forward(self, x, state: StreamState | None = None):
        h = norm_act_conv(self.norm1, self.conv1, x, state)
        return norm_act_conv(self.norm2, self.conv2, h, state, residual=x)


def main() -> None:
    torch.manual_seed(0)
    block, clip = ResidualBlock(16), torch.randn(1, 16, 9, 24, 32, requires_grad=True)
    whole = block(clip)
    whole.square().mean().backward()
    print(f"whole clip: {tuple(whole.shape)}, gradient of norm {clip.grad.norm():.2e}")

    state, parts = StreamState(), []
    with torch.no_grad():
        for chunk in clip.split([1, 4, 4], dim=2):
            parts.append(block(chunk, state))
    difference = (torch.cat(parts, dim=2) - whole).abs().max()
    print(f"in chunks of 1, 4 and 4 frames: largest difference {difference:.1e}, {state.nbytes / 1e6:.2f} MB remembered")


if __name__ == "__main__":
    main()
