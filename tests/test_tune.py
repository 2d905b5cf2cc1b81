"""sora-fast tune: the real frame around a planted kernel whose configs differ in speed, in numbers, or fail."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from cli_checks import refused

import sora_fast.kernels
from sora_fast import configs, ops, records
from sora_fast.benchmarks import rows, suites, timing
from sora_fast.benchmarks.case import FORWARD, Case, Provider
from sora_fast.dispatch import Backend
from sora_fast.explanation import explain
from sora_fast.ops import modulation
from sora_fast.testing.draw import Draw
from sora_fast.tuning import tuner

CPU = torch.device("cpu")
KERNEL = '''
from dataclasses import dataclass

@dataclass(frozen=True)
class Launch:
    width: int

@dataclass(frozen=True)
class Config:
    """How long a launch takes, and what is wrong with it."""
    ms: float
    fault: str = ""

def heuristic(launch, gpu):
    return Config(4.0)
'''
CANDIDATES = """
from .planted import Config

def candidates(kernel, launch, gpu):
    return [Config(*each) for each in {}]
"""


# ---------------------------------------------------------------------------------------------- the planted family
@dataclass(frozen=True)
class Planted(Case):
    """gate_residual of 12 tokens, a row of modulation each."""

    width: int = 8

    def shape(self):
        return dict(width=self.width)

    def inputs(self, device, seed):
        draw = Draw(device, seed, self.dtype)
        return {name: draw(12, self.width) for name in ("x", "y", "gate")}

    def directions(self):
        return {FORWARD: (), "backward": ("x", "y", "gate")}

    def least_bytes(self, direction):
        return 1


class Clock:
    """Time that passes only when a planted kernel runs: what a config takes, give or take ``jitter``."""

    def __init__(self, jitter=0.0):
        self.now, self.jitter, self.random = 0.0, jitter, random.Random(1)

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds * (1 + self.jitter * self.random.random())


class Kernel:
    """The planted op: gate_residual, whose forward and backward look up a config each, and are as it says."""

    def __init__(self, sleep=time.sleep, saving=False):
        self.sleep, self.saving, self.launches = sleep, saving, []

    def launch(self, kernel, width, tensor):
        from sora_fast.kernels import planted

        config = configs.lookup("planted", kernel, planted.Launch(width), "cpu", planted.heuristic).config
        self.launches.append((kernel, config))
        self.sleep(config.ms / 1e3)
        if config.fault == "raises":
            raise RuntimeError("out of resource: shared memory, required 262144, limit 232448")
        late = config.fault == "late" and self.launches.count((kernel, config)) > 15  # the gate makes fewer
        return tensor * 1.001 if config.fault == "wrong" or late else tensor

    def __call__(self, x, y, gate):
        class Planted(torch.autograd.Function):
            @staticmethod
            def forward(ctx, out):
                return out.view_as(out)

            @staticmethod
            def backward(ctx, grad):
                return self.launch("backward", x.shape[1], grad)

        if self.saving and torch.is_grad_enabled():
            self.launch("saving", x.shape[1], x)
        return Planted.apply(self.launch("forward", x.shape[1], ops.gate_residual(x, y, gate, backend="reference")))


def provider(kernel):
    return Provider("triton", kernel)


def work(kernel, count=1):
    """``count`` cases with a problem each."""
    return [("modulation", Planted("gate_residual", f"planted {place}", torch.float32, ("quick",), 8 + place),
             provider(kernel)) for place in range(count)]


def forget():
    records.forget()
    configs.forget()
    for name in ("planted", "planted_candidates"):
        sys.modules.pop(f"sora_fast.kernels.{name}", None)
        vars(sora_fast.kernels).pop(name, None)
    importlib.invalidate_caches()


def plant(folder, candidates=((4.0,), (3.0,), (5.0,), (2.0,), (6.0,), (7.0,), (2.5,), (3.5,)), kernel=KERNEL):
    """Write the kernel module and the one of its ``candidates``, (ms, fault) each, and have them imported."""
    folder.mkdir(exist_ok=True)
    (folder / "planted.py").write_text(kernel)
    (folder / "planted_candidates.py").write_text(CANDIDATES.format(candidates))
    forget()


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch):
    """A planted kernel module, an empty cache and nothing shipped; the folder of all three."""
    plant(tmp_path / "kernels")
    monkeypatch.setattr(sora_fast.kernels, "__path__", [str(tmp_path / "kernels")])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # or a module rewritten within a second would stay what it was
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "checkout" / "sora_fast" / "tuning" / "configs")
    monkeypatch.setattr(records, "triton_minor", lambda: "3.6")
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


def tune(room, kernel, count=1, likeliest=lambda asked, candidates, call: candidates, **settings):
    """A Tuner after its run."""
    made = tuner.Tuner(tuner.Settings(CPU, "quick", room / "tune.jsonl", effort=timing.Effort(1.0, 5.0), **settings),
                       tell=lambda text: None, likeliest=likeliest)
    made.run(work(kernel, count))
    return made


def found(kernel="forward", width=8):
    from sora_fast.kernels import planted

    return configs.lookup("planted", kernel, planted.Launch(width), "cpu", planted.heuristic)


# ---------------------------------------------------------------------------------------------------------- who wins
def test_the_fastest_wins_and_is_what_launches_get(room, clock):
    made = tune(room, Kernel(clock.sleep))
    assert [(row["kernel"], row["direction"], row["tried"]) for row in made.rows] == [
        ("forward", "forward", 7), ("backward", "backward", 7)] and not made.failures
    for row in made.rows:
        assert row["config"] == dict(ms=2.0, fault="") and row["verdict"] == "FAST" and row["skipped"] == []
        assert row["us"] == pytest.approx(2000) and row["heuristic_us"] == pytest.approx(4000) and row["n"] >= 20
        assert row["environment"]["kind"] == "cpu" and row["gpu"] == "cpu" and row["timer"] == "wall"
        assert found(row["kernel"]).config.ms == 2.0 and "the user's cache" in found(row["kernel"]).source
    assert found(width=9).source == "the heuristic"
    path = room / "cache" / "configs" / "cpu" / "planted.json"
    entries = json.loads(path.read_text())["entries"]
    assert entries == {row["key"]: row["entry"] for row in made.rows}
    assert entries["forward: width=8"]["command"].startswith("sora-fast tune modulation --suite quick --device cpu")


def test_it_begins_with_the_likeliest(room, clock):
    """Which is a caller's to say, of a call that looks the config up; what is measured decides."""
    def likeliest(asked, candidates, call):
        with configs.recording() as looked_up:
            call()
        assert asked in looked_up and len(candidates) == 7
        return sorted(candidates, key=lambda config: -config.ms)

    rows = tune(room, Kernel(clock.sleep), most=2, likeliest=likeliest).rows
    assert [(row["tried"], row["config"]["ms"], row["verdict"]) for row in rows] == [(2, 6.0, "SLOW")] * 2


