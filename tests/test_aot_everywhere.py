"""Every case of our kernels on every architecture, with the installed Triton and with older ones."""

import os
import subprocess
import sys
import tempfile

import pytest
import structure
import test_aot
import test_row_kernels
import triton
from test_aot import ARCHITECTURE, assert_passes, first_of_each, run_again

from sora_fast.testing import aot, launches

pytestmark = pytest.mark.full

OTHERS = tuple(cc for cc in aot.CCS if cc != ARCHITECTURE)


def test_good_kernels_pass_everywhere(tmp_path_factory):
    test_aot.test_good_kernels_pass(tmp_path_factory, aot.CCS)


@pytest.mark.parametrize("family", launches.FAMILIES)
def test_every_case_passes_on_sm_90(family, tmp_path_factory):
    """But those that the default tests have compiled."""
    cases = aot.ours(family)
    first = {case.name for case in first_of_each(cases, ARCHITECTURE)}
    others = [case for case in cases if case.name not in first]
    assert_passes(f"{family}-sm{ARCHITECTURE}", others, (ARCHITECTURE,), tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("family", launches.FAMILIES)
def test_every_case_passes_elsewhere(family, tmp_path_factory):
    assert_passes(f"{family}-others", aot.ours(family), OTHERS, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("family", structure.ROWS)
def test_no_backward_of_rows_issues_more(family):
    test_row_kernels.test_no_row_kernel_issues_more(family, "backward")


# 3.7 is tried for the harness alone; what is supported is proven with 3.6 and with the one installed.
@pytest.mark.parametrize("version, tests", [
    pytest.param("3.6.0", ("-m", "", "tests/test_aot.py", "tests/test_aot_elsewhere.py"), id="3.6"),
    pytest.param("3.6.0", ("-m", "", "tests/test_aot_everywhere.py", "-k", "every_case_passes"), id="3.6 every_case"),
    pytest.param("3.6.0", ("tests/test_emulated.py", "tests/test_emulator_races.py", "tests/test_emulated_core.py"),
                 id="3.6 emulator"),
    pytest.param("3.7.0", ("tests/test_aot.py", "-k", "not our_kernels"), id="3.7")])
def test_older_triton(version, tests):
    if triton.__version__ == version:
        pytest.skip("this is the Triton installed here")
    with tempfile.TemporaryDirectory() as folder:  # 600 MB, which pytest's own folders would keep for three runs
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"triton=={version}"]
        installed = subprocess.run(install, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"pip cannot install Triton {version}: {installed.stderr.strip().splitlines()[-1]}")
        seen = subprocess.run([sys.executable, "-c", "import triton; print(triton.__version__)"], capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": folder})
        assert seen.stdout.strip() == version, seen.stderr
        assert " passed" in run_again(folder, *tests)
