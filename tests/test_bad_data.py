"""Bad and hard media: each file is used or named with a reason, and a folder that holds all of them trains.

Every check is shown to fail: a library that loses a file, a reader that clips 16 bits, one that turns without mirroring.
"""

import contextlib
import io
import json
import os
import random
import struct
import sys
import tempfile
import time
import unicodedata
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

av = pytest.importorskip("av")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from sora_fast.data import FitPolicy, UnreadableMedia, probe, read_clip, scan, write_image, write_video  # noqa: E402
from sora_fast.data.frames import Frames  # noqa: E402

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links, pipes and line ends in names need another file system")
NOISE = torch.randint(0, 256, (12, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def counting(frames):
    """(T, 48, 64, 3): every pixel of frame i is 20 + 4 i."""
    return (20 + 4 * torch.arange(frames)).to(torch.uint8)[:, None, None, None].repeat(1, 48, 64, 3)


def numbers(clip_THWC):
    """The frames' numbers in `counting`, by their brightness."""
    return [round((float(level) - 20) / 4) for level in clip_THWC.float().mean((1, 2, 3))]


def encode(path, frames_THWC, times=None, *, codec="h264", options=None, container=None):
    """A clip as PyAV's muxers leave it: an mp4's index at the end, a webm without a frame count. times: ms of each."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames_THWC.shape[2], frames_THWC.shape[1], "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(picture_HWC.contiguous().numpy(), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else 40 * number, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def sound(path, cover=False):
    """An mp4 of sound alone, or with a cover picture."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        if cover:
            picture = file.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(numpy.zeros((32, 32, 3), numpy.uint8), format="rgb24")
            frame.pts = 0
            file.mux(picture.encode(frame))
            file.mux(picture.encode())
        samples = av.AudioFrame.from_ndarray(numpy.zeros((1, 1024), numpy.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        file.mux(stream.encode(samples))
        file.mux(stream.encode())
    return path


def deep_png(path, pixels_HWC, kind, clear=b""):
    """A PNG of 16 bits (kind 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha), which Pillow cannot write."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", pixels_HWC.shape[1], pixels_HWC.shape[0], 16, kind, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels_HWC)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + (chunk(b"tRNS", clear) if clear else b"")
                     + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))
    return path


def with_matrix(source, target, matrix):
    """A copy of an mp4 whose track header has the display matrix (a, b, c, d): x' = a x + c y, y' = b x + d y."""
    data = bytearray(source.read_bytes())
    place = data.index(b"tkhd") + 44  # version 0 of ISO/IEC 14496-12, 8.3.2
    for slot, value in zip((0, 1, 3, 4), matrix, strict=True):
        data[place + 4 * slot : place + 4 * slot + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    target.write_bytes(data)
    return target


def cut(path, source, share=2 / 3):
    """The first part of a file."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def with_hole(path, source):
    """A clip of full length whose middle is zeros: its header and first frame are good."""
    data = bytearray(source.read_bytes())
    data[len(data) // 2 : len(data) // 2 + len(data) // 6] = bytes(len(data) // 6)
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(folder, {good file: kind}, {bad file: kind of its reason}) of everything at once; no file is damaged inside."""
    root = tmp_path_factory.mktemp("media")
    good, bad = {}, {}

    def clip(name, frames_THWC=NOISE, **settings):
        good[name] = "clip"
        return encode(root / name, frames_THWC, **settings)

    plain = clip("late-index.mp4")
    whole_webm = clip("plain.webm", codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"})
    clip("one-frame.mp4", NOISE[:1])
    clip("uneven.mp4", counting(12), times=[0, 40, 80, 500, 540, 580, 1200, 1240, 1900, 1940, 1980, 2020])
    clip("köln \U0001f600\nzwei.mp4", NOISE[:5])
    write_video(root / "first-index.mp4", NOISE, 8)
    write_video(root / "moving.gif", NOISE[:5], 10)
    with_matrix(root / "first-index.mp4", root / "mirrored.mp4", (-1, 0, 0, 1))
    with_matrix(root / "first-index.mp4", root / "turned.mp4", (0, 1, -1, 0))
    good |= {name: "clip" for name in ("first-index.mp4", "moving.gif", "mirrored.mp4", "turned.mp4")}
    write_image(root / "odd.png", NOISE[0, :47, :33])
    write_image(root / "dot.png", NOISE[0, :1, :1])
    Image.fromarray(NOISE[0, ..., 0].numpy()).save(root / "grey.png")
    Image.fromarray(NOISE[0].numpy()).quantize(16).save(root / "palette.png")
    Image.fromarray(NOISE[0].numpy()).convert("CMYK").save(root / "ink.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE[0].numpy()).save(root / "turned.jpg", exif=exif)
    deep = numpy.random.default_rng(0).integers(0, 65536, (40, 40, 4))
    deep_png(root / "deep-grey.png", deep[..., :1], 0)
    deep_png(root / "deep-alpha.png", deep, 6)
    good |= {name: "image" for name in ("odd.png", "dot.png", "grey.png", "palette.png", "ink.jpg", "turned.jpg",
                                        "deep-grey.png", "deep-alpha.png")}
    (root / "grey.txt").write_text("grey noise")
    (root / "notes.md").write_text("not media")
    (root / ".hidden.png").touch()

    cut(root / "cut-index.mp4", root / "first-index.mp4")
    cut(root / "cut-late.mp4", plain)
    cut(root / "cut.webm", whole_webm)
    cut(root / "cut.gif", root / "moving.gif")
    cut(root / "cut.png", root / "odd.png")
    cut(root / "cut.jpg", root / "turned.jpg")
    bad |= {name: "truncated" for name in ("cut-index.mp4", "cut-late.mp4", "cut.webm", "cut.gif", "cut.png", "cut.jpg")}
    for name in ("empty.png", "empty.mp4"):
        (root / name).touch()
        bad[name] = "empty"
    sound(root / "sound.mp4")
    sound(root / "song.mp4", cover=True)
    bad |= {"sound.mp4": "no video stream", "song.mp4": "no video stream"}
    (root / "words.mp4").write_text("these are words\n" * 100)
    (root / "words.png").write_text("these are words\n" * 100)
    bad |= {"words.mp4": "not decodable", "words.png": "not decodable"}
    (root / "list.mp4").write_text("ffconcat version 1.0\nfile first-index.mp4\n")
    bad["list.mp4"] = "another format"
    write_image(root / "caption.png", NOISE[0])
    (root / "caption.txt").write_bytes(b"\xff\xfe\xff")
    bad["caption.png"] = "caption not readable"
    (root / "gone.webm").symlink_to(root / "nowhere.webm")
    (root / "self.png").symlink_to(root / "self.png")
    bad |= {"gone.webm": "broken link", "self.png": "broken link"}
    (root / "back").symlink_to(root)
    bad["back"] = "link loop"
    return root, good, bad


def assert_accounted(library, root):
    """Every name in the folder is an item, is skipped, or is among the counts of the others or the captions."""
    items, skipped = [item.path for item in library.items], [path for path, _ in library.skipped]
    captions = [p for p in root.rglob("*.txt") if any(p.with_suffix("") == q.with_suffix("") for q in items + skipped)]
    names = [path for path in root.rglob("*") if path.is_symlink() or not path.is_dir()]
    assert len(set(items + skipped + captions)) == len(items + skipped + captions)
    assert len(items + skipped + captions) + sum(count for _, count in library.others) == len(names)
    assert set(items + skipped + captions) <= set(names)


def test_every_file_is_used_or_named_and_counted_by_reason(folder):
    root, good, bad = folder
    library = scan(root, progress=False)
    assert {item.path.name: item.kind for item in library.items} == good
    assert {path.name: why.partition(":")[0] for path, why in library.skipped} == bad
    assert library.reasons == {kind: list(bad.values()).count(kind) for kind in bad.values()}
    assert list(library.reasons.items())[0] == ("truncated", 6)
    assert library.others == ((".md", 1), ("hidden", 1)) and library.uncaptioned == len(good) - 1
    assert_accounted(library, root)
    with pytest.raises(AssertionError):
        assert_accounted(replace(library, skipped=library.skipped[1:]), root)

    lines = library.summary().splitlines()
    clips = list(good.values()).count("clip")
    assert lines[0] == f"{clips} clips, {len(good) - clips} images, {len(good) - 1} without a caption, {len(bad)} skipped"
    assert lines[1].startswith("without a caption: deep-alpha.png, ") and f"and {len(good) - 4} more" in lines[1]
    assert lines[2] == "not read: 1 .md, 1 hidden"
    assert lines[3].startswith("skipped: 6 truncated, 2 ") and "1 link loop" in lines[3]
    assert len(lines) == 4 + len(bad) and all(any(name in line for line in lines[4:]) for name in bad)


def test_what_is_used_can_be_read_whole(folder):
    for item in scan(folder[0], progress=False).items:
        fit = FitPolicy(space_multiple=1, time_factor=1, max_frames=99, fps=None)
        T, H, W = fit.fit_item(item)
        assert read_clip(item, frames=T, size=(H, W)).shape == (item.frames, item.height, item.width, 3), item


# ---- Files that end too early


def whole(path):
    name, picture = path.name, Image.fromarray(NOISE[0].numpy())
    fast = {"cpu-used": "8", "deadline": "realtime"}
    made = {
        "first.mp4": lambda: write_video(path, NOISE, 8),
        "last.mp4": lambda: encode(path, NOISE),
        "parts.mp4": lambda: encode(path, NOISE, options={"g": "3"}, container={"movflags": "frag_keyframe+empty_moov"}),
        "nine.webm": lambda: encode(path, NOISE, codec="libvpx-vp9", options=fast),
        "eight.webm": lambda: encode(path, NOISE, codec="libvpx", options=fast),
        "a.gif": lambda: write_video(path, NOISE, 10),
        "slow.jpg": lambda: picture.save(path, progressive=True),
    }
    made.get(name, lambda: picture.save(path))()
    return path


@pytest.mark.parametrize("name", ["first.mp4", "last.mp4", "parts.mp4", "nine.webm", "eight.webm", "a.gif", "a.png", "a.jpg",
                                  "slow.jpg", "a.webp", "a.bmp"])
def test_a_file_cut_anywhere_is_truncated_never_a_shorter_clip(tmp_path, name):
    source = whole(tmp_path / name)
    probe(source)
    place = random.Random(0)
    shares = [0.01, 0.1, 0.5, 0.9, 0.97] + [place.uniform(0.02, 0.97) for _ in range(5)]
    for share in shares:
        short = cut(tmp_path / f"cut{source.suffix}", source, share)
        with pytest.raises(UnreadableMedia, match=r"cut\.\w+ cannot be used \(truncated: "):
            probe(short)


def test_bytes_behind_the_end_do_not_make_a_file_truncated(tmp_path):
    for name in ("first.mp4", "last.mp4", "nine.webm", "a.gif", "a.png", "a.jpg"):
        path = whole(tmp_path / name)
        before = probe(path)
        path.write_bytes(path.read_bytes() + b"\x7f\xffmore than the file says" * 9)
        assert probe(path) == before
    path = whole(tmp_path / "a.gif")
    path.write_bytes(path.read_bytes()[:-1])  # without its trailer no picture is lost
    assert probe(path).frames == 12


# ---- Depth, alpha, turns


def as_eight_bits(pixels_HWC):
    """float (H, W, 3) of 16-bit grey or RGB, with alpha or not, over white."""
    levels = pixels_HWC / 257
    channels = pixels_HWC.shape[-1]
    colour = levels[..., :3] if channels > 2 else levels[..., :1].repeat(3, -1)
    alpha = levels[..., -1:] / 255 if channels in (2, 4) else 1.0
    return colour * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, kind, channels):
    pixels_HWC = numpy.random.default_rng(kind).integers(0, 65536, (31, 17, channels))
    read = read_clip(probe(deep_png(tmp_path / "a.png", pixels_HWC, kind)), frames=1)[0]
    expected = as_eight_bits(pixels_HWC)
    # Pillow keeps the high byte of RGB, up to one level below; with alpha, of colour and alpha both.
    assert numpy.abs(read.numpy() - expected).max() <= (0.5, 1, 2, 2)[(0, 2, 4, 6).index(kind)] + 1e-9
    for wrong in (pixels_HWC.clip(0, 255) * 257, pixels_HWC % 256 * 257):  # cut off at 255; the low byte
        assert numpy.abs(as_eight_bits(wrong) - expected).max() > 100


def test_floating_point_pixels_are_named_and_not_black(tmp_path):
    Image.fromarray(numpy.linspace(0, 1, 64, dtype=numpy.float32).reshape(8, 8)).save(tmp_path / "a.png", "TIFF")
    with pytest.raises(UnreadableMedia, match="cannot be used .another format: its pixels are floating-point"):
        probe(tmp_path / "a.png")


def test_grey_of_sixteen_bits_may_have_a_transparent_level(tmp_path):
    pixels_HWC = numpy.full((2, 2, 1), 40000)
    pixels_HWC[0] = 1234
    read = read_clip(probe(deep_png(tmp_path / "a.png", pixels_HWC, 0, struct.pack(">H", 1234))), frames=1)[0]
    assert read[:, 0].tolist() == [[255] * 3, [156] * 3]


MATRICES = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0),
            (0, -1, -1, 0)]


def shown_by(matrix, picture_HWC):
    """Every pixel moved by the definition; the result begins at the least line and column."""
    a, b, c, d = matrix
    H, W, _ = picture_HWC.shape
    moved = {(b * x + d * y, a * x + c * y): picture_HWC[y, x] for y in range(H) for x in range(W)}
    lines, columns = (sorted({place[axis] for place in moved}) for axis in (0, 1))
    return torch.stack([torch.stack([moved[y, x] for x in columns]) for y in lines])


def test_all_eight_display_matrices_are_honoured(tmp_path):
    source_HWC = torch.full((16, 32, 3), 30, dtype=torch.uint8)
    source_HWC[:8, :16] = 220
    source_HWC[:8, 16:24] = 120
    plain = write_video(tmp_path / "plain.mp4", source_HWC[None].repeat(3, 1, 1, 1), 8)
    seen = []
    for matrix in MATRICES:
        item = probe(with_matrix(plain, tmp_path / "a.mp4", matrix))
        expected = shown_by(matrix, source_HWC)
        assert (item.height, item.width) == expected.shape[:2], matrix
        for start in (0.0, 0.25):
            read = read_clip(item, frames=1, start=start)[0]
            assert (read.int() - expected.int()).abs().float().mean() < 5, matrix
        seen.append(expected)
    for i, one in enumerate(seen):  # the eight are told apart by that bound
        for other in seen[:i]:
            assert one.shape != other.shape or (one.int() - other.int()).abs().float().mean() > 20


# ---- Time


@pytest.mark.parametrize("name, codec", [("a.mp4", "h264"), ("a.webm", "libvpx-vp9")])
def test_uneven_clips_are_read_by_their_timestamps(tmp_path, name, codec):
    times = [0, 40, 80, 500, 540, 580, 1200, 1240, 1900, 1940, 1980, 2020]
    fast = {"cpu-used": "8", "deadline": "realtime"} if codec != "h264" else {}
    item = probe(encode(tmp_path / name, counting(12), times, codec=codec, options=fast))
    assert item.frames == 12 and item.seconds == pytest.approx(2.06, abs=0.15)
    frames = Frames([item], FitPolicy(fps=4, time_factor=1, space_multiple=1), progress=False)
    got = numbers(frames.window(0, 0, frames.frames(0)))
    nearest = [min(range(12), key=lambda n: abs(times[n] - 250 * i)) for i in range(len(got))]
    assert len(got) >= 8 and got == nearest
    assert got != [min(11, round(i / 4 * item.fps)) for i in range(len(got))]  # by number


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path):
    """A clip cut without encoding it anew: it begins between two keyframes, and the frames before are not shown."""
    source = encode(tmp_path / "source.mp4", counting(50), options={"g": "10", "bf": "2"})
    with av.open(str(source)) as read, av.open(str(tmp_path / "a.mp4"), "w") as written:
        stream = read.streams.video[0]
        copy, shift = written.add_stream_from_template(stream), int(Fraction(15, 25) / stream.time_base)
        for packet in [each for each in read.demux(stream) if each.dts is not None][10:]:
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
            written.mux(packet)
    item = probe(tmp_path / "a.mp4")
    assert (item.frames, item.fps) == (35, pytest.approx(25)) and item.seconds == pytest.approx(1.4)
    assert numbers(read_clip(item, frames=35)) == list(range(15, 50))


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif"])
def test_one_frame_is_enough(tmp_path, name):
    path = tmp_path / name
    if name == "a.webm":
        encode(path, NOISE[:1], codec="libvpx-vp9")
    else:
        write_video(path, NOISE[:1], 10)
    item = probe(path)
    assert (item.kind, item.frames) == ("image" if name == "a.gif" else "clip", 1)
    frames = Frames([item], FitPolicy(), progress=False)
    assert frames.frames(0) == 1 and frames.window(0, 0, 1).shape == (1, 48, 64, 3)


def test_damage_within_a_clip_leaves_that_clip_out_with_a_warning(tmp_path):
    fine = probe(write_video(tmp_path / "fine.mp4", NOISE, 10))
    damaged = probe(with_hole(tmp_path / "damaged.mp4", fine.path))
    last = probe(write_image(tmp_path / "last.png", NOISE[0]))
    with pytest.warns(UserWarning, match="left out, since it is damaged: .*damaged.mp4 cannot be read"):
        frames = Frames([fine, damaged, last], FitPolicy(fps=None), progress=False)
    assert [frames.item(i).path.name for i in range(len(frames))] == ["fine.mp4", "last.png"]
    assert [path.name for path, _ in frames.unreadable] == ["damaged.mp4"]
    assert torch.equal(frames.window(1, 0, 1)[0], NOISE[0]) and frames.window(0, 0, 12).shape[0] == 12
    with pytest.raises(UnreadableMedia, match="damaged.mp4"):  # nothing is left
        Frames([damaged], FitPolicy(fps=None), progress=False)
    with pytest.raises(UnreadableMedia, match="damaged.mp4"):  # not decoded ahead
        Frames([fine, damaged], FitPolicy(fps=None), memory_gb=0.0, progress=False).window(1, 0, 12)


# ---- Folders


def test_links_are_followed_once_and_loops_end(tmp_path):
    root, beside = tmp_path / "root", tmp_path / "beside"
    write_image(root / "sub" / "a.png", NOISE[0])
    write_image(beside / "b.png", NOISE[0])
    (root / "sub" / "up").symlink_to(root)  # brings the folder itself again
    (root / "over").symlink_to(tmp_path)  # brings what is beside it
    (root / "other").symlink_to(beside)
    (root / "again").symlink_to(root / "sub")
    os.mkfifo(root / "pipe.mp4")
    library = scan(root, progress=False)
    assert [item.path.relative_to(root).as_posix() for item in library.items] == ["other/b.png", "sub/a.png"]
    assert {path.name: why.partition(":")[0] for path, why in library.skipped} == {
        "up": "link loop", "over": "link loop", "again": "repeated folder", "pipe.mp4": "no file"}


@contextlib.contextmanager
def common_user():
    """Inside, this process may not read every file: root, who may, becomes nobody."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public():
    """A folder that nobody may enter too, as pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_what_may_not_be_read_is_named(public):
    tmp_path = public
    write_image(tmp_path / "fine.png", NOISE[0]).chmod(0o644)
    write_image(tmp_path / "closed.png", NOISE[0]).chmod(0)
    with common_user():
        if os.access(tmp_path / "closed.png", os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            pytest.skip("this user may read every file")
    write_image(tmp_path / "secret.png", NOISE[0])
    (tmp_path / "secret.txt").write_text("a caption")
    (tmp_path / "secret.txt").chmod(0)
    write_image(tmp_path / "room" / "a.png", NOISE[0])
    (tmp_path / "room").chmod(0)
    try:
        with common_user():
            library = scan(tmp_path, progress=False)
        assert [item.path.name for item in library.items] == ["fine.png"]
        assert {path.name: why for path, why in library.skipped} == {
            "closed.png": "not readable: Permission denied", "room": "not readable: Permission denied",
            "secret.png": "caption not readable: secret.txt, Permission denied"}
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "fine.png", "text": "a"}')
        (tmp_path / "metadata.jsonl").chmod(0)
        with common_user(), pytest.raises(ValueError, match="must be UTF-8 text that can be read, got .*Permission"):
            scan(tmp_path, progress=False)
    finally:
        (tmp_path / "room").chmod(0o700)


def test_names_in_any_letters_find_their_captions_and_are_shown_on_one_line(tmp_path):
    composed, apart = unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")
    write_image(tmp_path / composed, NOISE[0])
    write_image(tmp_path / "東京\n2.png", NOISE[0])
    # the second caption ends an emoji half-way
    entries = [{"file_name": apart, "text": "an accent"}, {"path": "東京\n2.png", "caption": "a \ud83d city"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(each) for each in entries))
    (tmp_path / "bad\n.png").touch()
    unreadable = ["bad\n.png"]
    with contextlib.suppress(OSError):  # some file systems take Unicode only
        bare = os.fsencode(tmp_path) + b"/\xff.mp4"
        with open(bare, "wb") as file:
            file.write(write_video(tmp_path / "z.mp4", NOISE, 8).read_bytes())
        unreadable.append("\udcff.mp4")
    library = scan(tmp_path, progress=False)
    found = {item.path.name: item.caption for item in library.items}
    written = {"z.mp4": ""} if len(unreadable) > 1 else {}
    assert found == {composed: "an accent", "東京\n2.png": "a \ufffd city"} | written
    assert [path.name for path, _ in library.skipped] == unreadable
    summary = library.summary()
    summary.encode()
    assert "bad\\n.png: empty" in summary and len(summary.splitlines()) == 2 + len(unreadable) + len(written)
    assert not written or "\\udcff.mp4: name not text: " in summary
    for item in library.items:
        assert read_clip(item, frames=1).shape == (1, 48, 64, 3)


def test_ten_thousand_files_are_scanned_with_progress(tmp_path, capsys, monkeypatch):
    """Links to one small file: what the scan itself costs, 2 s on one slow core; the bound catches a quadratic one."""
    first = write_image(tmp_path / "00000.png", NOISE[0, :8, :8])
    for number in range(1, 9_990):
        os.link(first, tmp_path / f"{number:05}.png")
    for number in range(10):
        (tmp_path / f"empty{number}.png").touch()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    begin = time.perf_counter()
    library = scan(tmp_path)
    seconds = time.perf_counter() - begin
    assert len(library.items) == 9_990 and library.reasons == {"empty": 10}
    assert [item.path for item in library.items] == sorted(item.path for item in library.items)
    assert seconds < 30, seconds
    pytest.importorskip("tqdm")
    assert "10000/10000" in capsys.readouterr().err


# ---- Training on all of it


def test_a_folder_of_everything_trains(folder, tmp_path):
    for package in ("safetensors", "diffusers", "yaml"):
        pytest.importorskip(package, reason="the train extra is not installed")
    from sora_fast.cli.__main__ import main

    root, good, bad = folder
    common = "steps: 1\nwarmup: 1\nlog-every: 1\nthreads: 1\ndevice: cpu\ntensorboard: false\n"
    (tmp_path / "vae.yaml").write_text(common + "crop: 16\nframes: 5\nimages: 2\n")
    (tmp_path / "dit.yaml").write_text(common + "budget: 64\nlook_ahead: 3\nshort_side: 16\nframes: 5\nwindows: 1\n"
                                       "latent_cache: none\n")
    for command, more in (("train-vae", ["--out", f"{tmp_path}/vae"]),
                          ("train", ["--out", f"{tmp_path}/dit", "--vae", f"{tmp_path}/vae"])):
        said = io.StringIO()
        config = tmp_path / ("vae.yaml" if command == "train-vae" else "dit.yaml")
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as done:
            main([command, "--config", str(config), "--data", str(root), *more])
        assert done.value.code == 0, said.getvalue()
        assert f"{len(bad)} skipped" in said.getvalue() and all(name in said.getvalue() for name in bad)
        assert "trained" in said.getvalue() or "wrote" in said.getvalue()
    from sora_fast.training.latents import load_library

    clips = load_library(tmp_path / "dit" / "latents")
    assert {Path(clip.source).name for clip in clips} == set(good)
    assert all(torch.isfinite(clip.latent).all() for clip in clips)
