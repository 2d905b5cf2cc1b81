"""Matrix descriptors, swizzles and fragments of the emulator beside what CuTe's host code computes, so that the emulator's
author does not judge himself."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sora_fast.emulator import matrix, tma

ROOT = Path(__file__).resolve().parents[1]
NVCC, CXX = shutil.which("nvcc"), shutil.which("g++")
CUTLASS = importlib.util.find_spec("cutlass_library")
NEEDED = NVCC and CXX and CUTLASS
pytestmark = [pytest.mark.full, pytest.mark.ci,
              pytest.mark.skipif(not NEEDED, reason="needs nvcc's headers, g++ and the package nvidia-cutlass")]  # fmt: skip


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Lines of tests/csrc/emulator_layouts.cpp: {words before the numbers: numbers}."""
    program = tmp_path_factory.mktemp("layouts") / "layouts"
    dryrun = subprocess.run([NVCC, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    includes = re.findall(r'"(?:-I)?([^"]*/include[^"]*)"', dryrun)
    headers = Path(CUTLASS.submodule_search_locations[0]) / "source" / "include"
    macros = ["-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0"]
    folders = [flag for path in (headers, *includes) for flag in ("-isystem", path)]
    command = [CXX, "-std=c++17", "-O0", "-w", *macros, *folders, ROOT / "tests/csrc/emulator_layouts.cpp", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        words = line.split()  # besides, CuTe says that it takes no shared address on the host, and begins at 0
        names = {"layout": 4, "descriptor": 6, "fragment": 5}.get(words[0])
        if names:
            found[tuple(words[:names])] = [int(word) for word in words[names:]]
    return found


def layouts(said):
    return {key[1]: np.array(value).reshape(int(key[2]), int(key[3])) for key, value in said.items() if key[0] == "layout"}


def test_descriptors_address_what_cute_lays_out(said):
    """Every element of every operand: the byte that the descriptor leads to is the one CuTe puts it at."""
    tiles, count = layouts(said), 0
    for (kind, *key), (descriptor,) in ((k, v) for k, v in said.items() if k[0] == "descriptor"):
        name, _, rows, block, step = key
        rows, block, step = int(rows), int(block), int(step)
        start, lead, stride, swizzle = matrix.decode(descriptor)
        got = matrix.layout_offsets(swizzle, lead, stride, name.startswith("MN"), rows, 16, 2, start % 1024)
        got = got + start // 1024 * 1024
        want = tiles[name][block * 64 : block * 64 + rows, step * 16 : step * 16 + 16]
        assert (got == want).all(), (kind, *key)
        count += 1
    assert count == 3 * (4 + 2 + 1 + 2 + 4 * 4)


@pytest.mark.parametrize("name, swizzle, channels", [("K_SW128", 3, 64), ("K_SW64", 2, 32), ("K_SW32", 1, 16)])
def test_boxes_are_swizzled_as_cute_lays_them_out(said, name, swizzle, channels):
    """A TMA load of 128 rows with CU_TENSOR_MAP_SWIZZLE_*: every element's byte in shared memory."""
    raw = np.zeros(1, tma.MAP)
    raw["address"], raw["rank"], raw["type"], raw["swizzle"] = 1 << 20, 2, 9, swizzle
    raw["dims"][0, :2], raw["box"][0, :2], raw["steps"][0, :2] = (4 * channels, 1000), (channels, 128), 1
    raw["strides"][0, 0] = 8 * channels
    box = tma.Box(raw.tobytes(), (channels, 7), 2048)
    assert (box.elements(box.shared).reshape(128, channels) - 2048 == layouts(said)[name]).all()
    row, column = np.arange(128)[:, None], np.arange(channels)
    got = box.elements(box.addresses).reshape(128, channels)
    assert (got == (1 << 20) + (row + 7) * 8 * channels + (column + channels) * 2).all()


def test_boxes_beyond_the_tensor_are_filled():
    raw = np.zeros(1, tma.MAP)
    raw["address"], raw["rank"], raw["type"] = 1 << 20, 2, 9
    raw["dims"][0, :2], raw["box"][0, :2], raw["steps"][0, :2], raw["strides"][0, 0] = (24, 5), (16, 4), 1, 64
    box = tma.Box(raw.tobytes(), (-8, 3), 1024)
    row, column = np.arange(4)[:, None] + 3, np.arange(16) - 8
    inside = (row < 5) & (column >= 0) & (column < 24)
    assert (np.repeat(box.in_bounds, box.size // 2).reshape(4, 16) == inside).all()
    assert (box.elements(box.addresses) == ((1 << 20) + 64 * row + 2 * column)[inside]).all()


def numbered(function, count, k, kind):
    """The matrix of registers whose elements are their own number, lane * values + value."""
    numbers = np.arange(count, dtype=np.float32 if kind == "tf32" else np.float16).reshape(32, -1)
    return function(list(numbers.view(np.uint32).T[:, None]), 1, k, kind)[0]


def where(matrix):
    """(row, column) of each number, by lane and value."""
    return np.array(np.unravel_index(np.argsort(matrix, axis=None), matrix.shape)).reshape(2, 32, -1)


def accumulated(columns):
    """(row, column) that each accumulator of each lane holds."""
    d = np.arange(16 * columns).reshape(16, -1, 8).swapaxes(0, 1)[None].copy()
    return np.divmod(np.stack([r[0] for r in matrix.registers_d(d)], 1), columns)


def test_fragments(said):
    """Which element of A, B and C each register of each lane holds, for mma.sync and wgmma."""
    a = lambda k, kind: where(numbered(matrix.matrix_a, 16 * k, k, kind))
    b = lambda k, kind: where(numbered(matrix.matrix_b, 8 * k, k, kind).T)  # CuTe's B is N x K
    places = {("m16n8k16", "A"): (16, a(16, "f16")), ("m16n8k8", "A"): (16, a(8, "f16")),
              ("m16n8k8_tf32", "A"): (16, a(8, "tf32")), ("m64n96k16", "A"): (64, a(16, "f16")),
              ("m16n8k16", "B"): (8, b(16, "f16")), ("m16n8k8", "B"): (8, b(8, "f16")),
              ("m16n8k8_tf32", "B"): (8, b(8, "tf32")),
              ("m16n8k16", "C"): (16, accumulated(8)), ("m64n96k16", "C"): (64, accumulated(96))}  # fmt: skip
    for (name, operand), (rows, (row, column)) in places.items():
        key = next(key for key in said if key[:3] == ("fragment", name, operand))
        threads, values = int(key[3]), int(key[4])
        warps = threads // 32
        got = np.concatenate([row + 16 * warp + rows * column for warp in range(warps)])
        assert (got == np.array(said[key]).reshape(threads, values)).all(), (name, operand)
