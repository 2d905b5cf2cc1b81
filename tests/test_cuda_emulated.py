"""The CUDA norm's kernel, a thread of the CPU for each of the GPU's, under sanitizers; and kernels that are broken."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import cuda_stand_ins
import numpy as np
import pytest
import torch
from test_cuda_normalization import CXX, NVCC, ROOT

from sora_fast import ops
from sora_fast.ops import cuda_backend, normalization_cuda
from sora_fast.reference import normalization as reference
from sora_fast.testing import assert_matches

pytestmark = [pytest.mark.full, pytest.mark.skipif(CXX is None, reason="needs g++")]


def compile_emulated(folder, sanitizer, *edits):
    """The kernel's program under a sanitizer; ``edits``: (what is in csrc/normalization.cuh, what to write for it)."""
    folder.mkdir()
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = folder / "csrc" / "normalization.cuh"
    for old, new in edits:
        text = source.read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in the kernel"
        source.write_text(text.replace(old, new))
    dryrun = subprocess.run([NVCC, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    headers = [word for path in re.findall(r'"-I([^"]*/include)"', dryrun) for word in ("-isystem", path)]
    done = subprocess.run([CXX, "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-Wall",
                           "-Wno-unknown-pragmas", *headers, "-I", folder / "csrc", "-I", ROOT / "tests/csrc",
                           ROOT / "tests/csrc/normalization_emulated.cpp", "-o", folder / "program", "-pthread"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "program"


ADDRESS, THREAD = "address,undefined", "thread"


PROGRAMS = {
    "address": (ADDRESS,),
    "thread": (THREAD,),
    "without its barrier": (THREAD, ("  __syncthreads();\n", "")),
    "with too small a buffer": (ADDRESS, ("* 2 * int(sizeof(float))", "* int(sizeof(float))")),
    "past the last column": (ADDRESS, ("if (column >= norm_act_columns(a)) return {-1, -1, -1};", "")),
    "without eps": (ADDRESS, (" + args.eps", "")),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Each of PROGRAMS, compiled two at a time."""
    if not NVCC:
        pytest.skip("needs nvcc's headers")
    folder = tmp_path_factory.mktemp("emulated")
    for sanitizer in (ADDRESS, THREAD):
        (folder / "empty.cpp").write_text("int main() {}")
        empty, works = folder / "empty", lambda *command: subprocess.run(command, capture_output=True).returncode == 0
        if not (works(CXX, f"-fsanitize={sanitizer}", f"{empty}.cpp", "-o", empty) and works(empty)):
            pytest.skip(f"g++ -fsanitize={sanitizer} does not work here")
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda item: compile_emulated(folder / item[0].replace(" ", "_"), *item[1]), PROGRAMS.items())
    return dict(zip(PROGRAMS, built, strict=True))


OUTPUTS = ("y", "cache_out")


class Crash(Exception):
    """What a sanitizer said."""


def memory(tensor):
    """The bytes of a vector, or of a video, channels last."""
    flat = tensor.permute(0, 2, 3, 4, 1) if tensor.dim() == 5 else tensor
    return flat.view(-1).view(torch.uint8).numpy()  # a view, or an error


@pytest.fixture
def run(programs, monkeypatch, tmp_path):
    """run(program): from here on norm_act's kernel is the emulated one, and the convolution's a stand-in."""
    def use(name, threads=64, blocks=3):
        def launch(op, like, **fields):
            if op != "norm_act":
                return cuda_stand_ins.launch(op, like, **fields)
            lines = []
            for field, value in fields.items():
                if isinstance(value, torch.Tensor):
                    numbers = memory(value)
                    # what the kernel leaves out of its outputs is NaN afterwards
                    (tmp_path / field).write_bytes(b"\xff" * len(numbers) if field in OUTPUTS else numbers.tobytes())
                    value = len(numbers)
                lines.append(f"{field} {-1 if value is None else float(value)!r}\n")
            (tmp_path / "arguments").write_text("".join(lines))
            done = subprocess.run([programs[name], tmp_path, str(threads), str(blocks)], capture_output=True, text=True)
            if done.returncode:
                raise Crash(done.stderr)
            for field in OUTPUTS:
                if fields[field] is not None:
                    memory(fields[field])[:] = np.fromfile(tmp_path / field, np.uint8)

        monkeypatch.setattr(cuda_backend, "launch", launch)
        monkeypatch.setattr(cuda_backend, "unsupported", lambda problem, kernel, wide: [])
    return use


def video(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def norm_act(channels, dtype, *, size=(2, 3, 21), **settings):
    """norm_act of a clip against the definition in float64, under the error rule."""
    inputs = dict(x=video(1, channels, *size, dtype=dtype), weight=1 + video(channels, dtype=dtype) / 4,
                  bias=video(channels, dtype=dtype), norm="rms", eps=1e-5, act="silu") | settings
    assert_matches("norm_act", lambda **given: ops.norm_act(**given, backend="cuda"), inputs, grads=False)


def norm_act_conv3d(channels=96, outputs=96, **settings):
    """What the convolution reads: padded, the cache's frames before it, and the next cache."""
    dtype = torch.bfloat16
    inputs = dict(x=video(2, channels, 2, 3, 5, dtype=dtype), weight=video(outputs, channels, 3, 3, 3, dtype=dtype) / 50,
                  norm_weight=video(channels, dtype=dtype), return_cache=True) | settings
    assert_matches("norm_act_conv3d", lambda **given: ops.norm_act_conv3d(**given, backend="cuda"), inputs, grads=False)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("channels", (8, 96, 160, 1024))
def test_the_kernel_passes_the_error_rule(run, dtype, channels):
    run("address")
    norm_act(channels, dtype)


@pytest.mark.parametrize("settings", [
    dict(act=None), dict(weight=None, bias=None), dict(bias=None), dict(size=(1, 1, 1)), dict(size=(3, 1, 70)),
    dict(eps=0.5), dict(channels=24), dict(channels=384),
], ids=str)
def test_other_norms(run, settings):
    run("address")
    norm_act(**dict(channels=48, dtype=torch.bfloat16) | settings)


@pytest.mark.parametrize("space_pad", ("zeros", "replicate", "reflect"))
@pytest.mark.parametrize("cached", (0, 1, 2))
def test_the_input_of_a_convolution(run, space_pad, cached):
    run("address")
    cache = video(2, 96, cached, 3, 5, dtype=torch.bfloat16) if cached else None
    norm_act_conv3d(space_pad=space_pad, padding=(1, 2, 0, 1), cache=cache)


def test_a_float32_clip_for_a_16_bit_convolution(run):
    run("address")
    x, settings = video(2, 96, 2, 3, 5), dict(norm="rms", eps=1e-6, act="silu")
    got, _ = normalization_cuda.launch(x, None, None, **settings, dtype=torch.bfloat16, padding=(1, 1, 1, 1))
    expected = torch.nn.functional.pad(reference.norm_act(x.double(), groups=1, **settings), (1, 1, 1, 1))
    assert ((got - expected).abs() <= expected.abs() * 2**-8 * 1.001).all()  # rounded once


def test_threads_do_not_race(run):
    run("thread")
    norm_act(96, torch.bfloat16, size=(1, 2, 5))
    norm_act_conv3d(space_pad="replicate", cache=video(2, 96, 1, 3, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("program, said", [
    ("without its barrier", "ThreadSanitizer: data race"),
    ("with too small a buffer", "AddressSanitizer: heap-buffer-overflow"),
    ("past the last column", "AddressSanitizer: heap-buffer-overflow"),
])
def test_sanitizers_see_a_broken_kernel(run, program, said):
    run(program)
    with pytest.raises(Crash, match=said):
        norm_act(96, torch.bfloat16, size=(1, 2, 5))


def test_the_rule_sees_a_wrong_kernel(run):
    run("without eps")
    with pytest.raises(AssertionError):
        norm_act(96, torch.float32, eps=0.1)
