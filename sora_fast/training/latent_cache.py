"""Latents of media files under a key of their content: another run, or a renamed or copied file, finds them again.

The key is made of the file's bytes, of what is cut from it (sizes, rate, windows, span) and of the VAE's weights. An entry
is one safetensors file, written atomically, with a checksum of its own: a damaged one is told and made again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .. import env
from ..data import FitPolicy, MediaItem
from ..models import VideoVAE
from . import checkpoint

FORMAT = 2  # of an entry and of how files are read, part of its key; 2: colours become sRGB


def default_folder() -> Path:
    """``latents`` in the user's cache (SORA_FAST_CACHE, default ~/.cache/sora_fast)."""
    return env.cache() / "latents"


class LatentCache:
    """Entries for one VAE and one way of cutting windows.

    Args:
        folder: where entries are; None keeps nothing.
        span: the part of each clip that windows are cut from.
    """

    def __init__(self, folder: Path | None, vae: VideoVAE, policy: FitPolicy, *, windows: int, span: tuple[float, float]):
        self.folder = folder
        self.reused, self.made = 0, 0
        if folder is not None:
            about = dict(format=FORMAT, policy=asdict(policy), windows=windows, span=span, vae=asdict(vae.config),
                         weights=_digest(vae.state_dict()))
            self.about = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest()

    def path(self, item: MediaItem) -> Path | None:
        """The entry of an item; the file is read for it."""
        if self.folder is None:
            return None
        digest = hashlib.sha256(self.about + item.kind.encode())  # a GIF is a clip or an image
        with open(item.path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                digest.update(block)
        return self.folder / digest.hexdigest()[:2] / f"{digest.hexdigest()}.safetensors"

    def read(self, path: Path | None, item: MediaItem) -> list[tuple[torch.Tensor, dict]] | None:
        """(latent, what is known of it) of each window of an entry; None where there is none, or none that is whole."""
        try:
            if path is None or not path.is_file():
                return None
        except OSError:  # may not be looked into, which is told where the entry cannot be written
            return None
        try:
            tensors, metadata = checkpoint.load_with_metadata(path)
            if metadata.get("sha256") != _digest(tensors, metadata.get("windows", "")):
                raise ValueError(f"{path}: expected the bytes that were written, got others")
            windows = json.loads(metadata["windows"])
            found = [(tensors[str(i)], window) for i, window in enumerate(windows)]
        except (ValueError, KeyError) as error:
            print(f"latents: {item.path.name} is encoded again, since its entry in the cache is damaged ({error})",
                  flush=True)
            return None
        self.reused += 1
        return found

    def write(self, path: Path | None, windows: Sequence[tuple[torch.Tensor, dict]]) -> None:
        """Keep an entry; a folder that cannot be written is told once, and training goes on without the cache."""
        self.made += 1
        if path is None or self.folder is None:
            return
        tensors = {str(i): latent.contiguous() for i, (latent, _) in enumerate(windows)}
        about = json.dumps([window for _, window in windows])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save_tensors(path, tensors, dict(windows=about, sha256=_digest(tensors, about)))
        except OSError as error:
            print(f"latents: nothing is kept for later runs, since {self.folder} cannot be written ({error}); pass another "
                  f"--latent-cache", flush=True)
            self.folder = None


def _digest(tensors: dict[str, torch.Tensor], more: str = "") -> str:
    digest = hashlib.sha256(more.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
