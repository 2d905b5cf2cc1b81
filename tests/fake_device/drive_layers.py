"""Layers and what makes their inputs, on the fake device: nothing waits, forward or backward."""

import pytest
import torch
from test_text import checkpoint  # noqa: F401 (a fixture)

from sora_fast import Pack
from sora_fast.compat import xformers
from sora_fast.models import ByteTextEncoder, DiT, HuggingFaceTextEncoder
from sora_fast.nn import VectorQuantizer, random_masking

from . import waits

GRIDS = [(1, 2, 2), (3, 2, 4)]


def test_packs():
    with waits.none():
        pack = Pack(GRIDS, modulation="frame", text_lengths=(3, 0), tokens=32, device="cuda")
        moved = Pack(GRIDS).to("cuda")
        moved.set_text((1, 2))
        masking = random_masking(Pack(GRIDS, device="cuda"), 0.5)
        shorter = Pack(GRIDS, device="cuda").keep(masking.visible)
    assert pack.coords.is_cuda and pack.text_cu_seqlens.tolist() == [0, 3, 3]
    assert moved.text_cu_seqlens.tolist() == [0, 1, 3] and shorter.num_tokens == masking.visible.shape[0]


def test_byte_text():
    encoder = ByteTextEncoder(64).to("cuda")
    with waits.none():
        text = encoder(["a clip", ""])
        text.tokens.square().sum().backward()
    assert text.lengths == (7, 1) and encoder.embedding.weight.grad.is_cuda


def test_text_of_hugging_face(checkpoint):  # noqa: F811
    """Our lines wait for nothing; the package's own model may."""
    encoder, captions = HuggingFaceTextEncoder(str(checkpoint("t5")[0])), ["red panda", "", "a b"]
    wanted = encoder(captions)
    encoder.to("cuda")
    with waits.seen() as found:
        text = encoder(captions)
    assert not (ours := [str(wait) for wait in found if "self.model(" not in str(wait)]), ours
    assert text.lengths == wanted.lengths
    torch.testing.assert_close(text.tokens.cpu(), wanted.tokens)


def test_a_dit_with_learned_positions():
    dit = DiT.preset("tiny", in_channels=4, text_width=0, depth=1).to("cuda")
    dit.pos_embed = torch.randn(1, 4, dit.config.width, device="cuda")
    pack = Pack([(1, 2, 2), (2, 2, 2)], device="cuda")
    flat, timesteps = torch.randn(4 * 4 * 12, device="cuda"), torch.rand(2).to("cuda")
    with waits.none():
        dit(flat, timesteps, pack).sum().backward()


def test_a_quantizer():
    quantizer, z = VectorQuantizer(8, 4).to("cuda"), torch.randn(2, 4, 3, 2, 2, device="cuda", requires_grad=True)
    with waits.none():
        quantizer(z).loss.sum().backward()
        quantizer.restart(z.detach())
    assert z.grad.is_cuda


@pytest.mark.parametrize("mask", [None, xformers.BlockDiagonalCausalMask.from_seqlens([3, 5], [5, 3], device="cuda")],
                         ids=["a batch", "top-left causal"])
def test_the_interface_of_xformers(mask):
    q, k, v = (torch.randn(1, 8, 2, 16, device="cuda", requires_grad=True) for _ in range(3))
    with waits.none():
        xformers.memory_efficient_attention(q, k, v, mask).sum().backward()
    assert q.grad.is_cuda
