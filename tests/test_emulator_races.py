"""Races and missing fences, each planted in a kernel that is otherwise right; the right one has no finding."""

import numpy as np
import pytest
from emulator_runs import execute

from sora_fast.emulator import tma
from sora_fast.emulator.codegen import Program
from sora_fast.emulator.forms import Unsupported
from sora_fast.emulator.ptx import parse

SHARED = ".shared .align 128 .b8 buffer[4096];\n"


def kinds(body, arrays, **options):
    """Kinds of the findings, with races looked for."""
    return {kind for kind, _ in execute(body, arrays, race=True, **options).findings}


# ---- between CTAs
SUM = "mov.u32 %r1, %ctaid.x; cvt.u64.u32 %d1, %r1; shl.b64 %d1, %d1, 2; "


def test_ctas_that_add_to_one_element():
    """y += 1 by three CTAs, as tl.store(y, tl.load(y) + 1): a race; by an atomic: none."""
    y = np.zeros(1, np.float32)
    plain = """setp.eq.u32 %q1, %t, 0; @%q1 ld.global.f32 %f1, [%p0]; add.f32 %f1, %f1, 0f3F800000;
@%q1 st.global.f32 [%p0], %f1;"""
    found = execute(plain, [y], grid=(3, 1, 1), race=True).findings
    assert any(kind.startswith("race in global memory") for kind, _ in found)
    said = " ".join(found.values())
    assert "element 0 of array 0 (1 elements)" in said and "CTA 1 warp 0 lane 0" in said and "st.global.f32" in said
    atomic = "setp.eq.u32 %q1, %t, 0; @%q1 red.global.add.f32 [%p0], 0f3F800000;"
    y[:] = 0
    assert not kinds(atomic, [y], grid=(3, 1, 1)) and y[0] == 3


def test_ctas_in_different_batches_race_too():
    y = np.zeros(1, np.uint32)
    body = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %q1, %t, 0; @%q1 st.global.u32 [%p0], %r1;"
    assert kinds(body, [y], grid=(2, 1, 1), batch=1) == {"race in global memory: not ordered behind a write of another CTA"}


def test_ctas_that_share_reads_and_write_apart():
    x, y = np.arange(32, dtype=np.uint32), np.zeros(96, np.uint32)
    body = SUM + """mul.wide.u32 %d2, %t, 4; add.s64 %d3, %p0, %d2; ld.global.u32 %r2, [%d3];
mad.lo.u32 %r3, %r1, 32, %t; mul.wide.u32 %d4, %r3, 4; add.s64 %d4, %p1, %d4; st.global.u32 [%d4], %r2;"""
    assert not kinds(body, [x, y], grid=(3, 1, 1)) and (y == np.tile(x, 3)).all()


def test_elements_narrower_than_a_word_are_apart():
    y = np.zeros(2, np.uint16)
    body = """mov.u32 %r1, %ctaid.x; cvt.u16.u32 %h1, %r1; mul.wide.u32 %d1, %r1, 2; add.s64 %d1, %p0, %d1;
setp.eq.u32 %q1, %t, 0; @%q1 st.global.u16 [%d1], %h1;"""
    assert not kinds(body, [y], grid=(2, 1, 1)) and y.tolist() == [0, 1]


# CTA 0 writes data and raises a flag; CTA 1 spins on the flag and reads the data.
FLAG = """mov.u32 %r1, %ctaid.x; setp.ne.u32 %q1, %t, 0; @%q1 bra LAST; setp.ne.u32 %q2, %r1, 0; @%q2 bra READER;
st.global.u32 [%p0], 7; RELEASE bra LAST;
READER: ACQUIRE setp.eq.u32 %q3, %r2, 0; @%q3 bra READER; AFTER ld.global.u32 %r3, [%p0]; st.global.u32 [%p2], %r3; LAST:"""
STORE, LOAD = "st.relaxed.gpu.global.u32 [%p1], 1;", "ld.relaxed.gpu.global.u32 %r2, [%p1];"
RELEASE, ACQUIRE = "atom.release.gpu.global.exch.b32 %r9, [%p1], 1;", "ld.acquire.gpu.global.u32 %r2, [%p1];"


