"""A VideoVAE encodes and decodes in chunks on the fake device: its graphs, its waits, and the pixels of one call."""

import pytest
import torch

from sora_fast import use_backend
from sora_fast.models import VAEConfig, VideoVAE
from sora_fast.nn import CausalConv3d, StreamState

from . import graphs, waits

SMALL = VAEConfig(width=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1, space_factor=2, time_factor=2,
                  latent_channels=4)


@pytest.fixture
def replays(monkeypatch):
    """One entry per replay of a CUDA graph."""
    found, replay = [], graphs.Tape.replay
    monkeypatch.setattr(graphs.Tape, "replay", lambda tape: (found.append(tape), replay(tape))[1])
    return found


def beyond_captures(found):
    """Waits other than those that a capture begins with."""
    return [str(wait) for wait in found if wait.what != "the begin of a capture"]


def both_ways(vae, video, chunk):
    """(latents, pixels) of one call, and of each kind of stream, whose chunks are steady for long enough to be captured."""
    with torch.no_grad():
        latents = vae.encode(video)
        pixels = vae.decode(latents)
    with waits.seen() as found:
        encoded = [vae.encode_clip(video), torch.cat(list(vae.encode_stream(video, chunk=chunk)), 2)]
        decoded = [vae.decode_clip(latents, chunk=1), torch.cat(list(vae.decode_stream(latents, chunk=1)), 2)]
    assert not beyond_captures(found)
    return (latents, encoded), (pixels, decoded)


def test_streams_by_pytorch(replays):
    vae = VideoVAE.preset("tiny", width=8).to("cuda").eval()
    for whole, parts in both_ways(vae, torch.rand(1, 3, 45, 16, 16, device="cuda"), 4):
        for part in parts:
            torch.testing.assert_close(part.cpu(), whole.cpu())
    assert len({id(tape) for tape in replays}) == 3 and len(replays) > 9  # encode_clip has too few chunks for one


def test_streams_by_kernels(kernels, replays):
    vae = VideoVAE(SMALL).to("cuda").eval()
    with use_backend("triton"):
        latents = torch.randn(1, 4, 9, 2, 2, device="cuda")
        with torch.no_grad():
            whole = vae.decode(latents)
        launched = len(kernels.records)
        with waits.seen() as found:
            parts = torch.cat(list(vae.decode_stream(latents, chunk=1)), 2)
        assert not beyond_captures(found) and replays and len(kernels.records) > launched
        torch.testing.assert_close(parts.cpu(), whole.cpu())


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_stream_that_cannot_be_captured(replays, caplog, where):
    """A hook that waits for the GPU: the stream goes on where it was, on its own CUDA stream, with the same pixels."""
    vae, z = VideoVAE.preset("tiny", width=8).to("cuda").eval(), torch.randn(1, 16, 12, 2, 2, device="cuda")
    wanted = list(vae.decode_stream(z, chunk=1, graph=False))
    hooked = [module for module in vae.decoder.modules() if isinstance(module, CausalConv3d)][0 if where == "first" else -1]
    with torch.no_grad():
        hooked.register_forward_hook(lambda module, inputs, output: (output.sum().item(), None)[1])
    before = torch.cuda.current_stream()
    parts = list(vae.decode_stream(z, chunk=1))
    assert torch.cuda.current_stream() is before and waits.state.capture is None and not replays
    for part, whole in zip(parts, wanted, strict=True):
        assert torch.equal(part, whole)
    (said,) = [text for record in caplog.records if "goes on without a CUDA graph" in (text := record.getMessage())]
    assert "operation not permitted when stream is capturing" in said


def test_a_stream_goes_to_the_host_as_it_comes():
    """The one wait per chunk that the caller asks for, with ``out`` on the CPU."""
    vae, z = VideoVAE.preset("tiny", width=8).to("cuda").eval(), torch.randn(1, 16, 3, 2, 2, device="cuda")
    out = torch.empty(1, 3, 9, 16, 16)
    with waits.seen() as found:
        vae.decode_clip(z, chunk=1, out=out)
    assert [(wait.what, wait.function) for wait in found] == [("copy to the host", "_collect")] * 3
    with torch.no_grad():
        torch.testing.assert_close(out, vae.decode(z).cpu())


def test_training_through_a_stream_state():
    """Moments and decode with a state have gradients, and nothing waits."""
    vae, video = VideoVAE.preset("tiny", width=8).to("cuda"), torch.rand(1, 3, 5, 16, 16, device="cuda")
    state = StreamState()
    with waits.none():
        parts = [vae.moments(part, state) for part in video.split((1, 4), 2)]
        sum(part.square().sum() for part in parts).backward()
    assert all(p.grad.is_cuda for p in vae.encoder.parameters())
