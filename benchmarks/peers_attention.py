"""Attention by others: adapters from varlen_attention's arguments to each peer's own, and what each peer cannot do.

Nq query rows, Nk key rows, H heads, E head dim, S samples; L the longest sample. Signatures are those of flash-attn 2.8.3,
FlashAttention-3 (hopper/flash_attn_interface.py, fa3-fwd 0.0.3), flash-attn-4 4.0.0b36, nvidia-cudnn-frontend 1.32,
xformers 0.0.35 and torch 2.11 to 2.13. What an adapter does besides the peer's own call is part of the peer's time, unless a
user does it once per step (index tensors, masks): then it is in ``prepare``.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sora_fast.ops import attention_peers as libraries
from sora_fast.ops.attention import AttentionProblem
from sora_fast.ops.attention_peers import HALF, Limits, left_right

from .case import Case, Provider


@dataclass(frozen=True)
class Refusal:
    """Why a peer cannot run a case: its limits, and what the lengths add, which are known here.

    ``plus_inf``: what it returns for the log-sum-exp of a row without keys is +inf. ``empty``: takes samples without queries
    or keys.
    """

    limits: Limits | Callable[[], Limits]
    plus_inf: bool = False
    empty: bool = True
    more: Callable[[Case], str] = lambda case: ""

    def __call__(self, case: Case, direction: str, device: torch.device) -> str:
        """The first reason, or ""."""
        limits = self.limits if isinstance(self.limits, Limits) else self.limits()
        reasons = limits.reasons(_problem(case, direction, device))
        if reasons:
            return reasons[0]
        if case.return_lse and self.plus_inf and case.blind:
            return f"{limits.name} gives +inf, not -inf, for the log-sum-exp of rows without keys."
        if not self.empty and (case.blind or 0 in case.queries or 0 in case.keys):
            return f"{limits.name} is not defined on samples, or rows, that have no keys or queries."
        return self.more(case)


def _problem(case: Case, direction: str, device: torch.device) -> AttentionProblem:
    name = device.type
    if name == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"cuda:sm{major}{minor}"
    return AttentionProblem(name, case.dtype, direction == "backward", case.heads, case.key_heads, case.head_dim,
                            case.causal, case.window, case.return_lse, deterministic=False)


def _lengths(cu_seqlens: torch.Tensor) -> list[int]:
    return cu_seqlens.diff().tolist()


# ------------------------------------------------------------------------------------- scaled_dot_product_attention
@dataclass(frozen=True)
class Layout:
    """How a pack becomes a dense batch: S x L rows, ``place_q`` where each row goes (None: the batch is a view)."""

    samples: int
    longest_q: int
    longest_k: int
    place_q: torch.Tensor | None
    place_k: torch.Tensor | None
    mask: torch.Tensor | None  # (S, 1, 1 or Lq, Lk) bool, True where seen; rows that see nothing see everything
    sees: torch.Tensor | None  # (Nq,) bool: rows that see something; None: all do
    is_causal: bool


def layout(cu_seqlens_q, cu_seqlens_k, causal: bool, window) -> Layout:
    """Lengths are read here, so it belongs in ``prepare``."""
    lengths_q, lengths_k = _lengths(cu_seqlens_q), _lengths(cu_seqlens_k)
    longest_q, longest_k = max(lengths_q), max(lengths_k)
    dense = len(set(lengths_q)) == len(set(lengths_k)) == 1
    left, right = left_right(causal, window)
    # SDPA aligns its own causal mask top-left: the same thing where queries and keys are equally many
    is_causal = dense and left < 0 and right == 0 and longest_q == longest_k
    banded = (left >= 0 or right >= 0) and not is_causal
    device = cu_seqlens_q.device
    place_q, place_k = (None, None) if dense else (_places(lengths_q, device), _places(lengths_k, device))
    mask = sees = None
    if banded or not dense:
        count_q, count_k = (torch.tensor(n[:1] if dense else n, device=device) for n in (lengths_q, lengths_k))
        row_k = torch.arange(longest_k, device=device)
        mask = (row_k < count_k[:, None])[:, None, None]
        if banded:
            row_q = torch.arange(longest_q, device=device)
            distance = row_k - row_q[:, None] - (count_k - count_q)[:, None, None, None]
            mask = mask & (distance >= -left) if left >= 0 else mask
            mask = mask & (distance <= right) if right >= 0 else mask
        sees = mask.any(-1)
        mask = mask | ~sees[..., None]
        sees = sees.expand(len(lengths_q), 1, longest_q).flatten()
        sees = sees if dense else sees[place_q]
        sees = None if bool(sees.all()) else sees
    return Layout(len(lengths_q), longest_q, longest_k, place_q, place_k, mask, sees, is_causal)


def _places(lengths: list[int], device) -> torch.Tensor:
    return torch.cat([torch.arange(n, device=device) + sample * max(lengths) for sample, n in enumerate(lengths)])


def _batch(x_NHE, samples: int, longest: int, place) -> torch.Tensor:
    """(S, H, L, E): a view where no row has to move."""
    if place is not None:
        x_NHE = x_NHE.new_zeros(samples * longest, *x_NHE.shape[1:]).index_copy(0, place, x_NHE)
    return x_NHE.view(samples, longest, *x_NHE.shape[1:]).transpose(1, 2)


def _batches(q, k, v, plan: Layout) -> dict:
    return dict(query=_batch(q, plan.samples, plan.longest_q, plan.place_q),
                key=_batch(k, plan.samples, plan.longest_k, plan.place_k),
                value=_batch(v, plan.samples, plan.longest_k, plan.place_k),
                attn_mask=plan.mask, is_causal=plan.is_causal, enable_gqa=q.shape[1] != k.shape[1])


def _with_layout(inputs: dict) -> dict:
    names = ("cu_seqlens_q", "cu_seqlens_k", "causal", "window")
    return inputs | dict(plan=layout(*(inputs[name] for name in names)))


def _sdpa(q, k, v, *, plan: Layout, kernel: SDPBackend | None = None, **_):
    if kernel is None:
        out = F.scaled_dot_product_attention(**_batches(q, k, v, plan))
    else:
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(**_batches(q, k, v, plan))
    out = out.transpose(1, 2).reshape(-1, *q.shape[1:])
    out = out if plan.place_q is None else out[plan.place_q]
    return out if plan.sees is None else torch.where(plan.sees[:, None, None], out, 0)


def _sdpa_details(case: Case, device: torch.device) -> dict:
    """Which kernel SDPA takes for this case, by its own choice, and how the pack became a batch."""
    inputs = _with_layout(case.inputs(device, seed=0))
    plan = inputs["plan"]
    given = _batches(*(inputs[name].requires_grad_() for name in "qkv"), plan)
    tensors = [given.pop(name) for name in ("query", "key", "value")]
    choice = SDPBackend(torch._fused_sdp_choice(*tensors, **given))
    padded = plan.samples * plan.longest_q
    return dict(kernel=choice.name.lower(), batch="a view" if plan.place_q is None else
                f"padded from {inputs['q'].shape[0]:,} to {padded:,} queries and back, inside the time")


def _sdpa_unavailable(case: Case, direction: str, device: torch.device) -> str:
    if case.return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp."
    return ""


def _no_mask(case: Case) -> str:
    """Forced kernels are compared on their own ground: FlashAttention takes no mask at all."""
    if len(set(case.queries)) > 1 or len(set(case.keys)) > 1 or max(case.window) >= 0 \
            or case.causal and case.queries != case.keys:
        return "A forced SDPA kernel is compared on samples of one length, full or causal: others need a mask."
    return ""


def _forced(name: str, kernel: SDPBackend, words: str) -> Provider:
    return Provider(name, functools.partial(_sdpa, kernel=kernel), _with_layout,
                    Refusal(Limits(words, lse="no"), empty=False, more=_no_mask))


# ------------------------------------------------------------------------------------ torch.nn.attention.varlen
def _varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal, window, return_lse):
    from torch.nn.attention import varlen

    # causal is the window (-1, 0) there, and only as a tuple
    options = dict(window_size=left_right(causal, window))
    if q.shape[1] != k.shape[1] and "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        options["enable_gqa"] = True  # torch 2.11 has no such flag: there its kernel counts the heads itself
    if return_lse:
        options["return_aux"] = varlen.AuxRequest(lse=True)
    return varlen.varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


# ------------------------------------------------------------------------------------------------ FlexAttention
@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _with_block_mask(inputs: dict) -> dict:
    """The document mask, built by a compiled function: uncompiled it would hold Nq x Nk numbers."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, cu_q, cu_k = (inputs[name] for name in ("q", "k", "cu_seqlens_q", "cu_seqlens_k"))
    left, right = left_right(inputs["causal"], inputs["window"])
    if cu_q.shape[0] == 2 and left < 0 and right < 0:  # one sample that sees all of itself
        return inputs | dict(block_mask=None)
    sample_q, sample_k = (torch.repeat_interleave(torch.arange(len(cu) - 1, device=cu.device), cu.diff())
                          for cu in (cu_q, cu_k))
    to_end_q, to_end_k = (cu.long()[sample + 1] - torch.arange(len(sample), device=cu.device)
                          for cu, sample in ((cu_q, sample_q), (cu_k, sample_k)))

    def mask_mod(batch, head, i, j):
        seen = sample_q[i] == sample_k[j]
        distance = to_end_q[i] - to_end_k[j]
        seen = seen & (distance >= -left) if left >= 0 else seen
        return seen & (distance <= right) if right >= 0 else seen

    mask = torch.compile(create_block_mask)(mask_mod, None, None, q.shape[0], k.shape[0], device=str(q.device))
    return inputs | dict(block_mask=mask)


