"""All ops in every dtype, on the definition too: error rule, autocast, graphs, checkpointing, gradients one at a time."""

import op_checks
import pytest
import torch

from sora_fast import ops

pytestmark = [pytest.mark.full, pytest.mark.ci]

OPS = [op for op in ops.__all__ if op not in ("varlen_attention_forward", "varlen_attention_backward")]
EVERY = torch.float64, torch.float32, torch.bfloat16, torch.float16
POINTWISE = ("merge_attention", "varlen_attention_backward", "norm_modulate", "gate_residual", "gate_residual_norm_modulate",
             "qk_norm_rope", "norm_act", "kl_sample", "unpatchify")
BACKENDS = "torch", "reference"

test_error_rule = op_checks.error_rule(ops.__all__, ("torch", "reference", "auto"), EVERY)
test_autocast_changes_nothing = op_checks.autocast_changes_nothing(POINTWISE)
test_traces_whole = op_checks.traces_whole(ops.__all__, BACKENDS)
test_checkpoint = op_checks.checkpointed([op for op in OPS if op != "merge_attention"])
test_second_backward_is_refused = op_checks.second_backward(OPS, BACKENDS)
test_one_gradient_at_a_time = op_checks.one_gradient_at_a_time(OPS, BACKENDS)
