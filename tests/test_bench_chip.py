"""benchmarks/chip.py without a GPU: its kernels as compiled for sm_90, and executed by the emulator at small sizes."""

import pytest
import torch

pytest.importorskip("triton")

from sora_fast.benchmarks import chip, rows  # noqa: E402
from sora_fast.cyclemodel import GPUS, facts, sass, units, warp_paths  # noqa: E402
from sora_fast.testing import aot, emulated_gpu  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.ci]

CPU = torch.device("cpu")
SMALL = chip.Sizes(sms=1, near=40, far=70, steps=30, turns=5, tiles=2)


def all_probes(hopper=True):
    return [make() for make in chip.probes(CPU, SMALL, hopper, GPUS["h200"])]


def test_each_kernel_does_what_it_is_timed_for(monkeypatch):
    monkeypatch.setattr(chip, "DEPTHS", (1, 3))
    monkeypatch.setattr(chip, "WIDTHS", (64,))
    with emulated_gpu("sm90"):
        for probe in all_probes():
            probe.call()
            assert not probe.wrong(), probe
            probe.call()  # the chase goes on where it was
            assert not probe.wrong() and probe.value(1e-6, 1e9) > 0, probe
    assert {probe.what for probe in all_probes(hopper=False)} == {"L2 latency", "DRAM latency", "L2 throughput"}


def test_machine_code_is_what_is_meant(monkeypatch):
    """WGMMA: so many groups in flight, none waited for early. Streams: copied ahead, by TMA or by cp.async."""
    monkeypatch.setattr(chip, "DEPTHS", (1, 3))
    monkeypatch.setattr(chip, "WIDTHS", (256,))
    seen = set()
    for probe in all_probes():
        (case,) = aot.cases_of(probe.what, probe.call, {})
        key = case.fn.__name__, str(case.constexprs)
        if key in seen or case.constexprs.get("SHARED"):
            continue
        seen.add(key)
        made = aot.compile_for(case.fn, case.signature, case.constexprs, case.aligned, 90, **case.options)
        code = max(sass.functions(made.sass), key=len)
        inside = [warp_paths.iteration(loop, code) for loop in warp_paths.main_loops(code)]
        assert not made.spills and not made.losses and inside
        for path in inside:
            bases = {i.base for i in path}
            if "wgmma" in key[0]:
                waits = {i.body for i in path if i.body.startswith("WARPGROUP.DEPBAR")}
                assert waits == {f"WARPGROUP.DEPBAR.LE gsb0, {case.constexprs['DEPTH'] - 1:#x}"}
                assert sum(map(units.flops, path)) * 4 % (2 * 64 * 256 * 64) == 0
            elif "stream" in key[0]:
                assert ("UTMALDG" if case.constexprs["TMA"] else "LDGSTS") in bases
                assert facts.prefetch(path, case.constexprs["STAGES"]) >= 1
            else:
                assert "LDG" in bases
    assert len(seen) == 1 + 2 + 2  # chase, streams by TMA and cp.async, WGMMAs


def test_what_is_written(monkeypatch, tmp_path, capsys):
    """On a stand-in for a GPU: rows for what passed, what did not, and what could not be measured."""
    assert chip.main(["--device", "cpu", "--jsonl", str(tmp_path / "none.jsonl")]) == 0
    assert "UNSUPPORTED" in capsys.readouterr().out and not (tmp_path / "none.jsonl").exists()
    monkeypatch.setattr(chip.timing, "Events", lambda calls, device: chip.timing.Wall(calls))
    monkeypatch.setattr(chip.timing, "GPU", chip.timing.Effort(0.0, 0.0))
    monkeypatch.setattr(chip, "_hertz", lambda *arguments: 1.5e9)
    make = lambda wrong, call=lambda: None: lambda: chip.Probe("L2 latency", "clocks", call, lambda: wrong,
                                                               lambda seconds, hertz: hertz, 300.0)
    passed, failed = chip._measure(make(False), CPU), chip._measure(make(True), CPU)
    broken = chip._measure(make(False, lambda: 1 / 0), CPU)
    assert (passed["status"], passed["value"], passed["clock_mhz"]) == ("PASSED", 1.5e9, 1500.0)
    assert (failed["status"], failed["value"]) == ("FAILED", None)
    assert broken["status"] == "ERROR" and "division by zero" in broken["reason"]
    assert chip.line(passed) == "L2 latency: 1.5e+09 clocks (the model has 300)" and "ERROR" in chip.line(broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(chip, "environment", lambda device: dict(device="NVIDIA H200", kind="cuda", sm=90))
    monkeypatch.setattr(chip, "sizes", lambda device: SMALL)
    monkeypatch.setattr(chip, "probes", lambda device, size, hopper, gpu: [lambda: broken] if hopper and gpu else [])
    monkeypatch.setattr(chip, "_measure", lambda make, device: make())
    monkeypatch.setattr(chip, "_loaded", lambda device, gpu: [passed])
    assert chip.main(["--jsonl", str(tmp_path / "chip.jsonl")]) == 1
    written = rows.read(tmp_path / "chip.jsonl")
    assert [(row["row"], row["status"], row["environment"]["kind"]) for row in written] == [
        ("chip", "ERROR", "cuda"), ("chip", "PASSED", "cuda")]
