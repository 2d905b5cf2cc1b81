"""VideoVAE beside diffusers' AutoencoderKLWan on a CPU: time and peak memory."""

import statistics
import sys

import pytest
import test_vae_peer

from sora_fast.benchmarks.model import vae_peer

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]


def test_decoding_is_no_slower_than_diffusers(width=32):
    """17 frames of 64 x 96 in alternating runs of one process: the median ratio of 5 is at most 1.05."""
    seconds = vae_peer.decode_seconds(vae_peer.Setting(width), rounds=5)
    for side in ("ours", "accelerated"):
        ratios = vae_peer.ratios(seconds, side)
        assert len(ratios) == 5 and statistics.median(ratios) <= 1.05, (side, ratios)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_decoding_peaks_lower_than_diffusers(width=32):
    """Resident memory of a fresh process each, in which both packages are imported."""
    *others, theirs = (vae_peer.peak_bytes(vae_peer.Setting(width), side) for side in vae_peer.SIDES)
    assert max(others) < theirs, (others, theirs)


def test_the_command(monkeypatch, capsys):
    small = ["--width", "8", "--size", "5", "16", "16"]
    peaks = {"ours": 3e6, "accelerated": 5e6, "diffusers": 4e6}
    monkeypatch.setattr(vae_peer, "peak_bytes", lambda setting, side: peaks[side])
    assert vae_peer.main([*small, "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "1.000 of diffusers' time" in out and "4.43 GB" in out and all(f"peak {n} MB" in out for n in (3, 4, 5))
    if sys.platform == "linux":  # what a fresh process is asked for
        for side in vae_peer.SIDES:
            assert vae_peer.main([*small, "--peak", side]) == 0
            assert int(capsys.readouterr().out) * 1024 > 50e6


def test_training_saves_a_fourth_of_what_diffusers_does_at_480p():
    test_vae_peer.test_training_saves_a_fourth_of_what_diffusers_does((17, 480, 832))
