"""Cases at the sizes of models: what a GPU is given, or --case asks for."""

import pytest
import test_testing
import torch

from sora_fast import validate
from sora_fast.testing import cases, model_cases

pytestmark = pytest.mark.full


@pytest.mark.parametrize("op", model_cases.MAKERS)
def test_they_are_calls_that_work(op):
    test_testing.test_cases_of_a_gpu_are_calls_that_work(op, True)


def test_a_part_of_a_name_chooses_among_them():
    (row, _) = validate("gate_residual", backend="torch", dtypes=(torch.float32,), case="width 1152").rows
    assert row.ran == {"width 1152, 1,235 tokens"} and row.passed


def test_models_sizes_are_those_that_records_unlock():
    """Heads, rows, windows, widths and patches as the models have them; the gradients of attention too."""
    calls = [inputs for _, inputs in cases("varlen_attention", torch.bfloat16, "cpu", 0, True)]
    assert {64, 72, 96, 128, 256} <= {inputs["q"].shape[2] for inputs in calls}
    large = [inputs for inputs in calls if inputs["q"].shape[0] > 1000]
    assert any("window" in inputs for inputs in large) and any("causal" in inputs for inputs in large)
    assert any(inputs["q"].shape[1] > inputs["k"].shape[1] for inputs in large)
    widths = {inputs["x"].shape[1] for _, inputs in cases("norm_modulate", torch.bfloat16, "cpu", 0, True)}
    assert {1152, 3072, 5120, 5376} <= widths
    heads = {inputs["q"].shape[1] for _, inputs in cases("qk_norm_rope", torch.bfloat16, "cpu", 0, True)}
    assert {16, 24, 40, 56} <= heads
    assert 5120 in {inputs["weight"].shape[0] for _, inputs in cases("patch_embed", torch.bfloat16, "cpu", 0, True)}
