"""Runs tests/interpreted in a process that has Triton's interpreter: TRITON_INTERPRET counts when Triton is imported."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.name for path in (ROOT / "tests" / "interpreted").glob("test_*.py"))


def interpreted(*arguments: str, seconds: int = 3000) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=seconds)


@pytest.fixture(scope="module")
def runs(request):
    """The modules that were asked for, two at a time where no other tests run beside them: each takes one core."""
    pytest.importorskip("triton")
    asked = [item.callspec.params["module"] for item in request.session.items
             if getattr(item, "originalname", "") == "test_in_the_interpreter"]
    with ThreadPoolExecutor(1 if "PYTEST_XDIST_WORKER" in os.environ else 2) as pool:
        yield {module: pool.submit(interpreted, f"tests/interpreted/{module}") for module in asked}


@pytest.mark.parametrize("module", MODULES)
def test_in_the_interpreter(module, runs):
    done = runs[module].result()
    assert done.returncode == 0, f"{module} in the interpreter:\n{done.stdout}\n{done.stderr}"


@pytest.mark.full
@pytest.mark.parametrize("module", MODULES)
def test_full_in_the_interpreter(module):
    """What is marked full there: the whole product of attention's cases takes 50 minutes on two cores."""
    pytest.importorskip("triton")
    done = interpreted("-m", "full", f"tests/interpreted/{module}", seconds=4 * 3600)
    assert done.returncode in (0, 5), f"{module} in the interpreter:\n{done.stdout}\n{done.stderr}"  # 5: it has none


def test_a_failure_there_is_a_failure_here(tmp_path):
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("import os\n\ndef test_it():\n    assert os.environ['TRITON_INTERPRET'] != '1'\n")
    done = interpreted(str(wrong))
    assert done.returncode == 1 and "1 failed" in done.stdout
