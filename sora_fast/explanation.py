"""Which backend runs what, and why: ``explain`` and ``info``."""

import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path

import torch

from . import __version__, env, environment, measured, ops, records
from .dispatch import ORDER, Backend, Op, Problem
from .ops import attention_peers, cuda_backend

# The ops that a model calls, in the order of its forward.
MODELS = {
    "dit": ("patch_embed", "norm_modulate", "qk_norm_rope", "varlen_attention", "gate_residual_norm_modulate",
            "gate_residual", "unpatchify"),
    "vae": ("causal_conv3d", "norm_act_conv3d", "norm_act", "kl_sample"),
}
# Packages that ``info`` shows, none of them required: name to import, name to install.
OPTIONAL = {name: environment.PEERS.get(name, name) for name in (
    "triton", "flash_attn", "flash_attn_interface", "cudnn", "xformers", "diffusers", "transformers", "safetensors", "numpy",
    "av", "PIL", "yaml", "tqdm", "tensorboard")} | {"PIL": "pillow", "yaml": "pyyaml"}

KINDS = {"reference": "the definition", "torch": "PyTorch's own best composition", "triton": "our Triton kernels",
         "cuda": "our CUDA kernels"} | {
    backend.name: "a library, by name or where it was measured" for backend in attention_peers.ATTENTION}


def all_ops() -> dict[str, Op]:
    """Every op by name, in the order of the families."""
    found = {}
    for family in ops.FAMILIES:
        for op in importlib.import_module(f"sora_fast.ops.{family}").OPS:
            found[op.name] = op
    return found


def explain(what: str = "all", *, device: str = "auto", dtype: torch.dtype = torch.bfloat16, grad: bool = True,
            assume_validated: bool = False, every: bool = False) -> str:
    """A line per op for a typical problem: what runs it, what that took here, and why not something that may be faster.

    Args:
        what: ``"all"``, ``"dit"``, ``"vae"``, a family or an op.
        device: ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"`` (this machine's) or ``"cuda:sm90"`` (any,
            present or not).
        dtype: of the tensors. grad: whether a backward is wanted.
        assume_validated: as if every kernel had its validation record, to see what would be taken then.
        every: a line per op and backend; ``*`` marks what is taken where none is named, ``ok`` what would run if it were
            named, ``-`` what cannot.

    Raises:
        ValueError: an unknown ``what``, a device that is none, or "cuda" where there is no GPU.
    """
    table = all_ops()
    chosen = [op for name, op in table.items()
              if what == "all" or what in (name, op.family) or name in MODELS.get(what, ())]
    if not chosen:
        raise ValueError(f"explain: expected all, {', '.join(MODELS)}, a family ({', '.join(ops.FAMILIES)}) or an op, got "
                         f"{what!r}; sora_fast.info() lists the ops")
    device = _architecture(device)
    lines = [f"{'op':28s} {'backend':11s} {'':3s} reason" if every else f"{'op':28s} {'runs on':11s} why"]
    for op in chosen:
        problem = op.example(device, dtype, grad)
        try:
            taken, refusal = op.choose(problem, assume_validated=assume_validated).name, ""
        except (NotImplementedError, ValueError) as error:  # SORA_FAST_BACKEND or use_backend names what cannot run
            taken, refusal = None, str(error)
        lines += (_every(op, problem, taken, refusal, assume_validated, table) if every else
                  [f"{op.name:28s} {taken or 'none':11s} {refusal or _why(op, problem, taken, assume_validated)}".rstrip()])
    order = [name for name in ORDER if name in _backends(table)]
    lines.append(f"auto takes the fastest where sora-fast setup has measured it here, else the first that can, in the order "
                 f"{', '.join(order)}" + (f"; SORA_FAST_BACKEND={env.backend()} overrides it" if env.backend() else ""))
    if any(op.backends[name].kernel for op in chosen for name in op.backends):
        here = "here each is taken to have one, as asked" if assume_validated else "sora-fast setup makes them"
        lines.append(f"auto takes a kernel only with a validation record; {here}")
    return "\n".join(lines if every else [*lines, "every backend with its reasons: sora-fast explain --all"])


def taken(what: str, device: str, dtype: torch.dtype, grad: bool = True) -> dict[str, str]:
    """The backend that runs each op of ``what``, a key of MODELS, for a typical problem."""
    table, device = all_ops(), _architecture(device)
    return {name: table[name].choose(table[name].example(device, dtype, grad)).name for name in MODELS[what]}


def _why(op: Op, problem: Problem, taken: str, assume_validated: bool) -> str:
    """What was measured of the backend that is taken, and the one reason why not a likelier one."""
    row, said = measured.find(op, problem), []
    if env.backend():
        said.append(f"SORA_FAST_BACKEND={env.backend()} names it")
    if row is not None and taken in row["ms"]:
        others = sorted((ms, name) for name, ms in row["ms"].items() if name != taken)
        said.append(f"{row['ms'][taken]:.3g} ms, measured here" + "".join(f", {name} {ms:.3g}" for ms, name in others))
    elif proof := records.evidence(op.name, op.backends[taken], problem):
        said.append(proof)
    if count := len(measured.every(op, problem.device)) if row is None else 0:
        said.append(f"{count} other {'problem was' if count == 1 else 'problems were'} measured here")
    tried = [*row["refused"], *op.order(problem)] if row is not None else op.order(problem)
    for name in tried[:tried.index(taken)] if taken in tried and not env.backend() else ():
        reasons = [row["refused"][name]] if row and name in row["refused"] else op.why_not(
            name, problem, assume_validated=assume_validated)
        if reasons:
            return "; ".join([*said, f"not {name}: {reasons[0]}"])
    return "; ".join(said)


