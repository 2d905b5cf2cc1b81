"""What every op promises whatever it computes, once for all ops: gradients one at a time, no second derivative, gradient
checkpointing, and one graph. test_op_matrices.py and test_op_graphs.py have all dtypes, backends and sizes.
"""

import op_checks

ONE_OF_EACH = ("patch_embed", "gate_residual_norm_modulate", "qk_norm_rope", "varlen_attention", "norm_act_conv3d",
               "norm_act", "kl_sample", "merge_attention")

test_second_backward_is_refused = op_checks.second_backward(ONE_OF_EACH)
test_one_gradient_at_a_time = op_checks.one_gradient_at_a_time(ONE_OF_EACH)
test_checkpoint = op_checks.checkpointed(ONE_OF_EACH[:-1])
test_traces_whole = op_checks.traces_whole(ONE_OF_EACH)
