"""What ``sora-fast`` and ``sora-fast --help`` print: commands by task, and what to do first on this machine."""

import os
from collections.abc import Mapping
from pathlib import Path

from .. import __version__, env

TASKS = {
    "See it work": {"demo": "sora-fast demo"},
    "Train and generate": {
        "train-vae": "sora-fast train-vae --data clips/ --out runs/vae",
        "train": "sora-fast train --data clips/ --vae runs/vae --out runs/dit",
        "generate": "sora-fast generate runs/dit --prompt 'a rabbit' --size 9x96x160",
        "eval": "sora-fast eval runs/dit --data clips/"},
    "Use the kernels on this GPU": {
        "setup": "sora-fast setup",
        "explain": "sora-fast explain dit",
        "info": "sora-fast info",
        "tune": "sora-fast tune --minutes 20"},
    "Check and predict kernels, yours too": {
        "validate": "sora-fast validate --op norm_modulate --impl my_kernels:norm_modulate",
        "predict": "sora-fast predict attention --gpu h200"},
    "Measure": {
        "bench": "sora-fast bench attention --suite full --device cuda",
        "bench compare": "sora-fast bench compare old/bench.jsonl new/bench.jsonl",
        "bench report": "sora-fast bench report h100/bench.jsonl h200/bench.jsonl",
        "bench collect": "sora-fast bench collect out/gpu",
        "bench readme": "sora-fast bench readme"},
}


def overview(commands: Mapping[str, str]) -> str:
    """``commands`` (name: what it does) by task, each with an example."""
    lines = []
    for task, examples in TASKS.items():
        lines += ["", f"{task}:"]
        for name, example in examples.items():
            lines += [f"  {name:14}{commands[name]}", f"  {'':14}  $ {example}"]
    return "\n".join(lines[1:])


def first_screen() -> str:
    """What to do first here. PyTorch is not imported for it."""
    gpu = _gpu()
    validated = (env.cache() / "validate.jsonl").is_file()
    steps = []
    if gpu and not validated:
        steps.append(("sora-fast setup", "judge the kernels and time them on this GPU: until then auto runs PyTorch's own"))
    if gpu and validated:
        steps.append(("sora-fast explain", "what runs on this GPU, and why nothing faster"))
    steps += [("sora-fast demo", "train on real clips and photos, generate, and open out/demo/report.html"),
              ("sora-fast train-vae --data clips/", "your own clips and images"),
              ("sora-fast --help", "every command, by task")]
    if not gpu:
        steps.insert(2, ("sora-fast predict attention --gpu h200", "what the kernels would take on a GPU"))
    width = max(len(command) for command, _ in steps)
    here = f"{os.cpu_count()} CPU cores, {gpu or 'no NVIDIA GPU'}"
    return "\n".join([f"sora_fast {__version__}: layers and kernels for video diffusion models. This machine: {here}.", "",
                      *(f"  {command:{width}}   {what}" for command, what in steps)])


def _gpu() -> str:
    """Names of NVIDIA GPUs by their driver, or ""."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return ", ".join(f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names))
