"""Every known way in which a change was once read past, and many drawn ones."""

import accelerate_changes as changes
import pytest
import test_accelerate_changes as one
from hypothesis import given, settings
from test_accelerate_drawn import check, drawn, few

pytestmark = pytest.mark.full


@pytest.mark.parametrize("fault", [fault for fault in one.FAULTS if fault not in one.SOME])
def test_a_change_acts_whatever_the_order(fault):
    one.test_a_change_acts_whatever_the_order(fault)


@pytest.mark.parametrize("name", [name for name in changes.NAMES if name not in ("vae 2.1", "vae cogvideox", "wan")])
def test_what_is_read_past_computes_with_nothing_else(name):
    one.test_what_is_read_past_computes_with_nothing_else(name)


@settings(few, max_examples=60)
@given(drawn())
def test_a_drawn_change_acts(case):
    check(case)
