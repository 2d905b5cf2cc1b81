"""sora-fast generate."""

from pathlib import Path

import torch

from ..data import to_uint8, write_image, write_video
from ..data.frames import bar
from ..diffusion import generate
from ..models import VideoVAE
from ..training.dit import Generator, load_run
from ..training.loop import pick_device
from ..training.progress import Progress


def parse_size(text: str, vae: VideoVAE, patch) -> tuple[int, int, int]:
    """``TxHxW`` in pixels, checked against what the VAE and the patch take."""
    try:
        frames, height, width = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise ValueError(f"--size: expected TxHxW such as 9x96x160, got {text!r}; give frames, lines, columns") from None
    f, step = vae.config.space_factor, vae.config.time_factor
    for name, size, unit, first in (("frames", frames, step * patch[0], 1), ("lines", height, f * patch[1], 0),
                                    ("columns", width, f * patch[2], 0)):
        if size < 1 or (size - first) % unit:
            low = (max(size, 1) - first) // unit * unit + first
            near = f"{low} or {low + unit}" if low > 0 else f"{low + unit}"
            raise ValueError(f"--size: expected {name} as {f'1 + {unit} k' if first else f'a multiple of {unit}'}, got "
                             f"{size}; the nearest are {near}")
    return frames, height, width


def sample(run: Generator, prompts: list[str], sizes: list[tuple[int, int, int]], *, steps: int, guidance: float,
           seed: int) -> list[torch.Tensor]:
    """Clips uint8 (T, H, W, 3) for ``prompts`` at ``sizes`` (T, H, W) in pixels, all denoised in one pack."""
    device = next(run.dit.parameters()).device

    def condition(null: bool) -> dict:
        with torch.no_grad():
            return dict(text=run.text_encoder([""] * len(prompts) if null else prompts))

    shown = Progress("denoise", steps, 0)
    latents = generate(run.dit, run.objective, [run.vae.latent_shape(*size) for size in sizes],
                       patch=run.dit.config.patch, steps=steps, guidance=guidance, condition=condition,
                       generator=torch.Generator().manual_seed(seed), device=device,
                       progress=lambda step, _: shown.update(step, ""))
    shown.close()
    clips = []
    with torch.no_grad():
        for latent in bar(latents, "decode"):
            frames = [to_uint8(part[0].cpu()) for part in run.vae.decode_stream(latent[None])]
            clips.append(torch.cat(frames))
    return clips


def run(arguments) -> int:
    if arguments.steps < 1 or not 0 < arguments.fps < 1000:
        raise ValueError(f"generate: expected --steps of 1 or more and --fps between 0 and 1000, got {arguments.steps} and "
                         f"{arguments.fps:g}; 25 and 12 are usual")
    found = load_run(arguments.model, pick_device(arguments.device))
    prompts, patch = arguments.prompt, found.dit.config.patch
    sizes = [parse_size(text, found.vae, patch) for text in arguments.size]
    if len(sizes) == 1:
        sizes = sizes * len(prompts)
    if len(sizes) != len(prompts):
        raise ValueError(f"generate: expected one --size, or one per --prompt ({len(prompts)}), got {len(sizes)}; give "
                         f"as many sizes as prompts")
    clips = sample(found, prompts, sizes, steps=arguments.steps, guidance=arguments.guidance, seed=arguments.seed)
    folder = Path(arguments.out)
    for index, clip in enumerate(clips):
        name = folder / f"sample-{index:02d}"
        if clip.shape[0] == 1:
            path = write_image(name.with_suffix(".png"), clip[0])
        else:
            path = write_video(name.with_suffix(".gif" if arguments.gif else ".mp4"), clip, arguments.fps)
        print(f"{path}: {'x'.join(map(str, clip.shape[:3]))}, {prompts[index]!r}")
    return 0
