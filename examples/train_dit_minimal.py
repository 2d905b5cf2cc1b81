"""A video DiT trained and sampled in one file: media from a folder, VAE, packs of mixed sizes, flow matching.

    python examples/train_dit_minimal.py path/to/media --steps 200 --out out/minimal

Captions are `name.txt` beside each file. `sora-fast train` does the same with checkpoints, resume and many GPUs.
"""

import argparse
from pathlib import Path

import torch

from sora_fast.data import FitPolicy, read_clip, scan, to_pixels, to_uint8, write_image, write_video
from sora_fast.diffusion import FlowMatching, generate, training_loss
from sora_fast.models import ByteTextEncoder, DiT, VideoVAE


def train_vae(vae, clips, steps: int) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=7e-4)
    for step in range(steps):
        clip = clips[step % len(clips)]                                    # (1, 3, T, H, W): one size a step
        reconstruction, kl = vae(clip)
        loss = (reconstruction - clip).abs().mean() + 1e-6 * kl.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"VAE step {step + 1} of {steps}: loss {loss.item():.3f}")


def train_dit(dit, text, objective, latents, captions, steps: int) -> None:
    optimizer = torch.optim.AdamW([*dit.parameters(), *text.parameters()], lr=1e-3)
    for step in range(steps):
        dropped = ["" if (step + i) % 10 == 0 else caption for i, caption in enumerate(captions)]  # for guidance
        loss = training_loss(dit, objective, latents, text=text(dropped))  # clips and images of any size in one pack
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        print(f"DiT step {step + 1} of {steps}: loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("media", help="folder of clips and images")
    parser.add_argument("--steps", type=int, default=200, help="of the VAE and of the DiT")
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--short-side", type=int, default=64, help="pixels")
    parser.add_argument("--out", type=Path, default=Path("out/minimal"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    policy = FitPolicy(short_side=arguments.short_side, max_frames=9)
    items, clips = scan(arguments.media).items, []
    for item in items:
        frames, height, width = policy.fit_item(item)
        clip = read_clip(item, frames=frames, fps=policy.read_fps(item.fps) or None, size=(height, width))
        clips.append(to_pixels(clip)[None].to(device))

    vae = VideoVAE.preset("tiny").to(device)
    train_vae(vae, clips, arguments.steps)
    with torch.no_grad():
        latents = [vae.encode(clip)[0] for clip in clips]

    dit, text, objective = DiT.preset("tiny").to(device), ByteTextEncoder(128).to(device), FlowMatching()
    train_dit(dit, text, objective, latents, [item.caption for item in items], arguments.steps)

    prompts = [item.caption for item in items[:2]]
    sizes = [latent.shape for latent in latents[:2]]                       # the size of the noise is that of the sample
    samples = generate(dit.eval(), objective, sizes, patch=dit.config.patch, steps=arguments.sampling_steps,
                       guidance=3.0, device=device,
                       condition=lambda null: dict(text=text([""] * len(prompts) if null else prompts)))
    for place, sample in enumerate(samples):
        with torch.no_grad():
            frames = to_uint8(vae.decode(sample[None])[0].cpu())
        path = arguments.out / f"{place}.{'mp4' if len(frames) > 1 else 'png'}"
        print("wrote", write_video(path, frames, 8) if len(frames) > 1 else write_image(path, frames[0]))


if __name__ == "__main__":
    main()
