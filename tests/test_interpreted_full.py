"""What is marked full in tests/interpreted, a process for each module; those that .ci/run takes are marked ci there too."""

import pytest
from test_interpreted import ROOT, interpreted

pytestmark = pytest.mark.full

MODULES = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))}


@pytest.mark.parametrize("module", [
    pytest.param(name, marks=[pytest.mark.ci] if "mark.ci" in text else [])
    for name, text in MODULES.items() if "pytestmark" in text])
def test_full_in_the_interpreter(module):
    """test_products.py takes an hour on two cores."""
    pytest.importorskip("triton")
    interpreted("-m", "full", f"tests/interpreted/{module}", seconds=4 * 3600)
