"""What the tests and the benchmarks share. With ``-n`` processes, each has one thread."""

import os
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once, when imported; children inherit it

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from sora_fast import reference  # noqa: E402


@pytest.fixture
def sums_of_real_clips(monkeypatch):
    """The definition's float32 convolutions made by oneDNN, as PyTorch has it do from 20,480 = B * C * T * H numbers on.

    Smaller clips, such as those of tests, are unfolded into one product. Where a CPU has no AVX-512, oneDNN adds a window's
    products one after another, which at 96 channels errs 3.5 times as much (RMS) as that: by the rule, too much.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return

    def conv3d(x, weight, bias=None, stride=(1, 1, 1)):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return F.conv3d(x, weight, bias, stride)
        if weight.shape[2] == 1:
            frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], bias, stride[1:])
            return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)

    monkeypatch.setattr(reference.convolution, "F", SimpleNamespace(conv3d=conv3d, pad=F.pad))
