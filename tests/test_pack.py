"""Pack against a brute-force construction."""

import op_checks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sora_fast import Pack, ops

GRIDS = [(2, 2, 3), (0, 4, 4), (1, 1, 1), (3, 0, 2), (2, 1, 2)]


def brute(grids, modulation, tokens=None):
    """Token by token."""
    cu, segments, coords, rows, samples = [0], [], [], [], []
    first = 0
    for s, (t, h, w) in enumerate(grids):
        for a in range(t):
            for b in range(h):
                for c in range(w):
                    segments.append(s)
                    coords.append([a, b, c])
                    rows.append(first + a if modulation == "frame" else s)
        count = t if modulation == "frame" else 1
        samples += [s] * count
        first += count
        cu.append(len(segments))
    tail = 0 if tokens is None else tokens - len(segments)
    return dict(cu_seqlens=cu, segment_ids=segments + [-1] * tail, coords=coords + [[0, 0, 0]] * tail,
                rows=rows + [-1] * tail, row_samples=samples)


def assert_is(pack, want):
    for name, value in want.items():
        got = getattr(pack, name)
        assert got.dtype == (torch.int64 if name == "row_samples" else torch.int32), name
        assert got.tolist() == value, name
    assert pack.coords.shape == (pack.num_tokens, 3)


@op_checks.drawn
@given(grids=st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=5), tail=st.integers(0, 4),
       modulation=st.sampled_from(("sample", "frame")), form=st.sampled_from(("tuple", "list", "int32", "int64")))
def test_against_brute_force(grids, tail, modulation, form):
    needed = sum(t * h * w for t, h, w in grids)
    given_grids = {"tuple": tuple(grids), "list": [list(g) for g in grids]}.get(form)
    if given_grids is None:
        given_grids = torch.tensor(grids, dtype=getattr(torch, form)).reshape(len(grids), 3)
    pack = Pack(given_grids, modulation=modulation, tokens=needed + tail)
    assert_is(pack, brute(grids, modulation, needed + tail))
    assert_is(Pack(grids, modulation=modulation).pad_to(needed + tail), brute(grids, modulation, needed + tail))
    assert pack.grids == tuple(grids) and pack.grids_cpu.tolist() == [list(g) for g in grids]
    assert pack.grids_device.dtype == torch.int32 and pack.grids_device.tolist() == pack.grids_cpu.tolist()
    assert pack.num_tokens == needed + tail and pack.num_samples == len(grids)
    assert pack.num_rows == (sum(g[0] for g in grids) if modulation == "frame" else len(grids))
    assert pack.max_seqlen == max((t * h * w for t, h, w in grids), default=0)
    assert isinstance(pack.max_seqlen, int) and pack.kept is None
    used = pack.rows[pack.rows >= 0]
    assert (used[1:] >= used[:-1]).all()
    assert torch.equal(pack.row_samples[used.long()].int(), pack.segment_ids[pack.rows >= 0])
    text = list(range(len(grids)))
    pack.set_text(text)
    assert pack.text_cu_seqlens.tolist() == [sum(text[:i]) for i in range(len(text) + 1)]
    assert pack.text_cu_seqlens.dtype == torch.int32 and pack.text_max_seqlen == max(text, default=0)
    assert pack.set_text(None).text_cu_seqlens is None


@op_checks.drawn
@given(chosen=st.sets(st.integers(0, 16)), modulation=st.sampled_from(("sample", "frame")), tail=st.integers(0, 2))
def test_keep(chosen, modulation, tail):
    full = Pack(GRIDS, modulation=modulation).pad_to(17 + tail)
    index = torch.tensor(sorted(chosen), dtype=torch.int64)
    pack = full.keep(index)
    want = brute(GRIDS, modulation)
    want = {name: [value[i] for i in sorted(chosen)] if name not in ("cu_seqlens", "row_samples") else value
            for name, value in want.items()}
    want["cu_seqlens"] = [sum(s < n for s in want["segment_ids"]) for n in range(len(GRIDS) + 1)]
    assert_is(pack, want)
    assert torch.equal(pack.kept, index) and pack.grids == full.grids and full.kept is None
    lengths = [b - a for a, b in zip(want["cu_seqlens"][:-1], want["cu_seqlens"][1:], strict=True)]
    assert pack.max_seqlen == max(lengths)
    parts = pack.split(torch.arange(len(index)))
    assert [len(p) for p in parts] == lengths and torch.cat(parts).tolist() == list(range(len(index)))
    padded = pack.pad_to(20)
    assert padded.kept.tolist() == index.tolist() + [-1] * (20 - len(index))


