"""Installs the fake device for the whole process, before the first drive_*.py is imported.

No conftest.py: pytest would load it, and fake CUDA, in every run that collects the folder above.
"""

import pytest
import torch
from torch.nn.attention import varlen

from sora_fast.reference.attention import visible

from . import cuda


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """In the place of PyTorch's own kernel, which a CPU build does not have: the same sums, without a wait."""
    mask = visible(cu_seq_q, cu_seq_k, query.shape[0], key.shape[0], False, window_size, query.device)
    scores = torch.einsum("nhe,mhe->hnm", query.float(), key.float()) * (scale or query.shape[2] ** -0.5)
    weights = torch.where(mask, scores.masked_fill(~mask, -1e30).softmax(-1), 0)
    return torch.einsum("hnm,mhe->nhe", weights.to(value.dtype), value)


varlen.varlen_attn = varlen_attn
cuda.install()


@pytest.fixture(autouse=True)
def default_stream():
    """A capture that fails leaves its stream the current one, as PyTorch's does: for one test."""
    yield
    del cuda._streams[1:]


@pytest.fixture
def kernels():
    """The Emulator that runs the kernels."""
    pytest.importorskip("triton")
    from .kernels import emulated

    with emulated() as emulator:
        yield emulator
