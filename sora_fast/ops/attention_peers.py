"""Other libraries' attention as backends of varlen_attention: what each cannot do, its own call, and our contract around it.

They are taken by name only. Nq query rows, Nk key rows, H heads, Hk key heads, E head dim, S samples. Signatures are those
of flash-attn 2.8.3, FlashAttention-3 (hopper/flash_attn_interface.py; fa3-fwd 0.0.3, its forward alone), flash-attn-4
4.0.0b36, nvidia-cudnn-frontend 1.32 and xformers 0.0.35. A call of a library here returns (out, log-sum-exp or None).

No library knows of our tails, and each has its own answer for rows without keys: q, k, v and out are copied once, with zeros
in the rows that are fully masked, and so are the gradients.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import checks, env
from ..dispatch import Backend, Problem
from ..environment import PEERS

HALF = (torch.float16, torch.bfloat16)
# What a peer of each kind does not take; each takes the masks of those before it too. "causal window": windows that end on
# the diagonal.
MASKS = {"full": "no causal mask and no window", "causal": "no window", "causal window": "no window that is not causal",
         "any": ""}


# ----------------------------------------------------------------------------------------------- what each cannot do
@functools.cache
def installed(module: str) -> str:
    """"" if ``module`` can be imported, else one sentence with the reason."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return f"The package {error.name} is not installed."
        return f"The package {module} is installed and cannot be imported: {error}."
    except Exception as error:  # a package built for another CUDA or torch fails in many ways
        why = f"{type(error).__name__}: {error}".strip(" .:")
        return f"The package {module} is installed and cannot be imported: {why}."
    return ""


@env.constant_in_graphs
def _missing(modules: tuple[str, ...]) -> str:
    """Parents first: flash-attn and flash-attn-4 share one, and where it is missing its child cannot even be looked for."""
    for place, module in enumerate(modules):
        reason = installed(module)
        if reason.endswith("is not installed.") and place:
            package = next(PEERS[name] for name in reversed(modules) if name in PEERS)
            return f"The installed {modules[0]} has no module {module}; this peer is the package {package}."
        if reason:
            return reason
    return ""


def _no_other_reasons(problem: Problem, sm: int | None) -> list[str]:
    return []


@dataclass(frozen=True)
class Limits:
    """What a peer takes, apart from attention over ragged samples of 16 bits with a gradient.

    ``modules`` are imported in this order: a package, then the module in it. ``sm``: lowest and highest architecture.
    ``lse``: "no", "forward" (returned, not differentiable) or "both". ``masks``: the widest kind of ``MASKS``.
    ``other_reasons``: the reasons that only this peer has, from a problem and its architecture (None while a graph is
    traced).
    """

    name: str
    modules: tuple[str, ...] = ()
    sm: tuple[int, int] = (80, 129)
    dtypes: tuple[torch.dtype, ...] = HALF
    backward: bool = True
    deterministic: bool = True
    lse: str = "forward"
    masks: str = "any"
    groups: bool = True
    other_reasons: Callable[[Problem, int | None], list[str]] = _no_other_reasons

    def reasons(self, problem: Problem) -> list[str]:
        """Sentences: why this peer cannot run an AttentionProblem; [] where it can."""
        kind, _, architecture = problem.device.partition(":sm")
        sm = int(architecture) if architecture else None
        left, right = left_right(problem.causal, problem.window)
        if right > 0 or right < 0 <= left:
            mask = "any"
        else:
            mask = "full" if right < 0 else "causal window" if left >= 0 else "causal"
        order = list(MASKS)
        facts = [
            (kind != "cuda", "needs a CUDA device."),
            (sm is not None and not self.sm[0] <= sm <= self.sm[1],
             f"is built for sm_{self.sm[0]} to sm_{self.sm[1]}; this device is sm_{sm}."),
            (problem.dtype not in self.dtypes,
             f"takes {' and '.join(str(dtype).removeprefix('torch.') for dtype in self.dtypes)} only."),
            (problem.grad and not self.backward, "has no backward."),
            (problem.grad and problem.deterministic and self.backward and not self.deterministic,
             "cannot be asked for a deterministic backward."),
            (problem.return_lse and self.lse == "no", "does not return the log-sum-exp."),
            (problem.return_lse and problem.grad and self.lse == "forward", "does not differentiate its log-sum-exp."),
            (order.index(mask) > order.index(self.masks), f"takes {MASKS[self.masks]} here."),
            (not self.groups and problem.key_heads != problem.heads,
             "has no backward for grouped key heads, and their forward alone is not taken."),
        ]
        found = [f"{self.name} {words}" for refuses, words in facts if refuses] + self.other_reasons(problem, sm)
        missing = _missing(self.modules)
        return [*found, missing] if missing else found


