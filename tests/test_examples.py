"""The examples run as their first lines say, and show what they promise."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sora_fast.training.config import DiTTraining

FOLDER = Path(__file__).parents[1] / "examples"
EQUAL_LOSSES = ("train_wan_with_accelerate", "train_wan_with_fsdp2")
OTHERS = {"train_dit_minimal": r"DiT step 2 of 2: loss \d.*wrote .*0\.mp4.*wrote .*1\.png",
          "accelerate_wan_pipeline": r"largest difference of a pixel in \[0, 1\]: \d\.\de-0[5-9]$",
          "lora_wan": r"16,384 weights of .* are trained.*step 2: loss \d.*wrote .*lora$",
          "custom_vae_block": r"in chunks of 1, 4 and 4 frames: largest difference (0\.0e\+00|\d\.\de-0[6-9])",
          "streaming_decode": r"^1 frames.5 frames.9 frames.wrote .*mp4$"}


def test_every_example_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*EQUAL_LOSSES, *OTHERS}


@pytest.mark.full
@pytest.mark.parametrize("name", EQUAL_LOSSES)
def test_an_example_trains_with_equal_losses(name):
    pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")
    path = FOLDER / f"{name}.py"
    done = subprocess.run([sys.executable, str(path), "--steps", "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"step +(\d+): loss ([\d.]+) plain, ([\d.]+) with sora_fast", done.stdout)
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4] and done.stdout.rstrip().endswith("equal losses")
    assert all(float(a) == pytest.approx(float(b), rel=1e-4) for _, a, b in rows) and rows[0][1] != rows[1][1]


@pytest.mark.full
@pytest.mark.ci
@pytest.mark.parametrize("name", OTHERS)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    from sora_fast.data import demo_media, read_clip, write_image, write_video

    arguments = {"train_dit_minimal": [str(tmp_path / "media"), *"--steps 2 --short-side 32 --sampling-steps 2".split(),
                                       "--out", str(tmp_path)],
                 "lora_wan": ["--steps", "2", "--out", str(tmp_path / "lora")],
                 "streaming_decode": ["--latent-frames", "3", "--out", str(tmp_path / "long.mp4")]}.get(name, [])
    if name == "train_dit_minimal":
        clip, photo = demo_media()[0], demo_media()[5]
        write_video(tmp_path / "media/a.mp4", read_clip(clip, frames=12, size=(36, 64)), 12)
        write_image(tmp_path / "media/b.png", read_clip(photo, frames=1, size=(48, 40))[0])
        (tmp_path / "media/a.txt").write_text("a rabbit")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out.rstrip()
    assert re.search(OTHERS[name], printed, flags=re.S | re.M), printed


def test_the_yaml_has_settings_of_train():
    settings = yaml.safe_load((FOLDER / "train.yaml").read_text())
    assert DiTTraining(**settings).objective == "flow" and settings["preset"] == "tiny"
