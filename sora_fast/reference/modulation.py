"""adaLN: a norm modulated by the token's own row, and the gated residual around it.

N tokens, D width, R modulation rows. (DiT: Peebles and Xie, arXiv 2212.09748, section 3.2.)
"""

import torch

from ..precision import has_data, wide_dtype
from .normalization import normalise

__all__ = ["gate_residual", "gate_residual_norm_modulate", "norm_modulate"]


def pick(table_RD, rows):
    """The modulation of every token: row ``rows[n]``, or, without rows, the one row there is or one a token."""
    if table_RD is None or rows is None:
        return table_RD
    if table_RD.shape[0] == 0:  # no sample: every token is tail, and any row will do
        return table_RD.sum(dim=0, keepdim=True)
    return table_RD.index_select(0, rows.clamp(min=0).to(torch.int64))


def only_samples(x_ND, rows):
    """``x_ND`` with 0 on tokens of no sample, whose contents (NaN included) go no further, nor do gradients."""
    if rows is None:
        return x_ND
    if rows.is_cpu and has_data(rows) and not bool((rows < 0).any()):
        return x_ND  # no tail: checking N ints is cheaper than copying N x D elements
    return torch.where((rows >= 0)[:, None], x_ND, torch.zeros((), dtype=x_ND.dtype, device=x_ND.device))


def _modulated(x_ND, shift, scale, rows, norm, weight, bias, eps):
    h_ND = normalise(x_ND, norm, weight, bias, eps)
    if scale is not None:
        h_ND = h_ND * (1 + pick(scale, rows))
    if shift is not None:
        h_ND = h_ND + pick(shift, rows)
    return only_samples(h_ND, rows)


def norm_modulate(x, shift, scale, rows=None, *, norm="layer", weight=None, bias=None, eps=1e-6, dtype=None):
    """``norm(x) * (1 + scale[rows]) + shift[rows]``; see ``sora_fast.ops.norm_modulate``."""
    wide = wide_dtype(x, shift, scale, weight, bias)
    shift, scale, weight, bias = (None if t is None else t.to(wide) for t in (shift, scale, weight, bias))
    return _modulated(only_samples(x.to(wide), rows), shift, scale, rows, norm, weight, bias, eps).to(dtype or x.dtype)


def gate_residual(x, y, gate, rows=None):
    """``x + gate[rows] * y``; see ``sora_fast.ops.gate_residual``."""
    wide = wide_dtype(x, y, gate)
    x_ND, y_ND = only_samples(x.to(wide), rows), only_samples(y.to(wide), rows)
    return only_samples(x_ND + pick(gate.to(wide), rows) * y_ND, rows).to(x.dtype)


def gate_residual_norm_modulate(x, y, gate, shift, scale, rows=None, *, norm="layer", weight=None, bias=None,
                                eps=1e-6):
    """``x_new = x + gate[rows] * y`` and ``h`` = its modulated norm; see ``sora_fast.ops``."""
    x_new = gate_residual(x, y, gate, rows)
    wide = wide_dtype(x, y, gate, shift, scale, weight, bias)
    shift, scale, weight, bias = (None if t is None else t.to(wide) for t in (shift, scale, weight, bias))
    h = _modulated(x_new.to(wide), shift, scale, rows, norm, weight, bias, eps)
    return x_new, h.to(y.dtype)
