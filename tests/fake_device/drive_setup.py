"""Setup on the fake device: kernels judged in the emulator, times that were planted, and what ``auto`` takes then."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fake_device.setup_process import CLEAN, TAKEN, Model, call, shorten, taken
from sora_fast import dispatch, measured, records, setup
from sora_fast.ops.modulation import GATE_RESIDUAL
from sora_fast.testing import aot
from sora_fast.tuning import setting_up, walk, workers
from sora_fast.tuning.launched import launched


@pytest.fixture
def machine(monkeypatch, tmp_path, kernels):
    """A cache of its own, and little to do."""
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    shorten(monkeypatch.setattr)
    yield tmp_path / "cache"
    monkeypatch.undo()
    measured.forget()


def elsewhere(cache, *words) -> subprocess.Popen:
    """A setup in another process."""
    command = [sys.executable, "-m", "fake_device.setup_process", str(cache), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def widths() -> list[int]:
    """Of the problems in the file of measured times, every line of which is whole."""
    rows = [json.loads(line) for line in measured.user_file().read_text("utf-8").splitlines()]
    assert all(row["ms"].keys() >= {"torch", "triton"} for row in rows)
    return sorted(row["shape"]["x"][1] for row in rows)


def test_auto_takes_the_fastest_that_is_right(machine):
    model, said = Model().to("cuda").eval(), []
    assert taken(model) == dict(gate_residual="torch", norm_modulate="torch")  # no records
    report = setup(model, call=call, jobs=1, tell=said.append)
    assert not report.failed and "2 to validate and 2 problems to time on NVIDIA H200" in said[0], said
    assert taken(model) == TAKEN
    lines = {line.op: line for line in report.lines}
    assert lines["gate_residual"].speed_up > 1 and lines["norm_modulate"].ms["triton"] > lines["norm_modulate"].ms["torch"]
    assert "xformers" not in lines["norm_modulate"].ms and "FAILED" in lines["norm_modulate"].refused["xformers"]
    assert "Layer" in str(report) and "not taken: norm_modulate, xformers" in str(report)
    start = time.monotonic()
    again = setup(model, call=call, jobs=1, tell=said.append)
    assert time.monotonic() - start < 5 and "nothing to do" in said[-1] and again.lines == report.lines


def test_a_wrong_kernel_is_never_taken(machine, monkeypatch):
    """Of a planted kernel that is right in its op's cases and wrong at the model's width."""
    right = CLEAN["gate_residual"]["triton"]
    wrong = replace(right, run=lambda x, **given: right.run(x=x, **given) * (1.01 if x.shape[1] == 16 else 1))
    monkeypatch.setattr(GATE_RESIDUAL, "backends", GATE_RESIDUAL.backends | {"triton": wrong})
    model = Model().to("cuda").eval()
    report = setup(model, call=call, jobs=1, tell=lambda line: None)
    problem = next(line for line in report.lines if line.op == "gate_residual")
    assert "triton" in problem.refused and taken(model)["gate_residual"] == "torch"
    assert not records.why_not("gate_residual", wrong, GATE_RESIDUAL.example("cuda:sm90", torch.float32, False))


def test_a_run_that_was_stopped_goes_on(machine, monkeypatch):
    """After a kernel is judged, and after a problem is timed."""
    model, done = Model().to("cuda").eval(), []

    def until(count):
        def did(clock, what, seconds):
            done.append(str(what))
            if len(done) == count:
                raise KeyboardInterrupt
        return did

    for count in (1, 4):
        done.clear()
        monkeypatch.setattr(setting_up._Clock, "did", until(count))
        with pytest.raises(KeyboardInterrupt):
            setup(model, call=call, jobs=1, tell=lambda line: None)
    done.clear()
    monkeypatch.setattr(setting_up._Clock, "did", until(99))
    setup(model, call=call, jobs=1, tell=lambda line: None)
    assert len(done) == 2, done  # the gate and the time of the one that was left
    assert taken(model) == TAKEN


def test_a_run_that_was_killed_goes_on(machine, monkeypatch):
    """Within the write of its second measured time: the file has the first, whole."""
    killed = elsewhere(machine, "16", "2")
    told, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert "2 to validate and 2 problems to time" in told and widths() == [16]
    model, done = Model().to("cuda").eval(), []
    monkeypatch.setattr(setting_up._Clock, "did", lambda clock, what, seconds: done.append(str(what)))
    setup(model, call=call, jobs=1, tell=lambda line: None)
    assert len(done) == 2 and taken(model) == TAKEN and widths() == [16, 16], done


def test_two_at_once(machine):
    """Of two models: the second waits for its turn, takes the first one's records as its own, and both are measured."""
    other = elsewhere(machine, "24")
    assert "2 to validate" in other.stdout.readline()
    model, said = Model().to("cuda").eval(), []
    report = setup(model, call=call, jobs=1, tell=said.append)
    told, errors = other.communicate()
    assert other.returncode == 0 and json.loads(told.splitlines()[-1]) == TAKEN, errors
    assert "another process is at it" in said[0] and "0 to validate and 2 problems" in said[1], said
    assert taken(model) == TAKEN and not report.failed and widths() == [16, 16, 24, 24]


