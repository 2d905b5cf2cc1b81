"""The first case of each of our kernels on an architecture of each other kind: sm_80 and sm_100."""

import pytest
from test_aot import assert_passes, assert_structure, first_of_each

from sora_fast.testing import aot, launches

pytestmark = [pytest.mark.full, pytest.mark.ci]


@pytest.mark.parametrize("cc", [80, 100])
def test_first_cases_pass_elsewhere(cc, tmp_path_factory):
    cases = [case for family in launches.FAMILIES for case in first_of_each(aot.ours(family), cc)]
    assert_structure(assert_passes(f"first-sm{cc}", cases, (cc,), tmp_path_factory.getbasetemp()))
