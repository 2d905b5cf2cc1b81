"""emulated_gpu: Triton's launches, a user's own too, and ours on CPU tensors; what it leaves alone; what it reports."""

import contextvars
import threading

import pytest
import torch

pytest.importorskip("triton")
import emulated_gluon_kernels as gluon_kernels  # noqa: E402
import emulated_kernels as kernels  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from sora_fast import env, ops  # noqa: E402
from sora_fast.emulator.memory import Fault  # noqa: E402
from sora_fast.testing import emulated_gpu  # noqa: E402


def scaled(n=100, block=64, factor=3.0):
    """scale_kernel of n numbers: (what it wrote, what it should)."""
    x, y = torch.arange(float(n)), torch.full((n,), -1.0)
    kernels.scale_kernel[(triton.cdiv(n, block),)](x, y, n, factor, BLOCK=block)
    return y, x * factor


@pytest.mark.parametrize("arch", ("sm80", "sm90", "sm120"))
def test_a_users_kernel_runs(arch):
    with emulated_gpu(arch) as emulator:
        got, want = scaled()
    assert torch.equal(got, want)
    (launched,) = emulator.records
    assert launched.name == "scale_kernel" and launched.grid == (2, 1, 1)
    assert f".target {arch[:2]}_{arch[2:]}" in launched.ptx


def test_other_arguments_than_numbers_and_tensors(monkeypatch):
    with emulated_gpu():
        for n in (1, 16, 17):  # 1 and multiples of 16 are other kernels
            got, want = scaled(n)
            assert torch.equal(got, want)
        with pytest.raises(ValueError, match="scale_kernel: expected x to be a CPU tensor in emulated_gpu, got one on meta"):
            kernels.scale_kernel[(1,)](torch.empty(64, device="meta"), torch.empty(64), 64, 1.0, BLOCK=64)


def test_warmup_and_the_handle_are_as_tritons():
    x, y = torch.arange(100.0), torch.zeros(100)
    with emulated_gpu() as emulator:
        handle = kernels.scale_kernel.warmup(x, y, 100, 2.0, BLOCK=64, num_warps=2, grid=(2,))
        assert not emulator.records and not y.any()
        assert handle.metadata.num_warps == 2 and handle.name == "scale_kernel"
        assert ".entry scale_kernel" in handle.asm["ptx"]
        assert handle is kernels.scale_kernel[(2,)](x, y, 100, 2.0, BLOCK=64, num_warps=2)
        assert torch.equal(y, 2 * x)
        handle[(2,)](x, y, 100, 3.0, 64)
        assert torch.equal(y, 3 * x)
        with pytest.raises(AttributeError, match="n_regs.*ptxas"):
            handle.n_regs  # noqa: B018
    with pytest.raises(RuntimeError, match="expected a launch inside emulated_gpu"):
        handle[(2,)](x, y, 100, 3.0, 64)


def test_autotuned_kernels_and_heuristics():
    """The first config, or the one whose values are named; nothing is timed."""
    x, y = torch.arange(128.0), torch.zeros(128)
    run = lambda n: kernels.tuned_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, y, n)
    with emulated_gpu() as emulator:
        run(128)
        assert torch.equal(y, x + 64) and emulator.records[-1].grid == (2, 1, 1)
        run(100)
        assert emulator.records[-1].block == (64, 1, 1)
    with emulated_gpu(configs={"tuned_kernel": {"BLOCK": 128}}) as emulator:
        run(128)
        assert torch.equal(y, x + 128) and emulator.records[-1].block == (128, 1, 1)
    none = pytest.raises(ValueError, match="config of tuned_kernel with")
    with emulated_gpu(configs={"tuned_kernel": {"BLOCK": 32}}), none:
        run(128)


def test_other_threads_are_left_alone():
    """A thread begun inside has a context of its own; one that copies the context has the scope."""
    seen, error = [], []

    def elsewhere():
        try:
            scaled()
        except Exception as raised:  # Triton's own, without a driver
            error.append(raised)

    with emulated_gpu() as emulator:
        plain = threading.Thread(target=elsewhere)
        plain.start(), plain.join()
        told = "scale_kernel: expected a GPU, or a launch in the context that opened emulated_gpu"
        assert not emulator.records and (torch.cuda.is_available() or told in str(*error))
        context = contextvars.copy_context()
        copied = threading.Thread(target=lambda: context.run(lambda: seen.append(scaled())))
        copied.start(), copied.join()
        assert torch.equal(*seen[0]) and len(emulator.records) == 1


def test_two_threads_emulate_two_gpus():
    found, together = {}, threading.Barrier(2)

    def one(arch):
        with emulated_gpu(arch) as emulator:
            together.wait(timeout=60)
            got, want = scaled()
            found[arch] = torch.equal(got, want) and f".target {arch[:2]}_{arch[2:]}" in emulator.records[0].ptx
            together.wait(timeout=60)

    threads = [threading.Thread(target=one, args=(arch,)) for arch in ("sm80", "sm90")]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert found == {"sm80": True, "sm90": True}


def test_nothing_is_changed_outside():
    before = JITFunction.run, Autotuner.run
    with emulated_gpu(), emulated_gpu("sm80"):
        assert JITFunction.run is not before[0]
    assert (JITFunction.run, Autotuner.run) == before
    with pytest.raises(ZeroDivisionError), emulated_gpu():
        raise ZeroDivisionError
    assert (JITFunction.run, Autotuner.run) == before
    with pytest.raises(NotImplementedError, match="on a CPU only in sora_fast.testing.emulated_gpu"):
        ops.norm_modulate(torch.zeros(2, 8), None, None, None, backend="triton")


