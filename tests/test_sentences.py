"""One sentence where an attribute was missing or a layer was made that could not run; one warning for a wrong scale."""

import warnings

import op_checks
import pytest
import torch
from pack_checks import CLIPS, GOOD, STEPS, TEXT, draw, tiny_dit, tiny_mae, tiny_wan

from sora_fast import checks, nn
from sora_fast.models import ByteTextEncoder, DiT, DiTConfig, MAEConfig, VAEConfig, VideoVAE, pad_text
from sora_fast.nn import Residual, VarlenAttention, random_masking

WITH_TEXT = dict(text_width=8)
SENTENCES = {
    "captions for text": ("DiT", lambda: tiny_dit(**WITH_TEXT)(CLIPS, STEPS, text=["a", "b"]),
                          ("text_encoder(captions)", "a list")),
    "a caption for text": ("DiT", lambda: tiny_dit(**WITH_TEXT)(CLIPS, STEPS, text="a"), ("'a'",)),
    "a tensor for text": ("DiT", lambda: tiny_dit(**WITH_TEXT)(CLIPS, STEPS, text=draw(2, 8)), ("a Tensor",)),
    "captions for Wan's text": ("WanDiT", lambda: tiny_wan()(CLIPS, STEPS, text=["a", "b"]), ("text_encoder(captions)",)),
    "no text for Wan": ("WanDiT", lambda: tiny_wan()(CLIPS, STEPS, text=None), ("None",)),
    "flat text for Wan": ("WanDiT", lambda: tiny_wan()(CLIPS, STEPS, text=draw(5, 8)), ("(S, L, 8)", "(5, 8)")),
    "captions for pad_text": ("pad_text", lambda: pad_text(["a"]), ("text_encoder(captions)",)),
    "numbers for captions": ("ByteTextEncoder", lambda: ByteTextEncoder(64)([1, 2]), ("a string", "got 1")),
    "a number for captions": ("ByteTextEncoder", lambda: ByteTextEncoder(64)(3), ("captions", "got 3")),
    "labels in a list": ("DiT", lambda: tiny_dit(classes=5)(CLIPS, STEPS, labels=[1, 2]), ("labels", "list")),
    "labels as floats": ("DiT", lambda: tiny_dit(classes=5)(CLIPS, STEPS, labels=STEPS), ("labels", "int64", "float32")),
    "arrays for latents": ("DiT", lambda: tiny_dit()([clip.numpy() for clip in CLIPS], STEPS), ("a tensor", "ndarray")),
    "nothing for latents": ("DiT", lambda: tiny_dit()(None, STEPS), ("latents", "None")),
    "arrays for clips": ("MAE", lambda: tiny_mae()([clip.numpy() for clip in CLIPS]), ("a tensor", "ndarray")),
    "tokens for a stream": ("FinalLayer", lambda: nn.FinalLayer(32, 6)(draw(26, 32), draw(2, 32), GOOD.rows),
                            ("Residual(x)",)),
    "tokens for a block's stream": ("DiTBlock", lambda: tiny_dit().blocks[0](draw(26, 32), draw(2, 32), GOOD),
                                    ("Residual(x)",)),
    "no context": ("VarlenAttention", lambda: VarlenAttention(32, 2, context_width=8)(draw(26, 32), GOOD),
                   ("context", "None")),
    "context without its width": ("VarlenAttention", lambda: VarlenAttention(32, 2)(draw(26, 32), GOOD, draw(5, 8)),
                                  ("no context",)),
    "a tensor for a stream's state": ("CausalConv3d", lambda: nn.CausalConv3d(3, 3, 3)(draw(1, 3, 2, 4, 4), draw(1)),
                                      ("StreamState()",)),
    "an array for video": ("VideoVAE.encode", lambda: tiny_vae().encode(draw(1, 3, 1, 8, 8).numpy()), ("ndarray",)),
    "bytes for video": ("VideoVAE.encode", lambda: tiny_vae().encode(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8)),
                        ("uint8", "/ 127.5 - 1")),
    "a list for latents": ("VideoVAE.decode", lambda: tiny_vae().decode([draw(16, 1, 2, 2)]), ("list",)),
    "a list for a stream": ("VideoVAE.encode_stream", lambda: list(tiny_vae().encode_stream([[1, 2]])),
                            ("every chunk", "list")),
    "nothing for a stream": ("VideoVAE.decode_stream", lambda: list(tiny_vae().decode_stream(None)), ("None",)),
    "a list to write into": ("VideoVAE.decode_clip", lambda: tiny_vae().decode_clip(draw(1, 4, 2, 2, 2), out=[1]),
                             ("out", "list")),
    "a list for a chunk": ("VideoVAE.encode_stream", lambda: list(tiny_vae().encode_stream(draw(1, 3, 3, 4, 4), chunk=[1])),
                           ("chunk", "int")),
    "a mask for a masking": ("MAE", lambda: tiny_mae()(CLIPS, masking=torch.ones(26, dtype=torch.bool)),
                             ("random_masking",)),
    "a mask to encode": ("MAE", lambda: tiny_mae().encode(CLIPS, masking=[1, 2]), ("random_masking", "[1, 2]")),
    "a list to unshuffle": ("Masking.unshuffle", lambda: random_masking(GOOD, 0.5).unshuffle([1], [2]), ("visible", "list")),
    "a list for a shift": ("norm_modulate", lambda: Residual(draw(26, 32)).norm_modulate([1], None, GOOD),
                           ("shift", "list")),
    "torch's own norm": ("norm_act_conv", lambda: nn.norm_act_conv(torch.nn.GroupNorm(1, 3), nn.CausalConv3d(3, 3, 3), draw(
        1, 3, 2, 4, 4)), ("of sora_fast.nn", "GroupNorm")),
    # refused at construction, not in forward
    "an activation of RMSNorm": ("RMSNorm", lambda: nn.RMSNorm(8, act="gelu"), ("'silu', None", "'gelu'")),
    "an activation of GroupNorm": ("GroupNorm", lambda: nn.GroupNorm(2, 8, act="relu"), ("'silu', None", "'relu'")),
    "odd axes": ("VarlenAttention", lambda: VarlenAttention(64, 2, rope_axes=(3, 4, 4)), ("rope_axes", "even", "(3, 4, 4)")),
    "two axes": ("VarlenAttention", lambda: VarlenAttention(64, 2, rope_axes=(4, 4)), ("rope_axes", "t, h, w", "(4, 4)")),
    "axes beyond a head": ("VarlenAttention", lambda: VarlenAttention(64, 2, rope_axes=(16, 16, 16)),
                           ("32 channels", "got 48")),
    "a base of 0": ("VarlenAttention", lambda: VarlenAttention(64, 2, rope_axes=(4, 4, 4), theta=0), ("theta above 0",)),
    "axes of a model": ("VarlenAttention", lambda: DiT.preset("tiny", rope_axes=(32, 32, 32)), ("64 channels", "got 96")),
    "padding of a convolution": ("CausalConv3d", lambda: nn.CausalConv3d(3, 3, 3, padding_mode="circular"), ("'circular'",)),
    "padding in time": ("CausalConv3d", lambda: nn.CausalConv3d(3, 3, 3, time_pad="reflect"), ("time_pad", "'reflect'")),
    "a look too far": ("CausalConv3d", lambda: nn.CausalConv3d(3, 3, 3, lookahead=3), ("lookahead", "got 3")),
    "a phase below 0": ("CausalConv3d", lambda: nn.CausalConv3d(3, 3, 3, phase=-1), ("phase", "-1")),
    "a patch of two": ("PatchEmbed3d", lambda: nn.PatchEmbed3d(3, 8, (2, 2)), ("pt, ph, pw", "(2, 2)")),
    "a fourth axis": ("DiTConfig", lambda: DiTConfig(positions=(1, 3)), ("positions", "(1, 3)")),
    "a side of 0": ("DiTConfig", lambda: DiTConfig(fractional_side=0.0), ("fractional_side",)),
    "a fourth axis of a MAE": ("MAEConfig", lambda: MAEConfig(positions=(3,)), ("positions", "(3,)")),
    "a pattern": ("MAEConfig", lambda: MAEConfig(pattern="cube"), ("'token', 'tube'", "'cube'")),
    "a ratio of 1": ("MAEConfig", lambda: MAEConfig(ratio=1.0), ("ratios", "got 1.0")),
    "no modulation": ("Modulation", lambda: nn.Modulation(8, 0), ("parts", "0")),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_sentence_where_an_attribute_was_missing(name):
    op, run, parts = SENTENCES[name]
    op_checks.assert_refused(run, op, *parts)


