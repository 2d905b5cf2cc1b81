"""What a CPU can tell: whole steps of ours beside those of others, as shares of their time, and peak memory.

    python -m sora_fast.benchmarks.cpu [--only GROUP ...] [--out benchmarks/results/cpu.jsonl]

Groups: "vae" (Wan 2.1's graph: decode, encode, a training step), "memory" (over clip lengths), "packing" (a DiT
trained on mixed sizes), "transformers" (diffusers' own, accelerated and plain). Every side of a group computes the same
numbers, which is looked at first; then all take turns, ROUNDS times, on one thread in float32. What is kept is the
processor's time, which other work on the machine does not count into, and for each round the share of the base's: ``share``
is the middle one. Freed memory stays with the process (``keep_memory``). Groups that the file has and --only does not name
stay as they are.

A row: row "cpu", schema, group, case, side, base (the side that shares are of), seconds (the middle one), samples, share,
bytes (of "memory": the most that tensors held beyond what was there before), command, environment.

N tokens, S samples, D width.
"""

import argparse
import ctypes
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sora_fast.dispatch import use_backend
from sora_fast.environment import environment
from sora_fast.files import save_text
from sora_fast.integrations import accelerate, recipes
from sora_fast.models.dit import DiTBlock, DiTConfig
from sora_fast.models.vae import PRESETS
from sora_fast.nn import Residual
from sora_fast.pack import Pack
from sora_fast.testing.draw import Draw

from . import rows
from .model.case import model
from .model.dit import _Padded, _PaddedAttention
from .model.vae import VAECase, _inputs, _Ours, _step, _theirs, _vae, _Wan

FILE = Path(__file__).parent / "results" / "cpu.jsonl"
ROUNDS = 7
LEAST_SECONDS = 1.0  # of a sample: shorter ones are noisy
ALIKE = 1e-3  # of the norm of all numbers that a step gives
CPU = torch.device("cpu")
Sides = dict[str, Callable[[], object]]  # the base is the last

WAN = replace(PRESETS["wan2.1"], width=16, encoder_blocks=1, decoder_blocks=2)
STEPS = {"wan_vae_decode": "decode", "wan_vae_encode": "encode", "vae_training_step": "training step"}
# (frames, height, width); smaller ones take their memory from the allocator's free lists in one run and not in the next
SIZES = {"wan_vae_decode": (9, 96, 128), "wan_vae_encode": (9, 96, 128), "vae_training_step": (5, 64, 96)}
LENGTHS = {"wan_vae_decode": (9, 33), "vae_training_step": (5, 17)}  # frames, of "memory"
# Clips, images, upright ones and small ones, in tokens of t, h, w: 8 samples of 5 sizes.
GRIDS = ((5, 8, 10), (1, 16, 16), (1, 16, 16), (1, 20, 12), (1, 20, 12), (1, 8, 8), (1, 8, 8), (3, 6, 8))
DIT = DiTConfig(width=192, heads=3, qk_norm=True, rope_axes=(16, 24, 24), rope_theta=1e4)
LAYERS = 2
_SIZES = dict(num_attention_heads=4, attention_head_dim=64, in_channels=16, out_channels=16)
# A class of diffusers: (changes of its tiny sizes, batch, latent frames).
TRANSFORMERS = {
    "WanTransformer3DModel": (_SIZES | dict(text_dim=64, freq_dim=64, ffn_dim=1024), 1, 40),
    "HunyuanVideoTransformer3DModel": (_SIZES | dict(text_embed_dim=64, rope_axes_dim=(16, 24, 24)), 1, 40),
    "CogVideoXTransformer3DModel": (_SIZES | dict(time_embed_dim=64, text_embed_dim=64, sample_width=16, sample_height=16),
                                    1, 8),
    "DiTTransformer2DModel": (_SIZES | dict(sample_size=32), 2, 1),
}
_INPUTS = {"WanTransformer3DModel": recipes._wan, "HunyuanVideoTransformer3DModel": recipes._hunyuan,
           "CogVideoXTransformer3DModel": recipes._cogvideox, "DiTTransformer2DModel": recipes._dit}


