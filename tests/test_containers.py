"""Animations of image formats, clips of variable rate, and containers beside mp4: read whole, by their own clocks.

The red of frame i is 40 i, so that a wrong pick shows.
"""

import struct
import warnings
import zlib
from fractions import Fraction

import pytest
import torch

av = pytest.importorskip("av")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from sora_fast.data import UnreadableMedia, probe, read_clip, scan  # noqa: E402

TIMES = [100, 200, 300, 400]  # ms of the frames


def pictures(count=4, mode="RGB"):
    return [Image.new(mode, (16, 8), (40 * i, 0, 0) if mode == "RGB" else (40 * i, 0, 0, 255)) for i in range(count)]


def reds(clip):
    return [round(float(red) / 40) for red in clip[..., 0].float().mean((1, 2))]


def animation(path, frames=None, **settings):
    first, *more = frames or pictures()
    lossless = dict(lossless=True) if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=more, **dict(duration=TIMES) | lossless | settings)
    return path


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif"])
def test_an_animation_is_a_clip_of_all_its_frames(tmp_path, name):
    item = probe(animation(tmp_path / name))
    assert (item.kind, item.width, item.height, item.frames) == ("clip", 16, 8, 4)
    assert item.seconds == pytest.approx(1.0) and item.fps == pytest.approx(4.0)
    assert reds(read_clip(item, frames=10, start=0.01, fps=10)) == [0, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    assert reds(read_clip(item, frames=2, start=0.3, fps=2)) == [2, 3]
    assert read_clip(item, frames=2, size=(4, 4)).shape == (2, 4, 4, 3)
    with pytest.raises(ValueError, match="holds 1.000 s, got a window of 12 frames"):
        read_clip(item, frames=12, fps=10)
    assert [each.kind for each in scan(tmp_path, progress=False).items] == ["clip"]


def test_what_an_animation_shows(tmp_path):
    """Transparent pixels over white, no still for older readers, 0.1 s of frames without a time; one frame is a photo."""
    clear = pictures(3, "RGBA")
    clear[1].putpixel((0, 0), (0, 0, 0, 0))
    for name in ("clear.webp", "clear.png"):
        item = probe(animation(tmp_path / name, clear, duration=[100] * 3, disposal=1) if name.endswith("png") else
                     animation(tmp_path / name, clear, duration=[100] * 3))
        clip = read_clip(item, frames=3)
        assert clip[1, 0, 0].tolist() == [255] * 3 and reds(clip[:, 1:]) == [0, 1, 2]
    item = probe(animation(tmp_path / "still.png", default_image=True, duration=TIMES[1:]))
    assert item.frames == 3 and reds(read_clip(item, frames=3)) == [1, 2, 3]
    for name in ("fast.webp", "fast.png"):
        assert probe(animation(tmp_path / name, duration=[0, 5, 20, 100])).seconds == pytest.approx(0.32)
    for name in ("one.webp", "one.png"):
        pictures()[1].save(tmp_path / name)
        assert probe(tmp_path / name).kind == "image"
    animation(tmp_path / "named.png", duration=TIMES)
    animation(tmp_path / "a.gif").rename(tmp_path / "gif.png")
    assert probe(tmp_path / "gif.png").frames == 4
    with pytest.raises(UnreadableMedia, match="another format: it is no clip"):
        probe(animation(tmp_path / "a.webp").rename(tmp_path / "webp.mp4"))


def test_a_deep_animation_is_told(tmp_path):
    """Pillow reads its high bytes; one of 8 bits is read without a word."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    frame = lambda place, level: chunk(b"fcTL", struct.pack(">5I2H2B", place, 1, 1, 0, 0, 1, 10, 0, 0)) + (
        chunk(b"IDAT", zlib.compress(b"\0" + 3 * level)) if not place else
        chunk(b"fdAT", struct.pack(">I", place + 1) + zlib.compress(b"\0" + 3 * level)))
    header = chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0)) + chunk(b"acTL", struct.pack(">2I", 2, 0))
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + frame(0, b"\0\0") + frame(1, b"\x28\0")
                                        + chunk(b"IEND", b""))
    with pytest.warns(UserWarning, match="deep.png: an animation of 16-bit colours, HDR or a wide gamut: the high 8 bits"):
        assert reds(read_clip(probe(tmp_path / "deep.png"), frames=2)) == [0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_clip(probe(animation(tmp_path / "a.png")), frames=2)


def test_a_cut_animation_is_named(tmp_path):
    noise = [numpy.random.default_rng(i).integers(0, 256, (16, 16, 3), "uint8") for i in range(4)]
    for name in ("a.webp", "a.png"):
        path = animation(tmp_path / name, [Image.fromarray(each) for each in noise])
        path.write_bytes(path.read_bytes()[:-300])
        with pytest.raises(UnreadableMedia, match=f"{name} cannot be used .truncated"):
            probe(path)


# ------------------------------------------------------------------------------------------------ video


def timed(path, times, codec="libx264", sides=(32, 32)):
    """A clip whose frame i, of red 40 i, is shown at times[i] ms."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *sides, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10 if path.suffix == ".avi" else 1000)
        for number, time in enumerate(times):
            picture = numpy.zeros((sides[1], sides[0], 3), numpy.uint8)
            picture[..., 0] = 40 * number
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def last_end(path):
    """When the last frame ends, by decoding all of the clip."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return float((frames[-1].pts + frames[-1].duration - frames[0].pts) * frames[0].time_base), len(frames)


@pytest.mark.parametrize("times", [[0, 100, 200, 1000], [0, 900, 940, 980, 1020], [0, 40, 80, 500, 540, 2000],
                                   [0, 100, 200, 300, 400, 500]], ids=str)
@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mov", "mpeg4"), ("a.mkv", "libx264"),
                                         ("a.webm", "libvpx-vp9")])
def test_a_clip_ends_with_its_last_frame(tmp_path, times, name, codec):
    """H.264's reordered frames in MP4: the header's sum, of decoding times, said 0.4 s of the first of these."""
    path = timed(tmp_path / name, times, codec)
    item, (end, count) = probe(path), last_end(path)
    assert item.seconds == pytest.approx(end, abs=2e-3) and item.frames == count == len(times)
    assert item.seconds > times[-1] / 1000
    asked = range(5, times[-1], 20)
    read = read_clip(item, frames=len(asked), start=0.005, fps=50)
    assert reds(read) == [min(range(len(times)), key=lambda i: abs(times[i] - now)) for now in asked]


@pytest.mark.parametrize("name, codec", [("a.mov", "libx264"), ("a.m4v", "mpeg4"), ("a.mkv", "libx264"), ("a.mkv", "ffv1"),
                                         ("a.avi", "mpeg4"), ("a.avi", "mjpeg"), ("a.AVI", "libx264")])
def test_other_containers_are_clips(tmp_path, name, codec):
    path = timed(tmp_path / name.lower(), range(0, 600, 100), codec)
    path = path.rename(tmp_path / name)
    (item,) = scan(tmp_path, progress=False).items
    assert (item.kind, item.frames) == ("clip", 6) and item.seconds == pytest.approx(0.6, abs=0.01)
    assert reds(read_clip(item, frames=6)) == list(range(6))
    assert reds(read_clip(item, frames=2, start=0.4)) == [4, 5] and torch.is_tensor(read_clip(item, frames=1))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableMedia):
        item = probe(path)
        read_clip(item, frames=6)
