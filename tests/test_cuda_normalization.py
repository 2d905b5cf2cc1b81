"""The CUDA norm's index functions beside brute force."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX, NVCC = shutil.which("g++"), shutil.which("nvcc")

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++")


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in
                "samples frames height width channels cached kept front left right top bottom space_pad".split()]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    built = tmp_path_factory.mktemp("index") / "index.so"
    subprocess.run([CXX, "-O1", "-shared", "-fPIC", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-I",
                    ROOT / "csrc", ROOT / "tests/csrc/normalization_index.cpp", "-o", built], check=True)
    return ctypes.CDLL(str(built))


def walked(index, sizes, threads, blocks):
    """(y's sources, how often each was written), and the same of cache_out."""
    s = Sizes(**sizes)
    y = (s.samples, s.front + s.frames, s.top + s.height + s.bottom, s.left + s.width + s.right)
    arrays = [np.full(shape, fill, kind) for shape in (y, (s.samples, s.kept, s.height, s.width))
              for fill, kind in ((-99, np.int64), (0, np.int32))]
    index.walk(ctypes.byref(s), threads, ctypes.c_int64(blocks), *(a.ctypes.data_as(ctypes.c_void_p) for a in arrays))
    return arrays


def meant(sizes):
    """The same sources by numpy's own concatenation and padding."""
    s = Sizes(**sizes)
    pixels = lambda frames: np.arange(s.samples * frames * s.height * s.width).reshape(s.samples, frames, s.height, s.width)
    whole = np.concatenate([-2 - pixels(s.cached), pixels(s.frames)], 1)
    around = ((0, 0), (0, 0), (s.top, s.bottom), (s.left, s.right))
    mode = [dict(mode="constant", constant_values=-1), dict(mode="edge"), dict(mode="reflect")][s.space_pad]
    return np.pad(whole[:, s.cached - s.front:], around, **mode), whole[:, s.cached + s.frames - s.kept:]


@pytest.mark.parametrize("channels", (4, 8, 96, 160, 384, 1024))
@pytest.mark.parametrize("space_pad", (0, 1, 2))
def test_every_pixel_comes_from_where_it_should(index, channels, space_pad):
    for cached, frames, (height, width), padding in itertools.product(
            (0, 1, 2), (1, 2, 3), ((1, 1), (2, 3), (5, 40)), ((0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 2, 0))):
        if space_pad == 2 and not (max(padding[:2]) < width and max(padding[2:]) < height):
            continue
        for kept, front, blocks in itertools.product({0, 1, min(2, cached + frames)}, {0, cached}, (1, 3, 7)):
            around = dict(zip(("left", "right", "top", "bottom"), padding, strict=True))
            sizes = dict(samples=2, frames=frames, height=height, width=width, channels=channels, cached=cached, kept=kept,
                         front=front, space_pad=space_pad, **around)
            y, y_written, out, out_written = walked(index, sizes, 64, blocks)
            assert (y_written == 1).all() and (out_written == 1).all(), sizes
            expected_y, expected_out = meant(sizes)
            assert (y == expected_y).all() and (out == expected_out).all(), sizes


def test_lanes_have_all_channels(index):
    for channels in range(1, 1025):
        lanes, numbers = index.lanes(channels), index.numbers(channels)
        assert lanes in (1, 2, 4, 8, 16, 32) and numbers in (8, 16, 24, 32)
        assert lanes * (numbers - 8) < channels <= lanes * numbers, channels