def test_split_pad_to_and_copies():
    pack = Pack(GRIDS, text_lengths=[1, 0, 2, 0, 5])
    tokens = torch.randn(19, 4)
    padded = pack.pad_to(19)
    parts = padded.split(tokens)
    assert [p.shape for p in parts] == [(12, 4), (0, 4), (1, 4), (0, 4), (4, 4)]
    assert torch.equal(torch.cat(parts), tokens[:17])
    assert parts[0].untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    assert pack.num_tokens == 17 and padded.cu_seqlens.tolist() == pack.cu_seqlens.tolist()
    assert padded.text_cu_seqlens.tolist() == [0, 1, 1, 3, 3, 8]
    assert pack.pad_to(17).rows.tolist() == pack.rows.tolist()
    assert "5 samples" in repr(pack) and "17 tokens" in repr(pack) and "..." in repr(pack)


def test_devices():
    pack = Pack(GRIDS, text_lengths=[1] * 5).pad_to(20).to("meta")
    assert {t.device.type for t in (pack.cu_seqlens, pack.segment_ids, pack.coords, pack.rows, pack.row_samples,
                                    pack.text_cu_seqlens)} == {"meta"}
    assert pack.grids_device.device.type == "meta"
    assert pack.device.type == "meta" and pack.grids_cpu.device.type == "cpu" and pack.num_tokens == 20
    assert pack.pad_to(22).rows.shape == (22,) and "meta" in repr(pack)
    assert Pack(GRIDS, device="meta").num_samples == 5
    kept = Pack(GRIDS).to("meta").keep(torch.tensor([0, 3]))
    assert kept.num_tokens == 2 and kept.max_seqlen == 12  # a bound: the lengths cannot be read there


# ------------------------------------------------------------------------------------------------ fractions, pooling
def assert_resolution_free(positions):
    """`positions(pack)` of h and w: equal, bit for bit, at the same place of the picture at every resolution."""
    small, large = Pack([(1, 3, 5), (2, 7, 1)]), Pack([(1, 9, 15), (2, 21, 3)])
    matching = (large.coords[:, 1:] % 3 == 0).all(1)
    assert torch.equal(positions(large)[matching][:, 1:], positions(small)[:, 1:])


