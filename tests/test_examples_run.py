"""The examples run as their first lines say, and show what they promise."""

import re
import runpy
import sys

import pytest
from test_examples import FOLDER, OTHERS

pytestmark = [pytest.mark.full, pytest.mark.ci]


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
