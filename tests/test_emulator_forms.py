"""Every form of an instruction that a kernel of ours uses (emulator_forms.txt, made by emulator_census.py) is tested: here
against plain Python integers and floats, or by a test named in ELSEWHERE, whose text must have it.
"""

import math
import re
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import test_emulator_copies
import test_emulator_matrices
from emulator_runs import FORMS, bits_of, execute, half_bits, matching

from sora_fast.emulator.forms import reason

HERE = Path(__file__).parent
# Tested where they mean something: in exchanges, copies and barriers.
ELSEWHERE = {
    "test_emulator_races.py": ("bar.sync", "bar.warp.sync", "fence.mbarrier_init.release.cluster",
                               "fence.proxy.async.shared::cta", "mbarrier.init.shared::cta.b64",
                               "mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.try_wait.parity.shared::cta.b64",
                               "wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned",
                               "wgmma.wait_group.sync.aligned", "bra"),
    "test_emulator_copies.py": ("cp.async.commit_group", "cp.async.wait_group", "cp.async.bulk.commit_group",
                                "cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read", "prefetch.tensormap",
                                "fence.proxy.tensormap::generic.acquire.gpu", "mbarrier.inval.shared::cta.b64",
                                *matching(r"tensormap\..*")),
    "test_emulator_instructions.py": ("mbarrier.arrive.shared::cta.b64", "ret"),
}  # fmt: skip


RNG = np.random.default_rng(1)
EDGES = [0, 1, 2, 3, 15, 31, 32, 63, 64, 255, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63]
DRAWN = EDGES + RNG.integers(0, 2**64, 32, dtype=np.uint64).tolist()
INTS = [np.array(DRAWN[at : at + 32][::step], np.uint64) for at, step in ((0, 1), (3, -1), (7, 1))]
SHIFTS = np.array([0, 1, 7, 15, 16, 31, 32, 33, 63, 64, 200] * 3, np.uint64)[:32]
FLOATS = RNG.standard_normal(26).astype(np.float32)
PRELUDE = "".join(
    f"mad.wide.u32 %d9, %t, 8, %p{at}; ld.global.b64 %d{at + 1}, [%d9]; cvt.u32.u64 %r{at + 1}, %d{at + 1}; "
    f"cvt.u16.u32 %h{at + 1}, %r{at + 1}; mov.b32 %f{at + 1}, %r{at + 1}; setp.ne.u32 %q{at + 1}, %r{at + 1}, 0;\n"
    for at in range(3)
)
STORE = "mad.wide.u32 %d9, %t, 8, %p3; st.global.b64 [%d9], %d0;"
WIDEN = {"h": "cvt.u64.u16 %d0, %h0;", "r": "cvt.u64.u32 %d0, %r0;", "d": "", "f": "mov.b32 %r0, %f0; cvt.u64.u32 %d0, %r0;",
         "q": "selp.b32 %r0, 1, 0, %q0; cvt.u64.u32 %d0, %r0;"}  # fmt: skip


def run(instruction, result, arrays):
    """The bits of register %<result>0 of 32 threads; inputs are in registers 1 to 3 of every kind."""
    out = np.zeros(32, np.uint64)
    execute(f"{PRELUDE}{instruction}\n{WIDEN[result]}\n{STORE}", [*arrays, out])
    return out.tolist()


def register(kind):
    """Its letter, and its width in bits."""
    bits = int(re.search(r"\d+", kind)[0]) if kind != "pred" else 1
    return ("q" if kind == "pred" else "f" if kind == "f32" else {8: "h", 16: "h", 32: "r", 64: "d"}[bits]), bits


def value(bits, kind):
    width = register(kind)[1]
    bits &= 2**width - 1
    return bits - 2**width if kind.startswith("s") and bits >> width - 1 else bits


def trunc_div(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "div": trunc_div, "rem": lambda a, b: a - trunc_div(a, b) * b,
}  # fmt: skip
COMPARE = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
           "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}  # fmt: skip


