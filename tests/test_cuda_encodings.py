"""Swizzles, descriptors and tensor maps of csrc/, compared with what CuTe computes for the same layouts."""

import collections
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC, CXX = shutil.which("nvcc"), shutil.which("g++")
CUTLASS = importlib.util.find_spec("cutlass_library")

pytestmark = pytest.mark.skipif(not (NVCC and CXX and CUTLASS),
                                reason="needs nvcc's headers, g++ and the package nvidia-cutlass")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """(what, ours, CuTe's) of everything that tests/csrc/encodings.cpp prints, by the first word of what it is."""
    folder = tmp_path_factory.mktemp("encodings")
    dryrun = subprocess.run([NVCC, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    includes = re.findall(r'"(?:-I)?([^"]*/include[^"]*)"', dryrun)
    assert includes, dryrun
    headers = Path(CUTLASS.submodule_search_locations[0]) / "source" / "include"
    sources = [ROOT / "tests/csrc/encodings.cpp", ROOT / "csrc/tensor_map.cpp", ROOT / "csrc/host.cpp"]
    # as if nvcc's host pass: CuTe's tensor maps are made there only
    macros = ["-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0", "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1",
              "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED"]
    folders = [flag for path in (ROOT / "csrc", headers, *includes) for flag in ("-isystem", path)]
    done = subprocess.run([CXX, "-std=c++17", "-O0", "-w", *macros, *folders, *sources, "-o", folder / "encodings"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = subprocess.run([folder / "encodings"], capture_output=True, text=True, check=True).stdout
    found = collections.defaultdict(list)
    for line in printed.splitlines():
        if line.count("\t") == 2:
            what, ours, cutes = line.split("\t")
            found[re.match(r"\w+", what)[0]].append((what, ours, cutes))
    return found


@pytest.mark.parametrize("kind, count", [
    ("swizzle", 256 * 64 + 256 * 32),  # every number of a box
    ("first", 5 * (4 + 2) * 2), ("second", 5 * (4 + 2)),  # widths, steps of K, blocks of 64 rows
    ("sum", 128 * (96 + 128 + 160 + 192 + 256) // 2),  # every thread's every sum
    ("map", 5),
])
def test_encodings_are_cutes(lines, kind, count):
    assert len(lines[kind]) == count
    wrong = [line for line in lines[kind] if line[1] != line[2]]
    assert not wrong, f"{len(wrong)} differ; the first: {wrong[0]}"


def test_the_lines_say_something(lines):
    """Encodings that were all alike would be compared in vain."""
    assert len({line[2] for line in lines["swizzle"]}) == 256 * 64
    assert len({line[2] for line in lines["first"] + lines["second"]}) == 12
    assert all("size 21" in line[2] or "size 320" in line[2] for line in lines["map"])