def test_ptx_is_kept_apart_from_tritons_cache(monkeypatch, tmp_path):
    """Compiled emulated, then normally: Triton finds nothing of the emulator's, and makes a cubin."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "ours"))
    kernels.scale_kernel.device_caches.clear()
    with emulated_gpu():
        scaled()
    kept = list((env.cache() / "emulator").iterdir())
    assert len(kept) == 1 and not list(tmp_path.glob("triton/**/*.cubin"))
    signature = dict(x="*fp32", y="*fp32", n="i32", factor="fp32", BLOCK="constexpr")
    source = ASTSource(kernels.scale_kernel, signature, {(4,): 64})
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert kernel.asm["cubin"][:4] == b"\x7fELF"
    kept[0].write_text('{"asm": ')  # a process that died: it is compiled again
    from sora_fast.emulator import triton_compile

    monkeypatch.setattr(triton_compile, "_kernels", {})
    with emulated_gpu():
        assert torch.equal(*scaled())


def test_wrong_requests_are_sentences(monkeypatch):
    for arguments, sentence in ((dict(arch="sm75"), "expected one of sm80, .*got 'sm75'"),
                                (dict(schedules=0), "expected schedules to be a number from 1 on"),
                                (dict(schedules="slow"), "expected schedules among 'late', .* got 'slow'")):
        with pytest.raises(ValueError, match=f"emulated_gpu: {sentence}"), emulated_gpu(**arguments):
            pass
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="got TRITON_INTERPRET=1"), emulated_gpu():
        pass


def test_auto_is_what_it_is_on_a_cpu():
    x = torch.randn(6, 8)
    with emulated_gpu() as emulator:
        ops.norm_modulate(x, None, None, None)
        assert not emulator.records
        ops.norm_modulate(x, None, None, None, backend="triton")
        assert emulator.records


# ------------------------------------------------------------------------------------------- wrong kernels of a user's
def line_of(text, module=kernels):
    """"emulated_kernels.py:12" of the line that holds ``text``."""
    lines = open(module.__file__, encoding="utf-8").read().splitlines()
    (number,) = [number for number, line in enumerate(lines, start=1) if text in line]
    return rf"{module.__name__}\.py:{number}\b"


@pytest.mark.parametrize("kernel, line", [("unmasked_load_kernel", "tl.load(x + at)  # no mask"),
                                          ("unmasked_store_kernel", "tl.store(y + at, value)  # no mask")])
def test_a_missing_mask_is_reported(kernel, line):
    x, y = torch.randn(100), torch.zeros(100)
    place = rf"{kernel} at {line_of(line)}, CTA 1 warp 1 lane 4: .* element 100 of . \(100 elements\)"
    with emulated_gpu(), pytest.raises(Fault, match=place):
        getattr(kernels, kernel)[(2,)](x, y, 100, BLOCK=64)


def test_a_missing_mask_that_stays_inside_is_none():
    x, y = torch.randn(128), torch.zeros(128)
    with emulated_gpu():
        kernels.unmasked_load_kernel[(2,)](x, y, 100, BLOCK=64)
    assert torch.equal(y[:100], x[:100])


def test_results_that_depend_on_the_schedule_are_reported():
    """Programs that add to one number: the orders differ, and so do the sums."""
    x = torch.ones(3 * 64)
    with emulated_gpu(schedules=2) as emulator:
        y = torch.zeros(1)
        kernels.atomic_sum_kernel[(3,)](x, y, BLOCK=64)
        assert y.item() == 192 and len(emulator.records[0].runs) == 2


def test_a_race_between_programs_is_reported():
    x, y = torch.ones(3 * 64), torch.zeros(1)
    line = line_of("tl.store(y, tl.load(y) + value)")
    with emulated_gpu(race=True), pytest.raises(Fault, match=line):
        kernels.racing_sum_kernel[(3,)](x, y, BLOCK=64)
    with emulated_gpu(race=True):
        kernels.atomic_sum_kernel[(3,)](x, y.zero_(), BLOCK=64)
        assert torch.equal(*scaled())


@pytest.mark.parametrize("race", (False, True))
@pytest.mark.parametrize("kernel, line, finding", [
    ("stored_kernel", "# of what was stored", "uninitialised shared memory"),
    ("copied_kernel", "# of what was copied", "uninitialised shared memory|race: a copy is still in flight")])
def test_gluon_kernels(kernel, line, finding, race):
    """A read of shared memory that nothing wrote, and a copy that nothing waits for."""
    x = torch.arange(128.0)
    for arch in ("sm80", "sm90"):
        with emulated_gpu(arch, race=race):
            y = torch.zeros(128)
            getattr(gluon_kernels, kernel)[(1,)](x, y, True, BLOCK=128)
            assert torch.equal(y, x)
            with pytest.raises(Fault, match=rf"{kernel} at {line_of(line, gluon_kernels)}, CTA 0 warp 0.*: ({finding})"):
                getattr(gluon_kernels, kernel)[(1,)](x, y, False, BLOCK=128)


def test_more_shared_memory_than_the_gpu_has_is_refused():
    x, y = torch.arange(2.0**15), torch.zeros(2**15)
    with emulated_gpu("sm86"), pytest.raises(OutOfResources, match="131072.*101376"):
        gluon_kernels.stored_kernel[(1,)](x, y, True, BLOCK=2**15)


def test_counters_of_a_launch():
    with emulated_gpu(counters=True) as emulator:
        scaled(128, block=128)
    counters = emulator.records[0].counters
    assert counters.mix()["global"] > 0 and sum(counters.sectors.values()) == 2 * 128 * 4 // 32
