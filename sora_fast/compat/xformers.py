"""xformers' ``memory_efficient_attention``, ``BlockDiagonalMask`` and its causal and local forms, in its layout.

B batch, M query rows, N key rows, H heads, K head dim, S blocks (samples). Names, arguments and masks are those of
xformers 0.0.35. One thing differs: rows that see no key, which xformers refuses or leaves undefined, are 0 here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from .. import checks, ops
from ..to_device import to_device


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
        return cls(to_device(torch.tensor(starts, dtype=torch.int32, device="cpu"), device or "cpu"), starts,
                   max(seqlens, default=0))

    def to(self, device) -> "SeqLenInfo":
        return replace(self, seqstart=to_device(self.seqstart, device))

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.seqstart_py[:-1], self.seqstart_py[1:], strict=True)]


@dataclass(frozen=True)
class BlockDiagonalMask:
    """Queries of block i attend to the keys of block i."""

    # None: every key; "top-left": query i of a block sees its keys j <= i; "bottom-right" (flash-attn's meaning of causal):
    # its keys j <= i + Sk - Sq. The two are one where Sq == Sk.
    diagonal: ClassVar[str | None] = None

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo
    _batch_sizes: tuple[int, ...] | None = None

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

    @classmethod
    def from_tensor_lists_qkv(cls, tensors_q: Sequence[torch.Tensor], tensors_k: Sequence[torch.Tensor],
                              tensors_v: Sequence[torch.Tensor] | None = None):
        """``(mask, queries, keys, values or None)``: ``from_tensor_list`` where keys have lengths of their own."""
        checks.require(len(tensors_q) == len(tensors_k), "BlockDiagonalMask", "as many tensors_k as tensors_q",
                       f"{len(tensors_k)} and {len(tensors_q)}", "pass the keys of every query tensor")
        (mask, queries), (other, keys) = cls.from_tensor_list(tensors_q), cls.from_tensor_list(tensors_k)
        checks.require(mask._batch_sizes == other._batch_sizes, "BlockDiagonalMask", "tensors_k of the batches of tensors_q",
                       f"{other._batch_sizes} and {mask._batch_sizes}", "pass the keys of every query tensor")
        values = None if tensors_v is None else cls.from_tensor_list(tensors_v)[1]
        return replace(mask, k_seqinfo=other.q_seqinfo), queries, keys, values

    def to(self, device) -> "BlockDiagonalMask":
        """The mask with its offsets on ``device``."""
        return replace(self, q_seqinfo=self.q_seqinfo.to(device), k_seqinfo=self.k_seqinfo.to(device))

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """(1, sum of queries, ...) back to the list that ``from_tensor_list`` had, or to (1, Mi, ...) each."""
        return self.split_queries(tensor)

    def split_queries(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """(1, sum of queries, ...) to (1, Mi, ...) of each block, as views."""
        return self._split(self.q_seqinfo, tensor)

    def split_kv(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """(1, sum of keys, ...) to (1, Ki, ...) of each block, as views."""
        return self._split(self.k_seqinfo, tensor)

    def _split(self, info: SeqLenInfo, tensor: torch.Tensor) -> list[torch.Tensor]:
        checks.tensor("BlockDiagonalMask.split", "tensor", tensor)
        checks.shape("BlockDiagonalMask.split", "tensor", tensor, (1, info.seqstart_py[-1], *tensor.shape[2:]),
                     "pass the attention's output")
        lengths, parts, block = info.lengths, [], 0
        sizes, counts = [], self._batch_sizes or (1,) * len(lengths)
        for count in counts:
            sizes.append(sum(lengths[block : block + count]))
            block += count
        for part, count in zip(tensor.split(sizes, dim=1), counts, strict=True):
            parts.append(part.reshape(count, part.shape[1] // count if count else 0, *tensor.shape[2:]))
        return parts

    def make_causal(self) -> "BlockDiagonalCausalMask":
        """Causal, each block's diagonal starting top-left."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> "BlockDiagonalCausalFromBottomRightMask":
        """Causal, each block's diagonal ending bottom-right, as in flash-attn."""
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> "BlockDiagonalCausalLocalAttentionMask":
        """Of ``make_causal``, the last ``window_size`` keys that each query sees."""
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)

    def make_local_attention_from_bottomright(self, window_size: int):
        """Of ``make_causal_from_bottomright``, the last ``window_size`` keys that each query sees."""
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes,
                                                                    window_size)

    def materialize(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device="cpu") -> torch.Tensor:
        """The dense bias (..., M, N): 0 where a query sees a key, -inf elsewhere."""
        queries, keys = self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1]
        checks.require(tuple(shape[-2:]) == (queries, keys), "BlockDiagonalMask.materialize",
                       f"a shape that ends in ({queries}, {keys})", tuple(shape), "pass the shape of the scores")
        seen = torch.zeros((queries, keys), dtype=torch.bool, device=device)
        spans = zip(self.q_seqinfo.seqstart_py[:-1], self.q_seqinfo.seqstart_py[1:], self.k_seqinfo.seqstart_py[:-1],
                    self.k_seqinfo.seqstart_py[1:], strict=True)
        window = getattr(self, "_window_size", None)
        for a, b, c, d in spans:
            seen[a:b, c:d] = True
            offset = d - c - (b - a) if self.diagonal == "bottom-right" else 0
            if self.diagonal is not None:
                seen[a:b, c:d].tril_(offset)
            if window is not None:
                seen[a:b, c:d].triu_(offset - window + 1)
        mask = torch.full((queries, keys), -torch.inf, dtype=dtype, device=device).masked_fill_(seen, 0)
        return mask.expand(*shape)


