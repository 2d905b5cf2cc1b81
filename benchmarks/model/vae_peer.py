"""VideoVAE and an accelerated AutoencoderKLWan beside diffusers' own, with the same weights: time and memory of a decode,
memory of training.

Times are of alternating runs in one process, after the outputs have been compared; peaks are of fresh processes, which
import the same packages; what training keeps for its backward is counted on the meta device, where no number is computed.

python -m sora_fast.benchmarks.model.vae_peer --width 32 --size 17 64 96 --rounds 5
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sora_fast.dispatch import use_backend
from sora_fast.integrations import accelerate
from sora_fast.models.vae import PRESETS, VideoVAE

from .vae import VAECase, _inputs, _Ours, _vae, _Wan

SIDES = ("ours", "accelerated", "diffusers")  # VideoVAE; diffusers' class, swapped and plain


@dataclass(frozen=True)
class Setting:
    """A decode in float32: ``width`` of Wan 2.1's graph (96 is the published one) and a clip of T x H x W pixels."""

    width: int = 32
    size: tuple[int, int, int] = (17, 64, 96)

    @property
    def case(self) -> VAECase:
        config = replace(PRESETS["wan2.1"], width=self.width)
        return VAECase("wan_vae_decode", "beside diffusers", torch.float32, (), config, *self.size)

    def decoders(self, sides: Iterable[str] = SIDES) -> dict[str, Callable[[], torch.Tensor]]:
        """Each side's decode of the same latents; without gradients, on the backend "torch"."""
        case, cpu = self.case, torch.device("cpu")
        vae, latents = _vae(case, cpu), _inputs(case, cpu)[1]

        def decoder(side):
            decode = _codec(side, vae).decode

            def run():
                with torch.no_grad(), use_backend("torch"):
                    return decode(latents)
            return run
        return {side: decoder(side) for side in sides}


def _codec(side: str, vae: VideoVAE) -> _Ours | _Wan:
    codec = _Ours(vae, None, "") if side == "ours" else _Wan(vae, False, False)
    if side == "accelerated" and not accelerate(codec.wan).swapped:
        raise AssertionError("vae_peer: expected an AutoencoderKLWan to be swapped, got none; install diffusers 0.42")
    return codec


def ratios(seconds: dict[str, list[float]], side: str) -> list[float]:
    """Times of ``side`` over those of diffusers, round by round."""
    return [own / theirs for own, theirs in zip(seconds[side], seconds["diffusers"], strict=True)]


def decode_seconds(setting: Setting, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's runs, which take turns.

    Raises:
        AssertionError: pixels that differ by more than 1e-4 of their largest.
    """
    decoders = setting.decoders()
    *others, theirs = (decode() for decode in decoders.values())  # the warm-up
    worst = max(((other - theirs).abs().max() / theirs.abs().max()).item() for other in others)
    if not worst <= 1e-4:
        raise AssertionError(f"vae_peer: expected the same pixels of all decoders, got ones {worst:.1e} of the largest "
                             f"apart; install diffusers 0.42")
    found = {side: [] for side in decoders}
    for _ in range(rounds):
        for side, decode in decoders.items():
            start = time.perf_counter()
            decode()
            found[side].append(time.perf_counter() - start)
    return found


def peak_bytes(setting: Setting, side: str) -> int:
    """Peak resident memory of a fresh process that decodes twice on one thread; Linux only."""
    command = [sys.executable, "-m", "sora_fast.benchmarks.model.vae_peer", "--peak", side, "--width", str(setting.width),
               "--size", *map(str, setting.size)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    return int(done.stdout) * 1024


def _own_peak(setting: Setting, side: str) -> str:
    import diffusers  # noqa: F401  its own memory counts on both sides

    (decode,) = setting.decoders([side]).values()
    decode()
    decode()
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(line for line in status if line.startswith("VmHWM")).split()[1]


class SavedForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Inside, ``bytes`` is what autograd has saved, every storage once, those of ``parameters`` left out."""

    def __init__(self, parameters: Iterable[torch.Tensor]):
        own = {p.untyped_storage()._cdata for p in parameters}
        self._held = {}  # the storages themselves: a freed one's address would be given to another

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                self._held[storage._cdata] = storage
            return tensor
        super().__init__(pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._held.values())


def training_bytes(side: str, backend: str = "torch", *, width: int = 96, size=(17, 256, 256),
                   dtype: torch.dtype = torch.bfloat16) -> int:
    """What a training forward (encode, sample, decode) of one clip keeps for its backward; ``backend`` is for ours."""
    with torch.device("meta"):
        vae = VideoVAE(replace(PRESETS["wan2.1"], width=width)).to(dtype)
        video = torch.empty(1, 3, *size, dtype=dtype)
        noise = torch.empty(1, *vae.latent_shape(*size), dtype=dtype)
    codec = _codec(side, vae)
    saved = SavedForBackward([*codec.leaves.values(), *vae.parameters()])
    with use_backend(backend), saved:
        outputs = codec.train(video, noise)
    del outputs
    return saved.bytes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sora_fast.benchmarks.model.vae_peer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--width", type=int, default=Setting.width, help="channels of the finest level")
    parser.add_argument("--size", type=int, nargs=3, default=Setting.size, metavar=("T", "H", "W"), help="of the clip")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for the times")
    parser.add_argument("--peak", choices=SIDES, help="print the peak memory in KiB of this process's own decode, no more")
    options = parser.parse_args(argv)
    setting = Setting(options.width, tuple(options.size))
    if options.peak:
        torch.set_num_threads(1)
        print(_own_peak(setting, options.peak))
        return 0
    torch.set_num_threads(options.threads)
    seconds = decode_seconds(setting, options.rounds)
    print(f"decode, width {options.width}, {' x '.join(map(str, options.size))}, float32, {options.threads} thread(s), "
          f"median of {options.rounds}")
    for side in SIDES:
        print(f"  {side:11s} {statistics.median(seconds[side]):8.3f} s, peak {peak_bytes(setting, side) / 1e6:,.0f} MB, "
              f"{statistics.median(ratios(seconds, side)):.3f} of diffusers' time")
    kept = {side: training_bytes(side) for side in SIDES}
    print("saved for backward, width 96, 17 x 256 x 256, bfloat16: "
          + ", ".join(f"{side} {bytes_ / 1e9:.2f} GB" for side, bytes_ in kept.items())
          + f": {kept['diffusers'] / kept['ours']:.2f} and {kept['diffusers'] / kept['accelerated']:.2f} times less")
    return 0


if __name__ == "__main__":
    sys.exit(main())
