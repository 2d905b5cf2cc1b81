"""Training a text-conditioned DiT on packs of latents, and generating with one.

T frames, H lines, W columns.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..data import FitPolicy, MediaItem, to_uint8
from ..diffusion import FrameTimesteps, MediaPrompt, Objective, draw_clean_frames, generate, make_objective
from ..models import ByteTextEncoder, DiT, DiTConfig, HuggingFaceTextEncoder, VideoVAE
from ..models.dit import PRESETS
from ..named import load_function
from ..progress import Progress, bar
from ..to_device import to_device
from . import checkpoint, distributed, memory
from .config import DiTTraining
from .latent_cache import LatentCache, default_folder
from .latents import (
    LatentBatch,
    LatentClip,
    LatentPacks,
    NoisyBatch,
    encode_library,
    held_out,
    held_out_batches,
    load_library,
    probe,
    save_library,
)
from .loop import Trainer, check_start
from .throughput import pick_precision
from .vae import load_vae

BYTE_WIDTH = 128
HELD_OUT_TIMESTEPS = (100, 300, 500, 700, 900)  # of 1000
FPS = 12.0  # of generated files, where neither the run nor a given clip says


def policy_for(config: DiTTraining, vae: VideoVAE, patch) -> FitPolicy:
    """Sizes that the VAE and the patch take, at most one pack's budget each where there is one."""
    f, step = vae.config.space_factor, vae.config.time_factor
    return FitPolicy(short_side=config.short_side, fps=config.fps or None, max_frames=config.frames,
                     space_multiple=f * patch[1], time_factor=step, max_tokens=config.budget or None)


def objective_of(config: DiTTraining) -> Objective:
    options = {}
    if config.objective == "flow":
        try:
            shift = "tokens" if config.shift == "tokens" else float(config.shift)
        except ValueError:
            raise ValueError(f"--shift: expected tokens or a number, got {config.shift!r}; 1 shifts nothing") from None
        options = dict(timesteps=config.timesteps, shift=shift)
    if config.learn_sigma and config.objective == "flow":
        raise ValueError("--learn-sigma: expected --objective ddpm beside it, got flow, whose paths have no variance; leave "
                         "it out")
    if ":" in config.objective:
        return own_objective(config)
    return make_objective(config.objective, config.prediction or None, learn_sigma=config.learn_sigma, **options)


def own_objective(config: DiTTraining) -> Objective:
    """The user's, which brings its own prediction and timesteps."""
    for name, given in (("--prediction", config.prediction), ("--learn-sigma", config.learn_sigma)):
        if given:
            raise ValueError(f"{name}: expected --objective flow or ddpm beside it, got {config.objective}; leave it out, "
                             f"since an objective of your own decides it")
    made = load_function(config.objective, "--objective")()
    wanted = [name for name, value in vars(Objective).items() if callable(value) and name[0] != "_"]
    missing = [name for name in wanted if not callable(getattr(made, name, None))]
    if missing:
        raise ValueError(f"--objective: expected the methods of sora_fast.diffusion.Objective, got {type(made).__name__} "
                         f"without {', '.join(missing)}; add them, or derive it from FlowMatching or DDPM")
    return made


def make_text_encoder(path: str) -> nn.Module:
    return HuggingFaceTextEncoder(path) if path else ByteTextEncoder(BYTE_WIDTH)


def preset_config(preset: str) -> DiTConfig:
    """A preset by name; one sentence for a name that is none."""
    if preset not in PRESETS:
        raise ValueError(f"train: expected preset to be one of {', '.join(PRESETS)}, got {preset!r}; choose one of them")
    return PRESETS[preset]


def dit_config(preset: str, vae: VideoVAE, text_width: int, learn_sigma: bool = False) -> DiTConfig:
    """A preset for this VAE's latents, conditioned on text."""
    return replace(preset_config(preset), in_channels=vae.config.latent_channels, text_width=text_width, classes=0,
                   learn_sigma=learn_sigma)