def test_real_time_decides_too(room):
    plant(room / "kernels", [(0.5,)])
    made = tune(room, Kernel(lambda seconds: time.sleep(5 * seconds)))
    assert {row["verdict"] for row in made.rows} == {"FAST"} and found().config.ms == 0.5


@pytest.mark.parametrize("fault, reason", [("wrong", "allowed"), ("late", "fails after it")])
def test_fast_and_wrong_never_wins(room, clock, fault, reason):
    """Neither what the gate finds wrong nor what begins to be wrong when it is timed."""
    plant(room / "kernels", [(0.5, fault), (3.0,)])
    made = tune(room, Kernel(clock.sleep))
    assert len(made.rows) == 2
    for row in made.rows:
        (skipped,) = row["skipped"]
        assert skipped["config"] == dict(ms=0.5, fault=fault) and skipped["status"] == "FAILED"
        assert reason in skipped["reason"] and row["config"] == dict(ms=3.0, fault="")
        assert found(row["kernel"]).config.ms == 3.0


def test_nothing_but_wrong_ones_saves_nothing(room, clock):
    plant(room / "kernels", [(0.5, "wrong"), (0.5, "late")])
    made = tune(room, Kernel(clock.sleep))
    assert all(row["config"] is None and row["entry"] is None and len(row["skipped"]) == 2 for row in made.rows)
    assert found().source == "the heuristic" and not (room / "cache").exists()


def test_what_fails_to_launch_is_skipped_with_its_reason(room, clock):
    plant(room / "kernels", [(0.5, "raises"), (3.0,)])
    made = tune(room, Kernel(clock.sleep))
    for row in made.rows:
        (sentence,) = tuner.reasons(row)
        assert "ms=0.5, fault=raises ERROR: RuntimeError: out of resource: shared memory" in sentence
        assert row["config"]["ms"] == 3.0 and "2 tried, 1 skipped" in tuner.line(row)