@pytest.mark.parametrize("release, acquire, after, ordered", [
    (RELEASE, ACQUIRE, "", True),
    ("fence.acq_rel.gpu; " + STORE, LOAD, "fence.acq_rel.gpu;", True),
    ("membar.gl; st.volatile.global.u32 [%p1], 1;", "ld.volatile.global.u32 %r2, [%p1];", "membar.gl;", True),
    ("atom.relaxed.gpu.global.exch.b32 %r9, [%p1], 1;", ACQUIRE, "", False),
    (RELEASE, LOAD, "", False),
    ("atom.release.cta.global.exch.b32 %r9, [%p1], 1;", ACQUIRE, "", False),
    (STORE, LOAD, "fence.acq_rel.gpu;", False),
])  # fmt: skip
def test_release_and_acquire_order_ctas(release, acquire, after, ordered):
    data, flag, out = (np.zeros(1, np.uint32) for _ in range(3))
    body = FLAG.replace("RELEASE", release).replace("ACQUIRE", acquire).replace("AFTER", after)
    found = kinds(body, [data, flag, out], grid=(2, 1, 1))
    assert out[0] == 7
    assert found == (set() if ordered else {"race in global memory: not ordered behind a write of another CTA"})


def test_a_plain_flag_is_a_race_itself():
    data, flag, out = (np.zeros(1, np.uint32) for _ in range(3))
    body = FLAG.replace("RELEASE", "st.global.u32 [%p1], 1;").replace("AFTER", "")
    body = body.replace("ACQUIRE", "ld.global.u32 %r2, [%p1];")
    found = kinds(body, [data, flag, out], grid=(2, 1, 1))
    assert "race in global memory: not ordered behind a write of another CTA" in found


def test_a_plain_read_beside_atomics_of_others():
    """The last atomic before the read is the thread's own; the other CTA's is not ordered."""
    y = np.zeros(1, np.uint32)
    out = np.zeros(2, np.uint32)
    body = """setp.ne.u32 %q1, %t, 0; @%q1 bra LAST; red.global.add.u32 [%p0], 1; ld.global.u32 %r1, [%p0];
mov.u32 %r2, %ctaid.x; mul.wide.u32 %d1, %r2, 4; add.s64 %d1, %p1, %d1; st.global.u32 [%d1], %r1; LAST:"""
    found = kinds(body, [y, out], grid=(2, 1, 1))
    assert any("atomic of another CTA" in kind or "read of another CTA" in kind for kind in found)


# ---- inside a CTA
EXCHANGE = """mad.wide.u32 %d1, %t, 4, %p0; st.global.u32 [%d1], %t; SYNC
xor.b32 %r1, %t, MASK; mad.wide.u32 %d2, %r1, 4, %p0; ld.global.u32 %r2, [%d2];
mad.wide.u32 %d3, %t, 4, %p1; st.global.u32 [%d3], %r2;"""


@pytest.mark.parametrize("mask, sync, found", [
    (32, "bar.sync 0;", set()),
    (32, "", {"race in global memory: not ordered behind a write of another warp"}),
    (32, "bar.warp.sync -1;", {"race in global memory: not ordered behind a write of another warp"}),
    (1, "bar.warp.sync -1;", set()),
    (1, "", {"race in global memory: not ordered behind a write of another lane"}),
])  # fmt: skip
def test_threads_of_a_cta(mask, sync, found):
    y, out = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    assert kinds(EXCHANGE.replace("SYNC", sync).replace("MASK", str(mask)), [y, out], threads=64) == found
    assert out.tolist() == [t ^ mask for t in range(64)]


def test_lanes_of_one_store():
    y = np.zeros(1, np.uint32)
    assert kinds("st.global.u32 [%p0], %t;", [y]) == {"race in global memory: lanes of one store write different values"}
    assert not kinds("st.global.u32 [%p0], 5;", [y])


@pytest.mark.parametrize("sync, found", [("bar.warp.sync -1;", set()), ("", {"race: not ordered behind a write"})])
def test_lanes_in_shared_memory(sync, found):
    out = np.zeros(32, np.uint32)
    body = f"""mov.u32 %r5, buffer; shl.b32 %r6, %t, 2; add.s32 %r7, %r5, %r6; st.shared.u32 [%r7], %t; {sync}
xor.b32 %r8, %r7, 4; ld.shared.u32 %r9, [%r8]; mad.wide.u32 %d1, %t, 4, %p0; st.global.u32 [%d1], %r9;"""
    assert kinds(body, [out], variables=SHARED) == found