def encode_media(config: DiTTraining, vae: VideoVAE, items: Sequence[MediaItem], *,
                 span: tuple[float, float] = (0.0, 1.0)) -> list[LatentClip]:
    """Latents of ``items``, kept in the run folder as latents.safetensors; each rank encodes its share of them."""
    check_start(config)
    policy = policy_for(config, vae, preset_config(config.preset).patch)
    folder = None if config.latent_cache == "none" else Path(config.latent_cache or default_folder())
    cache = LatentCache(folder, vae, policy, windows=config.windows, span=span)
    encoded = [encode_library(vae, [item], policy, windows=config.windows, span=span, progress=False, cache=cache)
               for item in bar(distributed.share(items), "latents", distributed.first())]
    reused, made = distributed.sum_of(cache.reused, cache.made)
    print(f"latents: {reused:,.0f} of {len(items):,} files from the cache{f' in {folder}' if folder else ''}, {made:,.0f} "
          f"encoded", flush=True)
    library = Path(config.out) / "latents"
    shares = distributed.gather(encoded)
    if distributed.first():
        with distributed.claimed(config.out):
            # Item i was encoded by rank i modulo their number.
            save_library(library, [clip for i in range(len(items)) for clip in shares[i % len(shares)][i // len(shares)]])
    distributed.barrier()
    return load_library(library)


def make_trainer(config: DiTTraining, vae: VideoVAE, clips: Sequence[LatentClip]) -> Trainer:
    """A Trainer for a new DiT (and its byte text encoder) on latent ``clips``."""
    check_start(config)
    objective, device = objective_of(config), distributed.own_device(config.device)
    config = replace(config, precision=pick_precision(config.precision, device))  # the budget is found with it
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    text_encoder = make_text_encoder(config.text_encoder).to(device)
    dit = DiT(dit_config(config.preset, vae, text_encoder.width, config.learn_sigma)).to(device)
    dit.gradient_checkpointing = config.checkpointing
    # A frozen encoder is not part of the checkpoint: its folder is named in config.json.
    modules = nn.ModuleDict({"dit": dit} if config.text_encoder else {"dit": dit, "text": text_encoder})

    def draw(batch: LatentBatch, generator) -> NoisyBatch:
        timesteps = objective.draw_timesteps(batch.tokens, generator)
        noise = torch.randn(batch.latents.shape, generator=generator, dtype=torch.float32, device="cpu")
        drawn = torch.rand(len(batch.captions), generator=generator, dtype=torch.float32, device="cpu")
        dropped = drawn < config.condition_dropout
        captions = tuple("" if drop else c for c, drop in zip(batch.captions, dropped.tolist(), strict=True))
        clean = draw_clean_frames(batch.grids, config.clean_frames, generator)
        return NoisyBatch(replace(batch, captions=captions), noise, timesteps, clean)

    def loss(drawn: NoisyBatch):
        batch = drawn.batch
        text = text_encoder(batch.captions)
        pack = batch.pack(text.lengths, device)
        frames = FrameTimesteps(drawn.timesteps, drawn.clean, batch.counts, batch.grids, dit.config.in_channels, device)
        x0, noise = to_device(batch.latents, device), to_device(drawn.noise, device)
        noisy = batch.with_tail(frames.add_noise(objective, x0, noise))
        predicted = dit(noisy, frames.timesteps, pack, text=text)
        if config.learn_sigma:
            predicted = objective.split(predicted, batch.counts)
        value, tokens = frames.loss(objective, predicted, x0, noise), int(batch.tokens.sum())
        return value, dict(samples=len(batch.captions), tokens=tokens, pad=batch.length - tokens)

    patch, held_names = dit.config.patch, held_out([clip.source for clip in clips], config.heldout)
    trained = [clip for clip in clips if clip.source not in held_names]
    held = [clip for clip in clips if clip.source in held_names]
    if not config.budget and trained:
        config = replace(config, budget=memory.find_budget(
            config, modules, lambda copies: draw(probe(trained, patch, copies), checkpoint.generator(config.seed)), loss,
            [clip.tokens(patch) for clip in trained], max(clip.tokens(patch) for clip in clips), device))
    batches = LatentPacks(trained, patch, config.budget, look_ahead=config.look_ahead, seed=config.seed)
    description = dict(kind="dit", dit=asdict(dit.config), text_encoder=config.text_encoder)
    trainer = Trainer(
        config, modules, batches, draw, loss, description, units=dit.blocks,
        held_out=(lambda: held_out_batches(held, patch, config.budget, HELD_OUT_TIMESTEPS, config.seed)) if held else None)
    if distributed.first() and not (config.resume and (trainer.run_folder / "vae" / "config.json").is_file()):
        with distributed.claimed(trainer.run_folder):
            save_vae(vae, trainer.run_folder / "vae")
    return trainer


def save_vae(vae: VideoVAE, folder: Path) -> None:
    """What ``load_vae`` reads. A run carries its VAE, so that it can generate wherever it is moved."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(folder / "vae.safetensors", vae.state_dict())
    checkpoint.save_json(folder / "config.json", dict(kind="vae", vae=asdict(vae.config)))


@dataclass(frozen=True)
class Generator:
    """What a run folder of ``train`` holds, ready to generate with."""

    dit: DiT
    text_encoder: nn.Module
    vae: VideoVAE
    objective: Objective
    training: DiTTraining


def load_run(run: str, device="cpu", vae: str = "") -> Generator:
    """DiT, text encoder and VAE (averaged weights) of a run folder of ``sora-fast train``."""
    folder = Path(run)
    described = checkpoint.description(run, "dit", "sora-fast train")
    training = DiTTraining(**described["training"])
    dit = DiT(DiTConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in described["dit"].items()}))
    text_encoder = make_text_encoder(described["text_encoder"])
    weights = checkpoint.load_tensors(checkpoint.newest(folder) / "ema.safetensors")
    modules = nn.ModuleDict({"dit": dit} if described["text_encoder"] else {"dit": dit, "text": text_encoder})
    modules.load_state_dict(weights)
    return Generator(dit.to(device).eval(), text_encoder.to(device).eval(),
                     load_vae(vae or str(folder / "vae"), device), objective_of(training), training)


def sample(run: Generator, prompts: Sequence[str], sizes: Sequence[tuple[int, int, int]], *, steps: int, guidance: float,
           seed: int, media: Sequence[MediaPrompt | None] | None = None, decoded: bool = False) -> list[torch.Tensor]:
    """Clips uint8 (T, H, W, 3) for ``prompts`` at ``sizes`` (T, H, W) in pixels, all denoised in one pack.

    Args:
        seed: of the first sample's noise; the next ones' are the next numbers, so that none depends on the others.
        media: given frames of each sample, or None.
        decoded: leave the decoder's copy of given frames where it is, in place of the given pixels.
    """
    device, step = next(run.dit.parameters()).device, run.vae.config.time_factor
    media = [None] * len(prompts) if media is None else media

    def condition(null: bool) -> dict:
        with torch.no_grad():
            return dict(text=run.text_encoder([""] * len(prompts) if null else list(prompts)))

    known = [given and given.known(run.vae, size[0]) for given, size in zip(media, sizes, strict=True)]
    shapes = [k.latents.shape if k else run.vae.latent_shape(*size) for k, size in zip(known, sizes, strict=True)]
    shown = Progress("denoise", steps, 0)
    latents = generate(run.dit, run.objective, shapes, patch=run.dit.config.patch, steps=steps, guidance=guidance,
                       condition=condition, known=known, device=device, progress=lambda step, _: shown.update(step, ""),
                       generator=[torch.Generator().manual_seed(seed + index) for index in range(len(prompts))])
    shown.close()
    clips = []
    with torch.no_grad():
        for latent, given, (frames, _, _) in zip(bar(latents, "decode"), media, sizes, strict=True):
            clip = torch.cat([to_uint8(part[0].cpu()) for part in run.vae.decode_stream(latent[None])])
            clips.append(given.finish(clip, step) if given and not decoded else clip[:frames])
    return clips