def test_what_is_within_the_noise_is_not_kept(room, clock):
    clock.jitter = 0.1
    plant(room / "kernels", [(3.98,), (4.0, "other name"), (4.02,)])
    made = tune(room, Kernel(clock.sleep))
    assert len(made.rows) == 2
    for row in made.rows:
        assert row["entry"] is None and row["verdict"] in ("SAME", "UNDECIDED") and "the heuristic stays" in tuner.line(row)
    assert found().source == "the heuristic" and not (room / "cache").exists()


def test_one_lookup_at_a_time_and_nothing_tuned_before_counts(room, clock):
    """Backward is timed beside forwards of the heuristic, also when a faster forward is known."""
    tune(room, Kernel(clock.sleep))
    assert found().config.ms == 2.0
    kernel = Kernel(clock.sleep)
    tune(room / "again", kernel)
    ran = [config.ms for name, config in kernel.launches if name == "forward"]
    first = next(place for place, (name, config) in enumerate(kernel.launches) if (name, config.ms) == ("backward", 3.0))
    assert 2.0 in ran and {config.ms for name, config in kernel.launches[first:] if name == "forward"} == {4.0}


def test_what_only_a_forward_with_gradients_looks_up(room, clock):
    made = tune(room, Kernel(clock.sleep, saving=True))
    assert [(row["kernel"], row["direction"]) for row in made.rows] == [
        ("forward", "forward"), ("backward", "backward"), ("saving", tuner.SAVING)]
    # a saving forward launches two, and only the one that is tuned gets faster: 4 + 4 and 4 + 2 ms
    assert made.rows[2]["us"] == pytest.approx(6000) and made.rows[2]["heuristic_us"] == pytest.approx(8000)


def test_nothing_to_tune_is_said(room, clock):
    (room / "kernels" / "planted_candidates.py").unlink()
    forget()
    said = []
    made = tuner.Tuner(tuner.Settings(CPU, "quick", room / "tune.jsonl"), tell=said.append)
    assert made.run(work(Kernel(clock.sleep), 2)) == []
    assert said == ["There is no sora_fast.kernels.planted_candidates: nothing to tune."]
    said.clear()
    plain = Provider("triton", partial(ops.gate_residual, backend="reference"))
    assert made.run([(*work(None)[0][:2], plain)]) == [] and said == ["gate_residual looks up no config: nothing to tune."]


def test_cases_that_cannot_be_tuned_do_not_stop_the_others(room, clock):
    def refuses(**inputs):
        raise NotImplementedError("Its kernels take fewer columns.")

    wrong = lambda **inputs: Kernel(clock.sleep)(**inputs) * 1.001
    said = []
    made = tuner.Tuner(tuner.Settings(CPU, "quick", room / "tune.jsonl", effort=timing.CPU), tell=said.append)
    cases = work(Kernel(clock.sleep), 3)
    made.run([(*cases[0][:2], provider(refuses)), (*cases[1][:2], provider(wrong)), cases[2]])
    assert "planted 0 / float32 is not tuned: Its kernels take fewer columns." in said[0]
    (failure,) = made.failures
    assert "planted 1" in failure and "with its heuristics forward is FAILED" in failure
    assert {row["case"] for row in made.rows} == {"planted 2"}


# ------------------------------------------------------------------------------------------------- lookups and files
def test_recording_and_overrides_of_one_problem(room):
    from sora_fast.kernels import planted

    save = partial(configs.save, "planted", "forward", planted.Launch(8), "cpu", evidence=dict.fromkeys(configs.EVIDENCE, 1))
    save(planted.Config(1.0))
    assert found().config.ms == 1.0
    with configs.recording() as outer, configs.override("planted", "forward", planted.Config(9.0), planted.Launch(9)):
        with configs.recording() as inner:
            assert (found().config.ms, found(width=9).config.ms, found("backward", 9).config.ms) == (4.0, 9.0, 4.0)
        assert found(width=7).config.ms == 4.0
    assert [asked.key for asked in inner] == ["forward: width=8", "forward: width=9", "backward: width=9"]
    assert len(outer) == 4 and {config.ms for config in outer.values()} == {4.0}
    assert found().config.ms == 1.0  # as before


def test_a_tuned_config_is_void_with_another_kernel_or_triton(room, clock, monkeypatch):
    tune(room, Kernel(clock.sleep))
    plant(room / "kernels", [(1.0,)])
    assert found().config.ms == 2.0, "candidates void nothing"
    plant(room / "kernels", [(1.0,)], KERNEL + "WARPS = 4\n")
    assert found().source == "the heuristic" and "has changed since it was tuned" in str(found())
    assert [row["config"]["ms"] for row in tune(room, Kernel(clock.sleep)).rows] == [1.0, 1.0]  # not the rows of the old one
    assert found().config.ms == 1.0
    monkeypatch.setattr(records, "triton_minor", lambda: "3.9")
    forget()
    assert found().source == "the heuristic" and "tuned with Triton 3.6, and here is 3.9" in str(found())