# ---- fences
# D (64 x 8) = A (64 x 16, of ones in registers) times B (16 x 8, of ones in shared memory, no swizzle).
WGMMA = """mov.u32 %r5, buffer; shl.b32 %r6, %t, 2; add.s32 %r7, %r5, %r6; setp.lt.u32 %q1, %t, 64;
@%q1 st.shared.b32 [%r7], 0x3F803F80; fence.proxy.async.shared::cta; bar.sync 0;
mov.b32 %r1, 0x3F803F80; mov.b32 %r2, %r1; mov.b32 %r3, %r1; mov.b32 %r4, %r1;
mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
shr.u32 %r8, %r5, 4; cvt.u64.u32 %d1, %r8; or.b64 %d1, %d1, 0x0000000800080000;
FENCE
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, %d1, 1, 1, 1, 0;
BETWEEN
wgmma.commit_group.sync.aligned;
WAIT
add.f32 %f5, %f1, %f2; mad.wide.u32 %d2, %t, 4, %p0; st.global.f32 [%d2], %f5;"""
FENCE, WAIT = "wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
SECOND = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, %d1, 1, 1, 1, 0;"
OTHER = SECOND.replace("%f1,%f2,%f3,%f4", "%f6,%f7,%f8,%f9")


@pytest.mark.parametrize("fence, between, wait, found, value", [
    (FENCE, "", WAIT, set(), 32),
    (FENCE, SECOND, WAIT, set(), 64),
    ("", "", WAIT, {"no wgmma.fence"}, 32),
    (FENCE, "mov.b32 %r2, 0; " + SECOND, WAIT, {"a register of a wgmma in flight is accessed"}, None),
    (FENCE, "neg.f32 %f6, %f9; mov.f32 %f7, %f6; " + OTHER, WAIT, set(), 32),  # as LLVM may put it
    (FENCE, "wgmma.commit_group.sync.aligned; neg.f32 %f6, %f9; " + OTHER, WAIT, {"no wgmma.fence"}, 32),
    (FENCE, "", "", {"a register of a wgmma in flight is accessed"}, None),
])  # fmt: skip
def test_wgmma_fence(fence, between, wait, found, value):
    out = np.zeros(128, np.float32)
    body = WGMMA.replace("FENCE", fence).replace("BETWEEN", between).replace("WAIT", wait)
    assert kinds(body, [out], threads=128, variables=SHARED) == found
    assert value is None or (out == value).all()


@pytest.mark.parametrize("again, found", [(FENCE, set()), ("", {"no wgmma.fence"})])
def test_a_fence_behind_accesses_to_accumulators(again, found):
    """The second tile of a loop: accumulators are cleared, and must be fenced again."""
    out = np.zeros(128, np.float32)
    second = f"{WAIT} mov.f32 %f1, 0f00000000; {again} {SECOND} wgmma.commit_group.sync.aligned; {WAIT}"
    body = WGMMA.replace("FENCE", FENCE).replace("WAIT", second).replace("BETWEEN", "")
    assert kinds(body, [out], threads=128, variables=SHARED) == found


def test_proxy_fence_before_wgmma():
    out = np.zeros(128, np.float32)
    body = WGMMA.replace("FENCE", FENCE).replace("WAIT", WAIT).replace("BETWEEN", "")
    body = body.replace("fence.proxy.async.shared::cta;", "")
    assert kinds(body, [out], threads=128, variables=SHARED) == {"no fence.proxy.async behind a write"}


# ---- TMA: 32 floats come to shared memory, are read by all threads, and go back out.
TMA = """mov.u32 %r5, buffer; mov.u32 %r6, gate; setp.eq.u32 %q1, %t, 0;
@%q1 mbarrier.init.shared::cta.b64 [%r6], 1; INIT_FENCE
bar.sync 0;
setp.eq.u32 %q1, %t, 32; @!%q1 bra READERS;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6], 128;
cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r5], [%p1, {0}], [%r6];
READERS: TRY
shl.b32 %r7, %t, 2; and.b32 %r7, %r7, 127; add.s32 %r8, %r5, %r7; ld.shared.u32 %r9, [%r8];
mad.wide.u32 %d1, %t, 4, %p0; st.global.u32 [%d1], %r9;"""
TRY = "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %q2, [%r6], 0; @!%q2 bra AGAIN;"
VARIABLES = SHARED + ".shared .align 8 .b64 gate;\n"


