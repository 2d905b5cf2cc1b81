"""Latents of media: encoded once and found again, written whole, packed; and the frames they are made of."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_checks import TINY, latent_clips, write_media

from sora_fast.data import FitPolicy, scan
from sora_fast.data.frames import Frames
from sora_fast.models import VideoVAE
from sora_fast.training import checkpoint
from sora_fast.training import dit as dit_task
from sora_fast.training.config import DiTTraining
from sora_fast.training.latent_cache import LatentCache
from sora_fast.training.latents import LatentPacks, encode_library, load_library, save_library

for package in ("safetensors", "av", "PIL"):
    pytest.importorskip(package, reason="the train extra is not installed")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def clips():
    return latent_clips()


@pytest.fixture
def encoder():
    return VideoVAE.preset("tiny", width=4).eval()


def cached(vae, items, folder, policy, windows=2):
    """Latent clips of items through a cache, and the cache."""
    cache = LatentCache(folder, vae, policy, windows=windows, span=(0.0, 1.0))
    return encode_library(vae, items, policy, windows=windows, progress=False, cache=cache), cache


def test_latents_are_found_again_by_content(media, tmp_path, encoder, capsys):
    """Also those of a renamed and of a copied file, with the caption it has now; other settings and weights are others'."""
    folder, policy = tmp_path / "cache", FitPolicy(short_side=48, fps=None, max_frames=5, space_multiple=16)
    items = scan(media, progress=False).items
    made, cache = cached(encoder, items, folder, policy)
    assert (cache.reused, cache.made) == (0, 5) and len(list(folder.rglob("*.safetensors"))) == 5
    moved = tmp_path / "moved"
    shutil.copytree(media, moved)
    (moved / "clip1.mp4").rename(moved / "another name.mp4")
    (moved / "another name.txt").write_text("a new caption")
    shutil.copy(moved / "image0.png", moved / "image9.png")
    again, cache = cached(encoder, scan(moved, progress=False).items, folder, policy)
    assert (cache.reused, cache.made) == (6, 0)
    by_name = lambda clips: {(Path(clip.source).name, clip.start): clip for clip in clips}
    for (name, start), clip in by_name(made).items():
        found = by_name(again)["another name.mp4" if name == "clip1.mp4" else name, start]
        assert torch.equal(found.latent, clip.latent) and (found.frames, found.fps) == (clip.frames, clip.fps)
    assert by_name(again)["another name.mp4", 0].caption == "a new caption"
    other = copy.deepcopy(encoder)
    other.latent_mean[3] += 1e-3
    for changed in (dict(vae=other), dict(policy=replace(policy, short_side=32)), dict(windows=3)):
        _, cache = cached(**dict(vae=encoder, items=items[:1], folder=folder, policy=policy) | changed)
        assert (cache.reused, cache.made) == (0, 1), changed
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_entry_is_made_again(media, tmp_path, encoder, capsys, damage):
    policy = FitPolicy(short_side=48, fps=None, max_frames=5, space_multiple=16)
    items = scan(media, progress=False).items[:1]
    made, _ = cached(encoder, items, tmp_path, policy)
    entry, = tmp_path.rglob("*.safetensors")
    whole = bytearray(entry.read_bytes())
    if damage == "bit":
        whole[-5] ^= 1
    entry.write_bytes(dict(cut=whole[: len(whole) // 2], bit=whole, empty=b"")[damage])
    again, cache = cached(encoder, items, tmp_path, policy)
    said = capsys.readouterr().out
    assert (cache.reused, cache.made) == (0, 1) and said.count("\n") == 1 and "clip0.mp4 is encoded again, since its" in said
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(made, again, strict=True))
    _, cache = cached(encoder, items, tmp_path, policy)
    assert (cache.reused, cache.made) == (1, 0) and not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_cannot_be_written_stops_nothing(media, tmp_path, encoder, capsys):
    (tmp_path / "file").write_text("")
    policy = FitPolicy(short_side=48, fps=None, max_frames=5, space_multiple=16)
    made, cache = cached(encoder, scan(media, progress=False).items, tmp_path / "file" / "cache", policy)
    said = capsys.readouterr().out
    assert len(made) > 4 and cache.made == 5 and said.count("cannot be written") == 1 and "--latent-cache" in said


def test_encode_media_tells_what_came_from_the_cache(media, tmp_path, encoder, capsys):
    items = scan(media, progress=False).items
    for out, count in (("a", 0), ("b", 5)):
        config = DiTTraining(out=str(tmp_path / out), latent_cache=str(tmp_path / "cache"), short_side=48, **TINY)
        dit_task.encode_media(config, encoder, items)
        assert f"latents: {count} of 5 files from the cache in {tmp_path / 'cache'}, {5 - count} encoded" in \
            capsys.readouterr().out
    dit_task.encode_media(replace(config, out=str(tmp_path / "c"), latent_cache="none"), encoder, items)
    assert "latents: 0 of 5 files from the cache, 5 encoded" in capsys.readouterr().out


def test_latents_that_are_not_finite_are_refused(media, encoder, tmp_path):
    encoder.latent_std.zero_()
    policy = FitPolicy(short_side=48, fps=None, max_frames=5, space_multiple=16)
    with pytest.raises(ValueError, match="expected finite latents of .*clip0.mp4, frames 0 to 4, got nan or inf"):
        cached(encoder, scan(media, progress=False).items, tmp_path, policy)


def test_latents_are_written_whole(tmp_path, clips, monkeypatch):
    save_library(tmp_path / "latents", clips)
    back = load_library(tmp_path / "latents")
    assert [clip.caption for clip in back] == [clip.caption for clip in clips]
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(back, clips, strict=True))
    monkeypatch.setattr(checkpoint, "save_tensors", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError):
        save_library(tmp_path / "latents", clips[:1])
    assert not (tmp_path / "latents.json").exists()  # so nobody takes the old list for the new tensors


def test_packs_are_endless_full_and_within_budget(clips):
    packs = LatentPacks(clips, (1, 2, 2), 40, look_ahead=8)
    counted = {clip.caption: 0 for clip in clips}
    for _ in range(50):
        batch = packs.load(packs.next())
        tokens = [t * h * w for t, h, w in batch.grids]
        assert 0 < sum(tokens) <= 40 and batch.latents.shape == (sum(batch.counts),)
        assert [16 * 4 * n for n in tokens] == list(batch.counts)
        for caption in batch.captions:
            counted[caption] += 1
    assert max(counted.values()) - min(counted.values()) <= 4  # epochs, shuffled
    with pytest.raises(ValueError, match="at least one latent clip to pack, got none"):
        LatentPacks([], (1, 2, 2), 40)
    with pytest.raises(ValueError, match="has 18 tokens, the budget is 10"):
        LatentPacks(clips[:1], (1, 2, 2), 10, look_ahead=1).next()


def test_windows_of_clips(media, tmp_path):
    vae = VideoVAE.preset("tiny", width=4).eval()
    items = scan(media, progress=False).items
    policy = FitPolicy(short_side=48, fps=None, max_frames=5, space_multiple=16, max_tokens=24)
    for windows, starts in ((1, [0]), (2, [0, 8]), (3, [0, 4, 8])):
        found = encode_library(vae, items[1:2], policy, windows=windows, progress=False)
        assert [clip.start for clip in found] == starts
        for clip in found:
            assert clip.latent.shape[1] == 1 + (clip.frames - 1) // 4 and clip.caption == "stripes 1"
            t, h, w = clip.grid((1, 2, 2))
            assert t * h * w <= 24


def test_frames_of_clips_without_rate_or_length(media):
    item = next(i for i in scan(media, progress=False).items if i.path.name == "clip0.mp4")
    policy = FitPolicy(short_side=48, fps=None)
    for odd in (replace(item, fps=0.0, seconds=0.0), replace(item, seconds=0.01), replace(item, fps=0.0)):
        frames = Frames([odd], policy, progress=False)
        assert len(frames) == 1 and frames.frames(0) == 1
        assert frames.window(0, 0, 1).shape == (1, 48, 64, 3)
    assert len(Frames([replace(item, seconds=0.01)], policy, span=(0.5, 1.0), progress=False)) == 0
    whole = Frames([item], policy, progress=False)
    assert whole.frames(0) == 9
    parts = [Frames([item], policy, span=span, progress=False) for span in ((0.0, 0.6), (0.6, 1.0))]
    assert [part.frames(0) for part in parts] == [6, 3]
    assert torch.equal(torch.cat([part.window(0, 0, part.frames(0)) for part in parts]), whole.window(0, 0, 9))
    on_demand = Frames([item], policy, memory_gb=0.0, progress=False)
    assert torch.equal(on_demand.window(0, 2, 5), whole.window(0, 2, 5))
    with pytest.raises(ValueError, match="expected frames within the 9 of clip0.mp4, got 5 to 10"):
        whole.window(0, 5, 5)


def test_memory_of_frames_goes_to_those_that_fit(media):
    items = scan(media, progress=False).items
    kept = Frames(items, FitPolicy(short_side=48, fps=None), memory_gb=5 * 48 * 48 * 3 / 2**30, progress=False)
    assert [kept.item(i).path.name for i in kept._kept] == ["clip2.mp4"]
