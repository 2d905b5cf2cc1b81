"""Which backend runs what, and why: ``explain`` and ``info``."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch

import sora_fast

from . import env, ops
from .dispatch import ORDER, Op

# The ops that a model calls, in the order of its forward.
MODELS = {
    "dit": ("patch_embed", "norm_modulate", "qk_norm_rope", "varlen_attention", "gate_residual_norm_modulate",
            "gate_residual", "unpatchify"),
    "vae": ("causal_conv3d", "norm_act_conv3d", "norm_act", "kl_sample"),
}
# Packages that add a backend or a peer to measure against. None is required.
OPTIONAL = ("triton", "flash_attn", "flash_attn_interface", "xformers", "diffusers", "transformers", "av", "safetensors")


def all_ops() -> dict[str, Op]:
    """Every op by name, in the order of the families."""
    import importlib

    found = {}
    for family in ops.FAMILIES:
        for op in importlib.import_module(f"sora_fast.ops.{family}").OPS:
            found[op.name] = op
    return found


def explain(what: str = "all", *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> str:
    """A table of op, backend, whether it would run, and why not.

    Args:
        what: ``"all"``, ``"dit"``, ``"vae"``, a family or an op.
        device: ``"cpu"``, ``"cuda"`` (this machine's) or ``"cuda:sm90"`` (any, present or not).
        dtype: of the tensors. grad: whether a backward is wanted.

    Returns:
        Text; ``*`` marks the backend that auto takes for a typical problem of each op.
    """
    table = all_ops()
    chosen = [op for name, op in table.items()
              if what == "all" or what in (name, op.family) or name in MODELS.get(what, ())]
    if not chosen:
        raise ValueError(f"explain: expected all, {', '.join(MODELS)}, a family ({', '.join(ops.FAMILIES)}) or an op, got "
                         f"{what!r}; sora_fast.info() lists the ops")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("explain: expected a CUDA device for 'cuda', got none here; name an architecture, as in "
                             "'cuda:sm90'")
        major, minor = torch.cuda.get_device_capability()
        device = f"cuda:sm{major}{minor}"
    lines = [f"{'op':28s} {'backend':11s} {'':3s} reason"]
    for op in chosen:
        problem = op.example(device, dtype, grad)
        taken = op.choose(problem).name
        for name in ORDER:
            backend = op.backends.get(name)
            if backend is None:
                why, mark = [f"{op.name} has no {name} backend."], "-"
            else:
                why = backend.unsupported(problem)
                mark = "-" if why else ("*" if name == taken else "ok")
            reason = " ".join(why) or ("taken by auto" if mark == "*" else "would run")
            lines.append(f"{op.name:28s} {name:11s} {mark:3s} {reason}")
    lines.append(f"auto takes the first that can, in the order {', '.join(ORDER)}"
                 + (f"; SORA_FAST_BACKEND={env.backend()} overrides it" if env.backend() else ""))
    return "\n".join(lines)


def info() -> str:
    """What is installed and where this package was imported from."""
    lines = [
        f"sora_fast {sora_fast.__version__} from {Path(sora_fast.__file__).parent}",
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, CUDA build {torch.version.cuda or 'none'}",
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"GPU {index}: {torch.cuda.get_device_name(index)}, sm{major}{minor}")
    else:
        lines.append("GPU: none that PyTorch can use")
    for package in OPTIONAL:
        if importlib.util.find_spec(package) is None:
            lines.append(f"{package}: not installed")
        else:
            try:
                version = importlib.metadata.version(package.replace("_", "-"))
            except importlib.metadata.PackageNotFoundError:
                version = "version unknown"
            lines.append(f"{package}: {version}")
    lines.append("backends: torch and reference for every op; this version has no Triton or CUDA kernels yet")
    lines.append("")
    lines.append(explain("all", device="cuda" if torch.cuda.is_available() else "cpu"))
    return "\n".join(lines)
