"""The gate and the runner, on one small op with right and wrong providers."""

import json
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from sora_fast import ops
from sora_fast.benchmarks import gate, rows, timing
from sora_fast.benchmarks.case import Case, Provider, nbytes
from sora_fast.benchmarks.roofs import PUBLISHED, Roofs, published
from sora_fast.benchmarks.runner import Runner, Settings
from sora_fast.benchmarks.suites import select
from sora_fast.testing.draw import Draw

CPU = torch.device("cpu")
QUICKLY = timing.Effort(0.0, 2.0)


@dataclass(frozen=True)
class Residual(Case):
    """gate_residual on ``tokens`` x ``width``, two modulation rows."""

    tokens: int = 40
    width: int = 24

    def shape(self):
        return dict(tokens=self.tokens, width=self.width)

    def inputs(self, device, seed):
        draw = Draw(device, seed, self.dtype)
        rows = (torch.arange(self.tokens, device=device) >= self.tokens // 3).to(torch.int32)
        return dict(x=draw(self.tokens, self.width), y=draw(self.tokens, self.width), gate=draw(2, self.width), rows=rows)

    def directions(self):
        return {"forward": (), "backward": ("x", "y", "gate")}

    def least_bytes(self, direction):
        x = self.tokens * self.width * self.dtype.itemsize
        return 3 * x if direction == "forward" else 4 * x


CASE = Residual("gate_residual", "a small pack", torch.float32, ("quick",))
RIGHT = partial(ops.gate_residual, backend="torch")


def verdicts(run, case=CASE, **options):
    truth = case.truth(case.inputs(CPU, 0), 0)
    return gate.check(case, Provider("planted", run, **options), truth, CPU, tuple(case.directions()))


def runner(out, told=None, **changes):
    settings = replace(Settings(CPU, "quick", "hot", out, effort=QUICKLY), **changes)
    return Runner(settings, tell=(lambda text: None) if told is None else told.append)


WORK = [("modulation", CASE, [Provider("torch", RIGHT)])]


# -------------------------------------------------------------------------------------------------------- the gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_provider_passes(dtype):
    for backend in ("torch", "reference"):
        found = verdicts(partial(ops.gate_residual, backend=backend), replace(CASE, dtype=dtype))
        assert {v.status for v in found.values()} == {"PASSED"}, found
        assert all(0 <= v.error <= v.allowed for v in found.values())


def one_element_off(x, y, gate, rows):
    out = RIGHT(x, y, gate, rows).clone()
    out[17, 5] += 1e-3
    return out


def gradient_off(x, y, gate, rows):
    return RIGHT(x, y, gate * 1.001, rows) - (RIGHT(x, y, gate * 1.001, rows) - RIGHT(x, y, gate, rows)).detach()


def changes_inputs(x, y, gate, rows):
    out = RIGHT(x, y, gate, rows)
    y.data[3] = 0  # unseen by autograd, as a kernel would do it
    return out


def changes_inputs_openly(x, y, gate, rows):
    out = RIGHT(x, y, gate, rows)
    gate.mul_(0)
    return out


def cached():
    kept = []

    def run(x, y, gate, rows):
        if not kept:
            kept.append(RIGHT(x, y, gate, rows))
        return kept[0]
    return run


def cached_by_address():
    kept = {}

    def run(x, y, gate, rows):
        return kept.setdefault(x.data_ptr(), RIGHT(x, y, gate, rows))
    return run


def one_buffer():
    buffer = torch.empty(CASE.tokens, CASE.width)

    def run(x, y, gate, rows):
        out = RIGHT(x, y, gate, rows)
        with torch.no_grad():
            buffer.copy_(out)
        return out - out.detach() + buffer if out.requires_grad else buffer
    return run


class LastRowForgotten(torch.autograd.Function):
    @staticmethod
    def forward(x, y, gate, rows):
        out = torch.empty_like(x)
        out[:-1] = RIGHT(x, y, gate, rows)[:-1]
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors[:3]]
            return *torch.autograd.grad(RIGHT(*leaves, ctx.saved_tensors[3]), leaves, grad), None


def last_row_of_gradient_forgotten(x, y, gate, rows):
    class Forgets(torch.autograd.Function):
        @staticmethod
        def forward(t):
            return t.view_as(t)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            out = torch.empty_like(grad)
            out[:-1] = grad[:-1]
            return out

    return RIGHT(Forgets.apply(x), y, gate, rows)


