"""Which Config a launch gets and where from: override, the user's cache, the shipped files, the heuristic."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

import sora_fast.kernels
from sora_fast import configs, records
from sora_fast.dispatch import Backend, Problem
from sora_fast.explanation import explain
from sora_fast.ops import modulation

ROOT = Path(__file__).resolve().parents[1]
GPU = "sm90-H200"
EVIDENCE = dict(us=11.0, heuristic_us=14.5, n=200, gpu="NVIDIA H200", command="sora-fast tune planted")


@dataclass(frozen=True)
class Config:
    block: int
    warps: int = 4


@dataclass(frozen=True)
class Shape:
    dtype: str
    width: int
    tokens: int


SHAPE = Shape("bfloat16", 1536, configs.bucket(30000))


def heuristic(shape, gpu):
    return Config(shape.width // 2, 8 if gpu.startswith("sm90") else 4)


def ask(shape=SHAPE, gpu=GPU, kernel="forward", rule=heuristic):
    return configs.lookup("planted", kernel, shape, gpu, rule)


def save(config, shape=SHAPE, evidence=EVIDENCE):
    return configs.save("planted", "forward", shape, GPU, config, evidence)


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch):
    """A planted kernel, an empty cache, nothing shipped, and Triton 3.6; returns the kernel's file."""
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "planted.py"
    file.write_text("def kernel(x):\n    return x\n")
    monkeypatch.setattr(sora_fast.kernels, "__path__", [str(file.parent)])
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(records, "triton_minor", lambda: "3.6")
    forget()
    yield file
    forget()


def forget():
    records.forget()
    configs.forget()


def test_buckets_are_powers_of_two():
    assert [configs.bucket(n) for n in (0, 1, 2, 3, 4, 5, 16, 17, 32768, 32769, 2**31 + 1)] == [
        1, 1, 2, 4, 4, 8, 16, 32, 32768, 65536, 2**32]


def test_the_heuristic_always_answers():
    found = ask()
    assert (found.config, found.source, found.ignored) == (Config(768, 8), "the heuristic", ())
    assert ask(gpu="cpu").config == Config(768, 4)
    assert ask() is found  # remembered: a launch pays for a dictionary


def test_a_saved_config_is_found_again_for_exactly_its_problem():
    path = save(Config(256))
    assert path.parts[-3:] == ("configs", GPU, "planted.json")
    assert ask().config == Config(256) and "the user's cache" in ask().source and str(path) in str(ask())
    for other in (Shape("float16", 1536, 32768), Shape("bfloat16", 1535, 32768), Shape("bfloat16", 1536, 16384),
                  Shape("bfloat16", 1536, 65536)):
        assert ask(other).source == "the heuristic"
    assert ask(gpu="sm90-H100").source == ask(gpu="sm90").source == ask(kernel="backward").source == "the heuristic"
    save(Config(128), Shape("float16", 64, 1))
    save(Config(64, 2))
    entries = json.loads(path.read_text())["entries"]
    assert len(entries) == 2 and ask().config == Config(64, 2)
    entry = entries["forward: dtype=bfloat16, width=1536, tokens=32768"]
    assert {name: entry[name] for name in configs.EVIDENCE} == EVIDENCE
    assert (entry["config"], entry["triton"], entry["kernel_hash"]) == (
        asdict(Config(64, 2)), "3.6", records.kernel_hash("planted"))


def test_the_order_of_the_sources():
    mine = save(Config(1))
    shipped = configs.SHIPPED / GPU / "planted.json"
    shipped.parent.mkdir(parents=True)
    mine.replace(shipped)
    configs.forget()
    assert ask().config == Config(1) and "the shipped configs" in ask().source
    save(Config(2))
    assert ask().config == Config(2)
    with configs.override("planted", "forward", Config(3)):
        assert ask().config == Config(3) and ask().source == "override"
        assert ask(kernel="backward").source == "the heuristic"
        with configs.override("planted", "forward", Config(4)):
            assert ask().config == Config(4)
        assert ask().config == Config(3)
    with pytest.raises(KeyError), configs.override("planted", "forward", Config(5)):
        raise KeyError
    assert ask().config == Config(2)


