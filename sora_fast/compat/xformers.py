"""xformers' ``memory_efficient_attention`` and ``BlockDiagonalMask``, in its layout.

B batch, M query rows, N key rows, H heads, K head dim, S blocks (samples).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import checks, ops

# How the masks of xformers that can be expressed here place their diagonal, by the name of their class.
_CAUSAL = {
    "BlockDiagonalMask": None,
    "BlockDiagonalCausalMask": "top-left",
    "BlockDiagonalCausalFromBottomRightMask": "bottom-right",
}


@dataclass(frozen=True)
class SeqLenInfo:
    """Where the blocks start: ``seqstart`` int32 (S + 1,), ``seqstart_py`` the same as a list, ``max_seqlen``."""

    seqstart: torch.Tensor
    seqstart_py: list[int]
    max_seqlen: int

    @classmethod
    def from_seqlens(cls, seqlens: Sequence[int], device=None) -> "SeqLenInfo":
        starts = [0]
        for place, length in enumerate(seqlens):
            checks.whole("BlockDiagonalMask", f"seqlen {place}", length, 0)
            starts.append(starts[-1] + int(length))
        return cls(torch.tensor(starts, dtype=torch.int32, device=device), starts, max(seqlens, default=0))

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.seqstart_py[:-1], self.seqstart_py[1:], strict=True)]


@dataclass(frozen=True)
class BlockDiagonalMask:
    """Queries of block i attend to the keys of block i.

    ``causal`` is None, ``"top-left"`` (query i of a block sees its keys j <= i; what xformers' ``make_causal`` means)
    or ``"bottom-right"`` (j <= i + Sk - Sq; flash-attn's meaning). The two are one where Sq == Sk.
    """

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo
    batch_sizes: tuple[int, ...] | None = None
    causal: str | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *,
                     device=None) -> "BlockDiagonalMask":
        """Blocks of ``q_seqlen[i]`` queries and ``kv_seqlen[i]`` keys (default: as many)."""
        checks.sequence("BlockDiagonalMask", "q_seqlen", q_seqlen, "ints")
        queries = SeqLenInfo.from_seqlens(q_seqlen, device)
        if kv_seqlen is None:
            return cls(queries, queries)
        checks.sequence("BlockDiagonalMask", "kv_seqlen", kv_seqlen, "ints")
        checks.require(len(q_seqlen) == len(kv_seqlen), "BlockDiagonalMask", "q_seqlen and kv_seqlen of one length",
                       f"{len(q_seqlen)} and {len(kv_seqlen)}", "every block has queries and keys, possibly none")
        return cls(queries, SeqLenInfo.from_seqlens(kv_seqlen, device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[torch.Tensor]) -> tuple["BlockDiagonalMask", torch.Tensor]:
        """The mask of tensors (Bi, Mi, ...), every batch element a block, and all of them as one (1, sum, ...)."""
        checks.sequence("BlockDiagonalMask", "tensors", tensors, "tensors (B, M, ...)")
        checks.require(len(tensors) > 0, "BlockDiagonalMask", "at least one tensor", "none", "pass a tensor")
        rest = tuple(tensors[0].shape[2:])
        for place, tensor in enumerate(tensors):
            checks.shape("BlockDiagonalMask", f"tensors[{place}]", tensor, ("B", "M", *rest), "they differ in B and M")
        seqlens = [tensor.shape[1] for tensor in tensors for _ in range(tensor.shape[0])]
        queries = SeqLenInfo.from_seqlens(seqlens, tensors[0].device)
        joined = torch.cat([tensor.reshape(1, -1, *rest) for tensor in tensors], dim=1)
        return cls(queries, queries, tuple(tensor.shape[0] for tensor in tensors)), joined

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """(1, sum of queries, ...) back to the list that ``from_tensor_list`` had, or to (1, Mi, ...) each."""
        checks.shape("BlockDiagonalMask.split", "tensor", tensor,
                     (1, self.q_seqinfo.seqstart_py[-1], *tensor.shape[2:]), "pass the attention's output")
        lengths, parts, block = self.q_seqinfo.lengths, [], 0
        sizes, counts = [], self.batch_sizes or (1,) * len(lengths)
        for count in counts:
            sizes.append(sum(lengths[block : block + count]))
            block += count
        for part, count in zip(tensor.split(sizes, dim=1), counts, strict=True):
            parts.append(part.reshape(count, part.shape[1] // count if count else 0, *tensor.shape[2:]))
        return parts

    def make_causal(self) -> "BlockDiagonalMask":
        """Causal, each block's diagonal starting top-left, as in xformers."""
        return BlockDiagonalMask(self.q_seqinfo, self.k_seqinfo, self.batch_sizes, "top-left")

    def make_causal_from_bottomright(self) -> "BlockDiagonalMask":
        """Causal, each block's diagonal ending bottom-right, as in flash-attn."""
        return BlockDiagonalMask(self.q_seqinfo, self.k_seqinfo, self.batch_sizes, "bottom-right")

    def materialize(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device="cpu") -> torch.Tensor:
        """The dense bias (..., M, N): 0 where a query sees a key, -inf elsewhere."""
        queries, keys = self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1]
        checks.require(tuple(shape[-2:]) == (queries, keys), "BlockDiagonalMask.materialize",
                       f"a shape that ends in ({queries}, {keys})", tuple(shape), "pass the shape of the scores")
        mask = torch.full((queries, keys), -torch.inf, dtype=dtype, device=device)
        spans = zip(self.q_seqinfo.seqstart_py[:-1], self.q_seqinfo.seqstart_py[1:], self.k_seqinfo.seqstart_py[:-1],
                    self.k_seqinfo.seqstart_py[1:], strict=True)
        for a, b, c, d in spans:
            block = mask[a:b, c:d]
            offset = d - c - (b - a) if self.causal == "bottom-right" else 0
            block.copy_(torch.zeros_like(block) if self.causal is None else torch.triu(block, 1 + offset))
        return mask.expand(*shape)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, backend="auto"):
    """``softmax(query key^T * scale + attn_bias) value``, as ``xformers.ops.memory_efficient_attention``.

    Args:
        query: (B, M, H, K) or (B, M, K). key, value: (B, N, H, K) or (B, N, K). K up to 256; a K below 16 or no
            multiple of 8 is padded with zeros and cut again. H of key may divide that of query.
        attn_bias: None (every batch element is a sample), or a ``BlockDiagonalMask``, ours or xformers', plain or one
            of its two causal forms, with B = 1.
        p: dropout, refused unless 0. scale: default ``K ** -0.5``.

    Returns:
        of query's shape and dtype; 0 on rows without keys.

    Raises:
        NotImplementedError: dropout, another kind of attn_bias. ValueError, TypeError: bad input.
    """
    op = "memory_efficient_attention"
    if p != 0.0:
        raise NotImplementedError(f"{op}: expected p=0.0, got {p}; train without attention dropout")
    checks.tensor(op, "query", query)
    if query.dim() not in (3, 4):
        raise checks.error(op, "query of shape (B, M, H, K) or (B, M, K)", checks.show_shape(query.shape),
                           "join groups of heads into H")
    heads = () if query.dim() == 3 else ("H",)
    checks.shape(op, "key", key, (query.shape[0], "N", *heads, query.shape[-1]), "keys have the queries' B and K")
    checks.shape(op, "value", value, tuple(key.shape), "values have the keys' shape")
    shape = query.shape
    if not heads:
        query, key, value = (t[:, :, None] for t in (query, key, value))
    head_dim = query.shape[-1]
    checks.require(0 < head_dim <= 256, op, "a head dim of 1 to 256", head_dim, "use more heads")
    missing = max(16, -(-head_dim // 8) * 8) - head_dim
    rows = [F.pad(t, (0, missing)) if missing else t for t in (query, key, value)]
    rows = [t.reshape(-1, *t.shape[2:]) for t in rows]
    options = dict(softmax_scale=head_dim**-0.5 if scale is None else scale, backend=backend)
    if attn_bias is None:
        cu_q, cu_k = (torch.arange(t.shape[0] + 1, dtype=torch.int32, device=t.device) * t.shape[1]
                      for t in (query, key))
        out = ops.varlen_attention(*rows, cu_q, cu_k, query.shape[1], key.shape[1], **options)
    else:
        out = _block_diagonal(op, rows, attn_bias, shape[0], options)
    return (out[..., :head_dim] if missing else out).reshape(shape)


def _block_diagonal(op: str, rows, bias, batch: int, options: dict):
    causal = _alignment(op, bias)
    checks.require(batch == 1, op, "a batch of 1 with a BlockDiagonalMask", batch, "join the samples along M")
    queries, keys = bias.q_seqinfo, bias.k_seqinfo
    for name, row, info in (("query", rows[0], queries), ("key", rows[1], keys)):
        if row.shape[0] != info.seqstart_py[-1]:
            raise checks.error(op, f"{name} of the {info.seqstart_py[-1]:,} rows of attn_bias", f"{row.shape[0]:,}",
                               "make the mask from these very lengths")
    lengths_q, lengths_k = (torch.tensor(info.seqstart_py).diff().tolist() for info in (queries, keys))
    if causal == "top-left" and lengths_q != lengths_k:
        return _top_left(rows, lengths_q, lengths_k, options)
    cu_q, cu_k = (info.seqstart.to(rows[0].device, torch.int32) for info in (queries, keys))
    return ops.varlen_attention(*rows, cu_q, cu_k, max(lengths_q, default=0), max(lengths_k, default=0),
                                causal=causal is not None, **options)


def _alignment(op: str, bias) -> str | None:
    """Where the diagonal of ``bias`` is; refuses everything that is not a block-diagonal mask."""
    if isinstance(bias, BlockDiagonalMask):
        return bias.causal
    name = type(bias).__name__
    if name not in _CAUSAL or not hasattr(getattr(bias, "q_seqinfo", None), "seqstart"):
        raise NotImplementedError(f"{op}: expected attn_bias to be None or a BlockDiagonalMask, plain or causal, got a "
                                  f"{name}; join the samples and pass BlockDiagonalMask.from_seqlens")
    return _CAUSAL[name]


def _top_left(rows, lengths_q, lengths_k, options: dict):
    """Query i sees keys j <= i of blocks with unequal lengths.

    The first min(Sq, Sk) queries and keys of a block are a causal square. Keys after it are never seen; queries after
    it see all keys. Both parts are packs of their own, on rows picked from the whole.
    """
    query, key, value = rows
    square_q, square_k, rest_q, rest_k = [], [], [], []
    first_q = first_k = 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        size = min(length_q, length_k)
        square_q.append(range(first_q, first_q + size))
        square_k.append(range(first_k, first_k + size))
        rest_q.append(range(first_q + size, first_q + length_q))
        rest_k.append(range(first_k, first_k + (length_k if length_q > length_k else 0)))
        first_q, first_k = first_q + length_q, first_k + length_k
    out = torch.zeros_like(query)
    for spans_q, spans_k, causal in ((square_q, square_k, True), (rest_q, rest_k, False)):
        at_q, cu_q = _picked(spans_q, query.device)
        at_k, cu_k = _picked(spans_k, query.device)
        part = ops.varlen_attention(query[at_q], key[at_k], value[at_k], cu_q, cu_k, None, None, causal=causal,
                                    **options)
        out = out.to(part.dtype).index_copy(0, at_q, part)
    return out


def _picked(spans: list[range], device) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of ``spans`` one after the other, and the cu_seqlens of the pack they make."""
    places = torch.tensor([place for span in spans for place in span], dtype=torch.int64)
    info = SeqLenInfo.from_seqlens([len(span) for span in spans])
    return places.to(device), info.seqstart.to(device)
