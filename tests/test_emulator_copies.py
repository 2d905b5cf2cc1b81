"""Asynchronous copies one by one: cp.async, TMA's boxes in and out, and tensor maps made on the device, against loops over
bytes and elements written from the PTX ISA (9.7.9.25, 9.7.9.27)."""

import numpy as np
import pytest
from emulator_runs import execute, matching
from test_emulator_matrices import swizzled
from test_emulator_races import aligned

from sora_fast.emulator import tma
from sora_fast.emulator.machine import Schedule

RNG = np.random.default_rng(3)
SHARED = ".shared .align 1024 .b8 buffer[{}];\n"
# Lanes copy the first {1} bytes from (ld.shared ... st.global) or into (the other way) the buffer at %r20.
WALK = """mov.u32 %r40, %t; {0}: add.u32 %r41, %r40, %r20; cvt.u64.u32 %d30, %r40; add.s64 %d30, %d30, %p{2};
{3} add.u32 %r40, %r40, 32; setp.lt.u32 %q5, %r40, {1}; @%q5 bra {0};"""
OUT = "ld.shared.u8 %h1, [%r41]; st.global.u8 [%d30], %h1;"
INTO = "ld.global.u8 %h1, [%d30]; st.shared.u8 [%r41], %h1;"


# ---- cp.async
SIZES = {"cp.async.ca.shared.global": (4, 8, 16), "cp.async.cg.shared.global": (16,)}