def _flex(q, k, v, *, block_mask, return_lse, **_):
    q_HNE, k_HNE, v_HNE = (t.transpose(0, 1)[None] for t in (q, k, v))
    found = _compiled_flex()(q_HNE, k_HNE, v_HNE, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1],
                             return_lse=return_lse)
    out = (found[0] if return_lse else found)[0].transpose(0, 1)
    return (out, found[1][0]) if return_lse else out


# ----------------------------------------------------------------------------------- the libraries, by their own calls
def _packed(call, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, return_lse, **options):
    out, lse = call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, return_lse=return_lse, **options)
    return (out, lse) if return_lse else out


def _flash_attn_3_details(case: Case, device: torch.device) -> dict:
    forward = libraries.flash_attn_3_is_forward_only()
    return dict(module="fa3_fwd_interface" if forward else "flash_attn_interface")


def _cudnn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, lengths, causal, window, return_lse):
    """Samples of one length go in as a dense batch (views), others as ragged tensors."""
    import cudnn

    lengths_q, lengths_k = lengths
    # a bottom-right diagonal only where it differs from the plain one: fewer engines take it
    is_causal = left_right(causal, window)[1] == 0
    bottom_right = is_causal and lengths_q != lengths_k
    if len(set(lengths_q)) == len(set(lengths_k)) == 1:
        batch = (_batch(x, len(n), n[0], None) for x, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k)))
        # out (S, H, L, E) in q's layout, lse (S, H, L, 1)
        out, lse = cudnn.sdpa_torch(*batch, is_causal=is_causal, causal_bottom_right=bottom_right, return_lse=True)
        out, lse = out.transpose(1, 2).reshape(q.shape), lse[..., 0].transpose(0, 1).reshape(q.shape[1], -1)
    else:
        out, lse = libraries.cudnn_pack(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=is_causal,
                                        causal_bottom_right=bottom_right)
    return (out, lse) if return_lse else out


