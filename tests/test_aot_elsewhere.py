"""The first case of each of our kernels on the architectures that the default tests leave out."""

import aot
import pytest
import test_aot
from test_aot import ARCHITECTURE, FAMILIES, assert_passes, first_of_each, ours

pytestmark = [pytest.mark.full, pytest.mark.ci]

OTHERS = tuple(cc for cc in aot.CCS if cc != ARCHITECTURE)


def test_good_kernels_pass_everywhere(tmp_path_factory):
    test_aot.test_good_kernels_pass(tmp_path_factory, aot.CCS)


@pytest.mark.parametrize("cc", OTHERS)
def test_first_cases_pass_elsewhere(cc, tmp_path_factory):
    cases = [case for family in FAMILIES for case in first_of_each(ours(family), cc)]
    assert_passes(f"first-sm{cc}", cases, (cc,), tmp_path_factory.getbasetemp())
