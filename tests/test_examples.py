"""The examples run as their first lines say, and show what they promise."""

from pathlib import Path

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


def test_the_yaml_has_settings_of_train():
    settings = yaml.safe_load((FOLDER / "train.yaml").read_text())
    assert DiTTraining(**settings).objective == "flow" and settings["preset"] == "tiny"
