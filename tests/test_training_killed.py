"""Training from the command line, killed and resumed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_checks import same_files, same_rows, tiny_vae, write_media

from sora_fast.training import checkpoint
from sora_fast.training import vae as vae_task

pytestmark = pytest.mark.full


def command(name, out, media, *more):
    """``sora-fast`` in a process of its own."""
    settings = ("--data", media, "--out", out, "--device", "cpu", "--short-side", 48, "--log-every", 1, "--save-every", 6,
                "--warmup", 2, "--no-tensorboard", "--log-samples", "--heldout", 0.2, "--heldout-every", 5,
                "--accumulate", 2, "--peak-tflops", 1, "--threads", 1, *more)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    return subprocess.Popen([sys.executable, "-m", "sora_fast.cli", name, *map(str, settings)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("task", ["train-vae", "train"])
def test_kill_and_resume_of_the_commands(tmp_path, task):
    """Twelve steps are six, kill -9, and a resume: weights, averages, moments, losses, held-out losses and samples."""
    media = write_media(tmp_path / "media")
    more = ["--crop", 32, "--frames", 5] if task == "train-vae" else ["--vae", tmp_path / "vae", "--budget", 64]
    if task == "train":
        trainer = tiny_vae(tmp_path / "vae", media, steps=1)
        trainer.run()
        vae_task.finish(trainer)
    runs = {}
    for name in ("whole", "parts"):
        process = command(task, tmp_path / name, media, "--steps", 12, *more)
        while name == "parts" and not checkpoint.everything(tmp_path / name):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        if name == "parts":
            process.kill()
        runs[name] = process.communicate()
        assert process.returncode == (-9 if name == "parts" else 0), runs[name]
    assert checkpoint.newest(tmp_path / "parts").name == "step-00000006"
    process = command(task, tmp_path / "parts", media, "--resume")
    assert process.communicate() and process.returncode == 0
    same_files(checkpoint.newest(tmp_path / "whole"), checkpoint.newest(tmp_path / "parts"))
    same_rows(tmp_path / "whole", tmp_path / "parts")
    for table in ("heldout.csv", "samples.csv"):
        assert (tmp_path / "whole" / table).read_text() == (tmp_path / "parts" / table).read_text()
