"""The CUDA convolution without a GPU: its index functions, run as the kernel runs them, and its encodings against CuTe's."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_fast.reference import convolution as reference

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("g++")

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++")


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in
                "frames cached out_frames out_height out_width samples kt kh kw stride_t phase lookahead top left".split()]
    _fields_ += [("replicate", ctypes.c_bool)]
    _fields_ += [(name, ctypes.c_int) for name in "slices out_tiles rows columns".split()]


class Tile(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in "out_tile column row frame sample".split()]


class Step(ctypes.Structure):
    _fields_ = [("from_cache", ctypes.c_bool)]
    _fields_ += [(name, ctypes.c_int) for name in "channel column row frame tap slice tap_w tap_h tap_t".split()]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """csrc/convolution_index.h, compiled for the host."""
    built = tmp_path_factory.mktemp("index") / "index.so"
    subprocess.run([CXX, "-O1", "-shared", "-fPIC", "-std=c++17", "-pthread", "-Wall",
                    "-Wno-unknown-pragmas", "-Werror", "-I", ROOT / "csrc",
                    ROOT / "tests/csrc/convolution_index.cpp", "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    library.tiles.restype = library.place.restype = ctypes.c_int64
    library.tile.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    return library


def box(video, step, sample, channels, rows, columns):
    """What TMA loads of (B, T, H, W, C): a box, out-of-bounds filled with 0; (pixels, channels)."""
    if not 0 <= step.frame < video.shape[1]:  # the kernel must choose frames that exist
        raise AssertionError(f"the box is of frame {step.frame} of {video.shape[1]}")
    found = np.zeros((rows, columns, channels))
    for row, column in itertools.product(range(rows), range(columns)):
        y, x = step.row + row, step.column + column
        if 0 <= y < video.shape[2] and 0 <= x < video.shape[3]:
            found[row, column] = video[sample, step.frame, y, x, step.channel:step.channel + channels]
    return found.reshape(rows * columns, channels)


def as_the_kernel_does(index, x, weight, cache, shape, pixels, out_channels):
    """The kernel's walk over tiles and steps, in numpy; x, cache (B, T, H, W, C), weight (Cout, taps, Cin)."""
    size = shape.samples * shape.out_frames * shape.out_height * shape.out_width
    y, written = np.full((size, weight.shape[0]), np.nan), np.zeros((size, weight.shape[0]), int)
    tile, step = Tile(), Step()
    for number in range(index.tiles(ctypes.byref(shape))):
        index.tile(ctypes.byref(shape), number, ctypes.byref(tile))
        outputs = slice(tile.out_tile * out_channels, (tile.out_tile + 1) * out_channels)
        sums = np.zeros((pixels, out_channels))
        index.first(ctypes.byref(shape), ctypes.byref(tile), ctypes.byref(step))
        for _ in range(index.steps(ctypes.byref(shape), ctypes.byref(tile))):
            channels = min(64, x.shape[-1] - step.channel)
            loaded = box(cache if step.from_cache else x, step, tile.sample, channels, shape.rows, shape.columns)
            sums += loaded @ weight[outputs, step.tap, step.channel:step.channel + channels].T
            index.next(ctypes.byref(shape), ctypes.byref(tile), ctypes.byref(step))
        for pixel in range(pixels):
            place = index.place(ctypes.byref(shape), ctypes.byref(tile), pixel)
            if place >= 0:
                y[place, outputs] = sums[pixel]
                written[place, outputs] += 1
    assert (written == 1).all(), "every output must be written once"
    return y.reshape(shape.samples, shape.out_frames, shape.out_height, shape.out_width, -1)