def test_explain_says_that_it_was_tuned(room, clock, monkeypatch):
    tune(room, Kernel(clock.sleep))
    op = modulation.GATE_RESIDUAL
    planted = Backend("triton", op.backends["torch"].run, kernel="planted", config=lambda problem: found())
    monkeypatch.setitem(op.backends, "triton", planted)
    path = room / "cache" / "configs" / "cpu" / "planted.json"
    assert f"config ms=2.0, fault= from the user's cache ({path})" in explain("gate_residual", every=True)


def test_it_goes_on_where_it_stopped(room, clock):
    tune(room, Kernel(clock.sleep), 2)
    kernel = Kernel(clock.sleep)
    made = tune(room, kernel, 3)
    assert [row["case"] for row in made.rows] == [f"planted {place}" for place in (0, 0, 1, 1, 2, 2)]
    assert len(rows.read(room / "tune.jsonl")) == 6 and found(width=10).config.ms == 2.0
    # only the discovery of the first two cases, and no other config than the heuristic's
    again = Kernel(clock.sleep)
    assert len(tune(room, again, 2).rows) == 4 and {config.ms for _, config in again.launches} == {4.0}
    (room / "cache" / "configs" / "cpu" / "planted.json").unlink()
    configs.forget()
    assert len(tune(room, again, 1).rows) == 2 and found().config.ms == 2.0  # the row holds the entry


def test_the_time_limit_stops_between_lookups_and_every_call_gets_further(room, clock):
    for call, left in enumerate((2, 1, 1, 0), start=1):
        made = tune(room, Kernel(clock.sleep), 2, minutes=1e-9)
        assert (made.left, len(made.rows), made.tuned) == (left, call, 1)


def test_the_newer_of_two_entries_stays(room, clock):
    row = tune(room, Kernel(clock.sleep)).rows[0]
    path = tuner.keep(row | dict(entry=row["entry"] | dict(time="2000-01-01T00:00:00+00:00", config=dict(ms=9.0))), None)
    assert json.loads(path.read_text())["entries"][row["key"]] == row["entry"]
    newer = row["entry"] | dict(time="2100-01-01T00:00:00+00:00", config=dict(ms=1.0))
    tuner.keep(row | dict(entry=newer), None)
    assert found().config.ms == 1.0 and tuner.keep(row | dict(entry=None), None) is None


