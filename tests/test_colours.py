"""HDR and wide-gamut clips, photos with colour profiles and PNGs of 16 bits come out in the 8 bits of sRGB.

Signals are made here from light by the inverses of the standards' formulas; matrices are the published ones.
"""

import io
import struct
import warnings
import zlib
from fractions import Fraction

import pytest
import torch

av = pytest.importorskip("av")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from sora_fast.data import UnreadableMedia, probe, read_clip  # noqa: E402

BT2020_TO_709 = numpy.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])  # BT.2087
P3_TO_709 = numpy.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])
PQ, HLG = 16, 18


def pq(nits):
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = (numpy.asarray(nits) / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def hlg(nits):
    """Of a pixel (3,) in BT.2020, shown on a display of 1,000 cd/m2."""
    shown = numpy.asarray(nits, float) / 1000
    luminance = shown @ [0.2627, 0.6780, 0.0593]
    scene = shown * luminance ** (1 / 1.2 - 1) if luminance else shown
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return numpy.where(scene <= 1 / 12, numpy.sqrt(3 * scene), a * numpy.log(numpy.maximum(12 * scene - b, 1e-9)) + c)


def srgb(light):
    light = numpy.clip(light, 0, 1)
    return 255 * numpy.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def flat_clip(path, signal, *, transfer, primaries=9, matrix=9, full=False, codec="ffv1", bits=10):
    """Two frames of one R'G'B' signal (3,), 0 to 1, in Y'CbCr."""
    red, blue = {9: (0.2627, 0.0593), 1: (0.2126, 0.0722)}.get(matrix, (0.2627, 0.0593))
    r, g, b = signal
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    one, top = 1 << (bits - 8), (1 << bits) - 1
    levels = [top * y, *(top * c + 128 * one for c in chroma)] if full else \
        [one * (16 + 219 * y), *(one * (128 + 224 * c) for c in chroma)]
    kind, shape = ("yuv420p10le", numpy.uint16) if bits == 10 else ("yuv420p", numpy.uint8)
    planes = numpy.concatenate([numpy.full(count, round(float(level)), shape)
                                for count, level in zip((1024, 256, 256), levels, strict=True)]).reshape(48, 32)
    with av.open(str(path), "w") as container:
        unsaid = "log-level=none:colorprim=undef:transfer=undef:colormatrix=undef"  # so that the container alone says it
        options = {"libx264": {"crf": "0"}, "libx265": {"crf": "0", "x265-params": unsaid}}
        stream = container.add_stream(codec, rate=10, options=options.get(codec, {}))
        stream.width = stream.height = 32
        stream.pix_fmt = kind
        tags = dict(color_trc=transfer, color_primaries=primaries, colorspace=matrix, color_range=2 if full else 1)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(planes, format=kind)
            frame.pts, frame.time_base = number, Fraction(1, 10)
            for name, value in tags.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def pixel(path):
    item = probe(path)
    clip = read_clip(item, frames=item.frames)
    assert (clip == clip[:1, :1, :1]).all()
    return clip[0, 0, 0].numpy().astype(float)


RED = numpy.linalg.solve(BT2020_TO_709, [1.0, 0.0, 0.0])  # the red of BT.709
LIGHT = {"white": [203] * 3, "grey": [203 * 0.18] * 3, "black": [0] * 3, "lamp": [800] * 3, "red": 203 * RED,
         "leaf": [20, 60, 10]}


@pytest.mark.parametrize("transfer, signal", [(PQ, pq), (HLG, hlg)], ids=["pq", "hlg"])
@pytest.mark.parametrize("light", LIGHT)
def test_hdr_is_shown_by_its_light(tmp_path, transfer, signal, light):
    """White at 203 cd/m2 is 255; read as SDR it was a grey of 146."""
    wanted = srgb(BT2020_TO_709 @ (numpy.array(LIGHT[light]) / 203))
    read = pixel(flat_clip(tmp_path / "a.mkv", signal(LIGHT[light]), transfer=transfer))
    assert numpy.abs(read - wanted).max() <= 3, (read, wanted)  # 10 bits of PQ are 2 % of light, a level of Cr 4
    if light == "white":
        assert (read >= 254).all()


@pytest.mark.parametrize("settings", [dict(codec="libx264"), dict(full=True), dict(matrix=1), dict(bits=8),
                                      dict(primaries=2)], ids=str)
def test_hdr_in_other_clothes(tmp_path, settings):
    """H.264, full range, BT.709's matrix, 8 bits, primaries unsaid."""
    path = tmp_path / ("a.mp4" if "codec" in settings else "a.mkv")
    read = pixel(flat_clip(path, pq(LIGHT["leaf"]), transfer=PQ, **settings))
    wanted = srgb(BT2020_TO_709 @ (numpy.array(LIGHT["leaf"]) / 203))
    assert numpy.abs(read - wanted).max() <= (12 if "bits" in settings else 4), (read, wanted)


@pytest.mark.parametrize("primaries, matrix", [(9, BT2020_TO_709), (12, P3_TO_709), (1, numpy.eye(3)), (2, numpy.eye(3))])
def test_wide_gamuts_of_sdr_keep_their_colours(tmp_path, primaries, matrix):
    signal = numpy.array([0.6, 0.5, 0.4])
    wanted = 255 * numpy.clip(matrix @ signal**2.4, 0, 1) ** (1 / 2.4)
    read = pixel(flat_clip(tmp_path / "a.mkv", signal, transfer=1, primaries=primaries, matrix=9 if primaries == 9 else 1))
    assert numpy.abs(read - wanted).max() <= (1.5 if primaries > 2 else 2.5), (read, wanted)  # of which swscale's own 2
    grey = pixel(flat_clip(tmp_path / "b.mkv", [0.02] * 3, transfer=1, primaries=primaries, matrix=1))
    assert numpy.abs(grey - 255 * 0.02).max() <= 1.5


@pytest.mark.skipif("libx265" not in av.codecs_available, reason="this FFmpeg has no x265")
def test_what_the_container_alone_says_counts(tmp_path):
    path = flat_clip(tmp_path / "a.mp4", pq([203] * 3), transfer=PQ, codec="libx265")
    with av.open(str(path)) as container:
        assert int(next(container.decode(video=0)).color_trc) == 2
    assert (pixel(path) >= 252).all()


def test_colours_that_are_not_read_are_named(tmp_path):
    for settings in (dict(transfer=PQ, matrix=10), dict(transfer=HLG, primaries=22)):
        with pytest.raises(UnreadableMedia, match="a.mkv cannot be used .colours of another kind: HDR"):
            probe(flat_clip(tmp_path / "a.mkv", [0.5] * 3, **settings))


# ------------------------------------------------------------------------------------------------ profiles


def icc(space=b"RGB ", gamma=2.2):
    """A profile of Display P3's primaries, or of grey, with a plain gamma."""
    fixed = lambda *numbers: struct.pack(f">{len(numbers)}i", *(round(65536 * number) for number in numbers))
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(256 * gamma)) + b"\0\0"
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249), b"cprt": b"text\0\0\0\0none\0",
            b"desc": b"desc" + struct.pack(">II", 0, 5) + b"made\0" + bytes(78)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for name, places in ((b"r", (0.51512, 0.24120, -0.00105)), (b"g", (0.29198, 0.69225, 0.04189)),
                             (b"b", (0.15710, 0.06657, 0.78407))):
            tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + fixed(*places), name + b"TRC": curve}
    table, data, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        body += bytes(-len(body) % 4)
        table += name + struct.pack(">II", place + len(data), len(body))
        data += body
    header = struct.pack(">I4sI4s4s4s12s4s", place + len(data), bytes(4), 0x02400000, b"mntr", space, b"XYZ ", bytes(12),
                         b"acsp") + bytes(28) + fixed(0.9642, 1.0, 0.8249) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + data