@dataclass(frozen=True)
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Query i of a block sees its keys j <= i."""

    diagonal: ClassVar[str | None] = "top-left"


@dataclass(frozen=True)
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Query i of a block of Sq queries and Sk keys sees its keys j <= i + Sk - Sq."""

    diagonal: ClassVar[str | None] = "bottom-right"


@dataclass(frozen=True)
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Query i of a block sees its keys i - window_size < j <= i.

    Other arguments as in ``BlockDiagonalMask.make_local_attention``, which makes it.

    Raises:
        ValueError, TypeError: a window below 1.
    """

    _window_size: int = 0

    def __post_init__(self):
        checks.whole(type(self).__name__, "window_size", self._window_size, 1)


@dataclass(frozen=True)
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Query i of a block sees its keys i + Sk - Sq - window_size < j <= i + Sk - Sq.

    Other arguments as in ``BlockDiagonalMask.make_local_attention``, which makes it.

    Raises:
        ValueError, TypeError: a window below 1.
    """

    _window_size: int = 0

    def __post_init__(self):
        checks.whole(type(self).__name__, "window_size", self._window_size, 1)


# Those of xformers are taken as ours are: by the name of their class and the fields they share.
_MASKS = {mask.__name__: mask for mask in (
    BlockDiagonalMask, BlockDiagonalCausalMask, BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask, BlockDiagonalCausalLocalAttentionFromBottomRightMask)}


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None,
                               backend="auto"):
    """``softmax(query key^T * scale + attn_bias) value``, as ``xformers.ops.memory_efficient_attention``.

    Args:
        query: (B, M, H, K) or (B, M, K). key, value: (B, N, H, K) or (B, N, K). K up to 256; a K below 16 or no
            multiple of 8 is padded with zeros and cut again. H of key may divide that of query.
        attn_bias: None (every batch element is a sample), or a ``BlockDiagonalMask``, ours or xformers', plain, causal or
            local, with B = 1. A local one whose diagonal starts top-left takes no block of fewer keys than queries.
        p: dropout, refused unless 0. scale: default ``K ** -0.5``.
        backend: as in ``ops.varlen_attention``.
        op, output_dtype: xformers' choice of its own kernels and of another dtype, refused unless None.

    Returns:
        of query's shape and dtype; 0 on rows without keys.

    Raises:
        NotImplementedError: dropout, another kind of attn_bias, op, output_dtype. ValueError, TypeError: bad input.
    """
    for name, given, neutral, remedy in (("p", p, 0.0, "train without attention dropout"),
                                         ("op", op, None, "choose among our backends with backend="),
                                         ("output_dtype", output_dtype, None, "cast the result")):
        if given != neutral:
            raise NotImplementedError(f"memory_efficient_attention: expected {name}={neutral}, got {given}; {remedy}")
    op = "memory_efficient_attention"
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
    diagonal, window_size = _alignment(op, bias)
    checks.require(batch == 1, op, "a batch of 1 with a BlockDiagonalMask", batch, "join the samples along M")
    queries, keys = bias.q_seqinfo, bias.k_seqinfo
    for name, row, info in (("query", rows[0], queries), ("key", rows[1], keys)):
        if row.shape[0] != info.seqstart_py[-1]:
            raise checks.error(op, f"{name} of the {checks.shown(info.seqstart_py[-1])} rows of attn_bias",
                               checks.shown(row.shape[0]), "make the mask from these very lengths")
    lengths_q, lengths_k = (torch.tensor(info.seqstart_py, device="cpu").diff().tolist() for info in (queries, keys))
    if diagonal is not None:
        options = dict(options, causal=True, window=(-1 if window_size is None else window_size - 1, -1))
    if diagonal == "top-left" and lengths_q != lengths_k:
        return _top_left(op, rows, lengths_q, lengths_k, options)
    cu_q, cu_k = (info.seqstart.to(rows[0].device, torch.int32) for info in (queries, keys))
    return ops.varlen_attention(*rows, cu_q, cu_k, max(lengths_q, default=0), max(lengths_k, default=0), **options)