@pytest.mark.parametrize("form, size", [(form, size) for form in matching(r"cp\.async\.c.*global") for size in SIZES[form]])
def test_cp_async(form, size):
    """``size`` bytes per lane to anywhere; of src-size bytes the rest is zeros, and none of it is read."""
    source = aligned(32 * size // 4)
    source[:] = RNG.integers(1, 2**32, source.size)
    order = RNG.permutation(32).astype(np.uint32)
    kept = (np.arange(32, dtype=np.uint32) % 3 * (size // 2)).astype(np.uint32)  # 0, half, all
    for src_size in ("", ", %r23"):
        out = np.zeros(32 * size, np.uint8)
        body = f"""mov.u32 %r20, buffer; mad.wide.u32 %d20, %t, 4, %p1; ld.global.b32 %r21, [%d20];
mad.lo.u32 %r22, %r21, {size}, %r20; mad.wide.u32 %d20, %t, 4, %p2; ld.global.b32 %r23, [%d20];
mad.wide.u32 %d21, %t, {size}, %p0; {form} [%r22], [%d21], {size}{src_size};
cp.async.commit_group; cp.async.wait_group 0; bar.warp.sync -1;
{WALK.format('AGAIN', 32 * size, 3, OUT)}"""
        for when in ("late", "early"):
            launch = execute(body, [source, order, kept, out], race=True, variables=SHARED.format(32 * size),
                             schedule=Schedule(when=when))  # fmt: skip
            assert not launch.findings
            data = source.tobytes()
            want = bytearray(32 * size)
            for lane in range(32):
                count = int(kept[lane]) if src_size else size
                moved = data[lane * size : lane * size + count]
                want[order[lane] * size : order[lane] * size + size] = moved + bytes(size - count)
            assert out.tobytes() == bytes(want)


# ---- TMA
# Innermost dimension first: sizes of the tensor and of the box, bytes of a swizzled row, and where the box begins.
BOXES = {
    2: ((24, 7), (16, 4), 32, (16, 5)), 3: ((40, 5, 3), (32, 2, 2), 64, (-8, 4, 1)),
    5: ((72, 3, 4, 3, 2), (64, 2, 1, 2, 2), 128, (16, -1, 2, 2, 0)),
}  # fmt: skip


def tensor_map(x, sizes, box, span):
    room = np.zeros(3, tma.MAP)
    raw = room.view(np.uint8)[-room.ctypes.data % 64 :][:128].view(tma.MAP)
    rank = len(sizes)
    raw["address"], raw["rank"], raw["type"] = x.ctypes.data, rank, 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    raw["dims"][0, :rank], raw["box"][0, :rank], raw["steps"][0, :rank] = sizes, box, 1
    raw["strides"][0, : rank - 1] = np.cumprod(sizes)[:-1] * 2
    raw["swizzle"] = (0, 32, 64, 128).index(span)
    return raw


def elements(sizes, box, span, starts):
    """(byte in shared memory, index in the tensor or None) of every element of a box, one after the other."""
    for at in range(int(np.prod(box))):
        left, index, inside, step = at, 0, True, 1
        for size, width, start in zip(sizes, box, starts, strict=True):
            place = start + left % width
            inside &= 0 <= place < size
            index, step, left = index + place * step, step * size, left // width
        yield swizzled(2 * at, span), index if inside else None


def tensor(sizes):
    x = aligned(int(np.prod(sizes)) // 2).view(np.uint16)
    x[:] = RNG.integers(1, 2**16, x.size)
    return x


def made_on_the_device(sizes, box, span):
    """A map in shared memory, field by field as the ISA numbers them (9.7.9.27), which goes to array 3."""
    fields = [("tensormap.replace.tile.global_address.shared::cta.b1024.b64", "%p2"),
              ("tensormap.replace.tile.rank.shared::cta.b1024.b32", len(sizes) - 1),
              ("tensormap.replace.tile.elemtype.shared::cta.b1024.b32", 10),
              ("tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32", (0, 32, 64, 128).index(span))]
    for at, (size, width) in enumerate(zip(sizes, box, strict=True)):
        fields += [("tensormap.replace.tile.box_dim.shared::cta.b1024.b32", f"{at}, {width}"),
                   ("tensormap.replace.tile.global_dim.shared::cta.b1024.b32", f"{at}, {size}"),
                   ("tensormap.replace.tile.element_stride.shared::cta.b1024.b32", f"{at}, 1")]
    fields += [("tensormap.replace.tile.global_stride.shared::cta.b1024.b64", f"{at}, {2 * step}")
               for at, step in enumerate(np.cumprod(sizes)[:-1].tolist())]
    replace = "\n".join(f"@%q1 {form} [%d10], {value};" for form, value in fields)
    return f"""mov.u32 %r10, map; mad.lo.u32 %r11, %t, 4, %r10; st.shared.b32 [%r11], 0; bar.warp.sync -1;
cvt.u64.u32 %d10, %r10; {replace} bar.warp.sync -1;
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%p3], [%r10], 128;
fence.proxy.tensormap::generic.acquire.gpu [%p3], 128; mov.b64 %d1, %p3;"""


LOADS = matching(r"cp\.async\.bulk\.tensor\.\dd\.shared.*")


@pytest.mark.parametrize("form, on_device, span", [
    *((form, False, None) for form in LOADS), (LOADS[0], False, 0), (LOADS[0], True, None), (LOADS[-1], True, None)])
def test_tma_load(form, on_device, span):
    rank = int(form.split(".")[4][0])
    sizes, box, swizzle, starts = BOXES[rank]
    span = swizzle if span is None else span
    x, count = tensor(sizes), 2 * int(np.prod(box))
    out, room = np.zeros(count, np.uint8), tensor_map(x, sizes, box, span)
    mapped = made_on_the_device(sizes, box, span) if on_device else "prefetch.tensormap [%p0]; mov.b64 %d1, %p0;"
    given = tensor_map(x, sizes, box, span)
    body = f"""mov.u32 %r20, buffer; mov.u32 %r21, gate; setp.eq.u32 %q1, %t, 0;
@%q1 mbarrier.init.shared::cta.b64 [%r21], 1; fence.mbarrier_init.release.cluster; bar.warp.sync -1;
{mapped}
@%q1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], {count};
@%q1 {form} [%r20], [%d1, {{{", ".join(map(str, starts))}}}], [%r21];
AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %q2, [%r21], 0; @!%q2 bra AGAIN;
{WALK.format("MORE", count, 1, OUT)}
bar.warp.sync -1; @%q1 mbarrier.inval.shared::cta.b64 [%r21];"""
    variables = SHARED.format(count) + ".shared .align 8 .b64 gate;\n.shared .align 128 .b8 map[128];\n"
    if on_device:
        room.view(np.uint8)[:] = 0
    for when in ("late", "early"):
        launch = execute(body, [given, out, x, room], race=True, variables=variables, schedule=Schedule(when=when))
        assert not launch.findings
        want = np.zeros(count, np.uint8)
        for at, index in elements(sizes, box, span, starts):
            want[at : at + 2] = x[index : index + 1].view(np.uint8) if index is not None else 0
        assert out.tolist() == want.tolist()


@pytest.mark.parametrize("wait", ("cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;"))
@pytest.mark.parametrize("form", matching(r"cp\.async\.bulk\.tensor\.\dd\.global.*"))
def test_tma_store(form, wait):
    """What lies beyond the tensor is not written, and neither is the tensor beyond the box."""
    sizes, box, span, starts = BOXES[2]
    count = 2 * int(np.prod(box))
    x, source = tensor(sizes), RNG.integers(0, 256, count).astype(np.uint8)
    want = x.copy()
    for at, index in elements(sizes, box, span, starts):
        if index is not None:
            want[index] = source[at : at + 2].view(np.uint16)[0]
    body = f"""mov.u32 %r20, buffer; setp.eq.u32 %q1, %t, 0;
{WALK.format("MORE", count, 1, INTO)}
fence.proxy.async.shared::cta; bar.warp.sync -1;
@%q1 {form} [%p0, {{{", ".join(map(str, starts))}}}], [%r20];
cp.async.bulk.commit_group; {wait}"""
    launch = execute(body, [tensor_map(x, sizes, box, span), source, x], race=True, variables=SHARED.format(count))
    assert not launch.findings and x.tolist() == want.tolist()