def still(path):
    return read_clip(probe(path), frames=1)[0].numpy().astype(float)


@pytest.mark.parametrize("name, mode, within", [("a.png", "RGB", 1.5), ("a.jpg", "RGB", 5), ("a.webp", "RGB", 6),
                                                ("a.png", "RGBA", 1.5), ("a.png", "P", 1.5)])
def test_a_display_p3_photo_becomes_srgb(tmp_path, name, mode, within):
    colour = (200, 120, 90)
    picture = Image.new("RGB", (16, 16), colour)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    if mode == "RGBA":
        picture.putpixel((0, 0), (*colour, 0))
    picture.save(tmp_path / name, icc_profile=icc(), quality=100)
    wanted = srgb(P3_TO_709 @ (numpy.array(colour) / 255) ** 2.2)
    assert numpy.abs(wanted - colour).max() > 10
    read = still(tmp_path / name)
    assert numpy.abs(read[8:] - wanted).max() <= within, (read[8, 0], wanted)
    if mode == "RGBA":
        assert (read[0, 0] == 255).all()  # transparent, over white


def test_profiles_of_grey_and_of_srgb(tmp_path):
    from PIL import ImageCms

    levels = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "grey.png", icc_profile=icc(b"GRAY", 1.0))
    assert numpy.abs(still(tmp_path / "grey.png") - srgb(levels / 255)[..., None]).max() <= 1.5
    Image.fromarray(levels.astype(numpy.uint16) * 257).save(tmp_path / "deep.png", icc_profile=icc(b"GRAY", 1.0))
    assert numpy.abs(still(tmp_path / "deep.png") - srgb(levels / 255)[..., None]).max() <= 1.5
    noise = numpy.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise).save(tmp_path / "own.png", icc_profile=own)
    assert (still(tmp_path / "own.png") == noise).all()  # bit for bit