@pytest.mark.parametrize("form", matching(r"(add|sub|mul\.lo|min|max|and|or|xor|div|rem)\.([bsu]\d+|pred)"))
def test_integer(form):
    name, _, kind = form.rpartition(".")
    letter, bits = register(kind)
    x, y = INTS[0], INTS[1] | np.uint64(1) if name in ("div", "rem") else INTS[1]
    got = run(f"{form} %{letter}0, %{letter}1, %{letter}2;", letter, [x, y, INTS[2]])
    if kind == "pred":
        want = [INTEGER[name](int(a) & 0xFFFFFFFF != 0, int(b) & 0xFFFFFFFF != 0) for a, b in zip(x, y, strict=True)]
    else:
        want = [INTEGER[name](value(int(a), kind), value(int(b), kind)) & 2**bits - 1 for a, b in zip(x, y, strict=True)]
    assert got == [int(w) for w in want]


@pytest.mark.parametrize("form", matching(r"(mul\.(wide|hi)|mad\.(wide|hi|lo))\.[su]\d+"))
def test_multiply(form):
    name, part, kind = form.split(".")
    letter, bits = register(kind)
    to = {"h": "r", "r": "d"}[letter] if part == "wide" else letter
    width = 2 * bits if part == "wide" else bits
    got = run(f"{form} %{to}0, %{letter}1, %{letter}2{f', %{to}3' if name == 'mad' else ''};", to, INTS)
    for a, b, c, found in zip(*(x.tolist() for x in INTS), got, strict=True):
        product = value(a, kind) * value(b, kind)
        product = product >> bits if part == "hi" else product
        assert found == (product + (c if name == "mad" else 0)) & 2**width - 1


@pytest.mark.parametrize("form", matching(r"(shl|shr)\.[bsu]\d+"))
def test_shift(form):
    name, kind = form.split(".")
    letter, bits = register(kind)
    got = run(f"{form} %{letter}0, %{letter}1, %r2;", letter, [INTS[0], SHIFTS, INTS[2]])
    for a, by, found in zip(INTS[0].tolist(), SHIFTS.tolist(), got, strict=True):
        want = value(a, kind) << by if name == "shl" else value(a, kind) >> min(by, bits if kind[0] != "s" else bits - 1)
        assert found == want & 2**bits - 1


@pytest.mark.parametrize("form", matching(r"(neg|not)\.([bs]\d+|pred)"))
def test_unary(form):
    name, kind = form.split(".")
    letter, bits = register(kind)
    got = run(f"{form} %{letter}0, %{letter}1;", letter, INTS)
    if kind == "pred":
        assert got == [int(a & 0xFFFFFFFF == 0) for a in INTS[0].tolist()]
    else:
        assert got == [(-a if name == "neg" else ~a) & 2**bits - 1 for a in INTS[0].tolist()]


@pytest.mark.parametrize("form", matching(r"setp\.\w+\.[bsu]\d+"))
def test_compare_integers(form):
    _, name, kind = form.split(".")
    letter, _ = register(kind)
    y = np.where(np.arange(32) % 3 == 0, INTS[0], INTS[1])
    got = run(f"{form} %q0, %{letter}1, %{letter}2;", "q", [INTS[0], y, INTS[2]])
    assert got == [int(COMPARE[name](value(int(a), kind), value(int(b), kind))) for a, b in zip(INTS[0], y, strict=True)]


@pytest.mark.parametrize("form", [f for f in FORMS if f.startswith("selp.")])
def test_select(form):
    letter, bits = register(form.split(".")[1])
    got = run(f"{form} %{letter}0, %{letter}1, %{letter}2, %q3;", letter, INTS)
    assert got == [(a if c & 0xFFFFFFFF else b) & 2**bits - 1 for a, b, c in zip(*(x.tolist() for x in INTS), strict=True)]


@pytest.mark.parametrize("form", matching(r"cvt\.[su]\d+\.[su]\d+"))
def test_convert_integers(form):
    _, to, source = form.split(".")
    got = run(f"{form} %{register(to)[0]}0, %{register(source)[0]}1;", register(to)[0], INTS)
    held = {8: 16}.get(register(to)[1], register(to)[1])  # an 8-bit result is extended in its 16-bit register
    assert got == [value(value(a, source), to) & 2**held - 1 for a in INTS[0].tolist()]


