"""Pack: clips and images of any size in one row of tokens, checked once, when it is made.

N tokens in all, S samples, R modulation rows. A uniform batch is the special case in which all grids are equal; an
image is a clip of one frame. Tokens of a sample stand in t, h, w order, samples one after the other, and rows past
``cu_seqlens[-1]`` (the tail, made by ``pad_to``) belong to no sample: ops give 0 there and never read them.
(Patch n' Pack: Dehghani et al., arXiv 2307.06304.)
"""

import functools
from collections.abc import Iterable, Sequence

import torch

from . import checks
from .precision import wide_dtype
from .to_device import to_device

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
    """Where every token of a row belongs. Ops take it in place of ``rows``, ``coords`` and ``cu_seqlens``.

    ``Pack.of(latents, patch)`` makes it from latents.

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
        tail: bool (host), whether some of ``rows`` may be -1; without, ops need no masks.
        even: int (host), the tokens of each modulation row where all have as many, in order and without a tail; else 0.
        row_samples: int64 (R,), the sample that each modulation row belongs to.
        text_cu_seqlens: int32 (S + 1,) or None; text_max_seqlen: int; text_lengths: tuple of S ints (host) or None;
            text_segment_ids: int32 (L,), the sample of each text token, -1 in the text's tail, or None.
        kept: int64 (N,) place of each token in the full row before ``keep`` dropped some, or None.

    Raises:
        ValueError, TypeError: one sentence saying what was expected, what came and what to do.
    """

    @_lasting
    def __init__(self, grids: Sequence[Sequence[int]] | torch.Tensor, *, modulation: str = "sample",
                 text_lengths: Sequence[int] | None = None, tokens: int | None = None,
                 device: torch.device | str = "cpu"):
        checks.choice("Pack", "modulation", modulation, ("sample", "frame"))
        grids = host_grids("Pack", grids)
        grids_cpu = torch.tensor(grids, dtype=torch.int64, device="cpu").reshape(len(grids), 3)
        self._hold(grids=grids, modulation=modulation, grids_cpu=grids_cpu, grids_device=grids_cpu.to(torch.int32),
                   kept=None)
        lengths = grids_cpu.prod(dim=1)
        needed = int(lengths.sum())
        if tokens is not None:
            checks.whole("Pack", "tokens", tokens)
        total = needed if tokens is None else int(tokens)
        checks.require(total >= needed, "Pack", f"at least the {needed:,} tokens of its grids", f"{total:,}",
                       "pass a larger tokens, or fewer samples")
        if total > 2**31 - 1:
            raise ValueError(f"Pack: expected at most 2,147,483,647 tokens, got {total:,}; make several packs")
        cu_seqlens = _running_sum(lengths)
        segment_ids, coords = _layout(grids_cpu, lengths, total)
        if modulation == "sample":
            # two tensors: a graph would hold that they were one, and a padded pack would want another graph
            rows, row_samples = segment_ids.clone(), torch.arange(len(grids), device="cpu")
        else:
            frames = grids_cpu[:, 0]
            first_row = _running_sum(frames)[:-1].to(torch.int64)
            inside = segment_ids >= 0
            rows = torch.full((total,), -1, dtype=torch.int32, device="cpu")
            rows[inside] = (first_row[segment_ids[inside].long()] + coords[inside, 0]).to(torch.int32)
            row_samples = torch.repeat_interleave(torch.arange(len(grids), device="cpu"), frames)
        self._set(cu_seqlens, int(lengths.max()) if len(grids) else 0, segment_ids, coords, rows, row_samples)
        self._hold(even=self._evenly())
        self.set_text(text_lengths)
        self._move(torch.device(device))

    def _set(self, cu_seqlens, max_seqlen, segment_ids, coords, rows, row_samples):
        self._hold(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, segment_ids=segment_ids, coords=coords, rows=rows,
                   row_samples=row_samples)._check()

    def _check(self) -> None:
        tokens = self.num_tokens
        checks.cu_seqlens("Pack", "cu_seqlens", self.cu_seqlens, tokens, "the pack")
        self._hold(tail=checks.rows("Pack", self.rows, tokens, self.num_rows))
        checks.shape("Pack", "coords", self.coords, (tokens, 3), "one t, h, w per token")

    def _hold(self, **values) -> "Pack":
        """Set attributes without a check."""
        values["_facts"] = None  # they are made anew of what is held now
        self.__dict__.update(values)
        return self

    def __setattr__(self, name: str, value: object):
        changed = self._copy()._hold(**{name: value})
        changed._check()  # ops trust what a pack holds, so also what is put there later
        self._hold(**vars(changed))
        self._hold(even=0)

    @classmethod
    def of(cls, latents: torch.Tensor | Sequence[torch.Tensor], patch: Sequence[int], *, modulation: str = "sample",
           text_lengths: Sequence[int] | None = None, tokens: int | None = None,
           device: torch.device | str | None = None) -> "Pack":
        """The pack of ``latents`` cut into patches.

        Args:
            latents: (B, C, T, H, W), or a list of (C, T, H, W); only their sizes are looked at.
            patch: (pt, ph, pw) of the model, such as ``dit.config.patch``.
            device: None: that of the latents.
            modulation, text_lengths, tokens: as in ``Pack``.

        Raises:
            ValueError, TypeError: a size that the patch does not divide, with the nearest that it does; no tensors.
        """
        op = "Pack.of"
        checks.several(op, "patch", patch, "pt, ph, pw", 1)
        if isinstance(latents, torch.Tensor):
            checks.shape(op, "latents", latents, ("B", "C", "T", "H", "W"), "pass a batch, or a list of (C, T, H, W)")
            names = ["latents"] * latents.shape[0]
        else:
            checks.sequence(op, "latents", latents, "tensors (C, T, H, W)")
            names = [f"latents[{place}]" for place in range(len(latents))]
            for name, clip in zip(names, latents, strict=True):
                checks.shape(op, name, clip, ("C", "T", "H", "W"), "an image is a clip of one frame")
        grids = [token_grid(op, clip.shape[-3:], patch, f"{name} whose {{}} is")
                 for name, clip in zip(names, latents, strict=True)]
        if device is None and (isinstance(latents, torch.Tensor) or grids):
            device = (latents if isinstance(latents, torch.Tensor) else latents[0]).device
        return cls(grids, modulation=modulation, text_lengths=text_lengths, tokens=tokens,
                   device="cpu" if device is None else device)

    @_lasting
    def set_text(self, lengths: Sequence[int] | None) -> "Pack":
        """Give the pack ragged text: ``lengths`` (S,) text tokens of each sample; None takes it away."""
        if lengths is None:
            return self._hold(text_cu_seqlens=None, text_max_seqlen=0, text_lengths=None, text_segment_ids=None)
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
        lengths = tuple(int(length) for length in lengths)
        counts = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        owners = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32, device="cpu"), counts)
        return self._hold(text_cu_seqlens=to_device(_running_sum(counts), self.device),
                          text_segment_ids=to_device(owners, self.device),
                          text_max_seqlen=max(lengths, default=0), text_lengths=lengths)

    @property
    def num_tokens(self) -> int:
        """N, the tail included."""
        return self.segment_ids.shape[0]

    @property
    def text_tokens(self) -> int:
        """L, the text's tail included; 0 without text."""
        return 0 if self.text_segment_ids is None else self.text_segment_ids.shape[0]

    @property
    def num_samples(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_rows(self) -> int:
        return self.row_samples.shape[0]

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    @property
    def facts(self) -> tuple:
        """What the checks of a call look at; made once."""
        if self._facts is None:
            self.__dict__["_facts"] = (
                Pack, self.segment_ids.shape[0], self.row_samples.shape[0], self.cu_seqlens.shape[0], self.text_tokens,
                self.cu_seqlens.device, self.modulation, self.kept is None)
        return self._facts

    def _evenly(self) -> int:
        """How many tokens each modulation row has, one after the other, where all have as many; else 0."""
        if self.tail or self.kept is not None:
            return 0
        counts = [h * w if self.modulation == "frame" else t * h * w for t, h, w in self.grids]
        return counts[0] if counts and counts == counts[:1] * len(counts) else 0

    def _move(self, device: torch.device) -> None:
        for name in ("grids_device", "cu_seqlens", "segment_ids", "coords", "rows", "row_samples", "text_cu_seqlens",
                     "text_segment_ids", "kept"):
            value = getattr(self, name)
            if value is not None:
                self._hold(**{name: to_device(value, device)})

    def _copy(self) -> "Pack":
        return object.__new__(Pack)._hold(**vars(self))

    @_lasting
    def to(self, device: torch.device | str) -> "Pack":
        """The same pack with its index tensors on ``device``."""
        other = self._copy()
        other._move(torch.device(device))
        return other

    @_lasting
    def pad_to(self, tokens: int, text_tokens: int | None = None) -> "Pack":
        """The same samples in a row of ``tokens`` tokens; the new ones are tail (static shapes, CUDA graphs).

        ``text_tokens``: likewise the length of the row of text tokens; None: as it is.
        """
        text_tokens = self.text_tokens if text_tokens is None else text_tokens
        for name, value, least, what in (("tokens", tokens, self.num_tokens, "tokens"),
                                         ("text_tokens", text_tokens, self.text_tokens, "text tokens")):
            checks.whole("Pack.pad_to", name, value)
            if value < least:
                raise checks.error("Pack.pad_to", f"at least the pack's {checks.shown(least)} {what}", checks.shown(value),
                                   "pass a larger length")
        more, text = int(tokens) - self.num_tokens, self.text_segment_ids
        if text is None and text_tokens:
            raise checks.error("Pack.pad_to", "text_tokens for a pack with text_lengths", text_tokens, "leave it out")
        return self._copy()._hold(
            segment_ids=_extend(self.segment_ids, more, -1), rows=_extend(self.rows, more, -1),
            tail=self.tail or more > 0, even=0 if more else self.even,
            coords=_extend(self.coords, more, 0), kept=None if self.kept is None else _extend(self.kept, more, -1),
            text_segment_ids=None if text is None else _extend(text, int(text_tokens) - self.text_tokens, -1))

    @_lasting
    def keep(self, index: torch.Tensor) -> "Pack":
        """The pack of the tokens ``index`` (M,) int64, rising, without the others; they keep their coords.

        ``grids`` still describes the whole samples; ``kept`` says where each remaining token stood.
        """
        checks.shape("Pack.keep", "index", index, ("M",), "pass the places of the tokens to keep")
        checks.require(index.dtype != torch.bool, "Pack.keep", "index of places", "a mask",
                       "pass mask.nonzero().flatten()")  # as ints its 0 and 1 would be places
        checks.integers("Pack.keep", "index", index, (torch.int64,))
        checks.require(self.kept is None, "Pack.keep", "a pack that has dropped nothing yet", "one that has",
                       "choose all tokens in one call")
        if checks.values_are_visible(index):
            inside = bool(((index >= 0) & (index < sum(self._lengths()))).all())
            checks.require(inside and bool((index[1:] > index[:-1]).all()), "Pack.keep",
                           f"rising places below {sum(self._lengths()):,}", _first_few(index),
                           "sort them and leave the tail out")
        index = to_device(index, self.device)
        other = self._copy()._hold(kept=index, even=0)
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
        if grids.dim() >= 3:
            raise checks.error(op, "grids of shape (S, 3)", f"a tensor of shape {checks.show_shape(grids.shape)}",
                               "make the pack of latents with Pack.of(latents, patch)")
        checks.integers(op, "grids", grids, (torch.int64, torch.int32))
        checks.shape(op, "grids", grids, ("S", 3), "one row of t, h, w per sample")
        grids = grids.tolist()
    if not isinstance(grids, Iterable) or isinstance(grids, str):
        raise TypeError(f"{op}: expected grids as a list of triples (t, h, w), got {type(grids).__name__}; pass the "
                        f"tokens in t, h, w of every sample")
    return tuple(_triple(op, grid, place) for place, grid in enumerate(grids))


def _triple(op: str, grid: object, place: int) -> Grid:
    """One sample's tokens in t, h, w: a tuple, list or array of three ints, or a CPU tensor of them."""
    came, remedy = checks.came(grid), "pass the tokens in t, h, w of every sample"
    if isinstance(grid, torch.Tensor):
        came = f"a tensor of shape {checks.show_shape(grid.shape)}"
        if grid.dim() >= 3:
            remedy = "make the pack of latents with Pack.of(latents, patch)"
        grid = grid.tolist() if grid.shape == (3,) and grid.device.type == "cpu" else ()
    triple = tuple(grid) if isinstance(grid, Iterable) and not isinstance(grid, str) else ()
    if len(triple) != 3 or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 0 for n in triple):
        raise ValueError(f"{op}: expected grids as triples (t, h, w) of ints, 0 or more, got {came} at place {place}; "
                         f"{remedy}")
    return tuple(int(n) for n in triple)


