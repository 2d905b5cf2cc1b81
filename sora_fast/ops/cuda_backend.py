"""What all CUDA backends share: the extension sora_fast._C, the devices it supports, and its launches."""

import functools
import importlib

import torch

from .. import env
from ..dispatch import Problem, emulated_gpu
from ..environment import build_info

HOW_TO_BUILD = "SORA_FAST_BUILD_CUDA=1 pip install -e . builds it, or says why it cannot"


@functools.cache
def extension():
    """(sora_fast._C or None, why it is missing). It is imported at the first use."""
    if "skipped" in build_info():
        return None, f"The CUDA extension was not built: {build_info()['skipped']}; {HOW_TO_BUILD}."
    try:
        return importlib.import_module("sora_fast._C"), ""
    except ImportError as error:
        return None, f"The CUDA extension does not load: {error}; {HOW_TO_BUILD}."


def unsupported(problem: Problem, kernel: str, wide: torch.dtype) -> list[str]:
    """Reasons why no CUDA kernel of the family ``kernel`` supports ``problem``. ``wide``: the dtype of the arithmetic."""
    reasons = list(why_not(problem.device, kernel))
    if problem.grad:
        reasons.append("Its kernel has no backward yet, and a gradient is needed.")
    if wide == torch.float64:
        reasons.append("Its kernels compute in float32, and float64 tensors ask for more.")
    return reasons


def cannot_run(device: torch.device, kernel: str) -> list[str]:
    """The same for a device alone."""
    name = device.type
    if name == "cuda":
        if not torch.cuda.is_available():
            return ["There is no CUDA GPU here."]
        major, minor = torch.cuda.get_device_capability(device)
        name = f"cuda:sm{major}{minor}"
    return list(why_not(name, kernel))


@env.constant_in_graphs
def why_not(device: str, kernel: str) -> tuple[str, ...]:
    """Reasons why the built ``kernel`` does not run on "cuda:sm90", "emulated:sm90" or "cpu"."""
    reasons = []
    _, missing = extension()
    if missing:
        reasons.append(missing)
    kind, _, architecture = device.partition(":")
    if kind not in ("cuda", "emulated"):
        reasons.append(f"It is a kernel for CUDA GPUs, and these tensors are on {'a CPU' if kind == 'cpu' else kind}.")
    elif architecture and not missing:
        built = build_info()["architectures"].get(kernel, [])
        if not any(_runs_on(each, int(architecture.removeprefix("sm"))) for each in built):
            reasons.append(f"Its kernel was built for {', '.join(built) or 'no GPU'}, and this GPU is {architecture}.")
    return tuple(reasons)


def _runs_on(built: str, capability: int) -> bool:
    """sm_90a runs on 9.0 only, sm_80 on 8.x, compute_90 (PTX) on 9.0 and later."""
    kind, _, number = built.partition("_")
    if number.endswith("a"):
        return int(number[:-1]) == capability
    if kind == "compute":
        return int(number) <= capability
    return int(number) // 10 == capability // 10 and int(number) <= capability


def launch(name: str, like: torch.Tensor, **fields) -> None:
    """Launch sora_fast._C.<name> on ``like``'s device and current stream; tensors in ``fields`` become addresses."""
    built, missing = extension()
    if missing:
        raise RuntimeError(f"{name}: {missing}")
    gpu = emulated_gpu()
    if gpu is not None:
        return gpu.launch(built, name, fields)
    arguments = {key: value.data_ptr() if isinstance(value, torch.Tensor) else value for key, value in fields.items()}
    stream = torch.cuda.current_stream(like.device).cuda_stream
    getattr(built, name)(device=like.device.index or 0, stream=stream, **arguments)
