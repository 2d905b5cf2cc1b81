"""No row kernel issues more instructions than tests/structure.json says, at the widths of models."""

import sys

import pytest

triton = pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("cuobjdump comes with Triton's wheels for Linux only", allow_module_level=True)

import structure  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.ci]


@pytest.mark.parametrize("family", structure.ROWS)
def test_no_row_kernel_issues_more(family, direction="forward"):
    if triton.__version__ != structure.TABLE["triton"]:
        pytest.skip("the table is of another Triton")
    known, found = structure.TABLE["rows"][family][direction], structure.row_issue(family, direction)
    assert found.keys() == known.keys()
    assert {name: percent for name, percent in found.items() if percent > known[name]} == {}
