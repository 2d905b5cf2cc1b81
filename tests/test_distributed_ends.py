"""How runs of two processes end: an error of one, a setting that is wrong for both."""

import time

import pytest
from test_distributed import HERE, torchrun, vae_run
from training_checks import write_media

from sora_fast.training import checkpoint

pytestmark = pytest.mark.full


@pytest.fixture
def root(tmp_path):
    (tmp_path / "media").mkdir()
    write_media(tmp_path / "media")
    return tmp_path


def test_an_error_of_one_process_ends_both(root, tmp_path):
    process = vae_run(root, tmp_path / "run", script=[HERE / "distributed_runs.py"])
    begin = time.monotonic()
    out, wrong = process.communicate(timeout=60)
    assert process.returncode != 0 and wrong.count("sora-fast: ") == 1 and "the disk of rank 1 is gone" in wrong, wrong
    assert checkpoint.newest(tmp_path / "run").name == "step-00000002" and time.monotonic() - begin < 40
    assert "run 1/100,000: loss" in out


def test_a_wrong_setting_is_said_once(tmp_path):
    process = torchrun("-m", "sora_fast.cli", "train-vae", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    _, wrong = process.communicate(timeout=60)
    assert process.returncode != 0 and wrong.count("sora-fast: ") == 1 and "nowhere" in wrong, wrong
