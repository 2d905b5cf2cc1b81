"""Every case of our kernels on sm_90, and the first case of each on the other architectures."""

import aot
import pytest
from test_aot import ARCHITECTURE, FAMILIES, assert_passes, first_of_each, ours, test_good_kernels_pass

pytestmark = [pytest.mark.full, pytest.mark.ci]

OTHERS = tuple(cc for cc in aot.CCS if cc != ARCHITECTURE)


def test_good_kernels_pass_everywhere(tmp_path_factory):
    test_good_kernels_pass(tmp_path_factory, aot.CCS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_passes(family, tmp_path_factory):
    """But those that the default tests have compiled."""
    cases = ours(family)
    first = {case.name for case in first_of_each(cases, ARCHITECTURE)}
    others = [case for case in cases if case.name not in first]
    assert_passes(f"{family}-sm{ARCHITECTURE}", others, (ARCHITECTURE,), tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("cc", OTHERS)
def test_first_cases_pass_elsewhere(cc, tmp_path_factory):
    cases = [case for family in FAMILIES for case in first_of_each(ours(family), cc)]
    assert_passes(f"first-sm{cc}", cases, (cc,), tmp_path_factory.getbasetemp())