# ---- floating point
def nearest(x: Fraction) -> float:
    """The float32 next to a fraction, ties to even, by comparison of exact distances."""
    guess = np.float32(float(x))
    around = [float(np.nextafter(guess, np.float32(-np.inf))), float(guess), float(np.nextafter(guess, np.float32(np.inf)))]
    finite = [v for v in around if math.isfinite(v)]
    return min(finite, key=lambda v: (abs(Fraction(v) - x), bits_of(v) & 1))


EXACT = {"add.f32": lambda a, b, c: a + b, "sub.f32": lambda a, b, c: a - b, "mul.f32": lambda a, b, c: a * b,
         "fma.rn.f32": lambda a, b, c: a * b + c, "div.rn.f32": lambda a, b, c: a / b}  # fmt: skip
SAFE = np.array([1.5, -2.25, 3.0, 1 + 2**-23, 1 - 2**-24, 2**-60, 7.0, -0.1] * 4, np.float32)
SAFE = [SAFE, SAFE * np.float32(1.1), SAFE * np.float32(-3)]


def as_bits(arrays):
    return [a.view(np.uint32).astype(np.uint64) for a in arrays]


@pytest.mark.parametrize("form", [*EXACT, "fma.rn.ftz.f32"])
def test_float_is_rounded_once(form):
    instruction = f"{form} %f0, %f1, %f2{', %f3' if form.startswith('fma') else ''};"
    for arrays in (SAFE, [FLOATS.repeat(2)[:32], SAFE[0], SAFE[2]]):
        got = np.array(run(instruction, "f", as_bits(arrays)), np.uint32).view(np.float32)
        for a, b, c, found in zip(*(x.tolist() for x in arrays), got.tolist(), strict=True):
            assert found == nearest(EXACT[form.replace(".ftz", "")](Fraction(a), Fraction(b), Fraction(c)))


def test_fma_where_float64_would_round_twice():
    """a * b + c lies just above the middle of two float32 numbers, by less than float64 keeps."""
    a = np.full(32, 1 + 2**-12, np.float32)
    c = np.full(32, 2.0**-70, np.float32)
    b = np.full(32, 1 - 2**-12 + 2**-24, np.float32)
    got = np.array(run("fma.rn.f32 %f0, %f1, %f2, %f3;", "f", as_bits([a, b, c])), np.uint32).view(np.float32)
    want = nearest(Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0])))
    assert (got == np.float32(want)).all()


@pytest.mark.parametrize("form, meant", [
    ("abs.f32", abs), ("neg.f32", lambda a: -a), ("sqrt.rn.f32", lambda a: math.sqrt(a) if a >= 0 else math.nan),
    ("ex2.approx.f32", lambda a: 2.0**a), ("ex2.approx.ftz.f32", lambda a: 2.0**a), ("rcp.approx.ftz.f32", lambda a: 1 / a),
    ("cvt.rmi.ftz.f32.f32", math.floor),
])  # fmt: skip
def test_float_functions(form, meant):
    got = np.array(run(f"{form} %f0, %f1;", "f", as_bits(SAFE)), np.uint32).view(np.float32)
    np.testing.assert_allclose(got, [meant(a) for a in SAFE[0].tolist()], rtol=2e-7)


def test_ftz_flushes_operands_and_results():
    tiny = np.full(32, 1e-40, np.float32)
    one = np.ones(32, np.float32)
    assert set(run("fma.rn.ftz.f32 %f0, %f1, %f2, %f3;", "f", as_bits([tiny, one, tiny]))) == {0}
    assert set(run("fma.rn.f32 %f0, %f1, %f2, %f3;", "f", as_bits([tiny, one, tiny]))) != {0}
    low = np.full(32, -140.0, np.float32)
    assert set(run("ex2.approx.ftz.f32 %f0, %f1;", "f", as_bits([low, one, one]))) == {0}


@pytest.mark.parametrize("form", matching(r"div\.(full|approx)\.f32"))
def test_divide(form):
    got = np.array(run(f"{form} %f0, %f1, %f2;", "f", as_bits(SAFE)), np.uint32).view(np.float32)
    np.testing.assert_allclose(got, SAFE[0].astype(float) / SAFE[1], rtol=2e-7)