def token_grid(op: str, sizes: Sequence[int], patch: Sequence[int], what: str = "latents whose {} is") -> Grid:
    """Tokens in t, h, w of latents of (T, H, W) ``sizes``; an error names the nearest sizes that fit."""
    for axis, size, step in zip("THW", sizes, patch, strict=True):
        if size % step:
            low, high = size // step * step, -(-size // step) * step
            raise ValueError(f"{op}: expected {what.format(axis)} a multiple of the patch's {step}, got {size}; crop or pad "
                             f"to {f'{low} or ' if low else ''}{high}")
    return tuple(size // step for size, step in zip(sizes, patch, strict=True))


def check_kind(op: str, name: str, value: object) -> None:
    """``value``, where an op takes a tensor or a Pack, is one of them or None."""
    if value is not None and not isinstance(value, (torch.Tensor, Pack)):
        raise TypeError(f"{op}: expected {name} to be a tensor or a Pack, got {checks.came(value)}; pass Pack(grids), or "
                        f"Pack.of(latents, patch)")


def check_pack(op: str, pack: object, **tokens: torch.Tensor) -> None:
    """``pack`` is a Pack, and each of ``tokens`` (N, ...) has a row for each of its tokens, on its device.

    Without the first check of sizes a pack of other tokens would be obeyed in silence: rows past its end are tail.
    """
    if not isinstance(pack, Pack):
        raise TypeError(f"{op}: expected a Pack, got {checks.came(pack)}; pass Pack(grids), or Pack.of(latents, patch)")
    for name, value in tokens.items():
        if not isinstance(value, torch.Tensor):
            checks.tensor(op, name, value)
        if value.dim() == 0 or value.shape[0] != pack.num_tokens:
            rows = checks.shown(value.shape[0]) if value.dim() else "no"
            raise checks.error(op, f"{name} of one row for each of the pack's {checks.shown(pack.num_tokens)} tokens",
                               f"{rows} rows", _how_to_fit(pack, value))
        if value.device != pack.device:
            raise checks.error(op, f"the pack on {name}'s device {value.device}", f"a pack on {pack.device}",
                               f"pass pack.to({name}.device)")


def check_text(op: str, pack: Pack, text: torch.Tensor) -> None:
    """``pack`` has text, and ``text`` (L, ...) a row for each of its text tokens."""
    checks.tensor(op, "text", text)
    if pack.text_cu_seqlens is None:
        raise checks.error(op, "a pack with text_lengths, since text is attended to", "one without",
                           "pass Pack(grids, text_lengths=text.lengths)")
    if text.dim() == 0 or text.shape[0] != pack.text_tokens:
        rows = checks.shown(text.shape[0]) if text.dim() else "no"
        raise checks.error(op, f"text of one row for each of the pack's {checks.shown(pack.text_tokens)} text tokens",
                           f"{rows} rows", "pass the pack with this text's lengths, Pack(grids, text_lengths=text.lengths)")


def _how_to_fit(pack: Pack, value: torch.Tensor) -> str:
    if value.dim() == 0 or value.shape[0] < pack.num_tokens:
        return "pass the pack of these very tokens, as Pack.of(latents, patch) makes it: grids count tokens, not pixels"
    if pack.kept is not None:
        return "pass the kept rows alone, those of pack.kept"
    return (f"pass the pack of these very tokens, as Pack.of(latents, patch) makes it, or, if the rows past it are tail, "
            f"pack.pad_to({checks.shown(value.shape[0]).replace(',', '')})")


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
