"""A whole small VideoVAE on Triton kernels, executed by the emulator: pixels, latents and every gradient against the
reference, streams, and what is saved for the backward.
"""

import pytest
import torch
from op_checks import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from sora_fast import use_backend
from sora_fast.models import VAEConfig, VideoVAE
from sora_fast.nn import StreamState

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("emulated_sm90")]

CONFIG = VAEConfig(width=8, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1, space_factor=2, time_factor=2,
                   latent_channels=4)


def model(config=CONFIG):
    """All parameters random, so that no branch is asleep."""
    vae = VideoVAE(config)
    for p in vae.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2 if p.dim() == 1 else p[0].numel() ** -0.5)
    return vae


def step(vae, video, backend, dtype=torch.float32):
    """Moments, pixels and the gradients of all parameters and of the video, in ``dtype``."""
    vae, video = vae.to(dtype), video.to(dtype).requires_grad_()
    with use_backend(backend):
        moments = vae.moments(video)
        pixels = vae.decode(moments.chunk(2, dim=1)[0])
        weights = torch.linspace(-1, 1, pixels.numel(), dtype=torch.float64).to(dtype).view(pixels.shape)
        loss = (pixels * weights).sum() + moments.square().sum()
        return [moments.detach(), pixels.detach(), *torch.autograd.grad(loss, [video, *vae.parameters()])]


def test_a_vae_is_the_references():
    vae, video = model(), torch.randn(1, 3, 3, 4, 6)
    got, low, truth = (step(vae, video, *how) for how in (
        ("triton",), ("reference",), ("reference", torch.float64)))
    names = ["moments", "pixels", "video", *(name for name, _ in vae.named_parameters())]
    for name, a, b, t in zip(names, got, low, truth, strict=True):
        assert (a - t).norm() <= 2 * (b - t).norm() + 1e-6 * t.norm(), name
    assert any(not torch.equal(a, b) for a, b in zip(got, low, strict=True))  # other code, other roundings
    assert all(same_bits(a, b) for a, b in zip(got, step(vae.float(), video, "triton"), strict=True))


@pytest.mark.parametrize("plan", [(1, 1, 1), (1, 2)], ids=str)
def test_streams_are_one_shot(plan):
    vae, latents = model(), torch.randn(1, 4, 3, 2, 3)
    with use_backend("triton"), torch.no_grad():
        whole = vae.decode(latents)
        state = StreamState()
        parts = torch.cat([vae.decode(part, state) for part in latents.split(plan, dim=2)], dim=2)
        assert (parts - whole).norm() <= 1e-6 * whole.norm()
        moments = vae.moments(whole)
        state = StreamState()
        frames = [1 + 2 * (plan[0] - 1), *(2 * n for n in plan[1:])]
        parts = torch.cat([vae.moments(part, state) for part in whole.split(frames, dim=2)], dim=2)
        assert (parts - moments).norm() <= 1e-6 * moments.norm()


# ------------------------------------------------------------------------------------------- saved for the backward
def saved_bytes(make, frames, height, width, backend=None) -> int:
    """Bytes that autograd keeps of a forward on fake tensors: storages once, parameters not."""
    kept = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        run, parameters = make()
        own = {p.untyped_storage()._cdata for p in parameters}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            video = torch.randn(1, 3, frames, height, width)
            if backend is None:
                out = run(video)
            else:
                with use_backend(backend):
                    out = run(video)
        total = sum(storage.nbytes() for storage in kept.values())
        del out
    return total


def _ours():
    vae = VideoVAE.preset("wan2.1")
    return lambda video: vae.decode(vae.moments(video).chunk(2, dim=1)[0]), list(vae.parameters())


def _diffusers():
    wan = pytest.importorskip("diffusers").AutoencoderKLWan()
    return lambda video: wan.decode(wan.encode(video).latent_dist.mean).sample, list(wan.parameters())


@pytest.fixture
def bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("bfloat16")
def test_saved_for_the_backward_of_wan():
    """17 frames of 256 x 256 through Wan 2.1's encoder and decoder, in bfloat16."""
    ours, eager = saved_bytes(_ours, 17, 256, 256, "triton"), saved_bytes(_diffusers, 17, 256, 256)
    print(f"saved for the backward of Wan 2.1, 17 x 256 x 256, bfloat16: {ours / 1e9:.2f} GB, diffusers "
          f"{eager / 1e9:.2f} GB, {eager / ours:.2f} times as much")
    assert 4 * ours <= eager
