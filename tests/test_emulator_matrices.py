"""Matrix instructions one by one: ldmatrix, stmatrix, mma.sync and wgmma, the forms that the kernels use and others.

Where an element lies is written here from the PTX ISA's figures, a lane and a register at a time: the fragments of mma
(9.7.14.5) and of wgmma (9.7.15.5), and the canonical layouts of shared memory (9.7.15.5.1). Elements are small integers, so
that every product is exact.
"""

import re

import numpy as np
import pytest
from emulator_runs import execute, half_bits, matching

RNG = np.random.default_rng(2)
SHARED = ".shared .align 1024 .b8 buffer[{}];\n"
LANES = range(32)


def integers(*shape):
    return RNG.integers(-4, 5, shape)


def encode(x, kind) -> int:
    """The bits of a small integer as an operand. The lowest 13 of tf32 do not count, and are set."""
    if kind == "tf32":
        return int(np.float32(x).view(np.uint32)) | 0x1FFF if x else 0x1FFF
    return half_bits(float(x), kind)


def packed(elements, kind) -> list[int]:
    """Registers of these elements, the first one in the low half."""
    bits = [encode(x, kind) for x in elements]
    return bits if kind == "tf32" else [low | high << 16 for low, high in zip(bits[::2], bits[1::2], strict=True)]