@pytest.mark.parametrize("form", matching(r"setp\.\w+\.f32"))
def test_compare_floats(form):
    name = form.split(".")[1]
    x = np.array([np.nan, 1.0, -0.0, 2.0] * 8, np.float32)
    y = np.array([1.0, np.nan, 0.0, 3.0] * 8, np.float32)
    got = run(f"{form} %q0, %f1, %f2;", "q", as_bits([x, y, x]))
    meant = {"num": lambda a, b: a == a and b == b, **COMPARE, "ne": lambda a, b: a < b or a > b}[name]
    assert got == [int(meant(a, b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]


@pytest.mark.parametrize("form", matching(r"(add|sub|mul|fma)\.(rn\.)?f32x2"))
def test_pairs(form):
    arrays = [SAFE[0].view(np.uint64).repeat(2), SAFE[1].view(np.uint64).repeat(2), SAFE[2].view(np.uint64).repeat(2)]
    got = np.array(run(f"{form} %d0, %d1, %d2{', %d3' if form.startswith('fma') else ''};", "d", arrays), np.uint64)
    scalar = form.replace("x2", "")
    meant = EXACT.get(scalar) or EXACT[scalar.replace(".rn", "")]
    for *given, found in zip(*(a.view(np.float32).tolist() for a in arrays), got.view(np.float32).tolist(), strict=True):
        assert found == nearest(meant(*(Fraction(g) for g in given)))


def half_value(bits, kind):
    if kind == "f16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_halves(kind):
    x, y = SAFE[0], SAFE[1]
    assert run(f"cvt.rn.{kind}.f32 %h0, %f1;", "h", as_bits(SAFE)) == [half_bits(a, kind) for a in x.tolist()]
    got = run(f"cvt.rn.{kind}x2.f32 %r0, %f1, %f2;", "r", as_bits(SAFE))
    assert got == [half_bits(a, kind) << 16 | half_bits(b, kind) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    halves = [half_bits(a, kind) for a in x.tolist()]
    source = [np.array(halves, np.uint64), *as_bits(SAFE[1:])]
    values = [half_value(h, kind) for h in halves]
    assert run(f"cvt.f32.{kind} %f0, %h1;", "f", source) == [bits_of(v) for v in values]
    got = run(f"fma.rn.f32.{kind} %f0, %h1, %h1, %f2;", "f", source)
    assert got == [bits_of(nearest(Fraction(v) ** 2 + Fraction(b))) for v, b in zip(values, y.tolist(), strict=True)]
    got = run(f"add.rn.f32.{kind} %f0, %h1, %f2;", "f", source)
    assert got == [bits_of(nearest(Fraction(v) + Fraction(b))) for v, b in zip(values, y.tolist(), strict=True)]


@pytest.mark.parametrize("kind", ["s32", "s64"])
def test_integers_become_floats(kind):
    got = run(f"cvt.rn.f32.{kind} %f0, %{register(kind)[0]}1;", "f", INTS)
    assert got == [bits_of(nearest(Fraction(value(a, kind)))) for a in INTS[0].tolist()]


@pytest.mark.parametrize("form", matching(r"(ld|st)\.(global|shared)(::cta)?(\.nc)?(\.v\d)?\.[bfu]\d+"))
def test_loads_and_stores(form):
    """Bytes of a thread come through unchanged: read with the form, or written with it, and beside it with others."""
    _, bits = register(form.rpartition(".")[2])
    count = int((re.search(r"\.v(\d)", form) or (0, 1))[1])
    letter = {16: "h", 32: "f" if form.endswith("f32") else "r", 64: "d"}[bits]
    size = count * bits // 8
    registers_ = ", ".join(f"%{letter}{at + 10}" for at in range(count))
    registers_ = f"{{{registers_}}}" if count > 1 else registers_
    kind = f"v{count}.b{bits}" if count > 1 else f"b{bits}"
    load, store, middle = f"ld.global.{kind}", f"st.global.{kind}", ""
    if ".shared" in form:
        into, back = (f"st.shared.{kind}", form) if form.startswith("ld") else (form, f"ld.shared.{kind}")
        clear = " ".join(f"mov.b{bits} %{letter}{at + 10}, 0;" for at in range(count))
        there = f"mov.u32 %r5, buffer; mad.lo.u32 %r6, %t, {size}, %r5;"
        middle = f"{there} {into} [%r6], {registers_}; {clear} {back} {registers_}, [%r6];"
    elif form.startswith("ld"):
        load = form
    else:
        store = form
    x = np.frombuffer(RNG.bytes(32 * size + 16), np.uint8).copy()
    room_in, room_out = np.zeros(32 * size + 16, np.uint8), np.zeros(32 * size + 16, np.uint8)
    given, out = (r[-r.ctypes.data % 16 :][: 32 * size] for r in (room_in, room_out))
    given[:] = x[: 32 * size]
    addresses = f"mad.wide.u32 %d5, %t, {size}, %p0; mad.wide.u32 %d6, %t, {size}, %p1;"
    body = f"{addresses} {load} {registers_}, [%d5]; {middle} {store} [%d6], {registers_};"
    execute(body, [given, out], variables=".shared .align 16 .b8 buffer[1024];\n")
    assert (given == out).all()


@pytest.mark.parametrize("form", matching(r"(ld|cvta)\.param\..*"))
def test_parameters(form):
    """The parameter space, by name and by a generic address: its first bytes are the address of the first array."""
    out = np.zeros(8, np.uint8)
    name, _, kind = form.rpartition(".")
    bits, count = int(kind[1:]), 2 if ".v2" in form else 1
    if form.startswith("cvta"):
        body = f"mov.b64 %d5, k_param_0; {form} %d6, %d5; ld.b64 %d7, [%d6]; st.global.b64 [%p0], %d7;"
    else:
        letter = "f" if kind == "f32" else {8: "h", 32: "r", 64: "d"}[bits]
        vector = "{" + ", ".join(f"%{letter}{at + 5}" for at in range(count)) + "}" if count > 1 else f"%{letter}5"
        stores = " ".join(f"st.global.b{bits} [%p0+{at * bits // 8}], %{letter}{at + 5};" for at in range(count))
        body = f"{form} {vector}, [k_param_0]; {stores}"
    execute(body, [out])
    assert bytes(out)[: count * bits // 8] == struct.pack("<Q", out.ctypes.data)[: count * bits // 8]


# ---- the rest, one by one
@pytest.mark.parametrize("instruction, result, meant", [
    ("bfe.s32 %r0, %r1, 5, 9;", "r", lambda a, b, c: (a >> 5 & 0x1FF) - (512 if a >> 13 & 1 else 0)),
    ("bfe.u32 %r0, %r1, 7, 11;", "r", lambda a, b, c: (a & 0xFFFFFFFF) >> 7 & 0x7FF),
    ("bfe.u64 %d0, %d1, 30, 20;", "d", lambda a, b, c: a >> 30 & 0xFFFFF),
    ("bfi.b32 %r0, %r1, %r2, 7, 11;", "r", lambda a, b, c: b & ~(0x7FF << 7) | (a & 0x7FF) << 7),
    ("prmt.b32 %r0, %r1, %r2, 0x5410;", "r", lambda a, b, c: (b & 0xFFFF) << 16 | a & 0xFFFF),
    ("add.s16x2 %r0, %r1, %r2;", "r", lambda a, b, c: ((a >> 16) + (b >> 16) & 0xFFFF) << 16 | (a + b) & 0xFFFF),
    ("mov.b16 %h0, %h1;", "h", lambda a, b, c: a), ("mov.u16 %h0, %h1;", "h", lambda a, b, c: a),
    ("mov.b32 %r0, %r1;", "r", lambda a, b, c: a), ("mov.u32 %r0, %r1;", "r", lambda a, b, c: a),
    ("mov.b64 %d0, %d1;", "d", lambda a, b, c: a), ("mov.u64 %d0, %d1;", "d", lambda a, b, c: a),
    ("mov.f32 %f0, %f1;", "f", lambda a, b, c: a), ("mov.pred %q0, %q1;", "q", lambda a, b, c: a & 0xFFFFFFFF != 0),
    ("mov.b32 %r0, {%h1, %h2};", "r", lambda a, b, c: (b & 0xFFFF) << 16 | a & 0xFFFF),
    ("mov.b32 {%h0, %h5}, %r1;", "h", lambda a, b, c: a & 0xFFFF), ("mov.b64 {%r0, %r5}, %d1;", "r", lambda a, b, c: a),
    ("mov.b64 %d0, {%r1, %r2};", "d", lambda a, b, c: (b & 0xFFFFFFFF) << 32 | a & 0xFFFFFFFF),
    ("cvt.rna.tf32.f32 %r0, %f1;", "r", None), ("cvta.to.global.u64 %d0, %d1;", "d", lambda a, b, c: a),
    ("cvta.global.u64 %d0, %d1;", "d", lambda a, b, c: a),
    ("redux.sync.add.s32 %r0, %r1, -1;", "r", "add"), ("redux.sync.max.s32 %r0, %r1, -1;", "r", "max"),
    ("shfl.sync.bfly.b32 %r0, %r1, 3, 31, -1;", "r", "bfly"), ("shfl.sync.idx.b32 %r0, %r1, 5, 31, -1;", "r", "idx"),
    ("elect.sync %r5|%q0, -1;", "q", "elect"), ("max.f32 %f0, %f1, %f2;", "f", "fmax"),
    ("setmaxnreg.inc.sync.aligned.u32 240; setmaxnreg.dec.sync.aligned.u32 24; mov.b32 %r0, %r1;", "r", lambda a, b, c: a),
    ("bra.uni NEXT; NEXT: mov.b32 %r0, %r1;", "r", lambda a, b, c: a),
])  # fmt: skip
def test_others(instruction, result, meant):
    arrays = as_bits(SAFE) if result == "f" and meant == "fmax" or meant is None else INTS
    got = run(instruction, result, arrays)
    width = {"h": 16, "r": 32, "d": 64, "f": 32, "q": 1}[result]
    one = [a & 0xFFFFFFFF for a in arrays[0].tolist()]
    if meant == "add":
        want = [sum(value(a, "s32") for a in one)] * 32
    elif meant == "max":
        want = [max(value(a, "s32") for a in one)] * 32
    elif meant == "bfly":
        want = [one[lane ^ 3] for lane in range(32)]
    elif meant == "idx":
        want = [one[5]] * 32
    elif meant == "elect":
        want = [int(lane == 0) for lane in range(32)]
    elif meant == "fmax":
        want = [bits_of(max(a, b)) for a, b in zip(SAFE[0].tolist(), SAFE[1].tolist(), strict=True)]
    elif meant is None:  # tf32: 10 bits of mantissa, ties away from zero
        want = [(a + 0x1000) & 0xFFFFE000 for a in one]
    else:
        want = [int(meant(*given)) for given in zip(*(a.tolist() for a in arrays), strict=True)]
    assert got == [w & 2**width - 1 for w in want]


def text_of(name):
    path = HERE / name
    return path.read_text() if path.exists() else ""


def is_tested(op) -> bool:
    """Is there a test with this opcode: parametrized by it, or written out?"""
    here = re.escape(op) + r"(?![\w.:])"
    names = {**globals(), **vars(test_emulator_copies), **vars(test_emulator_matrices)}
    tests = [test for name, test in names.items() if name.startswith("test_")]
    marks = [mark for test in tests for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    values = [value if isinstance(value, tuple) else (value,) for mark in marks for value in mark.args[1]]
    halves = r"cvt\.rn\.b?f16(x2)?\.f32|cvt\.f32\.b?f16|(add|fma)\.rn\.f32\.b?f16|cvt\.rn\.f32\.s(32|64)"
    return bool(
        any(op in value for value in values)
        or any(op in forms and re.search(here, text_of(name)) for name, forms in ELSEWHERE.items())
        or any(re.search(here, text_of(name)) for name in (Path(__file__).name, "test_emulator_instructions.py"))
        or re.fullmatch(halves, op)
    )


def test_every_form_is_executed_and_has_a_test():
    ops = [form.split(" ")[0] for form in FORMS]
    assert len(ops) > 200
    assert not [op for op in ops if reason(op)]
    assert not [op for op in ops if not is_tested(op)]
    assert not is_tested("sub." + "f64")