# --------------------------------------------------------------------------------------------------------------- sides
def vae_case(op: str, frames: int = 0) -> VAECase:
    """``frames``: other ones than SIZES says, on frames of half the height and width."""
    own, height, width = SIZES[op]
    size = (frames, height // 2, width // 2) if frames else (own, height, width)
    return VAECase(op, f"width {WAN.width}, {'x'.join(map(str, size))}", torch.float32, (), WAN, *size)


def _vae_side(op: str, side: str, frames: int = 0) -> Callable[[], dict]:
    case = vae_case(op, frames)
    if side == "VideoVAE":
        return _step(case, _Ours(_vae(case, CPU), None, ""), _inputs(case, CPU), "torch")
    if side != "accelerated":
        return _theirs(case, CPU, channels_last="channels_last" in side, compiled="compiled" in side)
    wan = _Wan(_vae(case, CPU), False, False)
    accelerate(wan.wan)
    return wan.ours_step(_step(case, wan, _inputs(case, CPU), "torch"))


def vae() -> Iterator[tuple[str, Sides]]:
    sides = ("VideoVAE", "accelerated", "diffusers, channels_last", "diffusers, compiled", "diffusers")
    for op, name in STEPS.items():
        yield f"{name}, {vae_case(op).label}", {side: _vae_side(op, side) for side in sides}


def packing() -> Iterator[tuple[str, Sides]]:
    """Forward, backward and AdamW of LAYERS blocks: one pack, one batch padded to the longest, a batch of each size."""
    whole = Pack(GRIDS)
    draw = Draw(CPU, 1, torch.float32)
    x, c, target = draw(whole.num_tokens, DIT.width), draw(len(GRIDS), DIT.width), draw(whole.num_tokens, DIT.width)

    def trained(parts: list[tuple], padded: bool):
        """``parts``: (pack, tokens (N,), samples (S,)) of each forward, which together are the whole."""
        blocks = model(lambda: nn.ModuleList(DiTBlock(DIT) for _ in range(LAYERS)), CPU, torch.float32)
        optimizer = torch.optim.AdamW(blocks.parameters(), lr=1e-4, weight_decay=0.0)
        given = []
        for pack, tokens, samples in parts:
            mine = pack.pad(x[tokens]) if padded else x[tokens]
            given.append((pack, mine, c[samples], tokens))
        if padded:
            for block in blocks:
                block.attn.__class__ = _PaddedAttention

        def step():
            optimizer.zero_grad()
            outputs = torch.empty_like(x)
            for pack, mine, conditions, tokens in given:
                y = Residual(mine)
                for block in blocks:
                    y = block(y, conditions, pack)
                y = y.joined(pack if not padded else pack.rows)
                y = y[pack.places] if padded else y
                outputs[tokens] = y.detach()
                ((y - target[tokens]).square().sum() / x.numel()).backward()
            optimizer.step()
            return {"output": outputs} | {f"d {name}": p.grad.clone() for name, p in blocks.named_parameters()}
        return step

    ends = whole.cu_seqlens.tolist()
    tokens_of = lambda sample: torch.arange(ends[sample], ends[sample + 1])
    buckets = []
    for grid in dict.fromkeys(GRIDS):
        samples = [place for place, other in enumerate(GRIDS) if other == grid]
        buckets.append((Pack([grid] * len(samples)), torch.cat([tokens_of(sample) for sample in samples]),
                        torch.tensor(samples)))
    everything = torch.arange(whole.num_tokens), torch.arange(len(GRIDS))
    padded_to = len(GRIDS) * whole.max_seqlen
    yield (f"training step, {LAYERS} blocks of width {DIT.width}, {len(GRIDS)} samples of {whole.num_tokens:,} tokens "
           f"(padded: {padded_to:,})",
           {"packed": trained([(whole, *everything)], False), "bucketed": trained(buckets, False),
            "padded": trained([(_Padded(whole), *everything)], True)})


def transformers() -> Iterator[tuple[str, Sides]]:
    import diffusers

    for name, (sizes, batch, frames) in TRANSFORMERS.items():
        kind, tiny = getattr(diffusers, name), recipes.RECIPES[name].tiny

        def side(fast: bool, train: bool, kind=kind, tiny=tiny, sizes=sizes, batch=batch, frames=frames, name=name):
            module = model(lambda: kind(**tiny | sizes), CPU, torch.float32).eval()
            given = _INPUTS[name](module.config, Draw(CPU, 1, torch.float32), batch, frames, height=4, width=3)
            if fast:
                accelerate(module)
            call = lambda: module(return_dict=False, **given)[0]
            return _trained(module, call) if train else _inferred(call)
        for what, train in (("inference", False), ("training step", True)):
            yield f"{name}, {what}", {"accelerated": side(True, train), "plain": side(False, train)}


def _inferred(call: Callable[[], torch.Tensor]) -> Callable[[], dict]:
    def step():
        with torch.no_grad():
            return {"output": call()}
    return step


def _trained(module: nn.Module, call: Callable[[], torch.Tensor]) -> Callable[[], dict]:
    def step():
        module.zero_grad()
        out = call()
        out.square().mean().backward()
        return {"output": out.detach()} | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return step


# ----------------------------------------------------------------------------------------------------------- measuring
def apart(got: dict, wanted: dict) -> float:
    """The largest, over a step's tensors of the outputs and all gradients together, of difference over size, as norms."""
    if got.keys() != wanted.keys():
        raise AssertionError(f"cpu: expected steps that give the same tensors, got others in {got.keys() ^ wanted.keys()}")
    out = lambda name: name in ("output", "reconstruction")

    def share(names):
        difference = sum((got[name] - wanted[name]).double().square().sum().item() for name in names)
        return (difference / max(sum(wanted[name].double().square().sum().item() for name in names), 1e-300)) ** 0.5
    return max(share(names) for names in ([n for n in wanted if out(n)], [n for n in wanted if not out(n)]) if names)


def alternating(case: str, sides: Sides) -> dict[str, list[float]]:
    """Seconds of the processor of each side's runs, in turns, after all gave what the last one, the base, gives."""
    kept = {side: {name: t.clone() for name, t in step().items()} for side, step in sides.items()}  # the warm-up too
    *others, base = kept
    for side in others:
        if not (far := apart(kept[side], kept[base])) <= ALIKE:
            raise AssertionError(f"cpu: expected {side} to give what {base} gives, got {far:.1e} of it apart ({case})")
    del kept
    calls, found = {}, {side: [] for side in sides}
    for side, step in sides.items():
        start = time.process_time()
        step()
        calls[side] = max(1, round(LEAST_SECONDS / (time.process_time() - start)))
    for _ in range(ROUNDS):
        for side, step in sides.items():
            gc.collect()
            start = time.process_time()
            for _ in range(calls[side]):
                step()
            found[side].append((time.process_time() - start) / calls[side])
    return found


def keep_memory() -> None:
    """From now on freed memory stays with the process, as other allocators than glibc's keep it.

    glibc gives large blocks back to the system, which hands out every page anew. Steps with large temporaries take up to
    twice as long with that, how long depends on what else the machine does, and it says nothing about the arithmetic.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own from the system
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def most_held(step: Callable[[], object]) -> int:
    """The most bytes of tensors that a call holds at once beyond what was there: PyTorch's count, the same every time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def memory() -> Iterator[dict]:
    sides = ("VideoVAE", "accelerated", "diffusers")
    for op, frames in ((op, frames) for op, lengths in LENGTHS.items() for frames in lengths):
        with use_backend("torch"):
            found = {side: most_held(_vae_side(op, side, frames)) for side in sides}
        for side, count in found.items():
            yield dict(case=f"{STEPS[op]}, {vae_case(op, frames).label}", side=side, base="diffusers", bytes=count,
                       share=count / found["diffusers"])


def timed(group: Callable[[], Iterator[tuple[str, Sides]]]) -> Iterator[dict]:
    for case, sides in group():
        torch._dynamo.reset()
        with use_backend("torch"):
            seconds = alternating(case, sides)
        base = list(sides)[-1]
        for side, samples in seconds.items():
            share = statistics.median(own / theirs for own, theirs in zip(samples, seconds[base], strict=True))
            yield dict(case=case, side=side, base=base, seconds=statistics.median(samples), samples=samples, share=share)


GROUPS = {"memory": memory, "vae": partial(timed, vae), "packing": partial(timed, packing),
          "transformers": partial(timed, transformers)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sora_fast.benchmarks.cpu", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="(default: all)")
    parser.add_argument("--out", type=Path, default=FILE, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_memory()
    where = environment(CPU)
    found = [row for row in (rows.read(options.out) if options.out.exists() else []) if row["group"] not in options.only]
    for group, measure in GROUPS.items():
        if group not in options.only:
            continue
        for row in measure():
            row = dict(row="cpu", schema=rows.SCHEMA, group=group, seconds=None, samples=None, bytes=None) | row
            found.append(row | dict(command="python -m sora_fast.benchmarks.cpu", environment=where))
            print(f"{row['case']}: {row['side']}: {row['share']:.3f} of {row['base']}", flush=True)
        found.sort(key=lambda row: list(GROUPS).index(row["group"]))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_text(options.out, "".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