def _with_lengths(inputs: dict) -> dict:
    return inputs | dict(lengths=(_lengths(inputs["cu_seqlens_q"]), _lengths(inputs["cu_seqlens_k"])))


def _cudnn_details(case: Case, device: torch.device) -> dict:
    import cudnn

    dense = len(set(case.queries)) == len(set(case.keys)) == 1
    return dict(backend_version=cudnn.backend_version(), batch="a view" if dense else "ragged")


def _with_bias(inputs: dict) -> dict:
    lengths = (_lengths(inputs[name]) for name in ("cu_seqlens_q", "cu_seqlens_k"))
    return inputs | dict(bias=libraries.xformers_bias(*lengths, inputs["causal"], inputs["window"], inputs["q"].device))


def _xformers(q, k, v, *, bias, **_):
    return libraries.xformers(q, k, v, bias)


def peers() -> list[Provider]:
    """Every peer of varlen_attention, whether it is installed or not; each says itself why it cannot run."""
    packed = lambda call: functools.partial(_packed, call)
    return [
        Provider("sdpa", _sdpa, _with_layout, _sdpa_unavailable, _sdpa_details),
        _forced("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION, "The cuDNN kernel of scaled_dot_product_attention"),
        _forced("sdpa_flash", SDPBackend.FLASH_ATTENTION, "The FlashAttention kernel of scaled_dot_product_attention"),
        Provider("varlen_attn", _varlen_attn, unavailable=Refusal(Limits("torch.nn.attention.varlen"), plus_inf=True)),
        # on a CPU it has no backward and no log-sum-exp
        Provider("flex", _flex, _with_block_mask, Refusal(Limits(
            "FlexAttention with its backward", ("triton",), dtypes=(*HALF, torch.float32), lse="both")),
            compiled=True),
        Provider("flash_attn", packed(libraries.flash_attn), unavailable=Refusal(libraries.FLASH_ATTN, plus_inf=True)),
        Provider("flash_attn_3", packed(libraries.flash_attn_3), unavailable=Refusal(libraries.flash_attn_3_limits),
                 details=_flash_attn_3_details),
        Provider("flash_attn_4", packed(libraries.flash_attn_4), unavailable=Refusal(libraries.FLASH_ATTN_4)),
        # where lengths are known, a causal mask and cuDNN before 9.25 can be used where they are right
        Provider("cudnn_frontend", _cudnn, _with_lengths,
                 Refusal(replace(libraries.CUDNN, masks="causal", other_reasons=Limits.other_reasons), empty=False),
                 _cudnn_details),
        Provider("xformers", _xformers, _with_bias, Refusal(libraries.XFORMERS, empty=False)),
    ]
