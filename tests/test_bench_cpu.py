"""What the CPU rows are made of: sides that give the same, shares round by round, and memory counted."""

import pytest
import torch

from sora_fast.benchmarks import cpu


def test_sides_that_differ_are_refused_and_others_are_timed(monkeypatch):
    monkeypatch.setattr(cpu, "LEAST_SECONDS", 0.0)
    x = torch.randn(64, 64)
    side = lambda by, name="d x": lambda: {"output": x, name: x * by}
    group = lambda by: lambda: [("a case", {"ours": side(by), "theirs": side(1.0)})]
    ours, theirs = cpu.timed(group(1.0))
    assert (ours["side"], ours["base"], theirs["side"]) == ("ours", "theirs", "theirs") and theirs["share"] == 1.0
    assert len(ours["samples"]) == cpu.ROUNDS and min(ours["samples"]) > 0
    with pytest.raises(AssertionError, match="expected ours to give what theirs gives"):
        list(cpu.timed(group(1.01)))
    with pytest.raises(AssertionError, match="d y"):
        cpu.alternating("a case", {"ours": side(1.0, "d y"), "theirs": side(1.0)})


def test_packed_bucketed_and_padded_blocks_train_alike(monkeypatch):
    monkeypatch.setattr(cpu, "GRIDS", ((1, 2, 2), (1, 3, 1), (1, 2, 2)))
    monkeypatch.setattr(cpu, "ROUNDS", 1)
    monkeypatch.setattr(cpu, "LEAST_SECONDS", 0.0)
    assert [row["side"] for row in cpu.timed(cpu.packing)] == ["packed", "bucketed", "padded"]


def test_memory_is_what_is_held_at_once():
    def step():
        a = torch.empty(250_000)
        del a
        b = torch.empty(250_000)
        return b + 1
    assert 2_000_000 <= cpu.most_held(step) < 2_001_000  # and a scalar


def test_every_transformer_has_its_sides():
    pytest.importorskip("diffusers")
    cases = dict(cpu.transformers())
    assert len(cases) == 2 * len(cpu.TRANSFORMERS)
    assert all(list(sides) == ["accelerated", "plain"] for sides in cases.values())