# ------------------------------------------------------------------------------------------------ scales
def warned(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


def tiny_vae():
    return VideoVAE(VAEConfig(latent_channels=4, width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1,
                              space_factor=2, time_factor=2, attention=False))


def test_pixels_of_0_to_255_are_told_once():
    vae = tiny_vae()
    pixels = torch.rand(1, 3, 3, 4, 4) * 255
    for right in (pixels / 127.5 - 1, pixels / 255, draw(1, 3, 3, 4, 4) * 9, torch.zeros(1, 3, 1, 4, 4)):
        assert not warned(lambda right=right: vae.encode(right))
    (sentence,) = warned(lambda: vae.encode(pixels))
    op_checks.assert_sentence(sentence, "VideoVAE.encode")
    assert "video / 127.5 - 1" in sentence
    assert not warned(lambda: vae.encode(pixels)) and not warned(lambda: vae.encode(pixels * 0.5))
    for way in ("encode_clip", "forward", "encode_stream"):
        other = tiny_vae()
        assert len(warned(lambda way=way, other=other: list(getattr(other, way)(pixels)))) == 1, way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_dit, tiny_wan])
def test_timesteps_of_0_to_1_are_told_once(make, dtype):
    model = make()
    more = dict(text=TEXT) if make is tiny_wan else {}
    run = lambda *steps: warned(lambda: model(CLIPS, torch.tensor(steps, dtype=dtype), **more))
    for right in ((300.0, 800.0), (0.0, 0.0), (0.5, 700.0), (1.0, 0.0), (1000.0, 1.0)):
        assert not run(*right), right
    (sentence,) = run(0.25, 0.75)
    op_checks.assert_sentence(sentence, make().__class__.__name__)
    assert "multiply them by 1000" in sentence and not run(0.25, 0.75) and not run(0.0, 0.5)
    model = make()
    assert not warned(lambda: model(CLIPS, torch.tensor([1, 0]), **more))


def test_nothing_is_looked_at_on_a_device(monkeypatch):
    """No warning reads what would make the host wait: meta tensors stand for a GPU's, whose numbers nobody may ask for."""
    monkeypatch.setattr(checks, "warn_once", lambda owner, of, sentence: pytest.fail(sentence))
    on_meta = tiny_dit().to("meta")
    on_meta([clip.to("meta") for clip in CLIPS], torch.tensor([0.25, 0.75], device="meta"), GOOD.to("meta"))
    tiny_vae().to("meta").encode(torch.zeros(1, 3, 1, 8, 8, device="meta"))
