"""Schemas, fakes and graphs of the registered ops, in Triton's interpreter: torch.compile is refused where a GPU is
emulated."""

import pytest
from test_interpreted import interpreted

pytestmark = [pytest.mark.full, pytest.mark.ci]


@pytest.mark.parametrize("name", ("registered", "graphs"))
def test_what_is_registered(name):
    pytest.importorskip("triton")
    interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/interpreted_{name}.py")
