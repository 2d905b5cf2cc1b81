"""What users' kernels do, right and wrong, in emulated_gpu: updates in place, locks, assertions, sines, descriptors."""

import re

import pytest
import torch

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from sora_fast.emulator.forms import Unsupported  # noqa: E402
from sora_fast.emulator.memory import Fault  # noqa: E402
from sora_fast.testing import emulated_gpu  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.ci]



@triton.jit
def double_kernel(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def softmax_kernel(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * n + at, mask=at < n, other=-float("inf"))
    value = tl.exp(value - tl.max(value))
    tl.store(x + tl.program_id(0) * n + at, value / tl.sum(value), mask=at < n)


@triton.jit
def count_kernel(x, y, BLOCK: tl.constexpr, USE: tl.constexpr, WAIT: tl.constexpr):
    count = tl.load(x)
    if WAIT:
        tl.debug_barrier()
    tl.store(x, count + 1)  # other warps may load it after this
    if USE:
        tl.store(y + tl.arange(0, BLOCK), count + tl.arange(0, BLOCK))


@triton.jit
def branch_kernel(x, y, BLOCK: tl.constexpr):
    flag = tl.load(x)
    tl.store(x, flag + 1)  # other warps may branch by this
    if flag == 0:
        tl.store(y + tl.arange(0, BLOCK), tl.full([BLOCK], 1.0, tl.float32))


@triton.jit
def accumulate_kernel(x, y, total, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(total, tl.sum(value))
    if tl.load(count) > 0:
        value += tl.load(y + at)
    tl.store(y + at, value)


@triton.jit
def shift_kernel(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at + 1)
    tl.store(x + at, value)  # behind other warps' loads by luck


@triton.jit
def locked_sum_kernel(x, y, lock, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * BLOCK + at)
    while tl.atomic_cas(lock, 0, 1, sem="acquire") == 1:
        pass
    tl.store(y + at, tl.load(y + at) + value)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0, sem="release")


@triton.jit
def turns_kernel(x, y, turn, BLOCK: tl.constexpr, RELEASE: tl.constexpr):
    at, program = tl.arange(0, BLOCK), tl.program_id(0)
    value = tl.load(x + program * BLOCK + at)
    while tl.load(turn, volatile=True) != tl.num_programs(0) - 1 - program:  # the last program goes first
        pass
    tl.debug_barrier()
    tl.atomic_add(y + at, value)
    if RELEASE:
        tl.atomic_add(turn, 1, sem="release")


@triton.jit
def before_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at - 1))


@triton.jit
def asserting_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.device_assert(value >= 0, "negative")
    tl.store(y + at, value)


@triton.jit
def printing_kernel(x, BLOCK: tl.constexpr):
    tl.device_print("x", tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def waves_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(y + at, tl.sin(value))
    tl.store(y + BLOCK + at, tl.cos(value))


@triton.jit
def clamp_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.clamp(tl.load(x + at), -1.5, 1.5))


@triton.jit
def add_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    before = tl.atomic_add(y + at, tl.load(x + at))
    tl.store(x + at, before)


