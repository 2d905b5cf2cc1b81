"""What Python costs before a launch: an op's call beside plain PyTorch, on inputs so small that nothing else takes time.

    python -m sora_fast.benchmarks.host_time [--device cpu] [--out DIR]

A GPU waits for this time wherever a layer is small. On a CPU the backends with kernels are measured too, their launches left
out (Triton's own dispatch, some 20 us a launch, with them), and beside nothing: what plain PyTorch computes is not left out.
On a GPU Liger and flash-attn stand beside them, where they are installed. Microseconds are the least of many rounds, because
noise only adds; Python calls (``sys.setprofile``) do not depend on the machine, and tests/test_host_time.py holds them.
``sora-fast bench`` on a GPU measures this too, and DIR/bench-host.jsonl goes into ``sora-fast bench report DIR``.

N tokens, S samples, D width, H heads, E head dim.
"""

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from sora_fast import Pack, ops, use_backend
from sora_fast.dispatch import use_emulated_gpu
from sora_fast.environment import environment
from sora_fast.files import save_text
from sora_fast.models import dit
from sora_fast.nn import Residual
from sora_fast.ops.attention_peers import installed
from sora_fast.ops.cuda_backend import extension

from . import rows
from .providers import liger_missing, liger_ops

S, LENGTH, D, H = 2, 8, 64, 2
N, E = S * LENGTH, D // H
AXES = (8, 12, 12)
CALLS, LEAST_ROUNDS, SECONDS = 20, 5, 0.6  # of a sample; of a row, all sides of it together
COLUMNS = ("backend", "op", "what", "ours_us", "eager_us", "more_us", "python_calls", "peer", "peer_us")