@pytest.mark.parametrize("run, directions, reason", [
    (one_element_off, {"forward", "backward"}, "at [17, 5]"),
    (gradient_off, {"backward"}, ": FAILED."),
    (changes_inputs, {"forward", "backward"}, "changes its inputs"),
    (changes_inputs_openly, {"forward", "backward"}, "changes its inputs"),
    (cached(), {"forward", "backward"}, "FAILED"),
    (cached_by_address(), {"forward", "backward"}, "FAILED"),
    (one_buffer(), {"forward", "backward"}, "same memory"),
    (lambda x, y, gate, rows: LastRowForgotten.apply(x, y, gate, rows), {"forward", "backward"}, "non-finite"),
    (last_row_of_gradient_forgotten, {"backward"}, "d x"),
    (lambda x, y, gate, rows: RIGHT(x, y, gate, rows).double(), {"forward", "backward"}, "dtype"),
    (lambda x, y, gate, rows: (RIGHT(x, y, gate, rows),) * 2, {"forward", "backward"}, "1 outputs, got 2"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_provider_fails(run, directions, reason):
    found = verdicts(run)
    assert {d for d, v in found.items() if v.status == "FAILED"} == directions, found
    assert any(reason in v.reason for v in found.values()), found


def test_exceptions_become_verdicts():
    def raises(error):
        def run(**inputs):
            raise error
        return verdicts(run)["forward"]

    assert raises(NotImplementedError("No such thing.")) == gate.refusal("UNSUPPORTED", "No such thing.")
    assert raises(RuntimeError("out of\nmemory")) == gate.refusal("ERROR", "RuntimeError: out of memory")


# ------------------------------------------------------------------------------------------------------ the runner
def test_rows_have_what_their_description_says(tmp_path):
    done = runner(tmp_path).run(WORK)
    assert done == rows.read(tmp_path / "bench.jsonl")
    timed = [row for row in done if row["row"] == "time"]
    assert [(row["direction"], row["provider"], row["status"]) for row in timed] == [
        ("forward", "torch", "PASSED"), ("backward", "torch", "PASSED")]
    for row in timed:
        assert row["min_ms"] <= row["p20_ms"] <= row["q3_ms"] <= row["p80_ms"] and row["n"] >= timing.LEAST_SAMPLES
        assert row["min_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["error"] <= row["allowed"] and row["timer"] == "wall" and row["l2"] == "hot"
        assert row["bytes"] == CASE.least_bytes(row["direction"]) and row["flops"] == 0 and row["roof"] == "copy"
        assert row["share"] is None or row["share"] == row["floor_ms"] / row["median_ms"] <= 1.05
        assert row["environment"]["torch"] == torch.__version__ and row["environment"]["kind"] == "cpu"
        assert row["shape"] == CASE.shape() and "--providers torch" in row["command"]
    assert {row["kind"] for row in done if row["row"] == "roof"} == {"copy", "matrix"}


def test_only_a_passed_provider_gets_a_time(tmp_path):
    providers = [Provider("torch", RIGHT), Provider("wrong", one_element_off),
                 Provider("absent", RIGHT, unavailable=lambda case, direction, device: "It is not installed."),
                 Provider("forward only", RIGHT,
                          unavailable=lambda case, direction, device: "No backward." if direction == "backward" else "")]
    done = [row for row in runner(tmp_path).run([("modulation", CASE, providers)]) if row["row"] == "time"]
    status = {(row["provider"], row["direction"]): row["status"] for row in done}
    assert status == {
        ("torch", "forward"): "PASSED", ("torch", "backward"): "PASSED", ("wrong", "forward"): "FAILED",
        ("wrong", "backward"): "FAILED", ("absent", "forward"): "UNSUPPORTED", ("absent", "backward"): "UNSUPPORTED",
        ("forward only", "forward"): "PASSED", ("forward only", "backward"): "UNSUPPORTED"}
    for row in done:
        assert (row["median_ms"] is not None) == (row["min_ms"] is not None) == (row["status"] == "PASSED")
        assert bool(row["reason"]) == (row["status"] != "PASSED")


def test_what_begins_to_cheat_once_timed_loses_its_time(tmp_path):
    calls, kept = [], []

    def run(x, y, gate, rows):
        calls.append(x)
        if len(calls) < 12:
            return RIGHT(x, y, gate, rows)
        if not kept:
            kept.append(RIGHT(x, y, gate, rows))
        return kept[0]

    case = replace(CASE, label="forward")
    done = runner(tmp_path).run([("modulation", case, [Provider("late", run)])])
    row = next(row for row in done if row["row"] == "time" and row["direction"] == "forward")
    assert row["status"] == "FAILED" and row["median_ms"] is None and "after" in row["reason"]


def test_what_memory_has_no_room_for_is_timed_in_another_group(tmp_path):
    class Fake:
        name, not_captured = "wall", ""

        def sample(self):
            return 1.0

    tried = []

    def make(provider):
        tried.append(provider.name)
        if provider.name == "huge" or provider.name == "big" and tried.count("big") == 1:
            raise torch.cuda.OutOfMemoryError("no room")
        return None, Fake()

    result, broken, clock = runner(tmp_path)._in_turns([Provider(name, RIGHT) for name in ("a", "big", "b", "huge")], make)
    assert tried == ["a", "big", "big", "b", "huge", "huge"] and set(result) == {"a", "big", "b"} and clock is None
    assert broken == {"huge": gate.refusal("ERROR", "OutOfMemoryError: no room")}


def test_what_a_backward_keeps_is_counted(tmp_path):
    def run(x, y, gate, rows):
        return x + gate[rows.long()] * y  # keeps gate[rows], which the inputs do not hold

    done = runner(tmp_path).run([("modulation", CASE, [Provider("eager", run)])])
    saved = {row["direction"]: row["saved_bytes"] for row in done if row["row"] == "time"}
    tokens = CASE.inputs(CPU, 0)["rows"]
    assert saved == {"forward": None, "backward": nbytes(torch.empty(40, 24)) + nbytes(tokens.long())}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    other = replace(CASE, label="another pack")
    first = runner(tmp_path).run(WORK)
    told = []
    both = runner(tmp_path, told).run([*WORK, ("modulation", other, WORK[0][2])])
    assert both[:len(first)] == first and told == [f"[2/2] {other.id}"]
    assert len({rows.key(row) for row in both if row["row"] == "time"}) == 4
    told.clear()
    more = [("modulation", CASE, [*WORK[0][2], Provider("reference", partial(ops.gate_residual, backend="reference"))])]
    assert {row["provider"] for row in runner(tmp_path, told).run(more)[len(both):] if row["row"] == "time"} == {"reference"}


def test_other_conditions_are_refused_by_name(tmp_path):
    runner(tmp_path).run(WORK)
    with pytest.raises(ValueError, match="l2 'cold' where it has 'hot'"):
        runner(tmp_path, l2="cold")
    path = tmp_path / "bench.jsonl"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    with pytest.raises(ValueError, match="torch .* where it has '1.0'"):
        runner(tmp_path)


def test_a_time_limit_leaves_the_rest_for_the_next_call(tmp_path):
    told = []
    done = runner(tmp_path, told, minutes=1e-9).run([*WORK, ("modulation", replace(CASE, label="b"), WORK[0][2])])
    assert done == [] and "2 of 2 cases are left" in told[-1]


def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path):
    path = tmp_path / "bench.jsonl"
    runner(tmp_path).run(WORK)
    whole = rows.read(path)
    with open(path, "a") as file:
        file.write(json.dumps(whole[0])[:50])
    assert rows.read(path) == whole
    rows.append(path, [whole[0]])
    assert rows.read(path) == [*whole, whole[0]]
    path.write_text('{"row": "time"}\n' + path.read_text())
    with pytest.raises(ValueError, match="line 1"):
        rows.read(path)


def test_select_takes_cases_and_providers_by_name():
    other = replace(CASE, label="Wan 14B")
    a, b = Provider("a", RIGHT), Provider("b", RIGHT)
    work = [("modulation", CASE, [a, b]), ("modulation", other, [b])]
    assert [case.label for _, case, _ in select(work, "WAN", ())] == ["Wan 14B"]
    assert [(case.label, [p.name for p in ps]) for _, case, ps in select(work, "", ("a",))] == [("a small pack", ["a"])]


# ------------------------------------------------------------------------------------------------- roofs and timing
def test_published_figures_are_found_by_the_device_name():
    assert published("NVIDIA H200").memory == 4800 and published("NVIDIA H100 PCIe").bf16 == 756
    assert published("NVIDIA A100-SXM4-40GB").memory == 1555 and published("NVIDIA GeForce RTX 4090").fp32 == 82.6
    assert published("Tesla T4") is None and published("NVIDIA A10G") is None
    for chip in PUBLISHED.values():
        assert chip.source.startswith("https://") and chip.fp32 < chip.bf16 and 100 < chip.memory < 20_000


def test_a_floor_is_the_slower_of_both_roofs():
    roofs = Roofs(CPU, "hot")
    roofs.effort = QUICKLY
    matrix, copy = roofs.matrix(torch.float32), roofs.copy(2**22)
    assert matrix > 1e8 and copy > 1e7
    assert roofs.floor_ms(int(matrix), 2**22, torch.float32) == ("matrix", pytest.approx(1e3, rel=1e-6))
    assert roofs.floor_ms(0, 2**22, torch.float32) == ("copy", pytest.approx(2**22 / copy * 1e3))
    assert {(row["kind"], row["bytes"]) for row in roofs.found.values()} >= {("copy", 2**22)}


def test_statistics_of_known_samples():
    found = timing.Timing(((1.0, 2.0, 3.0), (10.0, 20.0, 30.0), (4.0, 5.0, 6.0)), "wall").statistics()
    assert found == dict(min_ms=1.0, p20_ms=pytest.approx(2.6), median_ms=5.0, q3_ms=10.0, p80_ms=pytest.approx(14.0), n=9)


def test_providers_take_turns():
    turns = []

    class Fake:
        name, not_captured = "wall", ""

        def __init__(self, letter):
            self.letter = letter

        def sample(self):
            turns.append(self.letter)
            return 50.0

    found = timing.measure({"a": Fake("a"), "b": Fake("b")}, timing.Effort(0.0, 200.0))
    assert "".join(turns[4:]) == "aaaabbbb" * timing.ROUNDS and found["a"].statistics()["n"] == 20
    long = timing.measure({"a": Fake("a")}, timing.Effort(0.0, 50.0))  # one call takes as long as all samples should
    assert long["a"].statistics()["n"] == timing.ROUNDS
