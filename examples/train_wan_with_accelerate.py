"""Train a Wan-type transformer with Hugging Face's `accelerate` library, plain and with sora_fast's layers: equal losses.

    python examples/train_wan_with_accelerate.py

A tiny random model on random latents, on whatever device there is; a CPU takes seconds. `accelerate launch` runs it on
several. The two libraries share a word: `Accelerator` is Hugging Face's, `sora_fast.accelerate` replaces layers.
"""

import argparse
import copy

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel

import sora_fast

TINY = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16,
            text_dim=64, freq_dim=64, ffn_dim=128, num_layers=2)


def train(model, steps: int) -> list[float]:
    """Losses of ``steps`` steps of rectified flow, the same noise every time."""
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    generator, losses = torch.Generator().manual_seed(0), []
    draw = lambda *shape: torch.randn(shape, generator=generator).to(accelerator.device)
    clean, text = draw(2, 16, 5, 8, 12), draw(2, 32, 64)  # two clips of 5 x 8 x 12 latents, 32 text tokens each
    for _ in range(steps):
        share, noise = torch.rand(2, generator=generator).to(accelerator.device), draw(*clean.shape)
        noisy = torch.lerp(clean, noise, share[:, None, None, None, None])
        velocity = model(noisy, 1000 * share, text, return_dict=False)[0]
        loss = (velocity - (noise - clean)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    plain = WanTransformer3DModel(**TINY)
    fast = copy.deepcopy(plain)
    print(sora_fast.accelerate(fast))
    for step, (a, b) in enumerate(zip(train(plain, steps), train(fast, steps), strict=True), 1):
        print(f"step {step:2}: loss {a:.6f} plain, {b:.6f} with sora_fast")
        if abs(a - b) > 1e-4 * a:
            raise SystemExit(f"step {step}: the losses differ by {abs(a - b) / a:.1e}")
    print("equal losses")


if __name__ == "__main__":
    main()
