"""Several processes make the run that one makes: DDP and FSDP2, train and train-vae, resume across them, ends."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_runs import runs
from training_checks import Stop, little, rows_of, stop_at, write_media

from sora_fast.training import checkpoint, distributed

pytestmark = [pytest.mark.full, pytest.mark.ci]

for package in ("safetensors", "av", "PIL", "yaml"):
    pytest.importorskip(package, reason="the train extra is not installed")
if os.name == "nt" or not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torchrun with gloo needs POSIX", allow_module_level=True)

HERE = Path(__file__).parent
KINDS = ("ddp", "fsdp")


def torchrun(*command, **options):
    """torchrun in two processes, in the environment of a checkout."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                             *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of one process and of two, of all tasks and both kinds; see distributed_runs."""
    root = tmp_path_factory.mktemp("distributed")
    (root / "media").mkdir()
    write_media(root / "media")
    alone = runs(root)
    for name, make in alone.items():
        make(root / name).run()
    for kind in KINDS:
        with pytest.raises(Stop):
            alone["dit"](root / f"dit-alone-{kind}").run(stop_at(3))
    little(root / "raised", steps=1).run()
    process = torchrun(HERE / "distributed_runs.py", root)
    out, wrong = process.communicate(timeout=300)
    assert process.returncode == 0, wrong
    (root / "out.txt").write_text(out)
    for kind in KINDS:
        alone["dit"](root / f"dit-{kind}-alone", resume=True).run()
    return root


def states(run):
    """Tensors and numbers of a run's last checkpoint."""
    folder = checkpoint.newest(run)
    names = ("model", "ema", "optimizer")
    return {name: checkpoint.load_tensors(folder / f"{name}.safetensors") for name in names}, \
        checkpoint.load_json(folder / "state.json"), sorted(path.name for path in folder.iterdir())


def samples(run):
    with open(run / "samples.csv", newline="") as file:
        return [row for row in csv.DictReader(file)]


def same_to_rounding(one, two, lr=1e-3):
    """Weights, averages and moments that differ by what the order of a sum can do; AdamW's step is of the size of lr."""
    (tensors, numbers, files), (others, other_numbers, other_files) = states(one), states(two)
    assert files == other_files
    for name in tensors:
        assert tensors[name].keys() == others[name].keys()
    for key, value in tensors["optimizer"].items():
        # Relative to the largest of its tensor, and where gradients are all but 0 to those of the run.
        scale = float(value.abs().max()) + (1e-5 if key.endswith("exp_avg") else 1e-9)
        assert float((others["optimizer"][key] - value).abs().max()) <= 1e-3 * scale, key
    for name in ("model", "ema"):
        for key, value in tensors[name].items():
            assert float((others[name][key] - value).abs().max()) <= 0.1 * lr, key
    for name in ("step", "samples", "tokens", "pad", "packs_per_step", "batches"):
        assert numbers[name] == other_numbers[name], name
    for row, other in zip(rows_of(one), rows_of(two), strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
        assert [row[name] for name in ("step", "samples", "tokens", "lr", "pad_share")] == \
            [other[name] for name in ("step", "samples", "tokens", "lr", "pad_share")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["little", "dit", "vae", "adversary"])
def test_two_processes_equal_one(root, task, kind):
    same_to_rounding(root / task, root / f"{task}-{kind}")
    of_one, of_two = samples(root / task), samples(root / f"{task}-{kind}")
    plain = lambda rows: [(row["step"], row["pack"], row["samples"]) for row in rows]
    assert plain(of_one) == plain(of_two)
    assert {row["rank"] for row in of_one} == {"0"} and [row["rank"] for row in of_two[:2]] == ["0", "1"]
    if task != "little":
        for one, two in zip(*(list(csv.DictReader(open(root / run / "heldout.csv"))) for run in (task, f"{task}-{kind}")),
                            strict=True):
            assert {k: float(v) for k, v in one.items()} == pytest.approx({k: float(v) for k, v in two.items()}, rel=1e-3)


def test_the_comparison_sees_a_wrong_run(root, tmp_path):
    """Another seed, or one step less, is not the same run."""
    other = runs(root)["little"](tmp_path / "other", seed=1)
    other.run()
    with pytest.raises(AssertionError):
        same_to_rounding(root / "little", tmp_path / "other")
    runs(root)["little"](tmp_path / "shorter", steps=5).run()
    with pytest.raises(AssertionError):
        same_to_rounding(root / "little", tmp_path / "shorter")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["dit-{}-alone", "dit-alone-{}"])
