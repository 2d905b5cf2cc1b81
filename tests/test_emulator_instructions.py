"""Single instructions against what the PTX ISA says, worked out in plain Python integers and floats."""

import math
import struct

import numpy as np
import pytest
from emulator_runs import execute

from sora_fast.emulator import memory
from sora_fast.emulator.machine import Deadlock, Schedule

RNG = np.random.default_rng(0)
EDGES = [0, 1, 2, 31, 32, 33, 63, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x12345678, 0xDEADBEEF]
A = np.array((EDGES + RNG.integers(0, 2**32, 32).tolist())[:32], np.uint32)
B = np.array((EDGES[::-1] + RNG.integers(0, 2**32, 32).tolist())[:32], np.uint32)
C = np.array((RNG.integers(0, 40, 32)).tolist(), np.uint32)


def signed(x):
    return x - 2**32 if x >= 2**31 else x


def three(instruction):
    out = np.zeros(32, np.uint32)
    execute(
        f"""add.s64 %d0, %p0, %t4; add.s64 %d1, %p1, %t4; add.s64 %d2, %p2, %t4; add.s64 %d3, %p3, %t4;
ld.global.b32 %r1, [%d0]; ld.global.b32 %r2, [%d1]; ld.global.b32 %r3, [%d2];
{instruction}
st.global.b32 [%d3], %r0;""",
        [A, B, C, out],
    )
    return out.tolist()


def prmt(a, b, c):
    both = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for i in range(4):
        s = c >> 4 * i & 15
        byte = both[s & 7]
        out |= (0xFF if byte & 0x80 else 0) << 8 * i if s & 8 else byte << 8 * i
    return out


def bfe_s(a, b, c):
    pos, length = b & 255, c & 255
    msb = 31
    sign = 0 if length == 0 else a >> min(pos + length - 1, msb) & 1
    return sum((sign if i >= length or pos + i > msb else a >> pos + i & 1) << i for i in range(32))


def bfi(a, b, c, pos, length):
    out = b
    for i in range(length):
        if pos + i <= 31:
            out = out & ~(1 << pos + i) | (a >> i & 1) << pos + i
    return out


def truncated(a, b):
    return 0xFFFFFFFF if b == 0 else int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b)) & 0xFFFFFFFF