def _flash_attn_3_reasons(problem: Problem, sm: int | None) -> list[str]:
    if problem.grad and problem.deterministic and problem.head_dim > 192:
        return ["FlashAttention-3 has no deterministic backward for head dims above 192."]
    return []


def _flash_attn_4_reasons(problem: Problem, sm: int | None) -> list[str]:
    found = []
    if sm is not None and sm >= 100 and problem.head_dim > 128 and not (problem.head_dim == 256 and sm < 120):
        found.append(f"FlashAttention-4 takes no head dim of {checks.shown(problem.head_dim)} on sm_{sm}.")
    if sm is not None and sm >= 120 and problem.grad and problem.deterministic:
        found.append("FlashAttention-4 has no deterministic backward on sm_120 and later.")
    return found


def _cudnn_reasons(problem: Problem, sm: int | None) -> list[str]:
    found = []
    if sm is not None and sm < 90 and problem.head_dim > 128:
        found.append("cuDNN takes head dims above 128 from sm_90 on.")
    version = _cudnn_version()
    if 0 < version < 92_500:
        # NaN without keys, and wrong gradients (NVIDIA/cudnn-frontend issue 943); the lengths are on the device
        found.append(f"cuDNN before 9.25 is wrong on samples without queries or keys, which any pack may hold, and this one "
                     f"is {version // 10_000}.{version // 100 % 100}.")
    return found


@env.constant_in_graphs
def _cudnn_version() -> int:
    """92500 of cuDNN 9.25; 0 where there is none."""
    if _missing(CUDNN.modules):
        return 0
    import cudnn

    return cudnn.backend_version()


@env.constant_in_graphs
def flash_attn_3_is_forward_only() -> bool:
    """Whether the wheel of its forward is all there is of FlashAttention-3."""
    return bool(installed("flash_attn_interface")) and not installed("fa3_fwd_interface")


FLASH_ATTN = Limits("FlashAttention-2", ("flash_attn", "flash_attn.flash_attn_interface"))
FLASH_ATTN_3 = Limits("FlashAttention-3", ("flash_attn_interface",), sm=(90, 90), other_reasons=_flash_attn_3_reasons)
# the wheel of its forward: built without fp16, windows and the backward
FLASH_ATTN_3_FORWARD = Limits("fa3_fwd, the forward of FlashAttention-3,", ("fa3_fwd_interface",), sm=(90, 90),
                              dtypes=(torch.bfloat16,), backward=False, masks="causal")
FLASH_ATTN_4 = Limits("FlashAttention-4", ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"), sm=(90, 129),
                      lse="both", other_reasons=_flash_attn_4_reasons)
# A diagonal of samples with more queries than keys is not defined there, and lengths are not known here. Its backward is
# deterministic only under torch.use_deterministic_algorithms at the time it runs.
CUDNN = Limits("cuDNN, as its Python frontend offers it,",
               ("cudnn", "cudnn.sdpa", "cudnn.sdpa.fwd", "cudnn.sdpa.fwd.torch_op"), masks="full",
               deterministic=False, other_reasons=_cudnn_reasons)
XFORMERS = Limits("xformers", ("xformers", "xformers.ops"), lse="no", masks="causal window", groups=False,
                  deterministic=False)


def flash_attn_3_limits() -> Limits:
    return FLASH_ATTN_3_FORWARD if flash_attn_3_is_forward_only() else FLASH_ATTN_3