def tensor_map(array):
    """A map of one dimension over all of ``array``, at an address that is a multiple of 64."""
    room = np.zeros(3, tma.MAP)
    at = (-room.ctypes.data % 64) // 1
    raw = room.view(np.uint8)[at : at + 128].view(tma.MAP)
    raw["address"], raw["rank"], raw["type"] = array.ctypes.data, 1, 2
    raw["dims"][0, 0], raw["box"][0, 0], raw["steps"][0, 0] = array.size, array.size, 1
    return raw


def aligned(count):
    room = np.zeros(count + 4, np.uint32)
    at = (-room.ctypes.data % 16) // 4
    return room[at : at + count]


@pytest.mark.parametrize("init_fence, wait, found", [
    ("fence.mbarrier_init.release.cluster;", TRY, set()),
    ("fence.proxy.async.shared::cta;", TRY, set()),
    ("", TRY, {"no fence.mbarrier_init or fence.proxy.async behind an mbarrier.init"}),
    ("fence.mbarrier_init.release.cluster;", "", {"race: a copy is still in flight", "uninitialised shared memory"}),
])  # fmt: skip
def test_mbarriers_and_tma(init_fence, wait, found):
    out, x = np.zeros(64, np.uint32), aligned(32)
    x[:] = np.arange(32)
    body = TMA.replace("INIT_FENCE", init_fence).replace("TRY", wait)
    got = kinds(body, [out, tensor_map(x), x], threads=64, variables=VARIABLES)
    assert got - {"a TMA load is in flight when its CTA ends"} == found
    assert bool(wait) == (out.tolist() == [*range(32)] * 2)


def test_an_mbarrier_must_be_initialised_before_others_use_it():
    out, x = np.zeros(64, np.uint32), aligned(32)
    body = TMA.replace("INIT_FENCE", "fence.mbarrier_init.release.cluster;").replace("TRY", TRY).replace("bar.sync 0;", "")
    assert "race: not ordered behind a write" in kinds(body, [out, tensor_map(x), x], threads=64, variables=VARIABLES)


# ---- refused by name
@pytest.mark.parametrize("instruction, said", [
    ("tcgen05.wait::ld.sync.aligned;", "tensor memory and tcgen05 of sm_100"),
    ("mapa.shared::cluster.u32 %r1, %r2, 1;", "clusters of CTAs"), ("barrier.cluster.arrive;", "clusters of CTAs"),
    ("ld.shared::cluster.u32 %r1, [%r2];", "clusters of CTAs"), ("mov.u32 %r1, %cluster_ctaid.x;", "special register"),
    ("add.sat.s32 %r1, %r2, %r3;", "this form"), ("add.rz.f32 %f1, %f2, %f3;", "this form"),
    ("frobnicate.b32 %r1, %r2;", "this instruction"),
    ("cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2;", "this form"), ("mov.u32 %r1, nothing;", "nothing is not declared"),
    ("cvta.local.u64 %d1, %d2;", "generic addresses of local memory"), ("@%q1 bar.sync 0;", "predicate on a barrier"),
    ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1,%r2}, {%r1,%r2}, {%r1,%r2}, {%r1,%r2};", "types of a matrix"),
])  # fmt: skip
def test_what_is_not_emulated_is_refused_by_name(instruction, said):
    with pytest.raises(Unsupported, match=said) as raised:
        execute(instruction, [])
    assert instruction.rstrip(";") in str(raised.value)


def test_clusters_are_refused():
    head = ".version 8.5\n.target sm_90a\n.address_size 64\n.visible .entry k() .reqnctapercluster 2 {"
    with pytest.raises(Unsupported, match="clusters of CTAs"):
        Program(parse(head + "ret; }")["k"])
    Program(parse(head.replace("cluster 2", "cluster 1, 1, 1") + "ret; }")["k"])
