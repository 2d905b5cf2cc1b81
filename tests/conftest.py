"""What every test starts from: the same random numbers, no chosen backend, a cache of the tests' own.

With ``-n`` processes, each has one thread and takes whole files, those that take longest first (durations.txt).
"""

import os
import time
from collections import Counter
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once, when imported; children inherit it

import pytest  # noqa: E402
import tiers  # noqa: E402
import torch  # noqa: E402

from sora_fast import dispatch, precision  # noqa: E402
from sora_fast.cli.__main__ import main  # noqa: E402

HERE = Path(__file__).parent
BEGAN = time.monotonic()


def _seconds_of_files() -> Counter:
    """Of the files of the longest tests, as durations.txt has them: ``seconds  path::test``."""
    found = Counter()
    for line in (HERE / "durations.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            seconds, test = line.split(maxsplit=1)
            found[test.partition("::")[0]] += float(seconds)
    return found


def pytest_collection_modifyitems(items):
    seconds = _seconds_of_files()
    items.sort(key=lambda item: -seconds[f"tests/{item.path.name}"])  # stable: the other files keep their order


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files, for what their tests share, in the order in which they were collected."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_sessionfinish(session):
    sentence = tiers.too_long(session.config, time.monotonic() - BEGAN)
    if sentence:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\n{sentence}")


@pytest.fixture(autouse=True)
def clean_state(monkeypatch, tmp_path_factory):
    monkeypatch.delenv("SORA_FAST_BACKEND", raising=False)
    monkeypatch.delenv("SORA_FAST_CHECK", raising=False)
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    dispatch.forget()  # a test may have changed what is fixed for a process
    torch.manual_seed(0)
    benchmark = torch.backends.cudnn.benchmark
    with precision.switches_restored():  # what a benchmark sets, it sets for one test
        yield
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def emulated_sm90():
    """Kernels take CPU tensors, compiled for sm_90 and executed by the emulator."""
    pytest.importorskip("triton")
    from sora_fast.testing import emulated_gpu

    with emulated_gpu("sm90") as emulator:
        yield emulator


@pytest.fixture
def cli(capsys):
    """Run the command line here: (exit code, stdout, stderr)."""
    def run(*argv):
        with pytest.raises(SystemExit) as done:
            main([str(a) for a in argv])
        return done.value.code, *capsys.readouterr()
    return run


@pytest.fixture
def sums_of_real_clips():
    """As the benchmarks let the definition sum: see the function of this name."""
    from sora_fast.benchmarks.specs import convolution

    with convolution.sums_of_real_clips():
        yield


@pytest.fixture
def one_thread():
    """For times, and peaks of memory, that do not hang on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