# ------------------------------------------------------------------------------------------------------ their own calls
def left_right(causal: bool, window) -> tuple[int, int]:
    """How far left and right of its own key a row sees; negative: without end."""
    return window[0], 0 if causal else window[1]


def flash_attn(*pack, **options):
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func, *pack, **options)


def flash_attn_3(*pack, **options):
    if flash_attn_3_is_forward_only():
        from fa3_fwd_interface import flash_attn_varlen_func
    else:
        from flash_attn_interface import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func, *pack, **options)


def _flash_attn(flash_attn_varlen_func, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *,
                causal, window, return_lse, softmax_scale=None, deterministic=False):
    # Builds of version 3 differ: the older ones know fewer options, and some return the log-sum-exp unasked.
    asked = dict(softmax_scale=softmax_scale, deterministic=deterministic or None, return_attn_probs=return_lse or None)
    found = flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
                                   window_size=tuple(window), **{n: x for n, x in asked.items() if x is not None})
    out, lse = found[:2] if isinstance(found, tuple) else (found, None)
    return out, lse if return_lse else None


def flash_attn_4(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal, window, return_lse,
                 softmax_scale=None, deterministic=False):
    from flash_attn.cute.interface import flash_attn_varlen_func

    # an open side is None there; both results come back whatever is asked for
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal,
        window_size=tuple(None if side < 0 else side for side in window), deterministic=deterministic, return_lse=return_lse)


def cudnn_pack(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False, causal_bottom_right=False,
               softmax_scale=None):
    """Ragged tensors; a causal diagonal is top-left unless ``causal_bottom_right``, which fewer engines take."""
    import cudnn

    out, lse = cudnn.sdpa_torch(  # the backward needs the log-sum-exp, (Nq, H, 1) there
        q, k, v, scale=softmax_scale, is_causal=causal, causal_bottom_right=causal_bottom_right, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_kv=max_seqlen_k, return_lse=True)
    return out, lse[..., 0].t()