@pytest.mark.parametrize(
    "instruction, meant",
    [
        ("add.s32 %r0, %r1, %r2;", lambda a, b, c: a + b),
        ("sub.s32 %r0, %r1, %r2;", lambda a, b, c: a - b),
        ("mul.lo.s32 %r0, %r1, %r2;", lambda a, b, c: a * b),
        ("mul.hi.u32 %r0, %r1, %r2;", lambda a, b, c: a * b >> 32),
        ("mul.hi.s32 %r0, %r1, %r2;", lambda a, b, c: signed(a) * signed(b) >> 32),
        ("mad.lo.s32 %r0, %r1, %r2, %r3;", lambda a, b, c: a * b + c),
        ("shl.b32 %r0, %r1, %r3;", lambda a, b, c: a << c if c < 32 else 0),
        ("shr.u32 %r0, %r1, %r3;", lambda a, b, c: a >> c if c < 32 else 0),
        ("shr.s32 %r0, %r1, %r3;", lambda a, b, c: signed(a) >> min(c, 31)),
        ("shr.s32 %r0, %r1, 40;", lambda a, b, c: signed(a) >> 31),
        ("shl.b32 %r0, %r1, 32;", lambda a, b, c: 0),
        ("shf.l.wrap.b32 %r0, %r1, %r2, %r3;", lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
        ("shf.r.clamp.b32 %r0, %r1, %r2, %r3;", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
        ("prmt.b32 %r0, %r1, %r2, 0x5410;", lambda a, b, c: prmt(a, b, 0x5410)),
        ("prmt.b32 %r0, %r1, %r2, 0xF3A9;", lambda a, b, c: prmt(a, b, 0xF3A9)),
        ("lop3.b32 %r0, %r1, %r2, %r3, 0xCA;", lambda a, b, c: a & b | ~a & c),
        ("lop3.b32 %r0, %r1, %r2, %r3, 0x96;", lambda a, b, c: a ^ b ^ c),
        ("bfe.u32 %r0, %r1, 5, 9;", lambda a, b, c: a >> 5 & 511),
        ("bfe.u32 %r0, %r1, %r3, 40;", lambda a, b, c: a >> c if c < 32 else 0),
        ("bfe.s32 %r0, %r1, 5, 9;", lambda a, b, c: bfe_s(a, 5, 9)),
        ("bfe.s32 %r0, %r1, %r3, 12;", lambda a, b, c: bfe_s(a, c, 12)),
        ("bfi.b32 %r0, %r1, %r2, 7, 11;", lambda a, b, c: bfi(a, b, c, 7, 11)),
        ("bfi.b32 %r0, %r1, %r2, %r3, 11;", lambda a, b, c: bfi(a, b, c, c, 11)),
        ("popc.b32 %r0, %r1;", lambda a, b, c: a.bit_count()),
        ("clz.b32 %r0, %r1;", lambda a, b, c: 32 - a.bit_length()),
        ("brev.b32 %r0, %r1;", lambda a, b, c: int(f"{a:032b}"[::-1], 2)),
        ("div.u32 %r0, %r1, %r2;", lambda a, b, c: a // b if b else 0xFFFFFFFF),
        ("min.s32 %r0, %r1, %r2;", lambda a, b, c: min(signed(a), signed(b))),
        ("max.u32 %r0, %r1, %r2;", lambda a, b, c: max(a, b)),
        ("div.s32 %r0, %r1, %r2;", lambda a, b, c: truncated(signed(a), signed(b))),
        ("not.b32 %r0, %r1;", lambda a, b, c: ~a),
        ("neg.s32 %r0, %r1;", lambda a, b, c: -a),
        ("setp.lt.s32 %q1, %r1, %r2; selp.b32 %r0, %r1, %r2, %q1;", lambda a, b, c: min(signed(a), signed(b))),
        ("setp.gt.u32 %q1|%q2, %r1, %r2; selp.b32 %r0, 1, 0, %q2;", lambda a, b, c: int(not a > b)),
        ("mov.b32 {%h1, %h2}, %r1; mov.b32 %r0, {%h2, %h1};", lambda a, b, c: a >> 16 | (a & 0xFFFF) << 16),
        ("mov.b64 %d9, {%r1, %r2}; shr.u64 %d9, %d9, 16; mov.b64 {%r0, %r9}, %d9;", lambda a, b, c: (b << 32 | a) >> 16),
        ("cvt.s64.s32 %d9, %r1; shr.s64 %d9, %d9, 8; cvt.u32.u64 %r0, %d9;", lambda a, b, c: signed(a) >> 8),
        (
            "mul.wide.s32 %d9, %r1, %r2; shr.s64 %d9, %d9, 32; cvt.u32.u64 %r0, %d9;",
            lambda a, b, c: signed(a) * signed(b) >> 32,
        ),
        ("setp.gt.u32 %q1, %r3, 20; mov.b32 %r0, %r1; @%q1 add.s32 %r0, %r0, 7;", lambda a, b, c: a + 7 if c > 20 else a),
        ("@%q3 bra LATER; mov.b32 %r0, 5; LATER: add.s32 %r0, %r0, %r1;", lambda a, b, c: a + 5),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_integers(instruction, meant):
    assert three(instruction) == [meant(int(a), int(b), int(c)) & 0xFFFFFFFF for a, b, c in zip(A, B, C, strict=True)]


def bf16(x):
    """Round to nearest, ties to even, by exact comparison."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    low, high = bits & 0xFFFF, bits >> 16
    return (high + (low > 0x8000 or low == 0x8000 and high & 1)) & 0xFFFF


def floats(instruction, x, y):
    out = np.zeros(32, np.uint32)
    execute(
        f"""add.s64 %d0, %p0, %t4; add.s64 %d1, %p1, %t4; add.s64 %d3, %p2, %t4;
ld.global.f32 %f1, [%d0]; ld.global.f32 %f2, [%d1];
{instruction}
st.global.b32 [%d3], %r0;""",
        [x, y, out],
    )
    return out


def test_conversions():
    x = np.concatenate([RNG.standard_normal(28), [0.0, -0.0, 1.00390625, 1.01171875]]).astype(np.float32)  # two ties
    y = RNG.standard_normal(32).astype(np.float32)
    got = floats("cvt.rn.bf16x2.f32 %r0, %f1, %f2;", x, y)
    assert got.tolist() == [bf16(float(a)) << 16 | bf16(float(b)) for a, b in zip(x, y, strict=True)]
    got = floats("cvt.rzi.s32.f32 %r0, %f1;", x * 100, y)
    assert got.view(np.int32).tolist() == [int(v) for v in x * np.float32(100)]
    got = floats("cvt.rna.tf32.f32 %r0, %f1;", x, y)
    assert (got & 0x1FFF == 0).all() and np.abs(got.view(np.float32) - x).max() <= np.abs(x).max() * 2**-11
    got = floats("cvt.rn.f16x2.f32 %r0, %f1, %f2;", x, y)
    assert (got >> 16).astype(np.uint16).tolist() == x.astype(np.float16).view(np.uint16).tolist()


def test_nan_and_comparisons():
    x = np.array([np.nan, 1, 2, np.nan] * 8, np.float32)
    y = np.array([1, np.nan, 2, np.nan] * 8, np.float32)
    assert floats("max.f32 %f3, %f1, %f2; mov.b32 %r0, %f3;", x, y).view(np.float32)[:3].tolist() == [1, 1, 2]
    assert np.isnan(floats("max.NaN.f32 %f3, %f1, %f2; mov.b32 %r0, %f3;", x, y).view(np.float32)[:2]).all()
    for name, meant in (
        ("lt", [0, 0, 0, 0]),
        ("ltu", [1, 1, 0, 1]),
        ("ne", [0, 0, 0, 0]),
        ("neu", [1, 1, 0, 1]),
        ("eq", [0, 0, 1, 0]),
        ("equ", [1, 1, 1, 1]),
        ("nan", [1, 1, 0, 1]),
        ("num", [0, 0, 1, 0]),
    ):
        assert floats(f"setp.{name}.f32 %q1, %f1, %f2; selp.b32 %r0, 1, 0, %q1;", x, y)[:4].tolist() == meant, name


def test_shuffles():
    out = np.zeros(32, np.uint32)
    for mode, by, c, meant in (
        ("bfly", 5, 31, lambda l: l ^ 5),
        ("down", 3, 31, lambda l: l + 3 if l + 3 < 32 else l),
        ("up", 3, 0, lambda l: l - 3 if l >= 3 else l),
        ("idx", 7, 31, lambda l: 7),
        ("idx", 1, 0x181F, lambda l: l // 8 * 8 + 1),
        ("down", 2, 0x181F, lambda l: l + 2 if l % 8 < 6 else l),
    ):
        execute(f"add.s64 %d3, %p0, %t4; shfl.sync.{mode}.b32 %r0|%q1, %t, {by}, {c}, -1; st.global.b32 [%d3], %r0;", [out])
        assert out.tolist() == [meant(lane) for lane in range(32)], (mode, by, c)
    execute(
        "add.s64 %d3, %p0, %t4; setp.gt.u32 %q1, %t, 29; vote.sync.ballot.b32 %r0, %q1, -1; st.global.b32 [%d3], %r0;", [out]
    )
    assert (out == 0xC0000000).all()


LOOP = """mov.b32 %r0, 0; mov.b32 %r1, 0;
AGAIN: add.s32 %r0, %r0, %r1; add.s32 %r1, %r1, 1; setp.le.u32 %q1, %r1, %t; @%q1 bra AGAIN;
add.s64 %d3, %p0, %t4; st.global.b32 [%d3], %r0;"""


@pytest.mark.parametrize("seed", (None, 1, 2))
def test_lanes_go_their_own_ways_and_meet_again(seed):
    out = np.zeros(96, np.uint32)
    execute(LOOP, [out], threads=96, schedule=Schedule(seed))
    assert out.tolist() == [t * (t + 1) // 2 for t in range(96)]


SHARED = ".shared .align 16 .b8 buffer[1024];\n"
CROSS = """mov.u32 %r5, buffer; shl.b32 %r6, %t, 2; add.s32 %r7, %r5, %r6; st.shared.b32 [%r7], %t;
BARRIER
xor.b32 %r8, %r6, 128; add.s32 %r8, %r8, %r5; ld.shared.b32 %r0, [%r8];
add.s64 %d3, %p0, %t4; st.global.b32 [%d3], %r0;"""


def test_races_are_seen():
    out = np.zeros(64, np.uint32)
    good = execute(CROSS.replace("BARRIER", "bar.sync 0;"), [out], threads=64, variables=SHARED, race=True)
    assert out.tolist() == [t ^ 32 for t in range(64)] and not good.findings
    bad = execute(CROSS.replace("BARRIER", ""), [out], threads=64, variables=SHARED, race=True)
    assert [kind for kind, _ in bad.findings] == ["race: not ordered behind a write"]
    unset = execute(
        CROSS.replace("st.shared.b32 [%r7], %t;", "").replace("BARRIER", "bar.sync 0;"), [out], threads=64, variables=SHARED
    )
    assert [kind for kind, _ in unset.findings] == ["uninitialised shared memory"]


def test_out_of_bounds_and_deadlock():
    out = np.zeros(31, np.uint32)
    with pytest.raises(memory.Fault, match="out of bounds"):
        execute("add.s64 %d3, %p0, %t4; st.global.b32 [%d3], %t;", [out])
    with pytest.raises(memory.Fault, match="shared access"):
        execute("mov.u32 %r5, buffer; st.shared.b32 [%r5+1024], %t;", [out], variables=SHARED)
    waits = """mov.u32 %r5, buffer; setp.eq.u32 %q1, %t, 0; @%q1 mbarrier.init.shared::cta.b64 [%r5], 2; bar.sync 0;
@%q1 mbarrier.arrive.shared::cta.b64 _, [%r5];
AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %q2, [%r5], 0; @!%q2 bra AGAIN;"""
    with pytest.raises(Deadlock, match="1 arrivals and 0 bytes pending"):
        execute(waits, [out], variables=SHARED)


def test_divergent_barrier_is_a_deadlock_and_an_early_exit_is_not():
    out = np.zeros(64, np.uint32)
    body = "setp.gt.u32 %q1, %t, 40; @%q1 ret; bar.sync 0; add.s64 %d3, %p0, %t4; st.global.b32 [%d3], 1;"
    execute(body, [out], threads=64)
    assert out.tolist() == [1] * 41 + [0] * 23
    apart = "setp.gt.u32 %q1, %t, 31; @%q1 bra OTHER; bar.sync 1, 64; bra LAST; OTHER: bar.sync 2, 64; LAST:"
    with pytest.raises(Deadlock, match="warp 1 waits at barrier 2"):
        execute(apart, [out], threads=64)
