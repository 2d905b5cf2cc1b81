"""Training a text-conditioned DiT on packs of latents, and loading one to generate with."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..data import FitPolicy, MediaItem
from ..diffusion import Objective, make_objective
from ..models import ByteTextEncoder, DiT, DiTConfig, HuggingFaceTextEncoder, VideoVAE
from ..models.dit import PRESETS
from . import checkpoint
from .config import DiTTraining
from .latents import LatentBatch, LatentClip, LatentPacks, encode_library, save_library
from .loop import Trainer, check_start, pick_device
from .vae import load_vae

BYTE_WIDTH = 128


def policy_for(config: DiTTraining, vae: VideoVAE, patch) -> FitPolicy:
    """Sizes that the VAE and the patch take, at most one pack's budget each."""
    f, step = vae.config.space_factor, vae.config.time_factor
    return FitPolicy(short_side=config.short_side, fps=config.fps or None, max_frames=config.frames,
                     space_multiple=f * patch[1], time_factor=step, max_tokens=config.budget)


def objective_of(config: DiTTraining) -> Objective:
    options = {}
    if config.objective == "flow":
        try:
            shift = "tokens" if config.shift == "tokens" else float(config.shift)
        except ValueError:
            raise ValueError(f"--shift: expected tokens or a number, got {config.shift!r}; 1 shifts nothing") from None
        options = dict(timesteps=config.timesteps, shift=shift)
    return make_objective(config.objective, config.prediction or None, **options)


def make_text_encoder(path: str) -> nn.Module:
    return HuggingFaceTextEncoder(path) if path else ByteTextEncoder(BYTE_WIDTH)


def preset_config(preset: str) -> DiTConfig:
    """A preset by name; one sentence for a name that is none."""
    if preset not in PRESETS:
        raise ValueError(f"train: expected preset to be one of {', '.join(PRESETS)}, got {preset!r}; choose one of them")
    return PRESETS[preset]


def dit_config(preset: str, vae: VideoVAE, text_width: int) -> DiTConfig:
    """A preset for this VAE's latents, conditioned on text."""
    return replace(preset_config(preset), in_channels=vae.config.latent_channels, text_width=text_width, classes=0,
                   learn_sigma=False)


def encode_media(config: DiTTraining, vae: VideoVAE, items: Sequence[MediaItem], *,
                 span: tuple[float, float] = (0.0, 1.0)) -> list[LatentClip]:
    """Latents of ``items``, kept in the run folder as latents.safetensors."""
    check_start(config)
    patch = preset_config(config.preset).patch
    clips = encode_library(vae, items, policy_for(config, vae, patch), windows=config.windows, span=span)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    save_library(Path(config.out) / "latents", clips)
    return clips


def make_trainer(config: DiTTraining, vae: VideoVAE, clips: Sequence[LatentClip]) -> Trainer:
    """A Trainer for a new DiT (and its byte text encoder) on latent ``clips``."""
    check_start(config)
    objective, device = objective_of(config), pick_device(config.device)
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    text_encoder = make_text_encoder(config.text_encoder).to(device)
    dit = DiT(dit_config(config.preset, vae, text_encoder.width)).to(device)
    dit.gradient_checkpointing = config.checkpointing
    batches = LatentPacks(clips, dit.config.patch, config.budget, look_ahead=config.look_ahead, seed=config.seed)
    # A frozen encoder is not part of the checkpoint: its folder is named in config.json.
    modules = nn.ModuleDict({"dit": dit} if config.text_encoder else {"dit": dit, "text": text_encoder})

    def loss(batch: LatentBatch, generator):
        counts = torch.tensor(batch.counts)
        tokens = torch.tensor([t * h * w for t, h, w in batch.grids])
        timesteps = objective.draw_timesteps(tokens, generator)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        dropped = torch.rand(len(batch.captions), generator=generator) < config.condition_dropout
        text = text_encoder(["" if drop else c for c, drop in zip(batch.captions, dropped.tolist(), strict=True)])
        pack = batch.pack(text.lengths, device)
        x0, counts, timesteps = batch.latents.to(device), counts.to(device), timesteps.to(device)
        noisy = objective.add_noise(x0, noise, timesteps, counts)
        predicted = dit(noisy, timesteps, pack, text=text)
        return (objective.loss(predicted, x0, noise, timesteps, counts),
                dict(samples=len(batch.captions), tokens=pack.num_tokens, pad=max(0, config.budget - pack.num_tokens)))

    description = dict(kind="dit", dit=asdict(dit.config), text_encoder=config.text_encoder)
    trainer = Trainer(config, modules, batches, loss, description)
    if not config.resume or not (trainer.run_folder / "vae" / "config.json").is_file():
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
