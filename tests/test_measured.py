"""What was measured on this GPU decides what ``auto`` takes, and nothing that was measured elsewhere does."""

import errno
import os
from dataclasses import dataclass, replace

import pytest
import torch

from sora_fast import configs, dispatch, explain, measured, records
from sora_fast.dispatch import Backend, Op, Problem
from sora_fast.ops.modulation import GATE_RESIDUAL

GPU = "sm90-H200"


@dataclass(frozen=True)
class Sized(Problem):
    width: int
    size: tuple[int, ...] = ()


PROBLEM = Sized("cuda:sm90", torch.bfloat16, False, width=8, size=(64,))


@pytest.fixture
def op(monkeypatch, tmp_path):
    """An op with a kernel, a library, PyTorch and the definition, each saying its name; every kernel has its record."""
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "gpu_name", lambda device: GPU)
    monkeypatch.setattr(records, "why_not", lambda *asked: [])
    monkeypatch.setattr(records, "evidence", lambda *asked: "")
    made = Op("made_up", "none", None, [Backend(name, lambda name=name: name, kernel="modulation" * (name == "triton"))
                                        for name in ("triton", "flash_attn", "torch", "reference")], Sized)
    measured.forget()
    yield made
    measured.forget()


def line(op, ms, problem=PROBLEM, refused=()):
    return dict(schema=1, row="measured", op=op.name, problem=measured.text(problem), size=list(problem.size), gpu=GPU,
                ms=ms, refused=dict.fromkeys(refused, "It is wrong."), **measured.conditions((("triton", "modulation"),)))


def taken(op, problem=PROBLEM):
    return op.choose(problem).name


def test_the_fastest_is_taken_where_it_was_measured(op):
    assert taken(op) == "triton"
    measured.save([line(op, dict(triton=2.0, torch=1.0, flash_attn=3.0))])
    assert taken(op) == "torch"
    for elsewhere in (dict(size=(256,)), dict(width=16), dict(grad=True), dict(dtype=torch.float16)):
        assert taken(op, replace(PROBLEM, **elsewhere)) == "triton"
    facts = (PROBLEM.device, PROBLEM.dtype, PROBLEM.grad, PROBLEM.width, PROBLEM.size)
    call = lambda: op.run(op.plan(facts, "auto"), None)
    assert call() == "torch"  # which is remembered, until something else is measured
    measured.save([line(op, dict(triton=2.0, torch=1.0, flash_attn=0.5))])
    assert taken(op) == call() == "flash_attn"
    assert taken(op, replace(PROBLEM, size=())) == "flash_attn"  # of any size: the largest that was measured
    with dispatch.use_backend("reference"):
        assert taken(op) == "reference"


def test_what_was_wrong_is_never_taken(op):
    measured.save([line(op, {}, refused=("triton", "torch"))])
    assert taken(op) == "reference"
    op.backends["reference"] = Backend("reference", lambda: "", lambda problem: ["It cannot."])
    with pytest.raises(NotImplementedError, match="when it was measured here"):
        taken(op)


@pytest.mark.parametrize("change", [
    dict(gpu="sm90-H100"), dict(kernels={"triton": "0"}), dict(torch="2.0"), dict(triton="2.0"), dict(schema=2),
    dict(packages={"flash-attn": "0.1"}), dict(ms={"torch": "1"})], ids=lambda change: next(iter(change)))
def test_what_was_measured_otherwise_does_not_count(op, change):
    measured.save([line(op, dict(triton=2.0, torch=1.0)) | change])
    assert taken(op) == "triton"


def test_a_kernel_without_a_record_waits_for_it_and_the_next_is_taken(op, monkeypatch):
    measured.save([line(op, dict(triton=1.0, torch=2.0))])
    monkeypatch.setattr(records, "why_not", lambda name, backend, problem: ["None."] if backend.kernel else [])
    assert taken(op) == "torch"


def test_a_file_cut_short_keeps_its_whole_lines(op):
    measured.save([line(op, dict(triton=2.0, torch=1.0)), line(op, dict(torch=3.0), replace(PROBLEM, width=16))])
    text = measured.user_file().read_text("utf-8")
    measured.user_file().write_text(text[:-40], "utf-8")
    measured.forget()
    assert taken(op) == "torch" and len(measured.every(op, "cuda:sm90")) == 1
    measured.save([line(op, dict(triton=0.5, torch=1.0))])
    assert taken(op) == "triton" and len(measured.every(op, "cuda:sm90")) == 1


def test_a_full_disk_leaves_what_there_was(op, monkeypatch):
    measured.save([line(op, dict(triton=2.0, torch=1.0))])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            measured.save([line(op, dict(triton=1.0, torch=2.0))])
    measured.forget()
    assert taken(op) == "torch" and not list(measured.user_file().parent.glob("*.tmp"))


def test_explain_says_what_it_took(op):
    """Where nobody has measured the typical problem, that others were; what was refused has its reason."""
    problem = replace(GATE_RESIDUAL.example("cuda:sm90", torch.bfloat16, False), size=(65_536,))
    told = lambda: explain("gate_residual", device="cuda:sm90", grad=False).splitlines()[1].split(maxsplit=2)[1:]
    conditions = measured.conditions(measured.kernels(GATE_RESIDUAL))
    row = line(GATE_RESIDUAL, dict(triton=0.25, torch=0.75), problem) | conditions
    measured.save([row | dict(problem=measured.text(replace(problem, width=8)))])
    assert told()[1].endswith("1 other problem was measured here")
    measured.save([row])
    assert told() == ["triton", "0.25 ms, measured here, torch 0.75"]
    measured.save([row | dict(ms=dict(torch=0.75), refused=dict(triton="FAILED: d gate."))])
    assert told() == ["torch", "0.75 ms, measured here; not triton: FAILED: d gate."]


def test_a_graph_takes_what_was_fastest_over_all(op):
    """Of all sizes, and without a question for its own, which would make it a graph of that size alone."""
    measured.save([line(op, dict(triton=2.0, torch=1.0)),
                   line(op, dict(triton=2.0, torch=9.0, flash_attn=0.1), replace(PROBLEM, size=(1024,)))])

    def steps(x):
        problem = Sized("cuda:sm90", torch.bfloat16, False, x.shape[1], measured.sizes(x.shape[:1]))
        return x + ("triton", "flash_attn", "torch", "reference").index(op.order(problem)[0]) + 10 * len(problem.size)

    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    compiled = torch.compile(steps, fullgraph=True, backend=backend, dynamic=True)
    assert [float(compiled(torch.zeros(n, 8))[0, 0]) for n in (3, 64, 1000)] == [0.0] * 3 and len(graphs) == 1
    assert float(steps(torch.zeros(64, 8))[0, 0]) == 12.0  # outside of one: torch, in its bucket


def test_sizes_are_powers_of_four():
    found = [measured.sizes((n,))[0] for n in (0, 1, 2, 4, 5, 16, 17, 32_760, 65_536, 65_537)]
    assert found == [1, 1, 4, 4, 16, 16, 64, 65_536, 65_536, 262_144]
    assert measured.sizes((2, 3), (90,), samples=9) == (16, 16)