# ----------------------------------------------------------------------------------------------- several processes
def in_a_process(room, first, count, others=0):
    """Tune ``count`` cases from ``first`` on, in a process of its own that shares rows and cache with the others."""
    code = f"import test_tune; test_tune.process({str(room)!r}, {first}, {count}, {others})"
    environment = os.environ | {"SORA_FAST_CACHE": str(room / "cache"),
                                "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[1])))}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def process(room, first, count, others):
    room = Path(room)
    if others:  # 100 entries as fast as they can be written, when all are there
        (room / f"ready {first}").touch()
        while len(list(room.glob("ready *"))) < others:
            time.sleep(0.001)
        for place in range(100):
            configs.keep("many", "cpu", {f"{first}, {place}": dict(time="2026")})
    sora_fast.kernels.__path__ = [str(room / "kernels")]
    records.triton_minor = lambda: "3.6"
    timing.time = Clock()
    made = tuner.Tuner(tuner.Settings(CPU, "quick", room / "tune.jsonl", effort=timing.Effort(1.0, 5.0)))
    made.run(work(Kernel(timing.time.sleep), first + count)[first:])
    assert len(made.rows) == 2 * count and not made.failures


def kept(room, family="planted"):
    return json.loads((room / "cache" / "configs" / "cpu" / f"{family}.json").read_text())["entries"]


def test_a_killed_process_leaves_whole_files_and_the_next_goes_on(room, clock):
    plant(room / "kernels", [(2.0,)])
    path, lines = room / "tune.jsonl", lambda: path.read_text().count("\n") if path.exists() else 0
    victim, end = in_a_process(room, 0, 2000), time.monotonic() + 100
    while lines() < 5 and victim.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    done = rows.read(path)
    assert 5 <= len(done) < 4000
    # entries are kept before their rows: the one at hand may have no row yet
    assert {row["key"]: row["entry"] for row in done}.items() <= kept(room).items() and len(kept(room)) <= len(done) + 1
    kernel, cases = Kernel(clock.sleep), len(done) // 2 + 2
    made = tune(room, kernel, cases)
    assert len(made.rows) == 2 * cases and made.tuned == 2 * cases - len(done)
    assert all(found(name, 8 + place).config.ms == 2.0 for place in range(cases) for name in ("forward", "backward"))


# -------------------------------------------------------------------------------------------------------- commands
@pytest.fixture
def command(room, cli, clock, monkeypatch):
    """sora-fast tune with the planted work, on a CPU as if kernels were interpreted."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(suites, "work", lambda families, suite: [
        ("modulation", case, [Provider("torch", None), each]) for _, case, each in work(Kernel(clock.sleep), 2)])
    return lambda *flags: cli("tune", "modulation", "--device", "cpu", "--quick", "--out", room / "tune.jsonl", *flags)


def test_the_command_says_what_it_found(room, command):
    code, out, _ = command("--candidates", "3")
    table = [line for line in out.splitlines() if "FAST, kept" in line]
    assert code == 0 and len(table) == 4 and all("ms=2.0, fault=" in line and "4,000.0  2,000.0" in line for line in table)
    assert f"4 of 4 lookups beat their heuristic by more than the noise and are kept in {room / 'cache'}" in out
    before = (room / "tune.jsonl").read_bytes()
    code, out, _ = command("--candidates", "3")
    assert code == 0 and (room / "tune.jsonl").read_bytes() == before and out.count("FAST, kept") == 4
    code, out, _ = command("--case", "planted 1", "--fresh")
    assert code == 0 and {row["tried"] for row in rows.read(room / "tune.jsonl")} == {7}
    assert out.count("FAST, kept") == 2 and "1 cases" in out


def test_the_command_tells_of_what_it_left_and_of_failures(room, command, monkeypatch):
    plant(room / "kernels", [(0.5, "wrong"), (4.0, "same")])
    code, out, _ = command("--minutes", "1e-9")
    assert code == 3 and "2 of 2 cases are left after 1e-09 minutes; the same command goes on" in out
    assert "skipped: planted forward: width=8: ms=0.5, fault=wrong FAILED: output float32" in out
    assert "SAME, the heuristic stays" in out and "nothing is saved" in out
    monkeypatch.setattr(suites, "work", lambda families, suite: [
        ("modulation", *work(None)[0][1:2], [Provider("triton", lambda **inputs: 1 / 0)])])
    code, out, _ = command("--fresh")
    assert code == 1 and "is not tuned: ZeroDivisionError: division by zero" in out


def test_winners_of_another_machine_are_shipped(room, command, cli):
    command()
    shipped = room / "checkout" / "sora_fast" / "tuning" / "configs"
    theirs = room / "theirs.jsonl"
    theirs.write_text("".join(json.dumps(row | dict(gpu="sm90-H200")) + "\n" for row in rows.read(room / "tune.jsonl")))
    refused(cli("tune", "--from", theirs, "--ship"), "in a checkout")
    (room / "checkout").mkdir()
    (room / "checkout" / "pyproject.toml").touch()
    refused(cli("tune", "--from", room / "tune.jsonl", "--ship"), "a GPU's times")
    code, out, _ = cli("tune", "--from", theirs, "--ship")
    path = shipped / "sm90-H200" / "planted.json"
    assert code == 0 and f"4 of 4 lookups beat their heuristic; wrote {path}" in out
    from sora_fast.kernels import planted

    got = configs.lookup("planted", "forward", planted.Launch(8), "sm90-H200", planted.heuristic)
    assert got.config.ms == 2.0 and "the shipped configs" in got.source
    (room / "empty.jsonl").write_text("")
    refused(cli("tune", "--from", room / "empty.jsonl"), "rows of sora-fast tune")


def test_misuse_is_one_sentence(room, command, cli, monkeypatch):
    refused(cli("tune", "atention", "--device", "cpu"), "families among", "atention")
    refused(command("--case", "no such case"), "no such case", "bench --suite quick --list")
    (room / "checkout").mkdir()
    (room / "checkout" / "pyproject.toml").touch()
    refused(command("--ship"), "a GPU's times for --ship")
    (room / "tune.jsonl").write_text("not json\n")
    refused(command(), "line 1")
    monkeypatch.delenv("TRITON_INTERPRET")
    refused(command(), "expected a CUDA GPU, got cpu", "TRITON_INTERPRET=1")


def test_families_without_kernels_are_named(cli, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, out, _ = cli("tune", "latents", "--quick", "--device", "cpu")
    assert code == 0 and "nothing to tune in latents: no Triton kernels yet" in out