def test_a_profile_that_cannot_be_used_is_told_once_by_the_file_s_name(tmp_path):
    for name, profile in (("broken.png", b"not a profile"), ("grey.png", icc(b"GRAY"))):
        Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / name, icc_profile=profile)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            for _ in range(2):
                assert (still(tmp_path / name) == (9, 8, 7)).all()
        (sentence,) = [str(each.message) for each in told]
        assert sentence.startswith(f"{tmp_path / name}: its colour profile cannot be used (")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path, levels_HWC, kind, *more, bits=16):
    height, width, _ = levels_HWC.shape
    if bits == 16:
        lines = [line.astype(">u2").tobytes() for line in levels_HWC]
    else:
        packed = ["".join(f"{level:0{bits}b}" for level in line.ravel()) for line in levels_HWC]
        lines = [int(each.ljust(-(-len(each) // 8) * 8, "0"), 2).to_bytes(-(-len(each) // 8), "big") for each in packed]
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(*each) for each in more)
                     + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))) + chunk(b"IEND", b""))
    return path


def test_headers_that_name_other_colours_are_told(tmp_path):
    levels = numpy.full((4, 4, 3), 128)
    xy = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)  # Adobe RGB's green
    for name, more, words in (("gamma", (b"gAMA", struct.pack(">I", 100000)), r"a gamma of 1 \(gAMA\)"),
                              ("green", (b"cHRM", struct.pack(">8I", *xy)), r"primaries that are not sRGB's \(cHRM\)")):
        png(tmp_path / f"{name}.png", levels, 2, more, bits=8)
        with pytest.warns(UserWarning, match=rf"{name}.png: its header says {words}: its pixels are read as sRGB"):
            assert (still(tmp_path / f"{name}.png") == 128).all()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    Image.new("RGB", (8, 8)).save(tmp_path / "adobe.jpg", exif=exif)
    with pytest.warns(UserWarning, match=r"adobe.jpg: its header says Adobe RGB \(Exif\), without a profile"):
        still(tmp_path / "adobe.jpg")


def test_sixteen_bits_of_colour_are_rounded_and_their_key_is_clear(tmp_path):
    levels = numpy.random.default_rng(0).integers(0, 65536, (9, 11, 3))
    levels[2, 3] = (0x12FF, 0x3456, 0x7800)
    levels[2, 4] = (0x1200, 0x3456, 0x7800)  # the key's high bytes are not the key
    key = struct.pack(">HHH", 0x12FF, 0x3456, 0x7800)
    wanted = numpy.rint(levels / 257)
    assert (still(png(tmp_path / "a.png", levels, 2)) == wanted).all()
    wanted[2, 3] = 255
    read = still(png(tmp_path / "b.png", levels, 2, (b"tRNS", key)))
    assert (read == wanted).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = png(tmp_path / "c.png", levels, 2, (b"eXIf", exif.tobytes()[6:]))
    item = probe(turned)
    assert (item.width, item.height) == (9, 11)
    assert (still(turned) == numpy.rot90(numpy.rint(levels / 257), -1)).all()
    profiled = png(tmp_path / "d.png", levels, 2, (b"iCCP", b"p3\0\0" + zlib.compress(icc())))
    shifted = srgb(numpy.einsum("ij,hwj->hwi", P3_TO_709, (levels / 65535) ** 2.2))
    assert numpy.abs(still(profiled) - shifted).max() <= 2.5


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_clear_level_of_shallow_grey_is_clear(tmp_path, bits):
    top = (1 << bits) - 1
    levels = numpy.arange(1 << bits).reshape(1, -1, 1)
    read = still(png(tmp_path / "a.png", levels, 0, (b"tRNS", struct.pack(">H", 1)), bits=bits))
    wanted = numpy.where(levels == 1, 255, numpy.rint(levels * 255 / top)).repeat(3, -1)
    assert (read == wanted).all()


def test_a_png_that_says_hdr_is_shown_by_its_light(tmp_path):
    levels = numpy.rint(65535 * pq([203, 203, 203])).reshape(1, 1, 3).astype(int).repeat(4, 0).repeat(4, 1)
    for bits in (16, 8):
        data = levels if bits == 16 else numpy.rint(levels / 257).astype(int)
        assert (still(png(tmp_path / f"{bits}.png", data, 2, (b"cICP", bytes([9, PQ, 0, 1])), bits=bits)) >= 252).all()


def test_a_colour_that_is_lost_is_seen(tmp_path):
    """The comparison of HDR itself: read as SDR, its white is far from white."""
    path = flat_clip(tmp_path / "a.mkv", pq([203] * 3), transfer=1, primaries=1, matrix=1)
    assert pixel(path).max() < 155
    assert io.BytesIO(icc()).read(4) == struct.pack(">I", len(icc())) and torch.is_tensor(read_clip(probe(path), frames=1))
