"""sora_fast._C as it was built here: it loads without a driver and says what is wrong with a call; what setup.py refuses."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

from sora_fast import ops
from sora_fast.environment import build_info
from sora_fast.ops import cuda_backend

ROOT = Path(__file__).resolve().parents[1]

needs_extension = pytest.mark.skipif("skipped" in build_info(), reason=f"not built: {build_info().get('skipped')}")

# of one frame of 2 x 2 pixels; the addresses are no memory, and nothing gets as far as to read there
NORM_ACT = dict(x=64, cache=None, weight=None, bias=None, y=128, cache_out=None, samples=1, frames=1, height=2, width=2,
                channels=96, cached=0, kept=0, front=0, left=0, right=0, top=0, bottom=0, space_pad=0, x_dtype=1, y_dtype=1,
                rms=True, silu=True, eps=1e-6)
CONV = dict(x=1024, cache=None, weight=2048, bias=None, residual=None, y=4096, samples=1, frames=1, height=2, width=2,
            in_channels=96, cached=0, x_stride=384, cache_stride=0, out_frames=1, out_height=2, out_width=2, out_channels=96,
            kt=3, kh=3, kw=3, stride_t=1, phase=0, lookahead=0, top=1, left=1, replicate=False)
WGMMA_SELFTEST = dict(a=1024, b=2048, y=4096, rows=64, columns=96, inner=64, tile_columns=96, slice=64)
CALLS = {"norm_act": NORM_ACT, "causal_conv3d": CONV, "wgmma_selftest": WGMMA_SELFTEST}


@pytest.fixture(scope="module")
def extension():
    built, missing = cuda_backend.extension()
    assert not missing
    return built


@needs_extension
@pytest.mark.parametrize("op, change, error, sentence", [
    ("norm_act", dict(channels=7), ValueError, "expected channels to be a multiple of 8 in this dtype, got 7; take another"),
    ("norm_act", dict(channels="many"), TypeError, "expected channels to be an int in range, got 'many'"),
    ("norm_act", dict(samples=2**40), TypeError, "expected samples to be an int in range, got 1099511627776"),
    ("norm_act", dict(x=-16), TypeError, r"expected x to be an address \(an int, or None\), got -16"),
    ("norm_act", dict(x=None), ValueError, "expected an address for x, got none; pass a tensor's data_ptr"),
    ("norm_act", dict(x=72), ValueError, "expected x to begin at a multiple of 16 bytes, got 0x48; copy it"),
    ("norm_act", dict(space_pad=2, left=2), ValueError, "expected reflections smaller than frames of 2 x 2, got left 2"),
    ("norm_act", dict(chanels=96), TypeError, "expected arguments among .*channels.*, got chanels; check the spelling"),
    ("norm_act", dict(eps=...), TypeError, "expected the argument eps, got none"),
    ("causal_conv3d", dict(in_channels=97), ValueError, "expected .*channels.*got 97"),
    ("causal_conv3d", dict(out_channels=80), ValueError, "expected .*channels.*got 80"),
    ("wgmma_selftest", dict(tile_columns=64), ValueError, "expected .*got 64"),
    ("wgmma_selftest", dict(stream="main"), TypeError, r"expected stream to be an address \(an int, or None\), got 'main'"),
    ("wgmma_selftest", dict(device="cuda"), TypeError, "expected device to be an int in range, got 'cuda'"),
], ids=lambda value: str(value) if isinstance(value, (str, dict)) else "")
def test_a_wrong_argument_raises_a_sentence(extension, op, change, error, sentence):
    given = {name: value for name, value in (CALLS[op] | change).items() if value is not ...}
    with pytest.raises(error, match=f"^{op}: {sentence}"):
        getattr(extension, op)(**given)


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("where", (dict(), dict(stream=0, device=0), dict(stream=2**47, device=1)), ids=str)
def test_a_launch_without_a_driver_raises_a_sentence(extension, op, where):
    with pytest.raises(RuntimeError, match=f"^{op}: expected a driver for CUDA .* got none or an older one; update it"):
        getattr(extension, op)(**CALLS[op], **where)


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_the_ops_calls_are_those_that_the_extension_takes(monkeypatch):
    """Every field, the device and the stream: what a stand-in of the kernels does not see."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda_backend, "unsupported", lambda problem, kernel, wide: [])
    x, weight = torch.zeros(1, 96, 1, 2, 2, dtype=torch.bfloat16), torch.zeros(96, 96, 3, 3, 3, dtype=torch.bfloat16)
    for op, kernel, call in (("norm_act", "norm_act", (x,)), ("causal_conv3d", "causal_conv3d", (x, weight)),
                             ("norm_act_conv3d", "norm_act", (x, weight))):
        with pytest.raises(RuntimeError, match=f"^{kernel}: expected a driver for CUDA"):
            getattr(ops, op)(*call, backend="cuda")


