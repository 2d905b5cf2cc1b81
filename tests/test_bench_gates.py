"""What is planted in a model or its peer fails the benchmark's gate, and a killed run loses no finished row."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import test_bench_models as of_models
import torch

from sora_fast.benchmarks import loss_parity, rows
from sora_fast.benchmarks.model import case as frame
from sora_fast.benchmarks.model import vae, wan
from sora_fast.ops.modulation import GATE_RESIDUAL_NORM_MODULATE

pytestmark = pytest.mark.full

CPU = torch.device("cpu")


@pytest.mark.usefixtures("sums_of_real_clips")
@pytest.mark.parametrize("op", ["wan_vae_decode", "vae_training_step"])
def test_the_vae_and_its_peer_pass_and_a_peer_with_one_other_weight_fails(op, monkeypatch):
    """One truth for all; the peers are diffusers' own class with our weights, in both layouts."""
    pytest.importorskip("diffusers")
    case, copy = of_models.QUICK[op].small(), wan.copy_weights
    truth, low = (case.plain_step(CPU, dtype)() for dtype in (torch.float64, None))

    def passes(name):
        return all(c.passed for c in frame.compare_all(of_models.provider(case, name).build(case, CPU)(), low, truth))

    def off_by_one(ours, theirs):
        copy(ours, theirs)
        with torch.no_grad():
            theirs.decoder.mid_block.resnets[0].conv1.weight[0, 0, 2, 1, 1] += 1.0
    assert passes("auto") and passes("diffusers") and passes("diffusers_channels_last")
    monkeypatch.setattr(vae, "copy_weights", off_by_one)
    assert not passes("diffusers")


def test_parity_fails_with_a_norm_that_is_off_by_a_tenth(tmp_path, monkeypatch, capsys):
    good = GATE_RESIDUAL_NORM_MODULATE.backends["torch"]

    def off(**inputs):
        x_new, h = good.run(**inputs)
        return x_new, 1.1 * h
    monkeypatch.setitem(GATE_RESIDUAL_NORM_MODULATE.backends, "torch", replace(good, run=off))
    assert loss_parity.main(["--device", "cpu", "--quick", "--steps", "40", "--out", str(tmp_path)]) == 1
    row = json.loads((tmp_path / "parity.jsonl").read_text())
    assert row["status"] == "FAILED" and row["error"] > row["allowed"]
    assert row["reason"].startswith("From step ") and row["reason"] in capsys.readouterr().out


def test_a_killed_run_loses_no_finished_row(tmp_path):
    script = tmp_path / "long.py"
    script.write_text(textwrap.dedent("""
        import sys, time
        from dataclasses import replace
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_bench import CASE, RIGHT, runner
        from sora_fast.benchmarks.case import Provider
        def slow(**inputs):
            time.sleep(0.003)
            return RIGHT(**inputs)
        cases = [replace(CASE, label=f"pack {n}") for n in range(40)]
        runner(Path(sys.argv[1])).run([("modulation", case, [Provider("torch", slow)]) for case in cases])
    """))
    command = [sys.executable, str(script), str(tmp_path), str(Path(__file__).parent)]
    running = subprocess.Popen(command)
    path = tmp_path / "bench.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") > 6):
        assert running.poll() is None
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = [row for row in rows.read(path) if row["row"] == "time"]
    assert 4 <= len(before) < 80
    subprocess.run(command, check=True)
    after = [row for row in rows.read(path) if row["row"] == "time"]
    assert after[:len(before)] == before and len({rows.key(row) for row in after}) == len(after) == 80
