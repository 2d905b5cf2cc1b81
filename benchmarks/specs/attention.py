"""Attention: the packs of real models, the published anchors, and the pieces of ring attention.

Nq query rows, Nk key rows, H heads, Hk key heads, E head dim. Operations are counted as is usual for attention: 4 E for
each pair of a query and a key it sees, per head; 2.5 times that for the backward, which forms the scores again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch

from sora_fast.reference import attention as reference
from sora_fast.testing import Truth
from sora_fast.testing.draw import Draw
from sora_fast.testing.rule import random_cotangents

from ..case import FORWARD, Case, Provider
from ..peers_attention import peers
from ..providers import backends, compiled
from . import shapes
from .shapes import lengths

FORWARD_OP, BACKWARD_OP, MERGE = "varlen_attention_forward", "varlen_attention_backward", "merge_attention"
RAW = (FORWARD_OP, BACKWARD_OP)
WHOLE_SCORES = 2**26  # up to so many scores the truth is computed at once: 0.5 GiB in float64, some eight times that in all
MOST_FLOPS = 5e13  # of the truth in float64: a second or two of an H200's matrix units in float64


@dataclass(frozen=True)
class AttentionCase(Case):
    """Attention over samples of ``queries`` and ``keys`` rows each; ``parts``: of merge_attention, else unused."""

    queries: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    heads: int = 1
    key_heads: int = 1
    head_dim: int = 64
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    return_lse: bool = False
    parts: int = 0

    def shape(self):
        sizes = dict(queries=_runs(self.queries), heads=self.heads, head_dim=self.head_dim)
        if self.op == MERGE:
            return sizes | dict(parts=self.parts)
        return sizes | dict(keys=_runs(self.keys), key_heads=self.key_heads, causal=self.causal, window=list(self.window),
                            return_lse=self.return_lse)

    @property
    def sides(self) -> tuple[int, int]:
        """How far left and right of its own key a row sees; negative: without end."""
        return self.window[0], 0 if self.causal else self.window[1]

    @property
    def blind(self) -> bool:
        """Whether some row sees no key."""
        right = self.sides[1]
        return any(q > 0 and (k == 0 or 0 <= right < q - k) for q, k in zip(self.queries, self.keys, strict=True))

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        return sum(_pairs(q, k, *self.sides) for q, k in zip(self.queries, self.keys, strict=True))

    def scores(self) -> int:
        """Pairs of a query and any key of its sample, over all heads: what a definition without tiles holds."""
        return sum(q * k for q, k in zip(self.queries, self.keys, strict=True)) * self.heads

    def inputs(self, device, seed):
        draw = Draw(device, seed, self.dtype)
        rows, heads = sum(self.queries), self.heads
        if self.op == MERGE:
            return dict(outs=[draw(rows, heads, self.head_dim) for _ in range(self.parts)],
                        lses=[draw(heads, rows, dtype=torch.float32) for _ in range(self.parts)])
        q = draw(rows, heads, self.head_dim)
        k, v = (draw(sum(self.keys), self.key_heads, self.head_dim) for _ in "kv")
        pack = dict(cu_seqlens_q=_ends(self.queries, device), cu_seqlens_k=_ends(self.keys, device),
                    max_seqlen_q=max(self.queries), max_seqlen_k=max(self.keys))
        mask = dict(causal=self.causal, window=self.window)
        if self.op == FORWARD_OP:
            return dict(q=q, k=k, v=v, **pack, **mask)
        if self.op == BACKWARD_OP:
            out, lse = reference.varlen_attention_forward(q, k, v, **pack, **mask)
            return dict(dout=draw(*q.shape), dlse=draw(*lse.shape, dtype=lse.dtype), q=q, k=k, v=v, out=out, lse=lse,
                        **pack, **mask)
        return dict(q=q, k=k, v=v, **pack, **mask, return_lse=self.return_lse)

    def directions(self) -> Mapping[str, tuple[str, ...]]:
        if self.op in RAW:
            return {FORWARD: ()}
        return {FORWARD: (), "backward": ("outs", "lses") if self.op == MERGE else ("q", "k", "v")}

    def flops(self, direction):
        if self.op == MERGE:
            return 0
        return (10 if self._is_backward(direction) else 4) * self.pairs() * self.heads * self.head_dim

    def least_bytes(self, direction):
        rows = sum(self.queries)
        row = self.heads * self.head_dim * self.dtype.itemsize
        q, lse = rows * row, rows * self.heads * 4
        if self.op == MERGE:  # the parts and the whole; backward: the parts, and what comes in for the whole and goes out
            return (self.parts + 1) * (q + lse) if direction == FORWARD else (2 * self.parts + 1) * (q + lse)
        kv = 2 * sum(self.keys) * self.key_heads * self.head_dim * self.dtype.itemsize
        ends = 2 * 4 * (len(self.queries) + 1)
        returned = lse if self.return_lse or self.op in RAW else 0  # the lse, or its gradient
        if self._is_backward(direction):  # q, out, dout, dq; k, v, dk, dv
            return 4 * q + 2 * kv + lse + returned + ends
        return 2 * q + kv + returned + ends

    def _is_backward(self, direction: str) -> bool:
        return self.op == BACKWARD_OP or direction != FORWARD

    def truth(self, inputs, seed):
        if self.op != "varlen_attention" or self.scores() <= WHOLE_SCORES:
            return super().truth(inputs, seed)
        return truth_in_pieces(self, inputs, seed)


def _runs(lengths: tuple[int, ...]) -> str:
    """"14040 + 4 x 1560" of (14040, 1560, 1560, 1560, 1560)."""
    counted = [(length, len(list(run))) for length, run in groupby(lengths)]
    return " + ".join(f"{count} x {length}" if count > 1 else str(length) for length, count in counted)


def _ends(lengths: tuple[int, ...], device) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(device, torch.int32)


def _pairs(queries: int, keys: int, left: int, right: int) -> int:
    """Pairs (i, j) with ``-left <= j - i - (keys - queries) <= right``; a negative side is open."""
    def up_to(offset: int) -> int:  # pairs with j - i <= offset: query i sees min(i + offset + 1, keys) keys, at least 0
        return ramp(queries + offset) - ramp(offset)

    def ramp(n: int) -> int:  # the sum of min(m, keys) over m = 1..n
        rising = min(max(n, 0), keys)
        return rising * (rising + 1) // 2 + (max(n, 0) - rising) * keys

    diagonal = keys - queries
    seen = queries * keys if right < 0 else up_to(diagonal + right)
    return seen if left < 0 else seen - up_to(diagonal - left - 1)


# ------------------------------------------------------------------------------------------- the truth, in pieces
def truth_in_pieces(case: AttentionCase, inputs: dict, seed: int, *, most_scores: int = WHOLE_SCORES,
                    most_flops: float = MOST_FLOPS) -> Truth:
    """The Truth of varlen_attention where the scores of a pack do not fit.

    The reference's own forward and backward run over one sample, some key heads with their query heads, and some queries,
    at most ``most_scores`` at once; each query sees all its keys, so that nothing is merged but sums into dk and dv. Where
    float64 would take more than ``most_flops`` operations, the first and the last key head stand for all, with their query
    heads.
    """
    share = case.heads // case.key_heads
    groups = list(range(case.key_heads))
    if (4 + 10) * case.scores() * case.head_dim > most_flops:
        groups = sorted({0, case.key_heads - 1})
    heads = [group * share + place for group in groups for place in range(share)]
    part, scope = None, "every element"
    if len(groups) < case.key_heads:
        part = partial(_part, heads=heads, groups=groups)
        scope = (f"key heads {' and '.join(map(str, groups))} of {case.key_heads} with their query heads "
                 f"({len(heads)} of {case.heads}), every element")

    q = inputs["q"]
    outputs = [q.new_empty(q.shape)]  # only their shapes and dtypes are read
    if case.return_lse:
        outputs.append(q.new_empty((case.heads, q.shape[0]), dtype=torch.float32))
    cotangents = random_cotangents(outputs, seed)
    dlse = cotangents[1][heads] if case.return_lse else None
    given = [q[:, heads], inputs["k"][:, groups], inputs["v"][:, groups], cotangents[0][:, heads], dlse]

    def run(wide: torch.dtype, narrow: Mapping[str, torch.dtype]):
        found = _in_pieces(case, *(None if t is None else t.to(wide) for t in given), most_scores)
        found = {name: t.to(narrow.get(name, wide)) for name, t in found.items()}
        outs = [found["out"], found["lse"]] if case.return_lse else [found["out"]]
        return outs, {name: found[name] for name in "qkv"}

    # low rounds once, at the end: dk and dv are summed in float32
    ref = run(torch.float64, {})
    low = run(torch.float32, dict.fromkeys(("out", "q", "k", "v"), case.dtype))
    return Truth(case.op, inputs, cotangents, ("q", "k", "v"), ref, low, part, scope)


def _part(name: str, t: torch.Tensor, heads: list[int], groups: list[int]) -> torch.Tensor:
    if name == "output 1":  # lse (H, Nq)
        return t[heads]
    return t[:, groups] if name in ("k", "v") else t[:, heads]


def _in_pieces(case: AttentionCase, q, k, v, dout, dlse, most_scores: int) -> dict[str, torch.Tensor]:
    """out, lse and the gradients by input name, in q's dtype."""
    out, dq, dk, dv = (torch.zeros_like(t) for t in (q, q, k, v))
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    share = q.shape[1] // k.shape[1]
    top = end = 0
    for queries, keys in zip(case.queries, case.keys, strict=True):
        step = max(1, most_scores // max(1, share * keys))
        for start in range(0, queries, step):
            stop = min(start + step, queries)
            first, last, window = _keys_seen(queries, keys, start, stop, *case.sides)
            if last <= first:
                continue
            ends = dict(cu_seqlens_q=_ends((stop - start,), q.device), cu_seqlens_k=_ends((last - first,), q.device))
            rows, cols = slice(top + start, top + stop), slice(end + first, end + last)
            wide = max(1, most_scores // (share * (stop - start) * keys))  # small samples: several key heads at once
            for group in range(0, k.shape[1], wide):
                mine, theirs = slice(group * share, (group + wide) * share), slice(group, group + wide)
                block = (q[rows, mine], k[cols, theirs], v[cols, theirs])
                some_out, some_lse = reference.varlen_attention_forward(*block, **ends, window=window)
                grads = reference.varlen_attention_backward(
                    dout[rows, mine], None if dlse is None else dlse[mine, rows], *block, some_out, some_lse, **ends,
                    window=window)
                out[rows, mine], lse[mine, rows], dq[rows, mine] = some_out, some_lse, grads[0]
                dk[cols, theirs] += grads[1]
                dv[cols, theirs] += grads[2]
        top, end = top + queries, end + keys
    return dict(out=out, lse=lse, q=dq, k=dk, v=dv)


def _keys_seen(queries: int, keys: int, start: int, stop: int, left: int, right: int):
    """(first, last, window): the keys that queries start..stop see lie in first..last, and their window among those.

    Bottom-right alignment counts from the last query and the last key: cutting either off moves the window.
    """
    diagonal = keys - queries
    first = 0 if left < 0 else max(0, start + diagonal - left)
    last = keys if right < 0 else min(keys, max(0, stop + diagonal + right))
    moved = (last - stop) - diagonal
    return first, last, (-1 if left < 0 else left + moved, -1 if right < 0 else right - moved)


# ------------------------------------------------------------------------------------------------------ providers
def providers(op: str) -> list[Provider]:
    """Our backends, torch.compile of the definition, and the peers."""
    if op == MERGE:
        return [*backends(op), compiled(op)]
    ours = [_if_scores_fit(provider) if provider.name == "reference" else provider for provider in backends(op)]
    if op in RAW:  # steps of ring attention: their peers are those of varlen_attention
        return ours
    return [*ours, _if_scores_fit(compiled(op)), *peers()]


def _if_scores_fit(provider: Provider) -> Provider:
    def unavailable(case: AttentionCase, direction: str, device: torch.device) -> str:
        # Lengths cannot be read while a graph is traced: there the whole pack is one block. What is fused holds scores,
        # probabilities and the gradients of both at once, what is not three tensors more.
        scores = sum(case.queries) * sum(case.keys) * case.heads if provider.compiled else case.scores()
        each, count = scores * 4, 4 if provider.compiled else 7
        room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 8 * 10**9
        if each * count > room:
            return (f"It would hold about {count} tensors of scores of {each / 1e9:,.1f} GB each, and "
                    f"{room / 1e9:,.0f} GB is all there is.")
        return provider.unavailable(case, direction, device)

    return replace(provider, unavailable=unavailable)


# ---------------------------------------------------------------------------------------------------------- cases
def _case(label: str, queries: tuple[int, ...], heads: int, head_dim: int, *, keys: tuple[int, ...] | None = None,
          key_heads: int | None = None, dtype: torch.dtype = torch.bfloat16, suite: str = "full",
          op: str = "varlen_attention", **options) -> AttentionCase:
    return AttentionCase(op, label, dtype, (suite,), queries, queries if keys is None else keys, heads,
                         heads if key_heads is None else key_heads, head_dim, **options)


_quick = partial(_case, suite="quick", dtype=torch.float32)

QUICK = (
    _quick("a clip and images", (96, 30, 30, 12), 4, 64),
    _quick("cross attention to text, one sample without text", (64, 40, 17), 4, 32, keys=(13, 0, 7)),
    _quick("grouped heads of 72", (70, 33), 6, 72, key_heads=2, dtype=torch.bfloat16),
    _quick("causal, window 24, more keys than queries", (96, 62), 4, 80, keys=(160, 62), causal=True, window=(24, 0)),
    _quick("forward with its log-sum-exp", (64, 20), 4, 64, op=FORWARD_OP),
    _quick("backward from out and log-sum-exp", (64, 20), 4, 64, op=BACKWARD_OP),
    _quick("3 parts", (200,), 4, 64, op=MERGE, parts=3),
)

MODELS = (
    _case("Wan 1.3B, 480p, 81 frames", lengths(shapes.WAN_480), 12, 128),
    _case("Wan 1.3B, 720p, 81 frames", lengths(shapes.WAN_720), 12, 128),
    _case("Wan 14B, 480p, 81 frames", lengths(shapes.WAN_480), 40, 128),
    _case("Wan 14B, 720p, 81 frames", lengths(shapes.WAN_720), 40, 128),
    _case("Wan 14B, 480p, cross attention to 512 text tokens", lengths(shapes.WAN_480), 40, 128, keys=(512,)),
    # HunyuanVideo's text, up to 256 tokens more, and Mochi's are left out; CogVideoX has 226 in the same row.
    _case("HunyuanVideo, 720p, 129 frames", lengths(shapes.HUNYUAN_720), 24, 128),
    _case("CogVideoX-5B, 49 frames with text", (lengths(shapes.COGVIDEOX_480)[0] + 226,), 48, 64),
    _case("Mochi, 480p, 163 frames", lengths(shapes.MOCHI_480), 24, 128),
    _case("DiT-XL/2, 128 images", lengths(shapes.DIT_256) * 128, 16, 72),
    _case("mixed pack of 32k", lengths(*shapes.MIXED_32K), 24, 128),
    _case("mixed pack of 16k", lengths(*shapes.MIXED_16K), 16, 72),
)

# 64 query heads on 8 key heads, one sample: the lengths of cuDNN's published figures on an H200 (cudnn-frontend,
# benchmark/sdpa_benchmark_training/results/h200_919_only_cudnn). The others: 32k tokens in samples of one length, at the
# width of 2,048 that FlashAttention-3's figures have (arXiv 2407.08608).
ANCHORS = (
    *(_case(f"{n // 1024}k, 64 heads on 8", (n,), 64, 128, key_heads=8) for n in (4_096, 8_192, 16_384, 32_768)),
    _case("16k causal, 64 heads on 8", (16_384,), 64, 128, key_heads=8, causal=True),
    _case("16k causal, window 1024, 64 heads of 64 on 8", (16_384,), 64, 64, key_heads=8, causal=True, window=(1_024, 0)),
    *(_case(f"{_runs((n // 1024,) * (32_768 // n))}k, heads of 128", (n,) * (32_768 // n), 16, 128)
      for n in (4_096, 8_192, 16_384, 32_768)),
    *(_case(f"{_runs((n // 1024,) * (32_768 // n))}k, heads of 64", (n,) * (32_768 // n), 32, 64)
      for n in (4_096, 8_192, 16_384, 32_768)),
)

# Ring attention over 8 GPUs: each holds an eighth of Wan 14B's tokens.
_EIGHTH = (sum(lengths(shapes.WAN_720)) // 8,)
MERGES = (
    _case("2 parts, a step of Wan 14B's ring of 8", _EIGHTH, 40, 128, op=MERGE, parts=2),
    _case("8 parts, Wan 14B's ring of 8 at once", _EIGHTH, 40, 128, op=MERGE, parts=8),
)

CASES = [*QUICK, *MODELS, *ANCHORS, *MERGES]
