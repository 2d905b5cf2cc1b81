"""The demo, shortened to a few steps: every stage runs and the report shows pictures. (.ci/run makes the whole demo.)"""

import json
import re
import subprocess
import sys

import pytest

from sora_fast.cli.demo_stages import WINDOWS

pytestmark = pytest.mark.full


def test_demo_writes_a_whole_report(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "sora_fast.cli", "demo", "--out", str(out), "--vae-steps", "2", "--dit-steps", "2",
         "--threads", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "memory: about" in done.stdout and "PSNR" in done.stdout and "minutes of training" in done.stdout
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") >= 3 * 3 + 3 * 2 + 1 + 5  # reconstructions and generated clips
    assert page.count("data:image/png;base64,") >= 2 + 5  # losses and photos
    assert not re.search(r"(src|href)=\"?https?:", page)  # self-contained
    for _, _, caption in WINDOWS:
        assert caption in page
    figures = json.loads((out / "figures.json").read_text())
    assert {row["clip"] for row in figures["reconstructions"]} == {
        "bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"}
    for row in figures["reconstructions"]:
        assert row["height"] >= 96 and f"{row['psnr']:.2f} dB" in done.stdout and f"{row['baseline_psnr']:.2f}" in page
    clips, photos = list((out / "samples").glob("*.mp4")), list((out / "samples").glob("*.png"))
    assert len(clips) == 4 + 5 and len(photos) == 7 + 1  # captions alone, and images and clips as prompts
    for shown in ("image to video", "extension forward", "extension backward", "loop", "interpolation", "SDEdit"):
        assert f"<small>{shown}" in page
    for join in ("before the given end", "from the end to the beginning"):
        step, most = re.search(f"{join} neighbouring frames differ by ([0-9.]+) of 255, ([0-9.]+) at most", page).groups()
        assert float(step) <= float(most)
