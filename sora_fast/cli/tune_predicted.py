"""The order in which the tuner tries candidates: what the cycle model likes best comes first. It decides nothing else."""

import math
from collections.abc import Callable

from .. import configs
from ..cyclemodel import GPU, GPUS, predict
from .predict_kernels import PASSES, works_of


def gpu_like(name: str) -> GPU | None:
    """The model's GPU of the name of ``configs.gpu_name`` ("sm90-H200"), else one of its architecture, or None."""
    arch, _, chip = name.partition("-")
    alike = [gpu for gpu in GPUS.values() if f"sm{gpu.cc}" == arch]
    return next((gpu for gpu in alike if gpu.name in chip.split("-")), next(iter(alike), None))


def likeliest(asked: configs.Asked, candidates: list, call: Callable, tell: Callable[[str], object] = print) -> list:
    """``candidates``, the best predicted first and those last that do not compile or fit; as they are where none is seen.

    ``call`` makes the launches that look up ``asked``: they are compiled for it and not made.
    """
    gpu = gpu_like(asked.gpu)
    if gpu is None or len(candidates) < 2:
        return candidates
    rates = {}
    for config in candidates:
        try:
            rates[config] = rate_of(config, asked, call, gpu)
        except Exception as error:  # a compiler's too: it is tried last, and says so itself
            rates[config], reason = -math.inf, error
    if max(rates.values()) == -math.inf:
        tell(f"{asked.family} {asked.key}: nothing is predicted of its candidates ({reason}): they are tried as they come")
        return candidates
    return sorted(candidates, key=rates.get, reverse=True)  # among equals the first stays first


def rate_of(config, asked: configs.Asked, call: Callable, gpu: GPU) -> float:
    """How fast all kernels of the call are predicted to be, as a sum of logarithms: those that no config changes cancel."""
    rate = 0.0
    with configs.override(asked.family, asked.kernel, config, asked.problem):
        works = list(works_of(asked.family, call, asked.key))
    for work in works:
        if PASSES.get(work.case.fn.__name__) != "beside the others":
            found = predict(work.kernel(gpu, getattr(asked.problem, "tokens", 0)), gpu)
            rate += math.log(found.tflops or found.copy_share)
    return rate
