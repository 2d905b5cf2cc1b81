"""Every case of our kernels on every architecture, with the installed Triton and with older ones."""

import os
import subprocess
import sys
import tempfile
from functools import partial

import pytest
import structure
import test_aot
import test_row_kernels
import torch
import triton
from test_aot import ARCHITECTURE, assert_passes, first_of_each, run_again

from sora_fast.kernels.arch import SHARED
from sora_fast.testing import aot, launches
from sora_fast.testing.launches import attention

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


@pytest.mark.parametrize("dtype, fits", [(torch.bfloat16, True), (torch.float32, False)], ids=["bfloat16", "float32"])
def test_wide_heads_fit_small_memory(dtype, fits):
    """Between 192 and 256; the backward in float32 does not, and is refused (ops/attention_triton.py)."""
    call = partial(attention.both, 208, dtype, "sm89")
    results, _ = aot.check_all(aot.cases_of("208", call, dict(gated=False, schedule_kernel=dict(ccs=()))), (86,))
    used = {result.compiled.kernel: result.compiled.shared for result in results}
    assert set(used) == {"forward_kernel", "dq_kernel", "dkdv_kernel"}
    fitting = {kernel for kernel, shared in used.items() if shared <= SHARED[86]}
    assert fitting == (set(used) if fits else {"forward_kernel", "dq_kernel"})


# The first cases of each kernel, and the emulator, with each Triton that a PyTorch from 2.11 on pins; every case with the
# oldest and with the one installed.
OLDER = [pytest.param(f"{minor}.0", tests, id=f"{minor} {what}") for minor in ("3.6", "3.7", "3.8") for what, tests in (
    ("first cases", ("-m", "", "tests/test_aot.py", "tests/test_aot_elsewhere.py")),
    ("emulator", ("tests/test_emulated.py", "tests/test_emulator_races.py", "tests/test_emulated_core.py")))]


@pytest.mark.parametrize("version, tests", [*OLDER, pytest.param(
    "3.6.0", ("-m", "", "tests/test_aot_everywhere.py", "-k", "every_case_passes"), id="3.6 every_case")])
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
