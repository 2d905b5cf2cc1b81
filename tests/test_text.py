"""Text encoders: ragged captions, each one's tokens its own, checkpoints in Hugging Face's layout.

`assert_own` is the check; an encoder that pads and lets the padding in must fail it.
"""

import pytest
import torch

from sora_fast.models import ByteTextEncoder, DiT, HuggingFaceTextEncoder, Text

CAPTIONS = ["a red panda", "", "ein Häschen springt über 月", "x", "a red panda"]


def assert_own(encoder, captions, tolerance):
    """Tokens and pooled vector of every caption equal those of that caption alone."""
    together = encoder(captions)
    assert isinstance(together, Text)
    assert together.tokens.shape == (sum(together.lengths), encoder.width)
    assert together.pooled.shape == (len(captions), encoder.width)
    for caption, tokens, pooled in zip(captions, together.tokens.split(together.lengths), together.pooled, strict=True):
        alone = encoder([caption])
        assert alone.tokens.shape == tokens.shape
        scale = tolerance * max(1.0, float(alone.tokens.detach().abs().max()))
        assert (alone.tokens - tokens).abs().max() <= scale
        assert (alone.pooled[0] - pooled).abs().max() <= scale
        if isinstance(encoder, ByteTextEncoder):  # the mean on the scale of the tokens, whatever the length
            mean = torch.nn.functional.layer_norm(alone.tokens.sum(0), pooled.shape, eps=1e-6)
        else:
            mean = alone.tokens.mean(0)
        assert (mean - pooled).abs().max() <= scale
    return together


# ------------------------------------------------------------------------------------------------ bytes
def test_bytes_are_ragged_and_each_caption_its_own():
    torch.manual_seed(0)
    text = assert_own(ByteTextEncoder(64).double(), CAPTIONS, 1e-12)
    assert text.lengths == tuple(1 + len(caption.encode("utf-8")) for caption in CAPTIONS)
    first, last = text.tokens[: text.lengths[0]], text.tokens[-text.lengths[-1] :]
    assert (first - last).abs().max() < 1e-12, "the same caption gives the same tokens"
    assert text.tokens.isfinite().all()


def test_an_encoder_that_lets_padding_in_fails_the_check():
    inner = ByteTextEncoder(64).double()

    class Padded:
        width = 64

        def __call__(self, captions):
            longest = max(map(len, captions))
            return inner([caption.ljust(longest) for caption in captions])

    with pytest.raises(AssertionError):
        assert_own(Padded(), ["a", "a red panda"], 1e-12)


def test_order_of_the_bytes_counts():
    encoder = ByteTextEncoder(64)
    ab, ba = encoder(["ab"]).pooled, encoder(["ba"]).pooled
    assert (ab - ba).abs().max() > 1e-4


@pytest.mark.parametrize("limit", [1, 4, 9])
def test_long_captions_are_cut(limit):
    """After max_bytes, in the middle of a character if it comes to that."""
    torch.manual_seed(0)
    encoder, free = ByteTextEncoder(32, heads=2, max_bytes=limit), ByteTextEncoder(32, heads=2)
    free.load_state_dict(encoder.state_dict())
    text = encoder(["月月月月", "no", "twelve bytes"])
    assert text.lengths == (1 + min(limit, 12), 1 + min(limit, 2), 1 + min(limit, 12))
    assert torch.allclose(text.tokens[-text.lengths[-1] :], free(["twelve bytes"[:limit]]).tokens, atol=1e-5)