def _every(op: Op, problem: Problem, taken: str | None, refusal: str, assume_validated: bool, table) -> list[str]:
    """A line per backend."""
    line = lambda name, mark, reason: f"{op.name:28s} {name:11s} {mark:3s} {reason}"
    lines = [line("none", "!", refusal)] * bool(refusal)
    for name in _backends(table):
        if name in op.backends:
            lines.append(line(name, *_verdict(op, op.backends[name], problem, name == taken, assume_validated)))
        elif name in ORDER:
            lines.append(line(name, "-", f"{op.name} has no {name} backend."))
    return lines


def _backends(table: dict[str, Op]) -> list[str]:
    """Every backend that some op has: those of auto in its order, then those that are taken by name only."""
    there = {name: None for op in table.values() for name in op.backends}
    return [name for name in ORDER if name in there] + [name for name in there if name not in ORDER]


def _verdict(op: Op, backend: Backend, problem: Problem, taken: bool, assume_validated: bool) -> tuple[str, str]:
    """The mark of a backend and the sentences beside it."""
    refused = backend.unsupported(problem)
    if refused:
        return "-", " ".join(refused)
    row = measured.find(op, problem) or dict(ms={}, refused={})
    if taken:
        reason = f"taken, as SORA_FAST_BACKEND={env.backend()} says" if env.backend() else "taken by auto"
        unproven = [] if assume_validated else records.why_not(op.name, backend, problem)  # it was named
    else:
        reason = "would run"
        unproven = op.why_not(backend.name, problem, assume_validated=assume_validated)
        if backend.name in row["refused"]:
            unproven = [f"Not taken: {row['refused'][backend.name]}"]
        elif backend.name not in (*ORDER, *row["ms"]):
            unproven = ["It is not among those that auto tries."]
        if unproven:
            reason = "would run if named"
    proof = records.evidence(op.name, backend, problem)
    found = f"config {backend.config(problem)}" if backend.config else ""
    time = f"{row['ms'][backend.name]:.3g} ms, measured here" if backend.name in row["ms"] else ""
    facts = "; ".join(part for part in (reason, proof, time, found, backend.note(problem)) if part)
    return "*" if taken else "ok", ". ".join([facts, " ".join(unproven)] if unproven else [facts])


def _architecture(device: str) -> str:
    """``"cpu"`` or ``"cuda:sm90"``, as problems name devices; one sentence for what is neither."""
    if re.fullmatch(r"cuda:sm\d+", device):
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"explain: expected device to be cpu, cuda or an architecture such as cuda:sm90, got {device!r}; "
                         f"choose one of them") from None
    if found.type != "cuda":
        return found.type
    if (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"explain: expected a CUDA device for {device!r}, got none here; name an architecture, as in "
                         f"'cuda:sm90'")
    major, minor = torch.cuda.get_device_capability(found)
    return f"cuda:sm{major}{minor}"


def info() -> str:
    """What is installed and where this package was imported from.

    Raises nothing.
    """
    lines = [
        f"sora_fast {__version__} from {Path(__file__).parent}",
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, CUDA build {torch.version.cuda or 'none'}",
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"GPU {index}: {torch.cuda.get_device_name(index)}, sm{major}{minor}")
    else:
        lines.append("GPU: none that PyTorch can use")
    for module, package in OPTIONAL.items():
        lines.append(f"{module}: {_version(module, package)}")
    table = all_ops()
    lines.append("backends: " + ", ".join(f"{name} ({KINDS[name]})" if name in KINDS else name
                                            for name in _backends(table)))
    for kind, of in (("Triton", "triton"), ("CUDA", "cuda")):
        kernels = sorted({op.backends[of].kernel for op in table.values() if of in op.backends})
        lines.append(f"{kind} kernels: {', '.join(kernels)}")
    lines.append(f"CUDA extension: {_extension()}")
    for what, path in (("validation records", records.user_file()), ("measured times", measured.user_file())):
        lines.append(f"{what} of this user: {path}" + ("" if path.is_file() else ", none yet"))
    lines.append(f"SORA_FAST_BACKEND={env.backend()}" if env.backend() else "SORA_FAST_BACKEND is not set")
    lines.append("")
    lines.append(explain("all", device="cuda" if torch.cuda.is_available() else "cpu"))
    return "\n".join(lines)


def _extension() -> str:
    """How the CUDA extension was built, or why it is not there."""
    _, missing = cuda_backend.extension()
    if missing:
        return missing.removeprefix("The CUDA extension ")
    built = environment.build_info()
    archs = "; ".join(f"{kernel} for {', '.join(archs)}" for kernel, archs in built["architectures"].items())
    return f"built by nvcc {built['nvcc']}: {archs}"


def _version(module: str, package: str) -> str:
    try:
        if importlib.util.find_spec(module) is None:
            return "not installed"
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"
    except ImportError:
        return "not installed"