def test_resume_on_another_number_of_processes_loses_and_repeats_no_sample(root, way, kind):
    run = root / way.format(kind)
    rows = samples(run)
    drawn = [key for row in rows for key in row["samples"].split()]
    assert len(drawn) == len(set(drawn)) == states(run)[1]["samples"]
    assert [(int(row["step"]), int(row["pack"])) for row in rows] == [(1 + pack // 2, pack) for pack in range(8)]
    # What was drawn and not trained on waits in the queue.
    waiting = [key for key, _ in states(run)[1]["batches"]["packer"]["waiting"]]
    numbers = sorted(int(key.partition(":")[0]) for key in drawn + waiting)
    assert numbers == list(range(states(run)[1]["batches"]["drawn"]))
    assert len({row["rank"] for row in rows}) == 2  # both halves are here: one process, and two
    same_to_rounding(root / "dit", run)


def test_a_nan_is_named_by_all_processes(root):
    said = [json.loads((root / f"said-{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1]
    for kind in KINDS:
        assert "at step 3" in said[0][f"nan-{kind}"] and "it comes from 5.2; the last checkpoint, " in said[0][f"nan-{kind}"]


def test_packs_of_a_step(root):
    said = json.loads((root / "said-0.json").read_text())
    assert "--accumulate: expected a multiple of the 2 processes" in said["odd"] and "got 3; pass 2, or 0" in said["odd"]
    out = (root / "out.txt").read_text()
    assert said["raised"] == 2 and "a step is now of 2 packs, and was of 1 before: 2 processes share it" in out
    assert out.count("rank 0 alone says this") == 1 and out.count("dit-ddp 4/4: loss") == 1


def test_alone_is_a_world_of_one():
    assert (distributed.rank(), distributed.size(), distributed.first()) == (0, 1, True)
    assert distributed.sum_of(1, 2.5) == [1.0, 2.5] and distributed.gather("a") == ["a"] and not distributed.orphaned()
    step = distributed.Step(torch.nn.ModuleDict(), None)
    assert distributed.wrap(step, "fsdp", torch.device("cpu")) is step


# ---- The command line


def children(pid):
    """Processes whose parent is ``pid``."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]


def gone(pid, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.1)
    return False


def vae_run(root, out, *more, script=("-m", "sora_fast.cli")):
    settings = ("--data", root / "media", "--out", out, "--crop", 16, "--frames", 5, "--clips", 1, "--images", 1, "--device",
                "cpu", "--precision", "fp32", "--log-every", 1, "--save-every", 2, "--short-side", 16, "--no-tensorboard",
                "--peak-tflops", 1, "--steps", 100_000, *more)
    return torchrun(*script, "train-vae", *settings)


def wait_for_a_checkpoint(process, run, after=0):
    while not (saved := checkpoint.everything(run)) or int(saved[-1].name[5:]) <= after:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up as Linux's ps does")
def test_ends_of_a_run_of_two_processes(root, tmp_path):
    """torchrun is killed, then Ctrl-C: nobody stays behind, and the run goes on, sharded, from where it was."""
    process = vae_run(root, tmp_path / "run")
    wait_for_a_checkpoint(process, tmp_path / "run")
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()  # which leaves its processes behind
    assert all(gone(pid, 30) for pid in workers)
    _, wrong = process.communicate()
    assert "torchrun was killed: training stops here, without saving" in wrong, wrong
    step = int(checkpoint.newest(tmp_path / "run").name[5:])  # it may have saved again before it was gone

    process = vae_run(root, tmp_path / "run", "--resume", "--parallel", "fsdp")
    wait_for_a_checkpoint(process, tmp_path / "run", after=step)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    out, wrong = process.communicate(timeout=60)
    saved = checkpoint.newest(tmp_path / "run")
    assert out.count(f"interrupted: saved {saved}") == 1 and wrong.count("stopped\n") == 1, (out, wrong)
    assert all(gone(pid, 5) for pid in workers)
    assert "sharded by FSDP2" in out and "deprecated" not in wrong and "UserWarning" not in wrong