def _alignment(op: str, bias) -> tuple[str | None, int | None]:
    """Where the diagonal of ``bias`` is, and its window; refuses everything that is not a block-diagonal mask."""
    name = type(bias).__name__
    if name not in _MASKS or not hasattr(getattr(bias, "q_seqinfo", None), "seqstart"):
        raise NotImplementedError(f"{op}: expected attn_bias to be None or a BlockDiagonalMask, plain, causal or local, got "
                                  f"a {name}; join the samples and pass {_nearest(name)}")
    return _MASKS[name].diagonal, getattr(bias, "_window_size", None)


def _nearest(name: str) -> str:
    """What to make in place of a mask of another class: one that hides the same keys, as far as its name says."""
    made = "BlockDiagonalMask.from_seqlens(lengths)"
    bottom = "FromBottomRight" in name or "WithOffset" in name
    if "Local" in name:
        return f"{made}.make_local_attention{'_from_bottomright' * bottom}(window_size)"
    if "LowerTriangular" in name or "Causal" in name:
        return f"{made}.make_causal{'_from_bottomright' * bottom}()"
    return made


def _top_left(op: str, rows, lengths_q, lengths_k, options: dict):
    """Query i sees keys j <= i of blocks with unequal lengths.

    The first min(Sq, Sk) queries and keys of a block are a causal square. Keys after it are never seen; queries after
    it see all keys, or, in a window, ever fewer of them, which is refused. Both parts are packs of their own, on rows picked
    from the whole.
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
        if options["window"][0] >= 0 and length_q > length_k:
            raise NotImplementedError(f"{op}: expected blocks of at least as many keys as queries with a local top-left "
                                      f"mask, got {length_k} and {length_q}; use make_local_attention_from_bottomright")
    out = torch.zeros_like(query)
    for spans_q, spans_k, changes in ((square_q, square_k, {}), (rest_q, rest_k, dict(causal=False))):
        at_q, cu_q = _picked(spans_q, query.device)
        at_k, cu_k = _picked(spans_k, query.device)
        part = ops.varlen_attention(query[at_q], key[at_k], value[at_k], cu_q, cu_k, None, None, **options | changes)
        out = out.to(part.dtype).index_copy(0, at_q, part)
    return out


def _picked(spans: list[range], device) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of ``spans`` one after the other, and the cu_seqlens of the pack they make."""
    places = torch.tensor([place for span in spans for place in span], dtype=torch.int64, device="cpu")
    info = SeqLenInfo.from_seqlens([len(span) for span in spans])
    return to_device(places, device), to_device(info.seqstart, device)