def test_stale_entries_are_passed_over_with_a_reason(room, monkeypatch):
    save(Config(256))
    room.write_text("def kernel(x):\n    '''Doc.'''\n    return x  # the same\n")
    forget()
    assert ask().config == Config(256)
    room.write_text("def kernel(x):\n    return x + 1\n")
    forget()
    assert ask().source == "the heuristic" and "sora_fast.kernels.planted has changed since it was tuned" in str(ask())
    save(Config(512))
    assert ask().config == Config(512)
    monkeypatch.setattr(records, "triton_minor", lambda: "3.7")
    forget()
    assert ask().source == "the heuristic" and "tuned with Triton 3.6, and here is 3.7" in str(ask())


@pytest.mark.parametrize("text, reason", [
    ("{", "it holds no JSON of configs"), ("[]", "it holds no JSON of configs"), ('{"schema": 7}', "of schema 7, not 1"),
    ('{"schema": 1, "entries": 3}', "it holds no JSON of configs"),
])
def test_a_bad_file_is_passed_over_and_written_anew(tmp_path, text, reason):
    path = tmp_path / "cache" / "configs" / GPU / "planted.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert ask().source == "the heuristic" and reason in str(ask())
    assert save(Config(256)) == path and ask().config == Config(256)


def test_a_config_of_other_fields_is_passed_over():
    path = save(Config(256))
    for wrong in (dict(block=1, stages=3), dict(warps=1), None):
        value = json.loads(path.read_text())
        next(iter(value["entries"].values()))["config"] = wrong
        path.write_text(json.dumps(value))
        configs.forget()
        assert ask().source == "the heuristic" and "does not fit Config" in str(ask())


def test_a_config_comes_with_its_evidence():
    for name in configs.EVIDENCE:
        with pytest.raises(ValueError, match=f"^configs: expected evidence with .*, got none for {name}; measure"):
            save(Config(256), evidence=EVIDENCE | {name: None})
    assert ask().source == "the heuristic"


TUNER = """
import sys
from dataclasses import dataclass
from sora_fast import configs, records
records.triton_minor = lambda: "3.6"
@dataclass(frozen=True)
class Shape:
    who: int
    place: int
for place in range(10):
    configs.save("modulation", "forward", Shape(int(sys.argv[1]), place), "sm90-H200", Shape(place, 0),
                 dict(us=1, heuristic_us=2, n=3, gpu="a", command="b"))
"""


def test_two_tuners_at_once_lose_nothing(tmp_path):
    workers = [subprocess.Popen([sys.executable, "-c", TUNER, str(who)], cwd=ROOT) for who in range(2)]
    assert [worker.wait(timeout=200) for worker in workers] == [0, 0]
    path = tmp_path / "cache" / "configs" / GPU / "modulation.json"
    assert set(json.loads(path.read_text())["entries"]) == {
        f"forward: who={who}, place={place}" for who in range(2) for place in range(10)}


def test_names_of_gpus(monkeypatch):
    names = ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA GeForce RTX 4090"]
    capabilities = [(8, 0), (9, 0), (8, 9)]
    place = lambda device: torch.device(device).index
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[place(device)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[place(device)])
    configs.gpu_name.cache_clear()
    try:
        assert [configs.gpu_name(torch.device("cuda", index)) for index in range(3)] == [
            "sm80-A100-SXM4-80GB", "sm90-H200", "sm89-GeForce-RTX-4090"]
        assert configs.gpu_name("cuda:sm90") == "sm90-H200" and configs.gpu_name("cuda:sm100") == "sm100"
    finally:
        configs.gpu_name.cache_clear()


def test_explain_says_where_a_config_is_from(monkeypatch):
    op = modulation.NORM_MODULATE

    def config(problem: Problem):
        return ask(Shape(str(problem.dtype), problem.width, 1024), configs.gpu_name(problem.device))

    monkeypatch.setitem(op.backends, "triton", Backend("triton", op.backends["torch"].run, kernel="planted", config=config))
    said = explain("norm_modulate", every=True, device="cuda:sm90", assume_validated=True)
    width = op.example("cuda:sm90", torch.bfloat16, True).width
    assert f"taken by auto; config block={width // 2}, warps=8 from the heuristic" in said


def test_a_lookup_costs_little():
    ask()
    start = time.perf_counter()
    for _ in range(2000):
        ask()
    assert (time.perf_counter() - start) / 2000 < 50e-6