def compare(index, *, inputs=96, outputs=96, at_once=96, pixels=256, kernel=(3, 3, 3), frames=2, cached=0, size=(5, 7),
            samples=1, stride=1, phase=0, lookahead=0, padding=None, replicate=False):
    """Small integers through the kernel's walk, bit for bit against the definition."""
    random = np.random.default_rng(0)
    integers = lambda *shape: random.integers(-2, 3, shape).astype(np.float64)
    kt, kh, kw = kernel
    padding = padding or (kw // 2, kw // 2, kh // 2, kh // 2)
    x, cache = integers(samples, frames, *size, inputs), integers(samples, cached, *size, inputs)
    weight = integers(outputs, kt, kh, kw, inputs)
    video = lambda numbers: torch.from_numpy(numbers).movedim(-1, 1)
    expected = reference.causal_conv3d(
        video(x), video(weight), stride=(stride, 1, 1), padding=padding, cache=video(cache) if cached else None, phase=phase,
        lookahead=lookahead, time_pad="replicate" if replicate else "zeros").movedim(1, -1).numpy()
    columns = index.columns_of_tile(*expected.shape[2:4], pixels)
    shape = Shape(frames, cached, *expected.shape[1:4], samples, kt, kh, kw, stride, phase, lookahead, padding[2],
                  padding[0], replicate, -(-inputs // 64), outputs // at_once, pixels // columns, columns)
    got = as_the_kernel_does(index, x, weight.reshape(outputs, -1, inputs), cache, shape, pixels, at_once)
    assert (got == expected).all()
    return got, expected


@pytest.mark.parametrize("settings", [
    dict(), dict(frames=1), dict(frames=5, cached=2), dict(frames=3, cached=1), dict(frames=1, cached=2, replicate=True),
    dict(frames=4, replicate=True), dict(frames=3, lookahead=1), dict(frames=3, lookahead=2, replicate=True),
    dict(frames=5, stride=2, phase=1, cached=2), dict(frames=4, stride=2, cached=1), dict(frames=4, stride=3, phase=2),
    dict(kernel=(1, 3, 3)), dict(kernel=(3, 1, 1), cached=2), dict(kernel=(1, 1, 1)), dict(kernel=(2, 3, 1)),
    dict(samples=3, frames=1), dict(padding=(0, 1, 0, 1)), dict(padding=(0, 0, 0, 0)), dict(padding=(2, 2, 3, 1)),
    dict(inputs=64), dict(inputs=128), dict(inputs=160, outputs=160, at_once=160),
    dict(inputs=192, outputs=192, at_once=192), dict(inputs=384, outputs=384, at_once=192, frames=1),
    dict(outputs=256, at_once=256, pixels=128, frames=1),
], ids=str)
def test_the_kernel_walks_right(index, settings):
    compare(index, **settings)


@pytest.mark.parametrize("pixels", (128, 256))
@pytest.mark.parametrize("size", [(1, 1), (1, 65), (33, 1), (15, 16), (16, 16), (17, 15), (4, 63), (9, 33)], ids=str)
def test_edges_of_tiles(index, size, pixels):
    compare(index, inputs=64, kernel=(1, 3, 3), frames=1, size=size, pixels=pixels)


def test_every_combination_in_time(index):
    for frames, cached, replicate, (stride, phase) in itertools.product((1, 2, 3), (0, 1, 2), (False, True),
                                                                       ((1, 0), (2, 0), (2, 1), (3, 2))):
        if phase < frames:
            compare(index, inputs=64, kernel=(3, 1, 1), frames=frames, cached=cached, replicate=replicate, stride=stride,
                    phase=phase, size=(1, 2))


def test_a_wrong_walk_is_found(index):
    """Each step with the weight of a neighbouring tap."""
    class Wrong:
        def __getattr__(self, name):
            return getattr(index, name)

        def first(self, shape, tile, step):
            index.first(shape, tile, step)
            step._obj.tap += 1

    with pytest.raises((AssertionError, IndexError)):
        compare(Wrong(), kernel=(1, 3, 2), inputs=64)


def test_tiles_cover_with_little_waste(index):
    """The shapes of Wan 2.1's decoder: the share of a tile's pixels that lies outside, at most."""
    for height, width, allowed in ((480, 832, 0), (240, 416, 0), (120, 208, 0.07), (60, 104, 0.12), (720, 1280, 0),
                                   (360, 640, 0.03), (180, 320, 0.03), (90, 160, 0.07)):
        columns = index.columns_of_tile(height, width, 256)
        rows = 256 // columns
        covered = -(-height // rows) * rows * -(-width // columns) * columns
        assert 1 - height * width / covered <= allowed, (height, width, rows, columns)


def test_a_lane_gathers_eight_columns_in_a_row(index):
    """Sums as products leave them: of a row of 32 columns, lane q has 2 columns of each block of 8."""
    column = [[block * 8 + lane * 2 + i for block in range(4) for i in range(2)] for lane in range(4)]
    numbers = (ctypes.c_float * 32)(*sum(column, []))
    index.gather(numbers)
    assert list(numbers) == list(range(32))
