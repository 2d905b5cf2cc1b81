"""The training loop: its arithmetic, resume bit for bit, checkpoints that survive, what it tells."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_checks import Count, Numbers, Rows, Stop, little, rows_of, same_files, same_rows, stop_at, weights

from sora_fast import progress
from sora_fast.named import pick_device
from sora_fast.training import checkpoint, loop
from sora_fast.training.config import DiTTraining, VAETraining
from sora_fast.training.dit import objective_of

pytest.importorskip("safetensors", reason="the train extra is not installed")


# ---- The loop's arithmetic


def test_losses_are_written(tmp_path):
    trainer = little(tmp_path, steps=25, log_every=10)
    seen = []
    trainer.run(seen.append)
    rows = rows_of(tmp_path)
    assert list(rows[0]) == ["step", "samples", "tokens", "loss", "lr", "tokens_per_s", "mfu", "pad_share",
                             "seconds"]
    assert [int(row["step"]) for row in rows] == [10, 20, 25] == [row["step"] for row in seen]
    assert [int(row["samples"]) for row in rows] == [40, 80, 100] and int(rows[-1]["tokens"]) == 300
    assert float(rows[-1]["pad_share"]) == pytest.approx(1 / 13, rel=1e-4)
    assert float(rows[-1]["loss"]) == pytest.approx(seen[-1]["loss"], rel=1e-5)


def test_accumulation_equals_one_larger_batch(tmp_path):
    class Double(Numbers):
        def next(self):
            first, second = Numbers.next(self), Numbers.next(self)
            return Count(first.number // 2, first.keys + second.keys)

        def load(self, plan):
            halves = [Numbers.load(self, Count(2 * plan.number + i, plan.keys[4 * i :][:4])) for i in range(2)]
            return Rows(torch.cat([half.values for half in halves]), plan.keys)

    def trained(name, batches, accumulate):
        trainer = little(tmp_path / name, batches=batches, accumulate=accumulate, steps=3)
        a, z = trainer.modules["a"], trainer.modules["z"]  # a loss without the noise, which is drawn per batch
        trainer.loss = lambda batch: ((z(a(batch.values)) - batch.values.sum(1, keepdim=True)).square().mean(),
                                      dict(samples=len(batch.names), tokens=len(batch.names), pad=0))
        trainer.run()
        return trainer

    halves, whole = trained("halves", Numbers(), 2), trained("whole", Double(), 1)
    assert halves.samples == whole.samples == 24
    for name, value in weights(halves).items():
        torch.testing.assert_close(value, weights(whole)[name], atol=1e-6, rtol=1e-5)
    assert [row["loss"] for row in halves.rows] == pytest.approx([row["loss"] for row in whole.rows], rel=1e-5)


def test_clipping(tmp_path):
    """The gradient that AdamW sees has at most that norm, and is untouched below it."""
    norms = {}
    for clip in (0.0, 1e-3, 1e6):
        trainer = little(tmp_path / str(clip), steps=1, clip=clip)
        seen = []
        step = trainer.optimizer.step

        def spy(step=step, trainer=trainer, seen=seen):
            grads = [p.grad for p in trainer.parameters.values() if p.grad is not None]
            seen.append(torch.cat([g.flatten() for g in grads]).norm().item())
            step()

        trainer.optimizer.step = spy
        trainer.run()
        norms[clip] = seen[0]
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[0.0] == norms[1e6] > 0.01


def test_warm_up_and_cosine(tmp_path):
    trainer = little(tmp_path, steps=100, warmup=10, lr=1.0, final_lr=0.1)
    rates = {}
    for step in (0, 4, 9, 10, 55, 99, 100):
        trainer.step = step
        rates[step] = trainer.learning_rate()
    assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.5) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5) and rates[100] == pytest.approx(0.1)
    assert rates[99] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    trainer = little(tmp_path / "minutes", steps=10**6, warmup=10, lr=1.0, final_lr=0.0, minutes=1.0)
    trainer.step, trainer.seconds, trainer.warm_seconds = 100, 35.0, 10.0
    assert trainer.learning_rate() == pytest.approx(0.5, abs=1e-3)  # half of the 50 s after the warm-up
    trainer.seconds = 60.0
    assert trainer.learning_rate() == pytest.approx(0.0, abs=1e-6)


def test_the_average_follows_closely_at_first(tmp_path):
    trainer = little(tmp_path, steps=4, ema=0.4, lr=0.1)
    expected = weights(trainer)
    for step in range(1, 5):
        trainer._one_step()
        decay = min(0.4, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * p for n, p in weights(trainer).items()}
    for name, value in trainer.ema.items():
        torch.testing.assert_close(value, expected[name])


def test_minutes_end_the_run(tmp_path):
    trainer = little(tmp_path, steps=10**6, minutes=0.3 / 60, log_every=10**6)
    trainer.run()
    assert 0 < trainer.step < 10**6 and 0.3 <= trainer.seconds < 3
    assert trainer.rows[-1]["step"] == trainer.step
    assert trainer.rows[-1]["lr"] < 0.1 * trainer.config.lr  # the schedule ended with it
    assert checkpoint.newest(tmp_path).name == f"step-{trainer.step:08d}"


def test_frozen_parameters_stay_and_are_kept_out(tmp_path):
    trainer = little(tmp_path, steps=3, lr=0.1)
    before = {n: p.clone() for n, p in trainer.modules.state_dict().items()}
    trainer.run()
    after = trainer.modules.state_dict()
    assert torch.equal(before["frozen.weight"], after["frozen.weight"])
    assert not torch.equal(before["a.weight"], after["a.weight"])
    assert not any(name.startswith("frozen") for name in (*trainer.ema, *trainer.parameters))
    moments = checkpoint.load_tensors(checkpoint.newest(tmp_path) / "optimizer.safetensors")
    trained = {f"{layer}.{part}" for layer in ("unused", "a", "z") for part in ("weight", "bias")}
    assert {key.rpartition("/")[0] for key in moments} == trained
    # What no step used had a gradient of 0, as it has where several processes exchange theirs.
    assert moments["unused.weight/exp_avg"].shape == (2, 2) and not moments["unused.weight/exp_avg"].any()
    assert moments["a.weight/exp_avg"].shape == (1, 3) and moments["z.weight/exp_avg"].shape == (1, 1)


def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path):
    trainer = little(tmp_path, steps=10, save_every=2)
    loss, made = trainer.loss, []

    def breaks(batch):
        value, counts = loss(batch)
        made.append(value)
        return (value * math.nan if len(made) == 5 else value), counts

    trainer.loss = breaks
    with pytest.raises(FloatingPointError, match="expected a finite loss and gradient at step 5, got a loss of nan.*"
                                                 "did not come again .*: 4.0; 4.1; 4.2, and 1 more.*step-00000004,"):
        trainer.run()
    assert checkpoint.newest(tmp_path).name == "step-00000004"
    # A finite loss with an infinite gradient must not reach the weights either.
    other = little(tmp_path / "other", steps=2)
    weight = other.parameters["a.weight"]
    other.loss = lambda batch: ((weight.sum() - weight.sum().detach()).abs().sqrt(), dict(samples=1, tokens=1, pad=0))
    with pytest.raises(FloatingPointError, match="gradient norm of .*every sample .* weights are .*nothing was saved"):
        other.run()
    assert all(torch.isfinite(p).all() for p in other.parameters.values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_names_its_sample(tmp_path, where):
    trainer = little(tmp_path, steps=10, save_every=2, accumulate=2)
    loss = trainer.loss

    def breaks(batch):
        value, counts = loss(batch)
        if "7.2" in batch.names:
            value = value * math.nan if where == "loss" else value + (value - value.detach()).abs().sqrt()
        return value, counts

    trainer.loss = breaks
    with pytest.raises(FloatingPointError, match="at step 4, got .*; it comes from 7.2; the last .*step-00000002"):
        trainer.run()


def test_a_nan_of_samples_together_names_them_all(tmp_path):
    trainer = little(tmp_path, steps=10)
    loss = trainer.loss
    trainer.loss = lambda batch: (loss(batch)[0] * (math.nan if "2.1" in batch.names and len(batch.names) > 1 else 1),
                                  loss(batch)[1])
    with pytest.raises(FloatingPointError, match="from these samples together and from none alone: 2.0; 2.1; 2.2, and 1"):
        trainer.run()


# ---- Resume


@pytest.mark.parametrize("log_every", [1, 4])
def test_resume_is_bit_for_bit(tmp_path, log_every):
    """Also where the checkpoint falls between two rows of the table, and rows were written after it."""
    common = dict(steps=12, save_every=5, warmup=3, accumulate=2, log_every=log_every)
    little(tmp_path / "whole", **common).run()
    with pytest.raises(Stop):
        little(tmp_path / "parts", **common).run(stop_at(8))
    resumed = little(tmp_path / "parts", resume=True, **common)
    assert resumed.step == 5
    resumed.run()
    same_files(checkpoint.newest(tmp_path / "whole"), checkpoint.newest(tmp_path / "parts"))
    same_rows(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("emulated, precision, said", [(True, "bf16", True), (True, "fp32", False), (False, "bf16", False)])
def test_a_cpu_without_bfloat16_is_told_the_faster_setting(emulated, precision, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "emulated_on_cpu", lambda dtype: emulated and dtype == torch.bfloat16)
    little(tmp_path, steps=1, precision=precision).run()
    assert ("--precision fp32 is several times faster" in capsys.readouterr().out) == said


def test_resume_of_a_finished_run_says_so(tmp_path, capsys):
    little(tmp_path, steps=2).run()
    before = (checkpoint.newest(tmp_path) / "state.json").stat().st_mtime_ns
    little(tmp_path, steps=2, resume=True).run()
    assert "already trained to step 2; raise --steps or --minutes" in capsys.readouterr().out
    assert (checkpoint.newest(tmp_path) / "state.json").stat().st_mtime_ns == before
    little(tmp_path, steps=4, resume=True).run()
    assert [int(row["step"]) for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_last_row_does_not_stop_a_resume(tmp_path):
    little(tmp_path, steps=2).run()
    with open(tmp_path / "losses.csv", "a") as file:
        file.write("2,8,2")
    assert len(little(tmp_path, steps=3, resume=True).rows) == 2


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path):
    with pytest.raises(Stop):
        little(tmp_path).run(stop_at(3))
    little(tmp_path, steps=2).run()
    assert [int(row["step"]) for row in rows_of(tmp_path)] == [1, 2]


def test_where_a_run_may_begin(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a run folder with a checkpoint .*, got none in .*; train first"):
        little(tmp_path, resume=True)
    little(tmp_path, steps=1).run()
    before = (tmp_path / "losses.csv").read_text()
    with pytest.raises(FileExistsError, match="expected an empty run folder, got one with checkpoints; pass --resume"):
        little(tmp_path)
    assert (tmp_path / "losses.csv").read_text() == before
    with pytest.raises(ValueError, match="--resume: expected seed 0, .*, got 1; leave it out"):
        little(tmp_path, resume=True, seed=1)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"model": dict(sizes=[4, 1])}))
    with pytest.raises(ValueError, match="--resume: expected the model that .* began with"):
        little(tmp_path, resume=True)
    (tmp_path / "config.json").write_text(json.dumps(described | {"kind": "big"}))
    with pytest.raises(ValueError, match="of kind 'little', got 'big'; pass that run's own folder"):
        little(tmp_path, resume=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: expected a JSON file, got"):
        little(tmp_path, resume=True)


# ---- Checkpoints


@pytest.mark.parametrize("where", ["tensors", "second file", "rename of the folder", "json"])
def test_a_write_that_dies_leaves_the_older_checkpoint(tmp_path, monkeypatch, where):
    trainer = little(tmp_path, steps=4)
    trainer.run()
    good = checkpoint.newest(tmp_path)
    trainer.step = 5
    from safetensors import torch as library

    replace_, save_, calls = os.replace, library.save_file, []

    def save(values, path, *rest):
        calls.append(path)
        if where == "tensors" or where == "second file" and len(calls) == 2:
            Path(path).write_bytes(b"half of a fi")
            raise OSError("no space left on device")
        save_(values, path, *rest)

    def rename(source, target):
        if where == "rename of the folder" and Path(source).name.startswith(".building") \
                or where == "json" and str(target).endswith("state.json"):
            raise OSError("no space left on device")
        replace_(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(library, "save_file", save)
        patch.setattr(os, "replace", rename)
        with pytest.raises(OSError, match="no space"):
            trainer.save()
    assert checkpoint.newest(tmp_path) == good
    assert not list(tmp_path.rglob("*.tmp"))
    resumed = little(tmp_path, steps=6, resume=True)
    assert resumed.step == 4
    resumed.run()
    assert checkpoint.newest(tmp_path).name == "step-00000006"
    assert not list((tmp_path / "checkpoints").glob(".*"))  # what was half made is gone


def test_half_folders_are_never_picked(tmp_path):
    trainer = little(tmp_path, steps=2)
    trainer.run()
    good = checkpoint.newest(tmp_path)
    for name in ("step-00000009", "step-x", "step-00000010.bak", ".building-step-00000011"):
        (good.parent / name).mkdir()
        (good.parent / name / "model.safetensors").write_bytes(b"half")
    assert checkpoint.everything(tmp_path) == [good]


def test_checkpoints_are_ordered_by_number_and_kept_by_count(tmp_path):
    little(tmp_path, steps=9, save_every=2, keep=2).run()
    assert [path.name for path in checkpoint.everything(tmp_path)] == ["step-00000008", "step-00000009"]
    for step in (10**8 - 1, 10**8):
        checkpoint.write(tmp_path, step, {}, {}, keep=2)
    assert [path.name for path in checkpoint.everything(tmp_path)] == ["step-99999999", "step-100000000"]
    checkpoint.write(tmp_path, 10**8, {"a": {"x": torch.ones(1)}}, {"second": True}, keep=1)
    assert checkpoint.load_json(checkpoint.newest(tmp_path) / "state.json") == {"second": True}
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_tensors_that_share_memory_are_saved(tmp_path):
    base = torch.arange(6.0)
    checkpoint.save_tensors(tmp_path / "a.safetensors", dict(one=base, same=base, part=base[2:4], column=base.view(2, 3).T,
                                                            empty=base[:0], none=base[:0]))
    back = checkpoint.load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(back["same"], base) and torch.equal(back["part"], base[2:4])
    assert torch.equal(back["column"], base.view(2, 3).T) and back["none"].shape == (0,)
    (tmp_path / "a.safetensors").write_bytes(b"12345678abc")
    with pytest.raises(ValueError, match="a.safetensors: expected a safetensors file, got .*; use an older checkpoint"):
        checkpoint.load_tensors(tmp_path / "a.safetensors")


# ---- In a process of its own: kill, and Ctrl-C here

SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from training_checks import little
def on_log(row):
    print("row", row["step"], flush=True)
    time.sleep(0.5)
little(sys.argv[2], steps=12, save_every=5, log_every=3, warmup=2).run(on_log)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_kill_and_resume(tmp_path):
    """kill -9 between two checkpoints, then to the end: bit for bit the run that was never killed."""
    little(tmp_path / "whole", steps=12, save_every=5, log_every=3, warmup=2).run()
    out = tmp_path / "parts"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(out)], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line.strip() == "row 9" for line in process.stdout), process.stderr.read()
    process.kill()
    process.communicate()
    assert checkpoint.newest(out).name == "step-00000005"
    little(out, steps=12, save_every=5, log_every=3, warmup=2, resume=True).run()
    same_files(checkpoint.newest(tmp_path / "whole"), checkpoint.newest(out))
    same_rows(tmp_path / "whole", out)


def test_ctrl_c_finishes_the_step(tmp_path):
    """An interrupt in the middle of a step must not save half of it."""
    trainer = little(tmp_path / "a", steps=6)
    loss = trainer.loss

    def interrupted(batch):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return loss(batch)

    trainer.loss = interrupted
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)
    assert checkpoint.newest(tmp_path / "a").name == "step-00000003"
    little(tmp_path / "a", steps=6, resume=True).run()
    little(tmp_path / "b", steps=6).run()
    same_files(checkpoint.newest(tmp_path / "a"), checkpoint.newest(tmp_path / "b"))


# ---- What is told


def test_progress_in_a_log_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 600.0)  # however slow the machine
    trainer = little(tmp_path, steps=300)
    trainer.run()
    out, wrong = capsys.readouterr()
    assert len(out.splitlines()) == 2 and wrong == ""  # the first row, and the last
    line = out.splitlines()[-1]
    for part in ("300/300", "loss ", "1,200 samples", "3,600 tokens", "tokens/s", "MFU ", "pad 7.7%", "0.0 min left"):
        assert part in line, line


def test_progress_in_a_terminal_is_a_bar(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    little(tmp_path, steps=3).run()
    out, wrong = capsys.readouterr()
    assert out == "" and "3/3" in wrong and "tokens/s" in wrong


def test_tensorboard_events(tmp_path, capsys, monkeypatch):
    little(tmp_path / "off", steps=2).run()
    assert not (tmp_path / "off" / "tensorboard").exists()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        little(tmp_path / "missing", steps=2, tensorboard=True).run()
    assert "tensorboard is not installed: losses go to losses.csv only" in capsys.readouterr().out
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Stop):
        little(tmp_path / "on", steps=6, save_every=3, tensorboard=True).run(stop_at(5))
    time.sleep(1.1)  # event files are named by the second
    little(tmp_path / "on", steps=6, save_every=3, tensorboard=True, resume=True).run()
    events = EventAccumulator(str(tmp_path / "on" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "tokens_per_s", "mfu", "pad_share"}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]  # none twice


def test_wrong_settings_get_a_sentence():
    for settings, sentence in (
            (dict(steps=0), "steps: expected 1 or more, got 0"), (dict(ema=1.5), "ema: expected 0 to 1, got 1.5"),
            (dict(lr=math.nan), "lr: expected 0 or more, got nan"), (dict(precision="fp16"), "bf16, fp32, got 'fp16'"),
            (dict(preset="huge"), "preset: expected one of tiny, wan2.1, got 'huge'")):
        with pytest.raises(ValueError, match=sentence):
            VAETraining(**settings)
    for name in ("gpu", "cuda:77", "meta:x"):
        with pytest.raises(ValueError, match=f"--device: expected auto, cpu, cuda .* got '{name}' .*; sora-fast info"):
            pick_device(name)


def test_an_objective_of_the_users_own_trains(tmp_path, monkeypatch):
    """``--objective my_objective:Halved`` is made by name, and its loss is what is learned."""
    (tmp_path / "my_objective.py").write_text(
        "from sora_fast.diffusion import FlowMatching\n\n\nclass Halved(FlowMatching):\n"
        "    def loss(self, *arguments):\n        return super().loss(*arguments) / 2\n")
    monkeypatch.chdir(tmp_path)
    made = objective_of(DiTTraining(objective="my_objective:Halved"))
    x0, noise, counts = torch.zeros(4), torch.ones(4), torch.tensor([4])
    assert made.loss(torch.zeros(4), x0, noise, torch.tensor([500.0]), counts) == 0.5