def xformers_bias(lengths_q: list[int], lengths_k: list[int], causal: bool, window, device):
    """Their mask of samples with at least one key and, where causal, no more queries than keys."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(lengths_q, lengths_k, device=device)
    left, right = left_right(causal, window)
    if right < 0:
        return bias
    # their window counts the key on the diagonal too
    return bias.make_causal_from_bottomright() if left < 0 else bias.make_local_attention_from_bottomright(left + 1)


def xformers(q, k, v, bias, softmax_scale=None):
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=softmax_scale)[0]


# --------------------------------------------------------------------------------------------------------- our contract
def _unmasked_rows(cu_seqlens, cu_seqlens_other, rows: int, reach: int):
    """(rows,) bool: whether the mask leaves a row of queries (or of keys) at least one key (or query).

    ``cu_seqlens_other``: of the keys (or queries). ``reach``: how far beyond the end of its sample's rows the diagonal may
    lie: ``right`` for queries, ``left`` for keys; negative: any.
    """
    row = torch.arange(rows, device=cu_seqlens.device)
    if cu_seqlens.shape[0] == 1:
        return torch.zeros_like(row, dtype=torch.bool)
    sample = (torch.searchsorted(cu_seqlens, row.to(cu_seqlens.dtype), right=True) - 1).clamp(max=cu_seqlens.shape[0] - 2)
    partners = cu_seqlens_other.diff()[sample]
    unmasked = (row < cu_seqlens[-1]) & (partners > 0)
    return unmasked if reach < 0 else unmasked & (partners + reach >= cu_seqlens[sample + 1] - row)


def _zero_other_rows(x_NHE, rows_N):
    """Zeros in all rows but ``rows_N``, whatever they hold, and in their gradients."""
    return torch.where(rows_N[:, None, None], x_NHE, torch.zeros((), dtype=x_NHE.dtype, device=x_NHE.device))


def _run(call, q, k, v, cu_seqlens_q, cu_seqlens_k, *, softmax_scale, causal, window, return_lse, deterministic):
    """``call`` with row counts for max_seqlen, which sizes launches: blocks of rows that do not exist exit at once."""
    left, right = left_right(causal, window)
    valid_q = _unmasked_rows(cu_seqlens_q, cu_seqlens_k, q.shape[0], right)
    valid_k = _unmasked_rows(cu_seqlens_k, cu_seqlens_q, k.shape[0], left)
    q, k, v = _zero_other_rows(q, valid_q), _zero_other_rows(k, valid_k), _zero_other_rows(v, valid_k)
    if q.shape[0] == 0 or k.shape[0] == 0 or cu_seqlens_q.shape[0] == 1:  # libraries refuse an empty side, or no sample
        out, lse = q + k[:0].sum() + v[:0].sum(), q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)
    else:
        # a longest sample of 1 row means to flash-attn that every sample has 1 (its issue 1537)
        out, lse = call(q, k, v, cu_seqlens_q, cu_seqlens_k, max(q.shape[0], 2), max(k.shape[0], 2), causal=causal,
                        window=window, return_lse=return_lse, softmax_scale=softmax_scale, deterministic=deterministic)
        out = _zero_other_rows(out, valid_q)
    return (out, torch.where(valid_q, lse, -torch.inf)) if return_lse else out


@torch.no_grad()
def _forward(call, q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    return _run(call, q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, deterministic=False, **options)


def _cudnn(*pack, causal, window, return_lse, softmax_scale, deterministic):
    """Builds a graph for every new number of rows; its backward holds S x H x Nq float32 of log-sum-exps."""
    return cudnn_pack(*pack, softmax_scale=softmax_scale)


def _run_xformers(q, k, v, cu_seqlens_q, cu_seqlens_k, *, softmax_scale, causal, window, return_lse, deterministic):
    """Their masks are made of lengths on the host: this waits for the GPU and cannot be captured.

    They are not defined on rows without keys: fully masked rows of queries and of keys are left out of the call.
    """
    left, right = left_right(causal, window)
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    kept_q, kept_k = _kept(lengths_q, lengths_k, right), _kept(lengths_k, lengths_q, left)
    if not sum(kept_q):
        return _zero_other_rows(q, torch.zeros_like(q[:, 0, 0], dtype=torch.bool)) + k[:0].sum() + v[:0].sum()
    rows, keys = (None if sum(kept) == x.shape[0] else _unmasked_rows(cu, cu_other, x.shape[0], reach).nonzero()[:, 0]
                  for kept, x, cu, cu_other, reach in ((kept_q, q, cu_seqlens_q, cu_seqlens_k, right),
                                                       (kept_k, k, cu_seqlens_k, cu_seqlens_q, left)))
    pick = lambda x, at: x if at is None else x.index_select(0, at)
    samples = [(a, b) for a, b in zip(kept_q, kept_k, strict=True) if a]
    bias = xformers_bias([a for a, _ in samples], [b for _, b in samples], causal, window, q.device)
    out = xformers(pick(q, rows), pick(k, keys), pick(v, keys), bias, softmax_scale)
    return out if rows is None else torch.zeros_like(q).index_copy(0, rows, out)


def _kept(lengths: list[int], lengths_other: list[int], reach: int) -> list[int]:
    """How many rows of each sample ``_unmasked_rows`` keeps: its last ones."""
    return [0 if other == 0 else length if reach < 0 else min(length, other + reach)
            for length, other in zip(lengths, lengths_other, strict=True)]


_PACKED = {"flash_attn": (flash_attn, FLASH_ATTN.reasons),
           "flash_attn_3": (flash_attn_3, lambda problem: flash_attn_3_limits().reasons(problem)),
           "flash_attn_4": (flash_attn_4, FLASH_ATTN_4.reasons),
           "cudnn": (_cudnn, CUDNN.reasons)}
ATTENTION = (*(Backend(name, functools.partial(_run, call), reasons, foreign=True)
               for name, (call, reasons) in _PACKED.items()),
             Backend("xformers", _run_xformers, XFORMERS.reasons, foreign=True))
FORWARD = tuple(Backend(name, functools.partial(_forward, call), reasons) for name, (call, reasons) in _PACKED.items())