@triton.jit
def tile_kernel(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    y.store([row, column], x.load([row, column]) * 2)


def line_of(text):
    """"test_emulated_idioms.py:12" of the line of a kernel here that holds ``text``."""
    lines = open(__file__, encoding="utf-8").read().splitlines()
    number = next(number for number, line in enumerate(lines, start=1) if text in line)
    return rf"test_emulated_idioms\.py:{number}\b"


# ------------------------------------------------------------------------------------------------------ dropped reads
@pytest.mark.parametrize("block", (16, 64, 256))
def test_an_update_in_place_is_no_race(block):
    """128 threads: of 16 or 64 elements several load each, and one stores."""
    x, rows = torch.arange(float(block + 3)), torch.randn(3, block - 1)
    want = x * 2, rows.softmax(1)
    with emulated_gpu(race=True, schedules=2):
        double_kernel[(2,)](x, len(x), BLOCK=block)
        softmax_kernel[(3,)](rows, block - 1, BLOCK=block)
    assert torch.equal(x, want[0]) and torch.allclose(rows, want[1], atol=1e-6)


def test_a_register_that_held_something_else_before():
    """The sum of what x held goes through shared memory; what is loaded from y takes its register."""
    x, y, total, count = torch.rand(64), torch.zeros(64), torch.zeros(1), torch.ones(1, dtype=torch.int32)
    with emulated_gpu(race=True):
        accumulate_kernel[(1,)](x, y, total, count, BLOCK=64)
        accumulate_kernel[(1,)](x, y, total, count, BLOCK=64)
    assert torch.equal(y, x + x)


def test_a_number_that_all_threads_load_and_one_stores():
    """A race where the others use what they have loaded: in a store, or in a branch."""
    x, y = torch.zeros(1), torch.zeros(128)
    with emulated_gpu(race=True):
        count_kernel[(1,)](x, y, BLOCK=128, USE=False, WAIT=False)
        count_kernel[(1,)](x, y, BLOCK=128, USE=True, WAIT=True)
        assert x.item() == 2 and torch.equal(y, torch.arange(128) + 1.0)
        with pytest.raises(Fault, match=line_of("# other warps may load it after this")):
            count_kernel[(1,)](x, y, BLOCK=128, USE=True, WAIT=False)
        with pytest.raises(Fault, match=line_of("# other warps may branch by this")):
            branch_kernel[(1,)](x.zero_(), y, BLOCK=128)


@pytest.mark.parametrize("block", (64, 128))
def test_a_shift_in_place_is_a_race(block):
    with emulated_gpu(race=True), pytest.raises(Fault, match=line_of("# behind other warps' loads by luck")):
        shift_kernel[(1,)](torch.arange(block + 1.0), BLOCK=block)


# ----------------------------------------------------------------------------------------------------------- idioms
def test_a_lock():
    x, y, lock = torch.randint(9, (4, 64)).float(), torch.zeros(64), torch.zeros(1, dtype=torch.int32)
    with emulated_gpu(race=True, schedules=3):
        locked_sum_kernel[(4,)](x, y, lock, BLOCK=64)
    assert torch.equal(y, x.sum(0)) and lock.item() == 0


def take_turns(programs, release):
    """(what the programs added up, what they should have)"""
    x, y, turn = torch.randint(9, (programs, 64)).float(), torch.zeros(64), torch.zeros(1, dtype=torch.int32)
    turns_kernel[(programs,)](x, y, turn, BLOCK=64, RELEASE=release, num_warps=1)
    return y, x.sum(0)


def test_programs_that_wait_for_later_ones():
    """They run together, also where races are looked for; a turn that never comes is a deadlock, and is reported."""
    with emulated_gpu(race=True):
        assert torch.equal(*take_turns(9, release=True))
    waits = rf"deadlock:\n  CTA 0 warp 0 waits in a loop at {line_of('# the last program goes first')}"
    with emulated_gpu(), pytest.raises(Fault, match=waits):
        take_turns(2, release=False)
    with emulated_gpu(), pytest.raises(Fault, match="CTAs 0 to 63 run together here, and 6 behind them"):
        take_turns(70, release=True)


def test_an_access_before_a_tensor_names_it():
    x, y = torch.zeros(64), torch.zeros(64)
    with emulated_gpu(), pytest.raises(Fault, match=r"out of bounds: element -1 of x \(64 elements\)"):
        before_kernel[(1,)](x, y, BLOCK=64)


def test_assertions_are_checked():
    x, y = torch.rand(64), torch.zeros(64)
    with emulated_gpu():
        asserting_kernel[(1,)](x, y, BLOCK=64, debug=True)
        assert torch.equal(x, y)
        x[40] = -1
        asserting_kernel[(1,)](x, y, BLOCK=64)  # without debug it is not compiled in
        with pytest.raises(Fault, match=rf"{line_of('tl.device_assert(value')}, CTA 0 warp 1.*a trap is reached"):
            asserting_kernel[(1,)](x, y, BLOCK=64, debug=True)


def test_printing_is_refused_by_name():
    with emulated_gpu(), pytest.raises(Unsupported, match="tl.device_print and other calls of functions"):
        printing_kernel[(1,)](torch.rand(64), BLOCK=64)


@pytest.mark.parametrize("scale", (1.0, 1e12))
def test_sine_and_cosine_of_any_angle(scale):
    """Large angles are reduced with a table in local memory and carries."""
    x, y = torch.randn(64) * scale, torch.zeros(2, 64)
    with emulated_gpu(race=True):
        waves_kernel[(1,)](x, y, BLOCK=64)
    want = torch.stack([x.double().sin(), x.double().cos()])
    assert (y - want).abs().max() < 2e-7


def test_a_clamp_between_opposite_numbers():
    x, y = torch.tensor([-2.0, -1.5, -1.0, -0.0, 0.0, 1.0, 1.5, float("inf")] * 4), torch.zeros(32)
    with emulated_gpu():
        clamp_kernel[(1,)](x, y, BLOCK=32)
    assert torch.equal(y, x.clamp(-1.5, 1.5)) and torch.equal(y.signbit(), x.signbit())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_vectors_of_atomics(dtype):
    """Threads of several elements: one instruction on sm_90 adds them."""
    x, y = torch.randint(9, (256,)).to(dtype), torch.randint(9, (256,)).to(dtype)
    want = y.clone(), x + y
    with emulated_gpu("sm90", race=True) as emulator:
        add_kernel[(1,)](x, y, BLOCK=256, num_warps=1)
    assert torch.equal(x, want[0]) and torch.equal(y, want[1])
    assert re.search(r"\.add\.(noftz\.)?v\d", emulator.records[0].ptx)


@pytest.mark.parametrize("arch", ("sm80", "sm90"))
def test_host_descriptors_with_and_without_tma(arch):
    x, y = torch.randn(40, 48), torch.zeros(40, 48)
    with emulated_gpu(arch, race=True):
        tile_kernel[(2, 2)](*(TensorDescriptor.from_tensor(each, [32, 32]) for each in (x, y)), ROWS=32, COLUMNS=32)
    assert torch.equal(y, x * 2)
