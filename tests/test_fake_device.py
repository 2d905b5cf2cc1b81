"""Host code for CUDA on a fake device (fake_device/): ops, streams, models, steps, commands, in a process of their own."""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.full

HERE = Path(__file__).parent
FOLDER = HERE / "fake_device"
COMPILER = shutil.which("g++")


def build(folder: Path) -> Path:
    """guard.cpp as a library, against the headers of the PyTorch that is installed."""
    made, root = folder / "guard.so", Path(torch.__file__).parent
    command = [COMPILER, "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", str(FOLDER / "guard.cpp"), "-o",
               str(made), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.skipif(COMPILER is None, reason="expected g++, which builds the fake device's guard, got none on the PATH")
@pytest.mark.skipif(sys.platform != "linux", reason="expected Linux, whose loader preloads the guard")
@pytest.mark.skipif(torch.version.cuda is not None, reason="expected a CPU build of PyTorch, got one with CUDA of its own")
def test_host_code_on_a_fake_device(tmp_path):
    """Every drive_*.py, none of its tests skipped."""
    report, drives = tmp_path / "report.xml", sorted(FOLDER.glob("drive_*.py"))
    environment = os.environ | dict(LD_PRELOAD=str(build(tmp_path)), OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "TRITON_INTERPRET"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist",
               "-p", "fake_device.plugin", f"--basetemp={tmp_path / 'drives'}", f"--junitxml={report}", *map(str, drives)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=environment)
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    assert not skipped and {case.get("classname").rpartition(".")[2] for case in cases} == {path.stem for path in drives}