def test_bytes_learn():
    encoder = ByteTextEncoder(32, heads=2).double()
    text = encoder(CAPTIONS)
    (text.tokens.square().sum() + (text.tokens[0] * text.pooled).sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    used = {b for caption in CAPTIONS for b in caption.encode()} | {256}
    rows = encoder.embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert set(rows) == used


def test_no_captions_and_a_dit_s_width():
    encoder = ByteTextEncoder(DiT.preset("tiny", depth=1).config.text_width)
    text = encoder([])
    assert text.tokens.shape == (0, 128) and text.pooled.shape == (0, 128) and text.lengths == ()
    model = DiT.preset("tiny", depth=1)
    out = model([torch.randn(16, 1, 2, 2)] * 2, torch.tensor([1.0, 2.0]), text=encoder(["", "a bunny"]))
    assert [part.shape for part in out] == [(16, 1, 2, 2)] * 2


# ------------------------------------------------------------------------------------------------ Hugging Face
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function that saves a tiny random model of a kind in the true layout, with a tokenizer made here."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    def save(kind):
        folder = tmp_path_factory.mktemp(kind)
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("▁", -2.0)]
        pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyzäöüß"] + [("▁red", -1.5), ("panda", -1.5)]
        inner = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        inner.decoder = tokenizers.decoders.Metaspace()
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
        config_class, model_class = {
            "t5": (transformers.T5Config, transformers.T5EncoderModel),
            "mt5": (transformers.MT5Config, transformers.MT5EncoderModel),
            "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel)}[kind]
        torch.manual_seed(0)
        model = model_class(config_class(
            vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.5))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn(p.shape))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, model.eval(), tokenizer

    made = {}
    return lambda kind: made.setdefault(kind, None) or made.update({kind: save(kind)}) or made[kind]


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_a_checkpoint_loads_and_padding_changes_no_token(kind, checkpoint):
    folder, model, tokenizer = checkpoint(kind)
    assert (folder / "config.json").exists() and (folder / "model.safetensors").exists()
    encoder = HuggingFaceTextEncoder(str(folder))
    assert encoder.width == 32
    text = assert_own(encoder, CAPTIONS, 1e-5)
    assert text.lengths == tuple(len(tokenizer(caption).input_ids) for caption in CAPTIONS)
    assert text.lengths[1] == 1 and text.lengths[0] < text.lengths[2]
    wanted = model(**tokenizer(CAPTIONS[2], return_tensors="pt")).last_hidden_state[0]
    start = sum(text.lengths[:2])
    assert torch.allclose(text.tokens[start : start + text.lengths[2]], wanted, atol=1e-5)
    assert HuggingFaceTextEncoder(str(folder))(CAPTIONS[:1]).tokens.equal(encoder(CAPTIONS[:1]).tokens)


def test_a_checkpoint_is_frozen_cut_and_cast(checkpoint):
    folder = checkpoint("t5")[0]
    encoder = HuggingFaceTextEncoder(str(folder), max_length=5, dtype=torch.bfloat16)
    assert not any(p.requires_grad for p in encoder.parameters())
    before = encoder(CAPTIONS)
    assert before.tokens.dtype == torch.bfloat16 and max(before.lengths) == 5 and not before.tokens.requires_grad
    encoder.train()  # dropout stays off
    assert torch.equal(encoder(CAPTIONS).tokens, before.tokens)
    left = HuggingFaceTextEncoder(str(folder))
    wanted = left(CAPTIONS)
    left.tokenizer.padding_side = "left"
    assert torch.allclose(left(CAPTIONS).tokens, wanted.tokens, atol=1e-5)


def test_errors_are_one_sentence(tmp_path, checkpoint):
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(hidden_size=8).save_pretrained(tmp_path)
    encoder = HuggingFaceTextEncoder(str(checkpoint("t5")[0]))
    calls = {
        "type t5, mt5, umt5, got 'bert'": lambda: HuggingFaceTextEncoder(str(tmp_path)),
        "ByteTextEncoder: expected a list of captions": lambda: ByteTextEncoder(32)("a bunny"),
        "HuggingFaceTextEncoder: expected a list of captions": lambda: encoder("a bunny"),
    }
    for words, call in calls.items():
        with pytest.raises((ValueError, TypeError), match=words) as caught:
            call()
        assert "\n" not in str(caught.value) and ";" in str(caught.value)