# ---- where the ISA's figures put the elements of a lane
def place_a(lane, i, kind):
    """Row and column of element i of A, 16 rows."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return group + 8 * (i % 2), thread + 4 * (i >= 2)
    return group + 8 * (i % 4 >= 2), thread * 2 + i % 2 + 8 * (i >= 4)


def place_b(lane, i, kind):
    group, thread = lane >> 2, lane % 4
    return (thread + 4 * i if kind == "tf32" else thread * 2 + i % 2 + 8 * (i >= 2)), group


def place_d(lane, i):
    group, thread = lane >> 2, lane % 4
    return group + 8 * (i % 4 >= 2), i // 4 * 8 + thread * 2 + i % 2


def names(letter, count, first=0):
    return "{" + ", ".join(f"%{letter}{at}" for at in range(first, first + count)) + "}"


def loads(letter, bits, count, at, first=0):
    """Registers of every thread from row t of array ``at``."""
    head = f"mad.wide.u32 %d20, %t, {count * 4}, %p{at};\n"
    return head + "\n".join(f"ld.global.{bits} %{letter}{first + i}, [%d20+{4 * i}];" for i in range(count))


def stores(letter, bits, count, at):
    head = f"mad.wide.u32 %d20, %t, {count * 4}, %p{at};\n"
    return head + "\n".join(f"st.global.{bits} [%d20+{4 * i}], %{letter}{i};" for i in range(count))


@pytest.mark.parametrize("form", matching(r"mma\.sync\..*") + ["mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32"])
def test_mma(form):
    depth, kind = int(re.search(r"n8k(\d+)", form)[1]), form.split(".")[-2]
    a, b, c = integers(16, depth), integers(depth, 8), integers(16, 8)
    per_a, per_b = 16 * depth // 32, 8 * depth // 32
    array = lambda value, place, count: [packed([value[place(lane, i, kind)] for i in range(count)], kind) for lane in LANES]
    given = [np.array(array(a, place_a, per_a), np.uint32), np.array(array(b, place_b, per_b), np.uint32),
             np.array([[c[place_d(lane, i)] for i in range(4)] for lane in LANES], np.float32)]  # fmt: skip
    regs_a, regs_b = given[0].shape[1], given[1].shape[1]
    out = np.zeros((32, 4), np.float32)
    vectors = f"{names('f', 4)}, {names('r', regs_a)}, {names('r', regs_b, 10)}, {names('f', 4, 10)}"
    body = [loads("r", "b32", regs_a, 0), loads("r", "b32", regs_b, 1, 10), loads("f", "f32", 4, 2, 10)]
    execute("\n".join([*body, f"{form} {vectors};", stores("f", "f32", 4, 3)]), [*given, out])
    want = [[sum(a[row, k] * b[k, column] for k in range(depth)) + c[row, column]
             for row, column in (place_d(lane, i) for i in range(4))] for lane in LANES]  # fmt: skip
    assert out.tolist() == want


@pytest.mark.parametrize("form", [f"{name}.sync.aligned.m8n8.x{count}{trans}.shared.b16" for name in ("ldmatrix", "stmatrix")
                                  for count in (1, 2, 4) for trans in ("", ".trans")])  # fmt: skip
def test_ldmatrix_and_stmatrix(form):
    """Lane l gives the address of row l % 8 of matrix l / 8, and holds two elements of each: of a row, or of a column."""
    count, trans = int(re.search(r"x(\d)", form)[1]), ".trans" in form
    matrices = RNG.integers(0, 2**16, (count, 8, 8))
    order = RNG.permutation(32)  # rows lie anywhere
    addresses = (order * 16).astype(np.uint32)
    two = lambda lane, at: [(lane % 4 * 2 + i, lane >> 2)[:: -1 if not trans else 1] for i in (0, 1)]
    registers = np.array([[sum(int(matrices[at][place]) << 16 * i for i, place in enumerate(two(lane, at)))
                           for at in range(count)] for lane in LANES], np.uint32)  # fmt: skip
    image = RNG.integers(0, 2**16, (32, 8)).astype(np.uint16)
    filled = image.copy()
    for at in range(count):
        filled[order[8 * at : 8 * at + 8]] = matrices[at]
    head = "mov.u32 %r20, buffer; mad.wide.u32 %d20, %t, 4, %p0; ld.global.b32 %r21, [%d20]; add.s32 %r21, %r21, %r20;\n"
    move = "mad.wide.u32 %d20, %t, 16, %p{}; mad.lo.u32 %r22, %t, 16, %r20;\n"
    four = names("r", 4, 30)
    fill = f"{move.format(1)}ld.global.v4.b32 {four}, [%d20]; st.shared.v4.b32 [%r22], {four};\n"
    empty = f"{move.format(2)}ld.shared.v4.b32 {four}, [%r22]; st.global.v4.b32 [%d20], {four};\n"

    if form.startswith("ldmatrix"):
        got = np.zeros((32, count), np.uint32)
        body = f"{head}{fill}bar.warp.sync -1; {form} {names('r', count)}, [%r21];\n{stores('r', 'b32', count, 2)}"
        execute(body, [addresses, filled, got], variables=SHARED.format(512))
        assert got.tolist() == registers.tolist()
    else:
        got = np.zeros((32, 8), np.uint16)
        body = (f"{head}{fill}{loads('r', 'b32', count, 3)}\nbar.warp.sync -1; {form} [%r21], {names('r', count)};\n"
                f"bar.warp.sync -1;\n{empty}")  # fmt: skip
        execute(body, [addresses, image, got, registers], variables=SHARED.format(512))
        assert got.tolist() == filled.tolist()


# ---- wgmma
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes of a swizzled row: the descriptor's bits 62 and 63
FULL = 1024  # between the operands' parts: a multiple of every swizzle's period


def swizzled(at, span):
    """16-byte chunks of a row of ``span`` bytes are exchanged, by the number of the 128 bytes they are in."""
    return at ^ (at // 128 % (span // 16)) * 16 if span else at


def layout(rows, depth, size, span, transposed):
    """(byte of each element, leading and stride byte offsets) of an operand of ``rows`` (M or N) by ``depth`` (K)."""
    place = np.zeros((rows, depth), int)
    if not transposed:  # K innermost: rows of span bytes, or core matrices of 8 rows of 16 bytes, K's two side by side
        lead, stride = (128, 256) if not span else (16, 8 * span)
        for row in range(rows):
            for k in range(depth):
                if span:
                    at = row // 8 * stride + row % 8 * span + k * size
                else:
                    at = row // 8 * stride + k * size // 16 * lead + row % 8 * 16 + k * size % 16
                place[row, k] = swizzled(at, span)
    elif span:  # M or N innermost: blocks of span bytes of it by 8 of K
        wide = span // size
        lead, stride = FULL * 2, 8 * span
        for row in range(rows):
            for k in range(depth):
                place[row, k] = swizzled(row // wide * lead + k // 8 * stride + k % 8 * span + row % wide * size, span)
    else:  # core matrices of 8 of K, each 8 of M or N wide
        stride, lead = 128, rows // 8 * 128
        for row in range(rows):
            for k in range(depth):
                place[row, k] = row // 8 * stride + k // 8 * lead + k % 8 * 16 + row % 8 * size
    return place, lead, stride


def run_wgmma(form, *, span_a=128, span_b=128, trans=(0, 0), registers=False, scale_d=1, negated=(1, 1)):
    """D of one instruction against the sum of products: A from shared memory, or from registers."""
    columns, depth, kind = re.search(r"n(\d+)k(\d+)\.f32\.(\w+)", form).groups()
    columns, depth, size = int(columns), int(depth), 4 if kind == "tf32" else 2
    a, b, c = integers(64, depth), integers(depth, columns), integers(64, columns)
    image, words, starts = np.zeros(1 << 16, np.uint8), f"<u{size}", (0, 1 << 15)
    descriptors = []
    for start, matrix, span, transposed in zip(starts, (a, b.T), (span_a, span_b), trans, strict=True):
        place, lead, stride = layout(*matrix.shape, size, span, transposed)
        assert len(np.unique(place)) == place.size and place.max() < 1 << 15
        for where, x in np.ndenumerate(matrix):
            image[start + place[where] :][:size].view(words)[0] = encode(int(x), kind)
        descriptors.append(lead >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[span] << 62 | start >> 4)
    count = columns // 2
    accumulators = np.array([[c[row + 16 * (t // 32), column] for row, column in (place_d(t % 32, i) for i in range(count))]
                             for t in range(128)], np.float32)  # fmt: skip
    in_lane = 4 if kind == "tf32" else 8
    fragments = np.array([packed([a[row + 16 * (t // 32), column] for row, column in
                                  (place_a(t % 32, i, kind) for i in range(in_lane))], kind) for t in range(128)], np.uint32)
    four = names("r", 4, 30)
    fill = "mov.u32 %r20, buffer; mad.lo.u32 %r22, %t, 16, %r20; mad.wide.u32 %d20, %t, 16, %p0;\n" + "\n".join(
        f"ld.global.v4.b32 {four}, [%d20+{at}]; st.shared.v4.b32 [%r22+{at}], {four};" for at in range(0, len(image), 2048))
    describe = "shr.u32 %r23, %r20, 4; cvt.u64.u32 %d21, %r23;\n" + "\n".join(
        f"mov.u64 %d{22 + at}, {d}; add.s64 %d{22 + at}, %d{22 + at}, %d21;" for at, d in enumerate(descriptors))
    flags = [*negated, *trans[registers:]] if kind != "tf32" else negated
    operands = f"{names('acc', count)}, {names('r', 4) if registers else '%d22'}, %d23, %q1, {', '.join(map(str, flags))}"
    body = f"""{fill}
{describe}
{loads('acc', 'f32', count, 1)}
{loads('r', 'b32', 4, 2)}
setp.ne.u32 %q1, {scale_d}, 0; fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;
{form} {operands};
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
{stores('acc', 'f32', count, 3)}"""
    out = np.zeros((128, count), np.float32)
    launch = execute(body, [image, accumulators, fragments, out], threads=128, race=True, shared_base=1024,
                     registers=f".reg .f32 %acc<{count}>;", variables=SHARED.format(len(image)))  # fmt: skip
    assert not launch.findings
    want = scale_d * c + negated[0] * negated[1] * (a @ b)
    for t in range(128):
        for i in range(count):
            row, column = place_d(t % 32, i)
            assert out[t, i] == want[row + 16 * (t // 32), column], (t, i)


@pytest.mark.parametrize("form", matching(r"wgmma\.mma_async\..*"))
def test_wgmma(form):
    span = 32 if "tf32" in form else 128
    run_wgmma(form, span_a=span, span_b=span)
    run_wgmma(form, span_b=span, registers=True)


@pytest.mark.parametrize("span", SWIZZLES)
def test_wgmma_from_every_layout(span):
    half = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
    for trans in ((0, 0), (0, 1), (1, 0), (1, 1)):
        run_wgmma(half, span_a=span, span_b=span, trans=trans)
    run_wgmma(half, span_b=span, trans=(0, 1), registers=True)
    run_wgmma("wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32", span_a=span, span_b=span)


def test_wgmma_signs_and_accumulators_that_are_not_read():
    run_wgmma("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16", scale_d=0, negated=(-1, 1))
    run_wgmma("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16", negated=(-1, -1), registers=True)
