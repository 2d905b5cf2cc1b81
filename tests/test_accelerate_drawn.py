"""Whatever is changed in a model, before or after accelerate, it gives what the plain model with that change gives."""

from functools import partial

import accelerate_changes as changes
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")


@st.composite
def drawn(data):
    """A model, a module of it, a change of that module, and how it is run."""
    name = data(st.sampled_from(changes.NAMES))
    modules = dict(changes.plain_model(name).named_modules())
    # Modules of the same class have the same chance together as those of another.
    kind = data(st.sampled_from(sorted({type(module).__name__ for path, module in modules.items() if path})))
    path = data(st.sampled_from([path for path, module in modules.items() if path and type(module).__name__ == kind]))
    change = data(st.sampled_from(changes.changes_of(modules[path])))
    return name, path, change, data(st.sampled_from(["before", "after"])), data(st.booleans()), data(st.booleans())


def check(case):
    name, path, change, when, train, grads = case
    assume(changes.compare(name, partial(changes.apply, path=path, change=change), when, train, grads))


few = settings(max_examples=4, deadline=None, derandomize=True, database=None,
               suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large])


@few
@given(drawn())
def test_a_drawn_change_acts(case):
    check(case)