def test_kernels_are_compiled_ahead_and_once(monkeypatch, tmp_path):
    """Triton finds what a worker compiled of tensors without memory, when it is launched on real ones; nothing runs here."""
    pytest.importorskip("triton")
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    here = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0,
                           get_current_target=lambda: GPUTarget("cuda", 90, 32))
    model = Model().to("cuda").train()
    case = next(each for each in walk.of_model(model, "cuda:sm90", call) if each.op == "gate_residual" and each.problem.grad)
    ahead = launched(case, "sm90-H200").launches
    (names,) = case.directions().values()
    given = {name: value.requires_grad_() if name in names else value for name, value in case.inputs("cuda", 0).items()}
    needed = aot.launches(lambda: torch.autograd.backward(x := CLEAN[case.op]["triton"].run(**given), torch.ones_like(x)))
    assert len(needed) == len(ahead) > 1
    monkeypatch.setattr(driver, "_active", here)
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        for place in range(len(ahead)):
            workers.Compilation(case, place, "kernel").run("cuda:0")
        compiled = sorted(tmp_path.rglob("*.cubin"))
        for launch in needed:
            launch.fn.device_caches.clear()
            launch.fn.warmup(*launch.args, grid=launch.grid, **launch.kwargs)
    assert len(compiled) == len(ahead) and sorted(tmp_path.rglob("*.cubin")) == compiled


def test_what_cannot_be_called_now(machine):
    model = Model().to("cuda").eval()
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="inside a CUDA graph"):
        setup(model, call=call)
    with pytest.raises(ValueError, match="expected call=, a function of the model"):
        setup(model)


def test_a_gpu_without_room(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**20, 2**30))
    with pytest.raises(RuntimeError, match=r"expected 0.7 GB of free memory on cuda:0, got 0.0 GB"):
        setup(Model().to("cuda").eval(), call=call, tell=lambda line: None)
    assert not measured.user_file().exists() and workers.cores() >= 1


@pytest.mark.parametrize("name", ("AutoencoderKLWan", "WanTransformer3DModel"))
def test_accelerate_sets_up(machine, monkeypatch, capsys, name):
    """What it prints with ``setup`` and without; every problem is measured in that call and none in a later step.

    Kernels are not judged here: times are planted, and each kernel has its record.
    """
    pytest.importorskip("diffusers", reason="the train extra is not installed")
    from sora_fast import accelerate
    from sora_fast.integrations.comparison import open_model

    ms = dict(triton=1.0, torch=3.0)
    monkeypatch.setattr(workers.Gate, "run", lambda task, device: dict.fromkeys(ms, ""))
    monkeypatch.setattr(workers.Validation, "run", lambda task, device: [])
    monkeypatch.setattr(setting_up, "_race", lambda case, runs, *rest: {run.name: ms[run.name] for run in runs})
    model = open_model(name).to("cuda").eval()
    before = accelerate(model)
    assert str(before).splitlines()[-1] == before.missing and before.measured is None
    assert before.missing.startswith("on this GPU no kernel has a validation record for ")
    assert before.missing.endswith("run on PyTorch: run sora-fast setup, or sora_fast.accelerate(model, setup=True), "
                                   "once")
    monkeypatch.setattr(records, "why_not", lambda *asked: [])
    report = accelerate(model, setup=True)
    said = capsys.readouterr().out
    assert "problems to time on NVIDIA H200, in " in said.splitlines()[0] and report.missing == ""
    last = str(report).splitlines()[-1].split()
    assert last[2] == "triton" and last[-1] == "3.00x" and report.measured.lines and not report.measured.failed
    assert {"WanResidualBlock", "WanTransformerBlock"} & {line.split()[0] for line in str(report).splitlines()}
    monkeypatch.setattr(setting_up, "setup", None)
    monkeypatch.setattr(setting_up, "_measure", None)
    x = torch.randn(1, 4, 1, 8, 8, device="cuda")
    with torch.no_grad(), dispatch.use_backend("torch"):
        if name == "AutoencoderKLWan":
            model.decode(x)
        else:
            model(x, torch.ones(1, device="cuda"), torch.randn(1, 3, 16, device="cuda"))
