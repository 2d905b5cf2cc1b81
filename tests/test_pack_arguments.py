"""A Pack in place of rows, coords and cu_seqlens: the same bits as the bare tensors, and one sentence for each mistake.

The ten mistakes: stale, in pixels, on another device, of another patch, without text lengths, not padded, reordered, float
grids, tensors for triples, another model's.
"""

import op_checks
import pytest
import torch
from pack_checks import CLIPS, GOOD, STEPS, TEXT, draw, tiny_dit, tiny_mae, tiny_wan

from sora_fast import Pack, nn, ops
from sora_fast.nn import Residual, VarlenAttention, random_masking

GRIDS = [(1, 2, 3), (0, 4, 4), (2, 2, 2), (1, 1, 1)]  # 15 tokens


def inputs(op, pack, rows=None):
    """Drawn tensors of ``op``, of ``rows`` rows (the pack's), and the pack."""
    tokens = pack.num_tokens if rows is None else rows
    heads = {name: draw(tokens, 2, 16, seed=place) for place, name in enumerate(("q", "k", "v"))}
    tables = {name: draw(pack.num_rows, 8, seed=place) for place, name in enumerate(("gate", "shift", "scale"), 5)}
    x = draw(tokens, 8, seed=9)
    found = {
        "varlen_attention": heads, "varlen_attention_forward": heads,
        "varlen_attention_backward": heads | dict(dout=heads["v"], dlse=draw(2, tokens), out=heads["q"],
                                                  lse=draw(2, tokens)),
        "qk_norm_rope": dict(q=heads["q"], k=heads["k"]),
        "norm_modulate": dict(x=x, shift=tables["shift"], scale=tables["scale"]),
        "gate_residual": dict(x=x, y=-x, gate=tables["gate"]), "gate_residual_norm_modulate": dict(x=x, y=-x, **tables),
        "patch_embed": dict(latents=x[:, :6].flatten(), weight=draw(5, 3, 1, 1, 2)), "unpatchify": dict(tokens=x)}
    return found[op] | dict(pack=pack)


def apply(op, pack, bare=False, **more):
    """``op`` with a Pack, or with the Pack's bare tensors."""
    if op.startswith("varlen"):
        where = dict(cu_seqlens_q=pack.cu_seqlens, cu_seqlens_k=pack.cu_seqlens) if bare else dict(cu_seqlens_q=pack)
    elif op == "qk_norm_rope":
        where = dict(coords=pack.coords, rows=pack.rows) if bare else dict(coords=pack)
        where["axes"] = (4, 6, 6)
    elif op in ("patch_embed", "unpatchify"):
        where = dict(grids=pack.grids if bare else pack) | (dict(patch=(1, 2, 2), channels=2) if op == "unpatchify" else {})
    else:
        where = dict(rows=pack.rows if bare else pack)
    return getattr(ops, op)(**where, **more)


def call(op, pack, bare=False, rows=None):
    return apply(op, bare=bare, **inputs(op, pack, rows))


OPS = ("varlen_attention", "varlen_attention_forward", "varlen_attention_backward", "qk_norm_rope", "norm_modulate",
       "gate_residual", "gate_residual_norm_modulate", "patch_embed", "unpatchify")