def calls(grad: bool, device: torch.device | str = "cpu", kernels: bool = False) -> dict[str, tuple[Callable, Callable]]:
    """By op: a call of ours, and plain PyTorch for a batch of equal samples.

    ``kernels``: videos are as kernels take them, in bfloat16 and with their channels last; a copy is no host time.
    """
    leaf = lambda *shape: torch.randn(*shape, device=device).requires_grad_(grad)
    of_video = dict(dtype=torch.bfloat16, memory_format=torch.channels_last_3d) if kernels else dict(dtype=torch.float32)
    pack = Pack([(1, 2, 4)] * S, device=device)
    x, y, q, k, v = leaf(N, D), leaf(N, D), leaf(N, H, E), leaf(N, H, E), leaf(N, H, E)
    shift, scale, gate = leaf(S, 6 * D).chunk(6, -1)[:3]
    weight, cos, sin = leaf(E), *torch.randn(2, N, 1, E // 2, device=device)
    clips, projection, bias, tokens = leaf(S, 4, 1, 4, 8), leaf(D, 4, 1, 2, 2), leaf(D), leaf(N, 16)
    video, kernel = (torch.randn(*shape, device=device).to(**of_video).requires_grad_(grad)
                     for shape in ((1, 64, 1, 4, 4), (64, 64, 3, 3, 3)))
    channels = torch.randn(64, device=device, dtype=video.dtype).requires_grad_(grad)
    moments, noise = leaf(2, 8, 4, 4), torch.randn(2, 4, 4, 4, device=device)

    each = lambda t: t.view(S, LENGTH, -1)
    modulated = lambda h: F.layer_norm(h, (D,)) * (1 + scale[:, None]) + shift[:, None]
    gated = lambda: each(x) + gate[:, None] * each(y)
    normed = lambda: F.silu(video * torch.rsqrt(video.square().mean(1, keepdim=True) + 1e-6) * channels[:, None, None, None])
    convolved = lambda h: F.conv3d(F.pad(h, (1, 1, 1, 1, 2, 0)), kernel)

    def turned(t):
        t = F.rms_norm(t, (E,), weight)
        a, b = t[..., 0::2], t[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def gated_and_modulated():
        x_new = gated()
        return x_new, modulated(x_new)

    def sampled():
        mean, logvar = moments.chunk(2, dim=1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
        return mean + (0.5 * logvar).exp() * noise, kl

    return {
        "patch_embed": (lambda: ops.patch_embed(clips, projection, bias),
                        lambda: F.conv3d(clips, projection, bias, (1, 2, 2)).flatten(2).transpose(1, 2)),
        "unpatchify": (lambda: ops.unpatchify(tokens, pack, (1, 2, 2), 4, flat=True),
                       lambda: tokens.view(S, 2, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(S, 4, 4, 8)),
        "norm_modulate": (lambda: ops.norm_modulate(x, shift, scale, pack), lambda: modulated(each(x))),
        "gate_residual": (lambda: ops.gate_residual(x, y, gate, pack), gated),
        "gate_residual_norm_modulate": (lambda: ops.gate_residual_norm_modulate(x, y, gate, shift, scale, pack),
                                        gated_and_modulated),
        "qk_norm_rope": (lambda: ops.qk_norm_rope(q, k, pack, q_weight=weight, k_weight=weight, axes=AXES),
                         lambda: (turned(q), turned(k))),
        "varlen_attention": (lambda: ops.varlen_attention(q, k, v, pack), lambda: F.scaled_dot_product_attention(
            *(t.view(S, LENGTH, H, E).transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)),
        "causal_conv3d": (lambda: ops.causal_conv3d(video, kernel), lambda: convolved(video)),
        "norm_act": (lambda: ops.norm_act(video, channels), normed),
        "norm_act_conv3d": (lambda: ops.norm_act_conv3d(video, kernel, norm_weight=channels), lambda: convolved(normed())),
        "kl_sample": (lambda: ops.kl_sample(moments, noise), sampled),
    }


def _plain_block(block: dit.DiTBlock, heads: int, x, c):
    """A DiT block as anyone would write it: x (S, N / S, D), c (S, D)."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = (t[:, None] for t in block.adaLN_modulation(c))
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    q, k, v = block.attn.qkv(h).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    x = x + gate * block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + ff_scale) + ff_shift
    return x + ff_gate * block.mlp(h)


def block_calls(device: torch.device | str = "cpu") -> tuple[Callable, Callable]:
    """A DiT-S/2 block on 64 tokens, ours and plain."""
    config = dit.PRESETS["S/2"]
    block, pack = dit.DiTBlock(config).to(device), Pack([(1, 8, 8)], device=device)
    nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    x, c = (torch.randn(n, config.width, device=device, requires_grad=True) for n in (64, 1))
    return lambda: block(Residual(x), c, pack).joined(pack), lambda: _plain_block(block, config.heads, x[None], c)


def peer_calls(device: torch.device) -> dict[str, tuple[str, Callable]]:
    """By op: (library, its call of the same work or of the nearest that it has), on a GPU and where it is installed."""
    found = {}
    if device.type == "cuda" and not liger_missing("LigerModulatedRMSNormFunction", device):
        x, scale, shift = torch.randn(N, D, device=device), *torch.randn(2, S, D, device=device)
        found["norm_modulate"] = ("liger", lambda: liger_ops().LigerModulatedRMSNormFunction.apply(
            x, None, scale, shift, 1e-6, 0.0, "gemma", False))
    if device.type == "cuda" and not installed("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        q = torch.randn(N, H, E, device=device, dtype=torch.bfloat16)
        ends = torch.arange(0, N + 1, LENGTH, device=device, dtype=torch.int32)
        found["varlen_attention"] = ("flash_attn", lambda: flash_attn_varlen_func(q, q, q, ends, ends, LENGTH, LENGTH))
    return found


def trained(call: Callable) -> Callable:
    """``call``, and the gradients of what it returns."""
    def step():
        found = call()
        outs = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    return step


class _NoGPU:
    """For dispatch.use_emulated_gpu: launches do nothing."""

    arch = "sm90"

    def launch(self, extension, op: str, fields: dict) -> None:
        pass


@contextlib.contextmanager
def launches_left_out() -> Iterator[None]:
    """Inside, kernels take CPU tensors, and what they would have written is whatever the memory holds."""
    from triton.runtime.jit import JITFunction

    with use_emulated_gpu(_NoGPU()), mock.patch.object(JITFunction, "run", lambda self, *arguments, **options: None):
        yield


def python_calls(call: Callable) -> int:
    """How many Python functions one call runs, those of PyTorch and Triton among them."""
    call(), call()  # what is remembered, is by now
    count = 0

    def counting(frame, event, argument):
        nonlocal count
        count += event == "call"

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # a collection that happens to fall into the call would count its callbacks, of Hypothesis for one
    sys.setprofile(counting)
    try:
        call()
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return count


def microseconds(calls: dict[str, Callable], device: torch.device) -> dict[str, float]:
    """The processor's time of one call, the least of many rounds in which all take turns, SECONDS long."""
    least, begin, rounds = dict.fromkeys(calls, float("inf")), time.process_time(), 0
    while rounds < LEAST_ROUNDS or time.process_time() - begin < SECONDS:
        rounds += 1
        for name, call in calls.items():
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # nothing waits in the queue
            start = time.process_time_ns()
            for _ in range(CALLS):
                call()
            least[name] = min(least[name], (time.process_time_ns() - start) / CALLS / 1e3)
    return least


def backends_of(device: torch.device) -> list[tuple[str, Callable]]:
    """(backend, a context in which it is measured)."""
    found = [("torch", contextlib.nullcontext)]
    kernels = contextlib.nullcontext if device.type == "cuda" else launches_left_out
    return [*found, ("triton", kernels), *([] if extension()[1] else [("cuda", kernels)])]


def measure(device: torch.device, tell: Callable[[dict], None]) -> list[dict]:
    """Rows of COLUMNS, each given to ``tell`` as it comes; None where there is nothing to stand beside ours."""
    found, peers = [], peer_calls(device)

    def row(backend, op, what, ours, eager):
        peer, call = peers.get(op, (None, None)) if what == "forward" else (None, None)
        beside = device.type == "cuda" or backend == "torch"
        us = microseconds({"ours": ours} | ({"eager": eager} if beside else {}) | ({"peer": call} if call else {}), device)
        us = {side: round(value, 1) for side, value in us.items()}
        more = round(us["ours"] - us["eager"], 1) if beside else None
        found.append(dict(zip(COLUMNS, (backend, op, what, us["ours"], us.get("eager"), more, python_calls(ours), peer,
                                        us.get("peer")), strict=True)))
        tell(found[-1])

    for backend, context in backends_of(device):
        with context(), use_backend(backend):
            for grad in (False, True):
                for op, (ours, eager) in calls(grad, device, backend != "torch").items():
                    try:
                        ours()
                    except NotImplementedError:  # this backend does not have it, or not its backward
                        continue
                    row(backend, op, "forward, gradients on" if grad else "forward", ours, eager)
                    if grad and (backend == "torch" or device.type == "cuda"):
                        row(backend, op, "forward and backward", trained(ours), trained(eager))
    row("torch", "DiT-S/2 block, 64 tokens", "forward and backward", *map(trained, block_calls(device)))
    return found


def complete(found: list[dict], device: torch.device, l2: str) -> list[dict]:
    """Rows for bench.jsonl."""
    where = environment(device)
    return [dict(row="host", schema=rows.SCHEMA, l2=l2, **row, environment=where) for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description="Python's time of every op beside plain PyTorch.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu, with launches of kernels left out)")
    parser.add_argument("--out", type=Path, help="folder for bench-host.jsonl (default: print alone)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    shown = lambda row: " | ".join("" if value is None else str(value) for value in row.values())
    found = measure(device, lambda row: print(f"| {shown(row)} |", flush=True))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in complete(found, device, "hot")]
        save_text(arguments.out / "bench-host.jsonl", "".join(lines))


if __name__ == "__main__":
    main()
