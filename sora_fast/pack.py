"""Pack: clips and images of any size in one row of tokens.

N tokens in all, S samples, R modulation rows. A uniform batch is the special case in which all grids are equal; an
image is a clip of one frame. Tokens of a sample stand in t, h, w order, samples one after the other, and rows past
``cu_seqlens[-1]`` (the tail, made by ``pad_to``) belong to no sample: ops give 0 there and never read them.
(Patch n' Pack: Dehghani et al., arXiv 2307.06304.)
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from . import checks
from .reference.precision import wide_dtype

Grid = tuple[int, int, int]


def _lasting(method):
    """``method`` outside inference mode: a pack that was made there may see training, whose backward saves its tensors."""
    @functools.wraps(method)
    def run(*arguments, **options):
        if not torch.is_inference_mode_enabled():
            return method(*arguments, **options)
        with torch.inference_mode(False):
            return method(*arguments, **options)
    return run


class Pack:
    """Where every token of a row belongs.

    Args:
        grids: (S, 3) tokens in t, h, w of each sample: a sequence of triples or a CPU integer tensor. 0 is legal.
        modulation: ``"sample"``: one modulation row per sample (R = S); ``"frame"``: one per latent frame of each
            sample (R = sum of t), for timesteps that differ from frame to frame.
        text_lengths: text tokens of each sample, (S,) ints, where the model has ragged text; or None.
        tokens: length N of the row; more than the samples need makes a tail.
        device: where the index tensors go.

    Attributes:
        grids: tuple of S triples (host). ``grids_cpu``: the same as an int64 CPU tensor (S, 3), for traced code.
            ``grids_device``: the same as int32 on ``device``, for code that must not copy.
        cu_seqlens: int32 (S + 1,). max_seqlen: int, the longest sample.
        segment_ids: int32 (N,), the sample of each token, -1 in the tail.
        coords: int32 (N, 3), t, h, w of each token within its sample, 0 in the tail.
        rows: int32 (N,), the modulation row of each token, -1 in the tail; non-decreasing before it.
        row_samples: int64 (R,), the sample that each modulation row belongs to.
        text_cu_seqlens: int32 (S + 1,) or None; text_max_seqlen: int.
        kept: int64 (N,) place of each token in the full row before ``keep`` dropped some, or None.

    Raises:
        ValueError, TypeError: one sentence saying what was expected, what came and what to do.
    """

    @_lasting
    def __init__(self, grids: Sequence[Sequence[int]] | torch.Tensor, *, modulation: str = "sample",
                 text_lengths: Sequence[int] | None = None, tokens: int | None = None,
                 device: torch.device | str = "cpu"):
        checks.choice("Pack", "modulation", modulation, ("sample", "frame"))
        self.grids = host_grids("Pack", grids)
        self.modulation = modulation
        self.grids_cpu = torch.tensor(self.grids, dtype=torch.int64, device="cpu").reshape(len(self.grids), 3)
        self.grids_device = self.grids_cpu.to(torch.int32)
        lengths = self.grids_cpu.prod(dim=1)
        needed = int(lengths.sum())
        if tokens is not None:
            checks.whole("Pack", "tokens", tokens)
        total = needed if tokens is None else int(tokens)
        checks.require(total >= needed, "Pack", f"at least the {needed:,} tokens of its grids", f"{total:,}",
                       "pass a larger tokens, or fewer samples")
        if total > 2**31 - 1:
            raise ValueError(f"Pack: expected at most 2,147,483,647 tokens, got {total:,}; make several packs")
        cu_seqlens = _running_sum(lengths)
        segment_ids, coords = _layout(self.grids_cpu, lengths, total)
        if modulation == "sample":
            rows, row_samples = segment_ids, torch.arange(len(self.grids), device="cpu")
        else:
            frames = self.grids_cpu[:, 0]
            first_row = _running_sum(frames)[:-1].to(torch.int64)
            inside = segment_ids >= 0
            rows = torch.full((total,), -1, dtype=torch.int32, device="cpu")
            rows[inside] = (first_row[segment_ids[inside].long()] + coords[inside, 0]).to(torch.int32)
            row_samples = torch.repeat_interleave(torch.arange(len(self.grids), device="cpu"), frames)
        self.kept = None
        self._set(cu_seqlens, int(lengths.max()) if len(self.grids) else 0, segment_ids, coords, rows, row_samples)
        self.set_text(text_lengths)
        self._move(torch.device(device))

    def _set(self, cu_seqlens, max_seqlen, segment_ids, coords, rows, row_samples):
        checks.cu_seqlens("Pack", "cu_seqlens", cu_seqlens, segment_ids.shape[0], "the pack")
        checks.rows("Pack", rows, segment_ids.shape[0], row_samples.shape[0])
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self.segment_ids, self.coords, self.rows, self.row_samples = segment_ids, coords, rows, row_samples

    @_lasting
    def set_text(self, lengths: Sequence[int] | None) -> "Pack":
        """Give the pack ragged text: ``lengths`` (S,) text tokens of each sample; None takes it away."""
        if lengths is None:
            self.text_cu_seqlens, self.text_max_seqlen = None, 0
            return self
        if isinstance(lengths, torch.Tensor):
            checks.integers("Pack", "text_lengths", lengths, (torch.int64, torch.int32))
            checks.require(lengths.device.type == "cpu", "Pack", "text_lengths as host data (ints or a CPU tensor)",
                           f"a tensor on {lengths.device}", "keep the lengths on the host")
            lengths = lengths.flatten().tolist() if lengths.dim() == 1 else [lengths.tolist()]
        checks.sequence("Pack", "text_lengths", lengths, "ints")
        checks.require(len(lengths) == len(self.grids), "Pack", f"{len(self.grids)} text_lengths, one per sample",
                       len(lengths), "use 0 for a sample without text")
        for length in lengths:
            checks.whole("Pack", "every length of text_lengths", length, 0)
        lengths = torch.tensor([int(length) for length in lengths], dtype=torch.int64, device="cpu")
        device = self.cu_seqlens.device
        self.text_cu_seqlens = _running_sum(lengths).to(device)
        self.text_max_seqlen = int(lengths.max()) if len(self.grids) else 0
        return self

    @property
    def num_tokens(self) -> int:
        """N, the tail included."""
        return self.segment_ids.shape[0]

    @property
    def num_samples(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_rows(self) -> int:
        return self.row_samples.shape[0]

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    def _move(self, device: torch.device) -> None:
        for name in ("grids_device", "cu_seqlens", "segment_ids", "coords", "rows", "row_samples", "text_cu_seqlens",
                     "kept"):
            value = getattr(self, name)
            if value is not None:
                # towards the host a copy that does not wait may be read before it is there
                setattr(self, name, value.to(device, non_blocking=device.type == "cuda"))

    def _copy(self) -> "Pack":
        other = object.__new__(Pack)
        other.__dict__.update(self.__dict__)
        return other

    @_lasting
    def to(self, device: torch.device | str) -> "Pack":
        """The same pack with its index tensors on ``device``."""
        other = self._copy()
        other._move(torch.device(device))
        return other

    @_lasting
    def pad_to(self, tokens: int) -> "Pack":
        """The same samples in a row of ``tokens`` tokens; the new ones are tail (static shapes, CUDA graphs)."""
        checks.whole("Pack.pad_to", "tokens", tokens)
        more = int(tokens) - self.num_tokens
        if more < 0:
            raise checks.error("Pack.pad_to", f"at least the pack's {checks.shown(self.num_tokens)} tokens",
                               checks.shown(tokens), "pass a larger length")
        other = self._copy()
        other.segment_ids = _extend(self.segment_ids, more, -1)
        other.rows = _extend(self.rows, more, -1)
        other.coords = _extend(self.coords, more, 0)
        other.kept = None if self.kept is None else _extend(self.kept, more, -1)
        return other

    @_lasting
    def keep(self, index: torch.Tensor) -> "Pack":
        """The pack of the tokens ``index`` (M,) int64, rising, without the others; they keep their coords.

        ``grids`` still describes the whole samples; ``kept`` says where each remaining token stood.
        """
        checks.shape("Pack.keep", "index", index, ("M",), "pass the places of the tokens to keep")
        checks.integers("Pack.keep", "index", index, (torch.int64,))
        checks.require(self.kept is None, "Pack.keep", "a pack that has dropped nothing yet", "one that has",
                       "choose all tokens in one call")
        if checks.values_are_visible(index):
            inside = bool(((index >= 0) & (index < sum(self._lengths()))).all())
            checks.require(inside and bool((index[1:] > index[:-1]).all()), "Pack.keep",
                           f"rising places below {sum(self._lengths()):,}", _first_few(index),
                           "sort them and leave the tail out")
        index = index.to(self.device)
        other = self._copy()
        other.kept = index
        segment_ids = self.segment_ids[index]
        lengths = torch.zeros(self.num_samples, dtype=torch.int64, device=self.device)
        lengths.index_add_(0, segment_ids.long(), torch.ones_like(index))
        # max_seqlen is a hint: where the new one cannot be read without waiting, the old one is still a bound
        longest = int(lengths.max()) if self.num_samples and checks.values_are_visible(lengths) else self.max_seqlen
        other._set(_running_sum(lengths), longest, segment_ids, self.coords[index], self.rows[index],
                   self.row_samples)
        return other

    def _lengths(self) -> list[int]:
        """Tokens of each sample; read from the device only after ``keep``."""
        if self.kept is None:
            return [t * h * w for t, h, w in self.grids]
        return self.cu_seqlens.diff().tolist()

    def split(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Cut ``tokens`` (N, ...) into the samples' own views, tail left out."""
        checks.tensor("Pack.split", "tokens", tokens)
        expected = (self.num_tokens, *(f"D{place}" for place in range(1, tokens.dim())))
        checks.shape("Pack.split", "tokens", tokens, expected, "pass one row per token of the pack")
        lengths = self._lengths()
        return list(tokens[: sum(lengths)].split(lengths))

    def fractional_coords(self, side: float = 1.0, axes: Sequence[int] = (1, 2)) -> torch.Tensor:
        """``coords`` (N, 3) float32 with those of ``axes`` as shares of the sample's own size, times ``side``.

        A patch's first row or column at ``p`` of ``size`` is at ``p / size * side``, so a place in the picture has the same
        number at every resolution and aspect ratio. ``axes``: 0 t, 1 h, 2 w; by default time stays a count of frames.
        Sin-cos embeddings, whose frequencies are made for counts of tokens, want the ``side`` of a typical sample.
        Works after ``keep``; 0 in the tail. (NaViT, arXiv 2307.06304, section 2.1, fractional embeddings.)
        """
        for axis in axes:
            checks.require(axis in (0, 1, 2), "Pack.fractional_coords", "axes of 0 (t), 1 (h) and 2 (w)", axis,
                           "name the axes by these numbers")
        coords = self.coords.to(torch.float32)
        if not self.num_samples:
            return coords
        sizes_N3 = self.grids_device.clamp(min=1).to(torch.float32)[self.segment_ids.clamp(min=0)]
        shares = coords / sizes_N3 * side
        return torch.stack([(shares if axis in axes else coords)[:, axis] for axis in range(3)], dim=1)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean (S, D) of each sample's own ``tokens`` (N, D), in their dtype; 0 for a sample without tokens.

        Summed in at least float32; the tail is not read. (NaViT's masked pooling, arXiv 2307.06304, section 2.1.)
        """
        checks.tensor("Pack.pool", "tokens", tokens)
        checks.floating("Pack.pool", tokens=tokens)
        checks.shape("Pack.pool", "tokens", tokens, (self.num_tokens, "D"), "pass one row per token of the pack")
        if not self.num_samples:
            return tokens.new_zeros((0, tokens.shape[1]))
        wide = torch.where((self.segment_ids >= 0)[:, None], tokens, 0).to(wide_dtype(tokens))
        sums = wide.new_zeros((self.num_samples, tokens.shape[1])).index_add(0, self.segment_ids.clamp(min=0).long(), wide)
        return (sums / self.cu_seqlens.diff().clamp(min=1)[:, None]).to(tokens.dtype)

    def __repr__(self) -> str:
        shown = ", ".join("x".join(map(str, grid)) for grid in self.grids[:4])
        more = ", ..." if len(self.grids) > 4 else ""
        return (f"Pack({self.num_samples} samples [{shown}{more}], {self.num_tokens:,} tokens, "
                f"{self.num_rows} modulation rows, {self.device})")


def host_grids(op: str, grids: object) -> tuple[Grid, ...]:
    """``grids`` as a tuple of int triples; refuses device tensors, because reading one would wait for the GPU."""
    if isinstance(grids, Pack):
        return grids.grids
    if isinstance(grids, torch.Tensor):
        if grids.device.type != "cpu":
            raise ValueError(f"{op}: expected grids as host data (a list of triples or a CPU tensor), got a tensor on "
                             f"{grids.device}; keep the sizes on the host, as Pack.grids does")
        checks.integers(op, "grids", grids, (torch.int64, torch.int32))
        checks.shape(op, "grids", grids, ("S", 3), "one row of t, h, w per sample")
        grids = grids.tolist()
    if not isinstance(grids, Iterable) or isinstance(grids, str):
        raise TypeError(f"{op}: expected grids as a list of triples (t, h, w), got {type(grids).__name__}; pass the "
                        f"tokens in t, h, w of every sample")
    result = []
    for place, grid in enumerate(grids):
        triple = tuple(grid) if isinstance(grid, Iterable) else ()
        if len(triple) != 3 or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 0 for n in triple):
            raise ValueError(f"{op}: expected grids as triples (t, h, w) of ints, 0 or more, got {grid!r} at place "
                             f"{place}; pass the tokens in t, h, w of every sample")
        result.append(tuple(int(n) for n in triple))
    return tuple(result)


@dataclass(frozen=True)
class _Uploaded:
    """``grids`` (S, 3) and ``cu_seqlens`` (S + 1,), int32 on a device; ``event``: when they were there (CUDA)."""

    grids: torch.Tensor
    cu_seqlens: torch.Tensor
    stream: object
    event: object


# What CUDA graphs read for as long as they live, so for good: 16 bytes a sample.
_captured: dict[int, _Uploaded] = {}


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a backward may save it later
def _upload(grids: tuple, device: torch.device) -> _Uploaded:
    """Copied once, from pinned memory, so that nobody waits."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("grids: expected grids that were used once before a CUDA graph is captured, got new ones; "
                           "make the call once before the capture, or pass a Pack")
    lengths = torch.tensor(grids, dtype=torch.int64, device="cpu").reshape(-1, 3).prod(1)
    ends = [0, *lengths.cumsum(0).tolist()]
    if ends[-1] > 2**31 - 1:
        raise checks.error("grids", "at most 2,147,483,647 tokens in the samples of a call on backend 'triton'",
                           f"{ends[-1]:,}", "make several calls")
    table = torch.tensor([*(n for grid in grids for n in grid), *ends], dtype=torch.int32, device="cpu")
    if device.type != "cuda":
        stream = event = None
    else:
        table = table.pin_memory().to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device)
        event = stream.record_event()
    return _Uploaded(table[: 3 * len(grids)].view(-1, 3), table[3 * len(grids) :], stream, event)


