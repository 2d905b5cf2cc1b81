"""Text to ragged tokens. L text tokens in all, S samples, W width of the encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from .. import checks, ops
from ..nn import VarlenAttention
from ..pack import Pack
from ..to_device import to_device


@dataclass(frozen=True)
class Text:
    """tokens (L, W), samples one after the other; pooled (S, W); lengths: text tokens of each sample (host)."""

    tokens: torch.Tensor
    pooled: torch.Tensor
    lengths: tuple[int, ...]


def check_encoded(op: str, text: object) -> None:
    """``text`` is what a TextEncoder gives, not the captions."""
    if isinstance(text, Text):  # a graph that asked for its attributes would hold how many lengths there are
        return
    if not all(hasattr(text, name) for name in ("tokens", "pooled", "lengths")):
        raise TypeError(f"{op}: expected text as a TextEncoder's result, got {checks.came(text)}; pass "
                        f"text_encoder(captions)")


class TextEncoder(Protocol):
    """Anything that turns captions into ``Text``; ``width`` is the DiT's ``text_width``. "" stands for no caption."""

    width: int

    def __call__(self, captions: Sequence[str]) -> Text: ...


class ByteTextEncoder(nn.Module):
    """A small transformer on the bytes of the captions, trained along with the DiT: no vocabulary, no weights to fetch.

    Each byte also looks up its hashed trigram (as in the Byte Latent Transformer, arXiv 2412.09871): captions differ from
    the first step on, where bytes alone look much alike.

    Args:
        width: W. depth: blocks. heads: heads of each. max_bytes: longer captions are cut.

    Raises:
        TypeError, when called: captions that are no list of strings.
    """

    TRIGRAMS = 4096

    def __init__(self, width: int = 128, depth: int = 1, heads: int = 4, max_bytes: int = 256):
        super().__init__()
        self.width, self.max_bytes = width, max_bytes
        self.embedding = nn.Embedding(257, width)  # 256 bytes and the start, so that "" has a token too
        head = width // heads // 2 * 2
        self.attentions = nn.ModuleList(
            VarlenAttention(width, heads, qk_norm=True, rope_axes=(0, 0, head)) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth))
        self.trigrams = nn.Embedding(self.TRIGRAMS, width)
        for table in (self.embedding, self.trigrams):
            nn.init.normal_(table.weight, std=0.5)

    def forward(self, captions: Sequence[str]) -> Text:
        _check("ByteTextEncoder", captions)
        device = self.embedding.weight.device
        data = [[256, *caption.encode("utf-8")[: self.max_bytes]] for caption in captions]
        pack = Pack([(1, 1, len(d)) for d in data], device=device)
        on_device = lambda numbers: to_device(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)
        x = self.embedding(on_device([b for d in data for b in d]))
        x = x + self.trigrams(on_device([g for d in data for g in self._hashes(d)]))
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(ops.norm_modulate(x, None, None), pack)
            x = x + mlp(ops.norm_modulate(x, None, None))
        x = ops.norm_modulate(x, None, None)
        sums = x.new_zeros((len(data), self.width)).index_add(0, pack.segment_ids, x)
        return Text(x, ops.norm_modulate(sums, None, None), tuple(len(d) for d in data))

    def _hashes(self, data: list[int]) -> list[int]:
        """Place in the table of the trigram that ends at each byte (multiplicative hashing, Knuth 6.4)."""
        padded = [256, 256, *data]
        keys = [(a * 257 + b) * 257 + c for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)]
        return [key * 2654435761 % 2**32 * self.TRIGRAMS >> 32 for key in keys]


class HuggingFaceTextEncoder(nn.Module):
    """A frozen T5-type encoder (T5, mT5, UMT5) from a local folder in Hugging Face's layout.

    Args:
        path: folder with config.json, the weights, and the tokenizer's files.
        max_length: tokens; longer captions are cut.
        dtype: of the weights.

    Raises:
        ImportError: transformers is not installed. ValueError: a model of another type. OSError: no such folder.
    """

    def __init__(self, path: str, max_length: int = 512, dtype: torch.dtype = torch.float32):
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ImportError("HuggingFaceTextEncoder: expected the transformers package, got none; run "
                              "pip install 'sora_fast[train]'") from error
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        kinds = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
        if config.model_type not in kinds:
            raise ValueError(f"HuggingFaceTextEncoder: expected a model of type {', '.join(kinds)}, got "
                             f"{config.model_type!r} in {path}; point path at such a folder")
        kind = getattr(transformers, kinds[config.model_type])
        self.model = kind.from_pretrained(path, local_files_only=True, dtype=dtype).eval().requires_grad_(False)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.width, self.max_length = config.d_model, max_length

    def train(self, mode: bool = True):
        super().train(mode)
        self.model.eval()  # frozen: no dropout, whatever surrounds it
        return self

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Text:
        _check("HuggingFaceTextEncoder", captions)
        batch = self.tokenizer(list(captions), padding=True, truncation=True, max_length=self.max_length,
                               return_tensors="pt")
        ids, kept = (to_device(batch[name], self.model.device) for name in ("input_ids", "attention_mask"))
        hidden = self.model(input_ids=ids, attention_mask=kept).last_hidden_state
        # lengths and places are read on the host, where the tokenizer made them: a GPU is not waited for
        lengths = tuple(batch["attention_mask"].sum(1).tolist())
        places = to_device(batch["attention_mask"].flatten().nonzero()[:, 0], self.model.device)
        mask = kept.bool()
        pooled = torch.where(mask[..., None], hidden, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return Text(hidden.flatten(0, 1)[places], pooled, lengths)


def _check(name: str, captions: Sequence[str]) -> None:
    if isinstance(captions, str):
        raise TypeError(f"{name}: expected a list of captions, one per sample, got the string {captions!r}; pass [caption]")
    checks.sequence(name, "captions", captions, "strings")
    for caption in captions:
        if not isinstance(caption, str):
            raise TypeError(f"{name}: expected every caption to be a string, got {checks.came(caption)}; pass str")
