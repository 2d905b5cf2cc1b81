"""Every op on the fake device, by its own composition and by its kernels: the error rule, no wait, and as a CUDA graph."""

from itertools import islice

import pytest
import torch

from sora_fast import ops
from sora_fast.explanation import all_ops
from sora_fast.ops import cuda_backend
from sora_fast.testing import truth
from sora_fast.testing.cases import cases
from sora_fast.testing.rule import run, same_bits

from . import waits

RAW = ("varlen_attention_forward", "varlen_attention_backward")  # without gradients of their own
CALLS = [(op, backend) for op in ops.__all__ for backend in ("torch", "triton") if backend in all_ops()[op].backends]
each_call = pytest.mark.parametrize("op, backend", CALLS)
COUNT = dict(torch=20, triton=2)  # cases, of which the emulator takes seconds each


def on(op, backend):
    return lambda **inputs: getattr(ops, op)(**inputs, backend=backend)


def few(op, backend, dtype):
    """The first cases that the backend takes, those for models' channels left out."""
    of_cpus = [label for label, _ in cases(op, dtype, "cpu")]
    found = []
    for label, inputs in cases(op, dtype, "cuda"):
        if len(found) == COUNT[backend] or label not in of_cpus:
            break
        try:
            with torch.no_grad():
                run(on(op, backend), inputs, None)
        except NotImplementedError:
            continue
        found.append((label, inputs))
    assert found
    return found


@each_call
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_an_op(kernels, op, backend, dtype):
    """Outputs and gradients by the error rule; nothing waits, forward or backward, but the judge."""
    for label, inputs in few(op, backend, dtype):
        wanted = truth(op, inputs, grads=op not in RAW)
        with waits.seen() as found:
            compared = wanted.compare(on(op, backend))
        hidden = [str(wait) for wait in found if not wait.file.startswith("sora_fast/testing/")]
        assert not hidden, f"{label}: {hidden}"
        assert not (failed := [str(each) for each in compared if not each.passed]), f"{label}: {failed}"
    assert backend == "torch" or kernels.records


# Forward alone: these kernels have no backward.
CUDA = [("norm_act", dict(x=(1, 8, 2, 3, 3), weight=(8,))),
        ("causal_conv3d", dict(x=(1, 96, 2, 4, 8), weight=(96, 96, 1, 3, 3), bias=(96,)))]


@pytest.mark.parametrize("op, shapes", CUDA, ids=[row[0] for row in CUDA])
def test_a_kernel_in_cuda(kernels, op, shapes):
    inputs = {name: torch.randn(shape, device="cuda").bfloat16() for name, shape in shapes.items()}
    call = lambda: run(on(op, "cuda"), inputs, None)[0]
    with torch.no_grad(), waits.none():
        if cuda_backend.extension()[0] is None:
            with pytest.raises(NotImplementedError, match="The CUDA extension"):
                call()
            return
        outputs = call()
    compared = truth(op, inputs, grads=False).compare(outputs)
    assert kernels.records and not (failed := [str(each) for each in compared if not each.passed]), failed


@each_call
def test_an_op_as_a_cuda_graph(kernels, op, backend):
    """Captured after one call, replayed on other numbers: the bits of a call without a graph."""
    (label, inputs), *_ = few(op, backend, torch.bfloat16)
    call = lambda: run(on(op, backend), inputs, None)[0]
    with torch.no_grad():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        for value in islice((v for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()), 1):
            value.mul_(0.5)
        graph.replay()
        assert all(same_bits(a, b) for a, b in zip(outputs, call(), strict=True)), label