def uploaded_grids(grids: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Host triples on ``device``, from a cache; never waits for the device."""
    if device.type != "cuda":
        found = _upload(grids, device)
        return found.grids, found.cu_seqlens
    with torch.cuda.device(device):
        found = _upload(grids, device)
        stream = torch.cuda.current_stream()
        if torch.cuda.is_current_stream_capturing():
            _captured[id(found)] = found  # the upload has ended: a capture begins with a synchronisation
        elif stream != found.stream:
            stream.wait_event(found.event)
            found.grids.record_stream(stream)  # both are views of one memory
    return found.grids, found.cu_seqlens


def _first_few(index: torch.Tensor) -> str:
    shown = ", ".join(str(place) for place in index[:8].tolist())
    return f"{shown} and more" if index.shape[0] > 8 else shown


def _running_sum(lengths: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros(1, dtype=torch.int64, device=lengths.device)
    return torch.cat([zero, lengths.cumsum(0)]).to(torch.int32)


def _layout(grids_S3: torch.Tensor, lengths_S: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """segment_ids (total,) and coords (total, 3), int32, of samples one after the other."""
    segment_ids = torch.full((total,), -1, dtype=torch.int32, device="cpu")
    coords = torch.zeros((total, 3), dtype=torch.int32, device="cpu")
    inside = int(lengths_S.sum())
    sample = torch.repeat_interleave(torch.arange(len(lengths_S), device="cpu"), lengths_S)
    place = torch.arange(inside, device="cpu") - (lengths_S.cumsum(0) - lengths_S)[sample]
    height, width = grids_S3[sample, 1], grids_S3[sample, 2]
    segment_ids[:inside] = sample.to(torch.int32)
    if inside:
        coords[:inside] = torch.stack([place // (height * width), place // width % height, place % width], 1).int()
    return segment_ids, coords


def _extend(values: torch.Tensor, more: int, fill: int) -> torch.Tensor:
    return torch.cat([values, values.new_full((more, *values.shape[1:]), fill)])