def test_fractional_coords():
    assert_resolution_free(lambda pack: pack.fractional_coords())
    assert_resolution_free(lambda pack: pack.fractional_coords(32.0, axes=(0, 1, 2)))
    with pytest.raises(AssertionError):
        assert_resolution_free(lambda pack: pack.coords)
    pack = Pack(GRIDS).pad_to(19)
    for axes in ((1, 2), (0,), (), (2, 0, 1)):
        got = pack.fractional_coords(12.0, axes)
        assert got.dtype == torch.float32 and got.shape == (19, 3) and not got[17:].any()
        for place in range(17):
            sizes = GRIDS[int(pack.segment_ids[place])]
            wanted = [c * 12.0 / n if axis in axes else c for axis, (c, n) in
                      enumerate(zip(pack.coords[place].tolist(), sizes, strict=True))]
            assert got[place].tolist() == pytest.approx(wanted)
    index = torch.tensor([1, 4, 12, 15])
    assert torch.equal(pack.keep(index).fractional_coords(12.0), pack.fractional_coords(12.0)[index])
    assert torch.equal(Pack([(0, 4, 4)]).pad_to(2).fractional_coords(), torch.zeros(2, 3))
    assert Pack([]).pad_to(2).fractional_coords().shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pool(dtype):
    """Each sample's own mean, with gradients, NaN in the tail unseen; after keep, of what is left."""
    pack = Pack(GRIDS).pad_to(19)
    tokens = torch.randn(19, 4, dtype=dtype)
    tokens[17:] = float("nan")
    tokens.requires_grad_()
    for index in (torch.arange(17), torch.tensor([0, 3, 11, 13])):
        owner, rows = (pack, tokens) if len(index) == 17 else (pack.keep(index), tokens[index])
        got = owner.pool(rows)
        wanted = torch.stack([part.double().mean(0) if len(part) else torch.zeros(4, dtype=torch.float64)
                              for part in owner.split(rows)])
        assert got.shape == (5, 4) and got.dtype == dtype
        assert (got - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()
        weight = torch.randn(5, 4, dtype=dtype)
        a, b = (torch.autograd.grad((x * weight).sum(), tokens, retain_graph=True)[0] for x in (got, wanted))
        assert a[index].all() and not a[17:].any()
        assert (a[:17] - b[:17]).abs().max() <= 4 * torch.finfo(dtype).eps * b[:17].abs().max()
    assert Pack([]).pool(torch.zeros(0, 3)).shape == (0, 3)


def test_one_image_and_nothing():
    assert_is(Pack([(1, 1, 1)]), brute([(1, 1, 1)], "sample"))
    nothing = Pack([])
    assert (nothing.num_tokens, nothing.num_samples, nothing.num_rows, nothing.max_seqlen) == (0, 0, 0, 0)
    assert nothing.cu_seqlens.tolist() == [0] and nothing.split(torch.zeros(0, 3)) == []
    assert nothing.pad_to(3).rows.tolist() == [-1] * 3


@pytest.mark.parametrize("name, call, parts", [
    ("Pack", lambda: Pack([(1, 2)]), ("triples", "(1, 2)", "place 0")),
    ("Pack", lambda: Pack([(1, 1, 1), (1, -2, 3)]), ("0 or more", "place 1")),
    ("Pack", lambda: Pack([(1, 1.5, 1)]), ("ints", "1.5")),
    ("Pack", lambda: Pack([(True, 1, 1)]), ("ints",)),
    ("Pack", lambda: Pack(3), ("grids", "int")),
    ("Pack", lambda: Pack([3]), ("triples", "3")),
    ("Pack", lambda: Pack(torch.ones(2, 3)), ("grids", "float32")),
    ("Pack", lambda: Pack(torch.ones(3, dtype=torch.int64)), ("grids", "(S, 3)", "(3,)")),
    ("Pack", lambda: Pack(torch.ones(2, 3, dtype=torch.int64, device="meta")), ("host data", "meta")),
    ("Pack", lambda: Pack(GRIDS, modulation="token"), ("'sample', 'frame'", "'token'")),
    ("Pack", lambda: Pack(GRIDS, tokens=16), ("at least the 17 tokens", "got 16")),
    ("Pack", lambda: Pack(GRIDS, tokens="20"), ("tokens", "'20'")),
    ("Pack", lambda: Pack([(2**11, 2**10, 2**10)], tokens=2**31), ("2,147,483,647", "2,147,483,648")),
    ("Pack", lambda: Pack(GRIDS, text_lengths=[1, 2]), ("5 text_lengths", "got 2")),
    ("Pack", lambda: Pack(GRIDS, text_lengths=[1, 2, -3, 4, 5]), ("0 or more", "-3")),
    ("Pack", lambda: Pack(GRIDS, text_lengths=[1, 2, 2.5, 4, 5]), ("int", "2.5")),
    ("Pack", lambda: Pack(GRIDS, text_lengths=7), ("list", "7")),
    ("Pack", lambda: Pack(GRIDS, text_lengths=torch.ones(5)), ("text_lengths", "float32")),
    ("Pack.pad_to", lambda: Pack(GRIDS).pad_to(16), ("at least the pack's 17 tokens", "got 16")),
    ("Pack.pad_to", lambda: Pack(GRIDS).pad_to(17.5), ("int", "17.5")),
    ("Pack.keep", lambda: Pack(GRIDS).keep(torch.tensor([3, 2])), ("rising", "3, 2")),
    ("Pack.keep", lambda: Pack(GRIDS).keep(torch.tensor([2, 2])), ("rising", "2, 2")),
    ("Pack.keep", lambda: Pack(GRIDS).keep(torch.tensor([17])), ("below 17", "got 17")),
    ("Pack.keep", lambda: Pack(GRIDS).pad_to(20).keep(torch.tensor([-1, 3])), ("below 17", "got -1, 3")),
    ("Pack.keep", lambda: Pack(GRIDS).keep(torch.tensor([1], dtype=torch.int32)), ("int64", "int32")),
    ("Pack.keep", lambda: Pack(GRIDS).keep([1, 2]), ("index", "list")),
    ("Pack.keep", lambda: Pack(GRIDS).keep(torch.tensor([1])).keep(torch.tensor([0])), ("dropped nothing",)),
    ("Pack.split", lambda: Pack(GRIDS).split(torch.zeros(16, 3)), ("17", "(16, 3)")),
    ("Pack.split", lambda: Pack(GRIDS).split([1]), ("tokens", "list")),
    ("Pack.split", lambda: Pack(GRIDS).split(torch.zeros(())), ("tokens",)),
    ("Pack.pool", lambda: Pack(GRIDS).pool(torch.zeros(16, 3)), ("(17, D)", "(16, 3)")),
    ("Pack.pool", lambda: Pack(GRIDS).pool(torch.zeros(17, 3, dtype=torch.int64)), ("floating", "int64")),
    ("Pack.fractional_coords", lambda: Pack(GRIDS).fractional_coords(axes=(1, 3)), ("axes", "got 3")),
])
def test_errors(name, call, parts):
    op_checks.assert_refused(call, name, *parts)


def test_wrong_layout_is_noticed():
    """A layout with height and width swapped is not the brute-force one."""
    swapped = Pack([(t, w, h) for t, h, w in GRIDS])
    with pytest.raises(AssertionError):
        assert_is(swapped, brute(GRIDS, "sample"))


def test_a_pack_from_inference_mode_is_trained_with():
    with torch.inference_mode():
        made = Pack([(2, 1, 3), (1, 2, 2)], modulation="frame", text_lengths=(2, 3), device="cpu")
        packs = made, made.pad_to(12), made.to("cpu"), made.keep(torch.tensor([0, 4, 9])), Pack(made.grids).set_text((1, 1))
    for pack in packs:
        assert not any(value.is_inference() for name, value in vars(pack).items()
                       if isinstance(value, torch.Tensor) and name != "kept")
    shift = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.norm_modulate(torch.randn(10, 8), shift, None, made.rows).sum(), shift)
    assert torch.equal(gradient, made.rows.bincount(minlength=3)[:, None].float().expand(3, 8))


def test_host_data_stays_on_the_host_whatever_the_default_device():
    """A context of torch.device, or set_default_device, is for tensors that say nothing."""
    make = lambda modulation: Pack([(2, 1, 3), (0, 2, 2), (1, 2, 2)], modulation=modulation, text_lengths=(2, 0, 3),
                                   tokens=12, device="cpu")
    for modulation in ("sample", "frame"):
        with torch.device("meta"):
            pack = make(modulation)
            kept = pack.keep(torch.tensor([0, 4, 9], device="cpu"))
        want = make(modulation)
        assert all(torch.equal(value, getattr(want, name)) for name, value in vars(pack).items()
                   if isinstance(value, torch.Tensor))
        assert torch.equal(kept.cu_seqlens, torch.tensor([0, 2, 2, 3], dtype=torch.int32)) and kept.max_seqlen == 2