# ------------------------------------------------------------------------------------------------ the same as bare tensors
@pytest.mark.parametrize("modulation", ["sample", "frame"])
@pytest.mark.parametrize("op", OPS)
def test_a_pack_is_its_bare_tensors(op, modulation):
    for pack in (Pack(GRIDS, modulation=modulation), Pack(GRIDS, modulation=modulation).pad_to(20)):
        got, want = (op_checks.tensors(call(op, pack, bare)) for bare in (False, True))
        assert all(op_checks.same_bits(a, b) for a, b in zip(got, want, strict=True))
    if op not in ("patch_embed", "unpatchify"):
        kept = pack.keep(torch.tensor([0, 3, 7, 14]))
        got, want = (op_checks.tensors(call(op, kept, bare)) for bare in (False, True))
        assert all(op_checks.same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_queries_and_keys_of_two_packs_and_of_text():
    pack, keys = Pack(GRIDS, text_lengths=(3, 0, 2, 4)), Pack([(1, 1, n) for n in (3, 0, 2, 4)])
    q, k, v = draw(15, 2, 16), draw(9, 2, 16, seed=1), draw(9, 2, 16, seed=2)
    want = ops.varlen_attention(q, k, v, pack.cu_seqlens, keys.cu_seqlens)
    for offsets in ((pack, keys), (pack, pack.text_cu_seqlens), (pack.cu_seqlens, keys)):
        assert torch.equal(ops.varlen_attention(q, k, v, *offsets), want)
    op_checks.assert_refused(lambda: ops.varlen_attention(q, k, v, pack), "varlen_attention", "k of one row", "15", "9 rows")
    op_checks.assert_refused(lambda: ops.varlen_attention(q, q, q, pack.cu_seqlens), "varlen_attention", "cu_seqlens_k")
    rows = ops.qk_norm_rope(q, None, None, rows=pack)[0]
    assert torch.equal(rows, ops.qk_norm_rope(q, None, None, rows=pack.rows)[0])
    op_checks.assert_refused(lambda: ops.qk_norm_rope(q, q, pack, rows=pack.rows), "qk_norm_rope", "no rows beside a Pack")


def test_a_pack_is_not_looked_at_again(monkeypatch):
    """Its values were checked when it was made: an op reads none of them."""
    pack = Pack(GRIDS).pad_to(20)
    monkeypatch.setattr("sora_fast.checks.values_are_visible", lambda value: pytest.fail("values were read"))
    for op in OPS:
        call(op, pack)


def test_what_is_put_into_a_pack_is_checked():
    pack = Pack(GRIDS)
    order = torch.arange(14, -1, -1)
    for name, value, part in (("rows", pack.rows[order], "never to fall"), ("coords", pack.coords[:3], "got (3, 3)"),
                              ("cu_seqlens", pack.cu_seqlens + 1, "start at 0"), ("rows", pack.rows + 4, "below the 4")):
        op_checks.assert_refused(lambda name=name, value=value: setattr(pack, name, value), "Pack", part)
        assert torch.equal(getattr(pack, name), getattr(Pack(GRIDS), name))
    pack.coords = pack.coords + 1
    assert pack.coords[0].tolist() == [1, 1, 1]


# ------------------------------------------------------------------------------------------------ Pack.of
def test_pack_of_latents():
    clips = [draw(16, 5, 12, 20), draw(16, 1, 16, 16)]
    pack = Pack.of(clips, (1, 2, 2))
    assert pack.grids == ((5, 6, 10), (1, 8, 8)) and pack.num_tokens == 364
    full = Pack.of(clips, [1, 4, 4], modulation="frame", text_lengths=(2, 3), tokens=400)
    assert full.grids == ((5, 3, 5), (1, 4, 4)) and full.num_tokens == 400 and full.num_rows == 6
    assert full.text_lengths == (2, 3) and full.text_tokens == 5
    assert Pack.of(draw(2, 4, 4, 6, 8), (2, 3, 2)).grids == ((2, 2, 4),) * 2
    assert Pack.of([], (1, 2, 2)).num_tokens == 0 and Pack.of(draw(0, 4, 4, 6, 8), (2, 3, 2)).num_samples == 0
    meta = [clip.to("meta") for clip in clips]
    assert Pack.of(meta, (1, 2, 2)).device.type == "meta" and Pack.of(meta, (1, 2, 2), device="cpu").device.type == "cpu"
    assert Pack.of(draw(0, 4, 4, 6, 8).to("meta"), (2, 3, 2)).device.type == "meta"
    for latents, patch, parts in (
            (clips, (1, 5, 2), ("latents[0] whose H", "5", "got 12", "10 or 15")), (clips, 2, ("patch", "got 2")),
            (clips, (1, 2), ("patch as ints", "(1, 2)")), (clips[0], (1, 2, 2), ("(B, C, T, H, W)", "(16, 5, 12, 20)")),
            ([draw(5, 12, 20)], (1, 2, 2), ("latents[0]", "(C, T, H, W)", "(5, 12, 20)")),
            ([(16, 5, 12, 20)], (1, 2, 2), ("latents[0]", "tensor", "tuple")), ("latents", (1, 2, 2), ("latents", "list")),
            (clips, (1, 2, 0), ("patch", "1 or more"))):
        op_checks.assert_refused(lambda latents=latents, patch=patch: Pack.of(latents, patch), "Pack.of", *parts)


def test_text_is_padded_too():
    pack = Pack(GRIDS, text_lengths=(3, 0, 2, 4)).pad_to(20, 16)
    assert pack.text_tokens == 16 and pack.text_cu_seqlens.tolist() == [0, 3, 3, 5, 9] and pack.text_lengths == (3, 0, 2, 4)
    torch.manual_seed(0)
    layer, x, text = VarlenAttention(32, 2, context_width=8), draw(20, 32), draw(16, 8, seed=1)
    want = layer(x[:15], Pack(GRIDS, text_lengths=(3, 0, 2, 4)), text[:9])
    text[9:] = torch.nan
    torch.testing.assert_close(layer(x, pack, text)[:15], want)
    op_checks.assert_refused(lambda: pack.pad_to(20, 8), "Pack.pad_to", "at least the pack's 16 text tokens", "got 8")


# ------------------------------------------------------------------------------------------------ stale and unpadded
@pytest.mark.parametrize("rows", [20, 12])
@pytest.mark.parametrize("op", OPS)
def test_an_op_refuses_a_stale_pack(op, rows):
    """More rows than the pack holds, which were taken for tail, and fewer."""
    for pack in (Pack(GRIDS), Pack(GRIDS).pad_to(16)):
        call(op, pack)
        op_checks.assert_refused(lambda pack=pack: call(op, pack, rows=rows), op, f"{pack.num_tokens}", f"{rows}",
                                 "Pack.of(latents, patch)")


def test_an_op_says_how_a_pack_would_fit():
    x = draw(1500, 8)
    for pack, remedy in ((Pack([(1, 4, 4)]), "pack.pad_to(1500)"), (Pack([(1, 50, 50)]), "grids count tokens, not pixels"),
                         (Pack([(1, 30, 50)]).keep(torch.arange(9)), "the kept rows alone")):
        op_checks.assert_refused(lambda pack=pack: ops.norm_modulate(x, None, None, pack), "norm_modulate", remedy,
                                 f"{pack.num_tokens:,} tokens", "1,500 rows")
    kept = Pack([(1, 2, 4)]).keep(torch.arange(3))
    op_checks.assert_refused(lambda: ops.unpatchify(x[:3], kept, (1, 2, 2), 2), "unpatchify", "dropped tokens", "keep()")
    op_checks.assert_refused(lambda: ops.patch_embed(x[:8].flatten(), draw(5, 8, 1, 1, 1), grids=kept), "patch_embed",
                             "dropped tokens")


STALE = Pack([(1, 4, 4)])
MODULES = {
    "VarlenAttention": lambda pack: VarlenAttention(32, 2)(draw(26, 32), pack),
    "VarlenAttention, to text": lambda pack: VarlenAttention(32, 2, context_width=8)(
        draw(26, 32), Pack(pack.grids, text_lengths=[5] + [0] * (pack.num_samples - 1)), draw(5, 8)),
    "norm_modulate, in FinalLayer": lambda pack: nn.FinalLayer(32, 6)(Residual(draw(26, 32)), draw(pack.num_rows, 32), pack),
    "gate_residual, in Residual": lambda pack: Residual(draw(26, 32), draw(26, 32), draw(pack.num_rows, 32)).joined(pack),
    "norm_modulate, in Block": lambda pack: tiny_dit().blocks[0](Residual(draw(26, 32)), draw(pack.num_rows, 32), pack),
    "DiT": lambda pack: tiny_dit()(CLIPS, STEPS[:pack.num_samples], pack),
    "DiT, flat": lambda pack: tiny_dit()(torch.cat([c.flatten() for c in CLIPS]), STEPS[:pack.num_samples], pack),
    "WanDiT": lambda pack: tiny_wan()(CLIPS, STEPS, Pack(pack.grids, text_lengths=[2, 3][:pack.num_samples]), text=TEXT),
    "MAE": lambda pack: tiny_mae()(CLIPS, pack),
    "MAE, of patches": lambda pack: tiny_mae().encoder(draw(26, 16), pack),
    "MAE, a masking": lambda pack: tiny_mae().decode(draw(20, 48), pack, random_masking(GOOD, 0.25)),
    "MAE, its loss": lambda pack: tiny_mae().loss(draw(6, 16), draw(26, 16), pack, random_masking(GOOD, 0.25)),
    "Pack.split": lambda pack: pack.split(draw(26, 3)),
    "Pack.pool": lambda pack: pack.pool(draw(26, 3)),
    "Masking.shuffle": lambda pack: random_masking(pack, 0.25).shuffle(draw(26, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_refuses_a_stale_pack(name):
    run = MODULES[name]
    run(GOOD)
    parts = ("1x4x4",) if name in ("DiT", "WanDiT", "MAE") else ("16",)
    op_checks.assert_refused(lambda: run(STALE), name.split(",")[0], *parts)
    if name.startswith("VarlenAttention"):  # the bug: rows 16 to 25 came out as tail
        op_checks.assert_refused(lambda: run(STALE), "VarlenAttention", "16 tokens", "26 rows", "pad_to(26)")


# ------------------------------------------------------------------------------------------------ the other mistakes
PIXELS = Pack([clip.shape[1:] for clip in CLIPS])
MISTAKES = {
    "in pixels": ("DiT", lambda: tiny_dit()(CLIPS, STEPS, PIXELS), ("(3, 2, 3)", "3x4x6", "Pack.of(latents, patch)")),
    "in pixels, an op": ("norm_modulate", lambda: ops.norm_modulate(draw(26, 8), None, None, PIXELS),
                         ("104", "26", "pixels")),
    "in pixels, flat": ("DiT", lambda: tiny_dit()(draw(416), STEPS, PIXELS), ("104 tokens", "got 416")),
    "another device": ("DiT", lambda: tiny_dit()(CLIPS, STEPS, GOOD.to("meta")), ("device cpu", "on meta", "pack.to(")),
    "another device, an op": ("varlen_attention", lambda: call("varlen_attention", GOOD.to("meta")),
                              ("cpu", "meta", "pack.to(")),
    "another device, a layer": ("VarlenAttention", lambda: MODULES["VarlenAttention"](GOOD.to("meta")), ("cpu", "meta")),
    "another device, a masked autoencoder": ("MAE", lambda: tiny_mae()(CLIPS, GOOD.to("meta")), ("cpu", "meta")),
    "another patch": ("DiT", lambda: tiny_dit()(CLIPS, STEPS, Pack.of(CLIPS, (1, 4, 2))), ("(3, 2, 3)", "3x1x3")),
    "no text lengths": ("DiT", lambda: tiny_dit(text_width=8)(CLIPS, STEPS, GOOD, text=TEXT),
                        ("text_lengths", "text.lengths")),
    "no text lengths, a layer": ("VarlenAttention", lambda: VarlenAttention(32, 2, context_width=8)(
        draw(26, 32), GOOD, draw(5, 8)), ("a pack with text_lengths", "text.lengths")),
    "other text lengths": ("DiT", lambda: tiny_dit(text_width=8)(
        CLIPS, STEPS, Pack(GOOD.grids, text_lengths=(3, 2)), text=TEXT), ("another text", "one order")),
    "more text than lengths": ("VarlenAttention", lambda: VarlenAttention(32, 2, context_width=8)(
        draw(26, 32), Pack(GOOD.grids, text_lengths=(2, 2)), draw(5, 8)), ("4 text tokens", "got 5 rows")),
    "not padded": ("DiT", lambda: tiny_dit()(draw(30 * 16), STEPS, GOOD), ("26 tokens", "got 480", "tail included")),
    "not padded, an op": ("gate_residual", lambda: ops.gate_residual(draw(30, 8), draw(30, 8), draw(2, 8), GOOD),
                          ("26 tokens", "30 rows", "pad_to(30)")),
    "reordered": ("DiT", lambda: tiny_dit()(CLIPS[::-1], STEPS, GOOD), ("(1, 4, 2)", "3x2x3")),
    "reordered tokens": ("Pack.keep", lambda: GOOD.keep(torch.randperm(26)), ("rising places",)),
    "a mask of tokens": ("Pack.keep", lambda: Pack([(1, 1, 2)]).keep(torch.tensor([False, True])), ("mask.nonzero()",)),
    "reordered rows": ("norm_modulate", lambda: ops.norm_modulate(draw(26, 8), draw(2, 8), None, GOOD.rows.flip(0)),
                       ("never to fall",)),
    "float grids": ("Pack", lambda: Pack([(3, 4 / 2, 6 / 2)]), ("ints", "(3, 2.0, 3.0)")),
    "float grids, a tensor": ("Pack", lambda: Pack(torch.tensor([[3, 4, 6]]) / 2), ("float32", "int64")),
    "a latent for a triple": ("Pack", lambda: Pack([draw(4, 3, 4, 6)]), ("(4, 3, 4, 6)", "Pack.of(latents, patch)")),
    "a latent for grids": ("Pack", lambda: Pack(draw(4, 3, 4, 6)), ("(4, 3, 4, 6)", "Pack.of(latents, patch)")),
    "a list of numbers for a triple": ("Pack", lambda: Pack([draw(4, 3, 4, 6).tolist()]), ("a list",)),
    "a number for a triple": ("Pack", lambda: Pack([torch.tensor(3)]), ("shape ()",)),
    "a text for a triple": ("Pack", lambda: Pack(["134"]), ("'134'",)),
    "another model's, per frame": ("norm_modulate", lambda: ops.norm_modulate(
        draw(26, 8), draw(2, 8), None, Pack(GOOD.grids, modulation="frame")), ("4 modulation rows", "'frame'", "2 rows")),
    "another model's, with fewer samples": ("gate_residual", lambda: ops.gate_residual(
        draw(26, 8), draw(26, 8), draw(2, 8), Pack([(1, 2, 13)])), ("1 modulation rows", "2 rows")),
    "another model's, of timesteps": ("DiT", lambda: tiny_dit()(CLIPS, torch.rand(3) * 900, GOOD), ("(2)", "(3,)")),
    "grids for a pack": ("DiT", lambda: tiny_dit()(CLIPS, STEPS, GOOD.grids), ("expected a Pack", "tuple", "Pack.of")),
    "grids for a pack, masked": ("MAE", lambda: tiny_mae()(CLIPS, GOOD.grids), ("expected a Pack", "tuple")),
    "grids for a pack, masking": ("random_masking", lambda: random_masking(GOOD.grids, 0.5), ("expected a Pack", "tuple")),
    "grids for a pack, an op": ("norm_modulate", lambda: ops.norm_modulate(draw(26, 8), draw(2, 8), None, GOOD.grids),
                                ("rows to be a tensor or a Pack", "a tuple", "Pack(grids)")),
    "grids for a pack, rotated": ("qk_norm_rope", lambda: ops.qk_norm_rope(draw(26, 2, 16), None, list(GOOD.grids)),
                                  ("coords to be a tensor or a Pack", "a list")),
    "grids for a pack, attended": ("varlen_attention", lambda: ops.varlen_attention(*[draw(26, 2, 16)] * 3, GOOD.grids),
                                   ("cu_seqlens_q to be a tensor or a Pack", "a tuple")),
    "offsets for a pack": ("VarlenAttention", lambda: VarlenAttention(32, 2)(draw(26, 32), GOOD.cu_seqlens),
                           ("expected a Pack", "a Tensor")),
    "a batch for a row of tokens": ("VarlenAttention", lambda: VarlenAttention(32, 2)(draw(2, 26, 32), Pack([(1, 1, 2)])),
                                  ("(N, D)", "(2, 26, 32)")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_sentence(name):
    op, run, parts = MISTAKES[name]
    op_checks.assert_refused(run, op, *parts)
    with pytest.raises((ValueError, TypeError)) as caught:
        run()
    assert len(str(caught.value)) < 400


def test_what_a_triple_may_be():
    for grid in ([1, 2, 3], torch.tensor([1, 2, 3]), torch.Size([1, 2, 3]), torch.tensor([1, 2, 3]).numpy(), range(1, 4)):
        assert Pack([grid]).grids == ((1, 2, 3),)
