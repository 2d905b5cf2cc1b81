"""VideoVAE beside diffusers' AutoencoderKLWan on a CPU: time, peak memory, and what training saves for its backward."""


import pytest
import torch

from sora_fast.benchmarks.model import vae_peer

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("diffusers")


def test_other_pixels_are_no_time():
    """Planted: a decoder with one other weight is not timed."""
    good = vae_peer.Setting(8, (5, 16, 16))

    class Spoilt(vae_peer.Setting):
        def decoders(self, sides=vae_peer.SIDES):
            found = good.decoders(sides)
            ours = found["ours"]
            return found | dict(ours=lambda: ours() * 1.001)
    assert [len(times) for times in vae_peer.decode_seconds(good, rounds=2).values()] == [2, 2, 2]
    with pytest.raises(AssertionError, match="expected the same pixels of all decoders"):
        vae_peer.decode_seconds(Spoilt(8, (5, 16, 16)), rounds=1)


# ------------------------------------------------------------------------------------------ saved for backward
def test_what_is_counted():
    """Each storage once, views of one storage together, parameters not."""
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(8, 4)
    saved = vae_peer.SavedForBackward([weight])
    with saved:
        assert saved.bytes == 0
        y = x @ weight
        assert saved.bytes == x.nbytes
        z = (x[:4] * weight).exp()
        assert saved.bytes == x.nbytes + z.nbytes
        (y[0] * z[0]).sum()
    assert saved.bytes == x.nbytes + y.nbytes + z.nbytes


@pytest.mark.parametrize("size", [(17, 256, 256)], ids=str)
def test_training_saves_a_fourth_of_what_diffusers_does(size):
    """Wan 2.1's graph in bfloat16: one tensor per convolution, where eager PyTorch keeps the norm's and the copies too."""
    ours, swapped, theirs, plain = (vae_peer.training_bytes(side, backend, size=size) for side, backend in (
        ("ours", "torch"), ("accelerated", "torch"), ("diffusers", "torch"), ("ours", "reference")))
    assert ours * 4 <= theirs and swapped * 4 <= theirs, (theirs / ours, theirs / swapped)
    assert plain * 4 > theirs, "the definition keeps everything, and the check must see it"
    if size == (17, 256, 256):
        assert round(ours / 1e9, 2) == 4.43 and round(theirs / 1e9, 1) == 22.6