@pytest.fixture
def setup(monkeypatch):
    """setup.py's own functions; nothing is installed."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for name in ("SORA_FAST_BUILD_CUDA", "SORA_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@needs_extension
def test_the_build_is_of_these_sources(setup):
    built = build_info()
    assert set(built["kernels"]) == set(built["architectures"]) == set(setup["KERNELS"])
    if built["nvcc"] == setup["VERSION"]:
        assert built["kernels"] == {name: setup["kernel_hash"](name) for name in setup["KERNELS"]}, "pip install -e . again"


def test_a_hash_is_of_what_the_sources_say(setup, tmp_path):
    """Of a family's own files, theirs that they include, and another family's that its backends launch; no comments."""
    if not setup["VERSION"]:
        setup["kernel_hash"].__globals__["VERSION"] = "13.0.0"
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    setup["kernel_hash"].__globals__["ROOT"] = tmp_path
    hashes = lambda: {name: setup["kernel_hash"](name) for name in setup["KERNELS"]}
    first = hashes()

    def changed_by(name, text):
        source = tmp_path / "csrc" / name
        before = source.read_text()
        source.write_text(before + text)
        now = hashes()
        source.write_text(before)
        return {family for family in now if now[family] != first[family]}

    assert changed_by("normalization.cuh", "  // a comment\n\n") == set()
    assert changed_by("normalization.cuh", "int more;") == {"normalization", "convolution"}
    assert changed_by("convolution_index.h", "int more;") == {"convolution"}
    assert changed_by("sm90.cuh", "int more;") == {"wgmma_selftest", "convolution"}
    assert changed_by("layout.h", "int more;") == {"normalization", "wgmma_selftest", "convolution"}
    setup["kernel_hash"].__globals__["VERSION"] = "99.1.0"
    assert not set(first.items()) & set(hashes().items())


def test_another_nvcc_in_the_same_place_compiles_anew(setup, tmp_path, monkeypatch):
    """What the hash and _build_info.json say of nvcc must be true of the objects."""
    monkeypatch.setattr(subprocess, "run", lambda *command, **how: SimpleNamespace(returncode=0))
    told = setup["build"].__globals__
    commands = []
    for version in ("13.0.88", "13.0.88", "13.1.0"):
        told.update(ROOT=tmp_path, NVCC="/cuda/bin/nvcc", VERSION=version)
        setup["build"]()
        written = (tmp_path / "build" / "cuda" / "build.ninja").read_text()
        commands.append(re.search("rule compile.*?command = ([^\n]*)", written, re.DOTALL)[1])
    assert commands[0] == commands[1] != commands[2]


def test_architectures(setup, monkeypatch):
    architectures = setup["architectures"]
    assert architectures("any") == ["sm_80", "sm_90", "compute_80", "compute_90"]
    assert architectures("hopper") == ["sm_90a", "compute_90a"]
    monkeypatch.setenv("SORA_FAST_CUDA_ARCHS", "120; 86")
    assert architectures("any") == ["sm_86", "sm_120", "compute_86", "compute_120"]
    monkeypatch.setenv("SORA_FAST_CUDA_ARCHS", "90a")
    assert architectures("any") == ["sm_90", "compute_90"]
    for wrong in ("", "75", "sm_90", "90;;80", "90b"):
        monkeypatch.setenv("SORA_FAST_CUDA_ARCHS", wrong)
        with pytest.raises(SystemExit, match="SORA_FAST_CUDA_ARCHS: expected numbers from 80 on"):
            architectures("any")


@pytest.mark.parametrize("variables, sentence", [
    (dict(SORA_FAST_BUILD_CUDA="yes"), "SORA_FAST_BUILD_CUDA: expected 0, 1 or auto, got 'yes'; set one of them"),
    (dict(SORA_FAST_BUILD_CUDA="1", CUDA_HOME="/nowhere"),
     "SORA_FAST_BUILD_CUDA=1: expected to build csrc/, but there was no nvcc in CUDA_HOME, .* 12.5 or newer is needed"),
], ids=str)
def test_setup_refuses_in_a_sentence(variables, sentence):
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, env={**os.environ, **variables},
                          capture_output=True, text=True)
    assert done.returncode == 1 and re.match(sentence, done.stderr.strip().splitlines()[-1])
