"""Comparison of a third-party model with its accelerated copy: outputs, gradients, layers, and the first one that departs.

The reference is the original in float64. In its own dtype the original has an error too; the accelerated model may have
twice that, plus one rounding of the result.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..precision import float32_kept
from .mixin import original_of
from .recipes import RECIPES
from .swapping import Report, accelerate


@dataclass(frozen=True)
class Line:
    """Relative errors of one tensor against float64: the original's in its own dtype, and the accelerated model's."""

    call: str
    name: str  # "output", a module's name, or "gradient of ..."
    plain: float
    fast: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.fast <= self.allowed


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; print it. ``lines``: outputs and gradients; ``layers``: modules that both run, in order."""

    model: str
    report: Report
    lines: tuple[Line, ...]
    layers: tuple[Line, ...]

    @property
    def passed(self) -> bool:
        return bool(self.report.swapped) and all(line.passed for line in self.lines)

    @property
    def departs(self) -> Line | None:
        """The first layer whose error exceeds what is allowed."""
        return next((line for line in self.layers if not line.passed), None)

    def __str__(self) -> str:
        rows = [f"{self.model}: {len(self.report.swapped)} modules replaced, {len(self.report.left)} unchanged",
                f"{'call':18} {'tensor':60} {'original':>10} {'sora_fast':>10} {'allowed':>10}"]
        outputs = [line for line in self.lines if line.name == "output"]
        gradients = [line for line in self.lines if line.name != "output"]
        worst = sorted(gradients, key=lambda line: line.fast / max(line.allowed, 1e-300), reverse=True)[:5]
        for title, lines in (("outputs", outputs), (f"gradients, the worst of {len(gradients)}", worst),
                             ("layers, in the order they ran", self.layers)):
            rows.append(f"-- {title}")
            rows += [f"{line.call:18} {line.name[-60:]:60} {line.plain:10.2e} {line.fast:10.2e} {line.allowed:10.2e}"
                     f"{'' if line.passed else '  BEYOND'}" for line in lines]
        first = self.departs
        rows.append(f"first departs at {first.name} ({first.call})" if first else "no layer departs")
        return "\n".join(rows)


def open_model(what: str) -> nn.Module:
    """A model from a diffusers folder, or a tiny random one by class name (``AutoencoderKLWan``)."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"validate --model: expected the diffusers package, got none ({error}); run "
                          f"pip install 'sora_fast[train]'") from error
    path = Path(what)
    if path.is_dir():
        file = path / "config.json"
        name = json.loads(file.read_text(encoding="utf-8")).get("_class_name", "") if file.is_file() else ""
    else:
        name = what.rpartition(".")[2].rpartition(":")[2]
    if name not in RECIPES:
        raise ValueError(f"validate --model: expected a folder or the name of one of {', '.join(RECIPES)}, got {what!r}; "
                         f"compare your own with sora_fast.integrations.comparison.compare")
    kind = getattr(diffusers, name)
    if path.is_dir():
        return kind.from_pretrained(path)
    torch.manual_seed(0)
    return _randomise(kind(**RECIPES[name].tiny))


@float32_kept()
def compare(model: nn.Module, calls: list[tuple[str, Callable]] | None = None, *, dtype: torch.dtype = torch.float32,
            device: str | torch.device = "cpu", progress: Callable[[str], None] = lambda text: None) -> Comparison:
    """Run ``model`` in float64, in ``dtype`` and accelerated, on the same inputs, without TF32; it is left as it was.

    Args:
        calls: (name, run) pairs, ``run(model, cast) -> tensor`` with ``cast`` for float inputs; None: those made for the
            class, where it is one of the covered families.

    Raises:
        ValueError: no calls for a class that is not covered.
    """
    name = original_of(type(model)).__name__
    if calls is None:
        if name not in RECIPES:
            raise ValueError(f"compare: expected calls for a {name}, got none; pass [(name, run)] with run(model, cast) -> "
                             f"tensor")
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        calls = RECIPES[name].calls(model, draw)
    plain = copy.deepcopy(model).to(device, dtype).eval()
    exact, fast = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    report = accelerate(fast)
    # Not absorbed children: a hook on one would keep it from being absorbed.
    inside = {row.name for row in report.rows if row.state == "inside"}
    watched = [name for name, module in model.named_modules() if name not in inside and name.count(".") <= 2 and name
               and _is_block(module)]
    floor = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 8
    lines, layers = [], []
    for call, run in calls:
        progress(call)
        results = [_results(each, run, watched, dtype, torch.device(device), kind) for each, kind in
                   ((exact, torch.float64), (plain, dtype), (fast, dtype))]
        gradient_norm = sum(value.square().sum() for key, value in results[0][0].items() if key != "output").sqrt()
        for key, expected in results[0][0].items():
            scale = gradient_norm if key != "output" else expected.norm()
            lines.append(_line(call, key, expected, results[1][0][key], results[2][0][key], scale, floor))
        for key, expected in results[0][1].items():
            others = [found[1].get(key) for found in results[1:]]
            if all(other is not None and other.shape == expected.shape for other in others):
                layers.append(_line(call, key, expected, *others, expected.norm(), floor))
    return Comparison(name, report, tuple(lines), tuple(layers))


def _line(call, name, expected, plain, fast, scale, floor) -> Line:
    scale = max(float(scale), 1e-30)
    errors = [float((other - expected).norm()) / scale for other in (plain, fast)]
    return Line(call, name, *errors, 2 * errors[0] + floor)


def _results(model, run, watched, rounded, device, dtype) -> tuple[dict, dict]:
    """Output and gradients by name, and the first tensor that each watched module returned, in float64 on the CPU."""
    outputs: dict[str, list[torch.Tensor]] = {}
    keep = lambda x: x.detach().double().cpu()

    def hook(name):
        def record(module, inputs, output):
            first = output[0] if isinstance(output, (tuple, list)) and output else getattr(output, "sample", output)
            if isinstance(first, torch.Tensor) and first.is_floating_point():
                outputs.setdefault(name, []).append(keep(first))
        return record

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook(name)) for name in watched]
    model.zero_grad()
    # Inputs are rounded once, so that all three models get the same.
    cast = lambda x: x.to(rounded).to(device, dtype)
    try:
        out = run(model, cast)
    finally:
        for handle in handles:
            handle.remove()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")
    (out.double().cpu() * weight).sum().backward()
    found = {"output": keep(out)}
    for name, p in model.named_parameters():
        found[f"gradient of {name}"] = keep(torch.zeros_like(p) if p.grad is None else p.grad)
    # A clip processed in chunks is compared with the clip processed whole.
    return found, {name: torch.cat(parts, dim=2 if parts[0].dim() == 5 else 0) for name, parts in outputs.items()}


def _is_block(module: nn.Module) -> bool:
    """A module of diffusers that has children."""
    return original_of(type(module)).__module__.startswith("diffusers.") and any(True for _ in module.children())


@torch.no_grad()
def _randomise(model: nn.Module) -> nn.Module:
    """Every parameter random, so that gates that start closed are open."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        fan = p[0].numel() if p.dim() > 1 and p.numel() > p.shape[0] else 1
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu")
        p.copy_(noise / (fan**0.5 if fan > 1 else 4) + (0 if fan > 1 else 0.5))
    return model
