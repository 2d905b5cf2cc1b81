"""The quick suite under pytest-benchmark: ``pytest benchmarks/``.

The same cases, providers and gate as ``sora-fast bench --suite quick``; pytest-benchmark keeps the time, compares with
--benchmark-compare and writes its own JSON.
"""

import functools

import pytest
import torch

from sora_fast.benchmarks import gate, timing
from sora_fast.benchmarks.runner import prepare, set_conditions
from sora_fast.benchmarks.suites import work
from sora_fast.ops import FAMILIES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CPU = DEVICE.type == "cpu"
WORK = [(case, provider, direction) for _, case, providers in work(FAMILIES, "quick", DEVICE.type, spare_compiling=ON_CPU)
        for provider in providers for direction in case.directions()]


@functools.lru_cache(maxsize=1)  # the cases come one after the other
def truth(case):
    return case.truth(case.inputs(DEVICE, seed=0), seed=0)


@pytest.mark.parametrize("case, provider, direction", WORK,
                         ids=[f"{case.id} / {direction} / {provider.name}" for case, provider, direction in WORK])
def test_speed(benchmark, case, provider, direction):
    why = provider.unavailable(case, direction, DEVICE)
    if why:
        pytest.skip(why)
    set_conditions()
    torch._dynamo.reset()
    verdict = gate.check(case, provider, truth(case), DEVICE, (direction,))[direction]
    if verdict.status == "UNSUPPORTED":
        pytest.skip(verdict.reason)
    assert verdict.status == "PASSED", verdict.reason
    stream = timing.side_stream(DEVICE)
    inputs = case.inputs(DEVICE, seed=1)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):  # of None: nothing
        (measured,), _ = prepare(provider, [inputs], case.directions()[direction], truth(case), DEVICE)

        def call():
            measured()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        benchmark.group = f"{case.id} / {direction}"
        benchmark(call)
