"""What every test starts from: the same random numbers, no chosen backend, a cache of the tests' own.

With ``-n`` processes, each has one thread and takes whole files, those that take longest first.
"""

import os
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once, when imported; children inherit it

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from sora_fast import reference  # noqa: E402
from sora_fast.cli.__main__ import main  # noqa: E402

LONGEST = ("test_interpreted.py", "test_aot.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))  # stable


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files, for what their tests share, in the order in which they were collected."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def clean_state(monkeypatch, tmp_path_factory):
    monkeypatch.delenv("SORA_FAST_BACKEND", raising=False)
    monkeypatch.delenv("SORA_FAST_CHECK", raising=False)
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(0)
    flags = [(torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "allow_tf32"),
             (torch.backends.cuda.matmul, "allow_tf32")]
    before = [getattr(module, name) for module, name in flags]
    yield
    for (module, name), value in zip(flags, before, strict=True):  # what a benchmark sets, it sets for one test
        setattr(module, name, value)


@pytest.fixture
def cli(capsys):
    """Run the command line here: (exit code, stdout, stderr)."""
    def run(*argv):
        with pytest.raises(SystemExit) as done:
            main([str(a) for a in argv])
        return done.value.code, *capsys.readouterr()
    return run


@pytest.fixture
def sums_of_real_clips(monkeypatch):
    """The definition's float32 convolutions made by oneDNN, as PyTorch has it do from 20,480 = B * C * T * H numbers on.

    Smaller clips, such as those of tests, are unfolded into one product. Where a CPU has no AVX-512, oneDNN adds a window's
    products one after another, which at 96 channels errs 3.5 times as much (RMS) as that: by the rule, too much.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return

    def conv3d(x, weight, bias=None, stride=(1, 1, 1)):
        if x.dtype != torch.float32:
            return F.conv3d(x, weight, bias, stride)
        if weight.shape[2] == 1:
            frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], bias, stride[1:])
            return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)

    monkeypatch.setattr(reference.convolution, "F", SimpleNamespace(conv3d=conv3d, pad=F.pad))
