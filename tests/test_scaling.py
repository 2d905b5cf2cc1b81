"""benchmarks/scaling.py: what is held out, the verdict, rows that are kept, and a whole run of tiny budgets."""

import csv
import json
from argparse import Namespace

import pytest
import torch

for package in ("av", "PIL", "safetensors", "diffusers", "matplotlib"):
    pytest.importorskip(package, reason="the demo extra is not installed")

from training_checks import smaller  # noqa: E402

from sora_fast.benchmarks import scaling  # noqa: E402
from sora_fast.data import write_video  # noqa: E402
from sora_fast.evaluation import loss_by_timestep  # noqa: E402
from sora_fast.models.vae import PRESETS as VAE_PRESETS  # noqa: E402
from sora_fast.training import dit as dit_task  # noqa: E402
from sora_fast.training.latents import load_library  # noqa: E402

pytestmark = pytest.mark.full

SMALL = dict(width=48, depth=2, heads=2, rope_axes=(8, 8, 8))


@pytest.mark.parametrize("total", [9, 20, 36, 71, 132, 250])
def test_no_training_window_holds_a_held_out_frame(total):
    recipe = scaling.Recipe(stride=1)
    free, held = scaling.starts(total, recipe)
    frames = lambda starts: {start + i for start in starts for i in range(recipe.frames)}
    assert not frames(free) & frames(held) and max(frames(free) | frames(held), default=0) < total
    if total >= 71:
        assert len(held) >= total // recipe.period and len(free) > 5 * len(held)
        assert held[-1] - held[0] > total / 3  # spread over the clip
        assert len(frames(free) | frames(held)) > 0.93 * total  # little else is lost


def rows(*losses):
    return [dict(factor=4**i, seed=seed, held_out_loss=loss)
            for seed, own in enumerate(losses) for i, loss in enumerate(own)]


def test_the_verdict_is_each_seeds_and_the_means():
    assert scaling.verdict(rows((3.0, 2.0, 1.0), (3.5, 2.5, 1.5))) == []
    assert scaling.means(rows((3.0, 2.0), (4.0, 3.0))) == {1: 3.5, 4: 2.5}
    assert scaling.verdict(rows((3.0, 2.0, 1.0), (3.0, 2.0, 2.0))) == ["seed 1: 2.0000 at 16x is not below 2.0000 at 4x"]
    wrong = scaling.verdict(rows((1.0, 2.0), (3.0, 3.5)))
    assert len(wrong) == 3 and wrong[2].startswith("the mean over seeds: 2.7500 at 4x is not below 2.0000 at 1x")
    assert len(scaling.verdict(rows((1.0, float("nan"))))) == 2


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole run: one seed, 1x and 2x of two steps, on a clip of moving stripes."""
    root = tmp_path_factory.mktemp("scaling")
    line = torch.arange(64)[None, :, None] * 3 + torch.arange(72)[None, None]
    moving = ((line + 6 * torch.arange(80)[:, None, None]) % 256).to(torch.uint8)[..., None].repeat(1, 1, 1, 3)
    write_video(root / "media" / "a.mp4", moving, 25)
    patch = pytest.MonkeyPatch()
    patch.setattr(scaling, "Recipe", lambda plain=scaling.Recipe, **changes: plain(**dict(crops=1, held_crops=1) | changes))
    argv = ["--data", str(root / "media"), "--out", str(root / "out"), "--work", str(root / "work"), "--steps", "2",
            "--factors", "1", "2", "--seeds", "0", "--vae-steps", "1", "--stride", "16", "--device", "cpu"]
    with smaller(dit_task.PRESETS, **SMALL), smaller(VAE_PRESETS, width=4):
        code = scaling.main(argv)
    yield root, argv, code
    patch.undo()


def test_a_run_writes_rows_that_can_be_made_again(done):
    root, _, code = done
    figures = json.loads((root / "out" / "figures.json").read_text())
    assert code in (0, 1) and [row["factor"] for row in figures["rows"]] == [1, 2]
    assert [row["steps"] for row in figures["rows"]] == [2, 4]
    assert figures["rows"][1]["tflop"] == pytest.approx(2 * figures["rows"][0]["tflop"], rel=0.3)
    assert figures["recipe"]["steps"] == 2 and "--steps 2" in figures["command"]
    assert all({"commit", "changed", "machine", "torch"} <= row.keys() for row in figures["rows"])
    with open(root / "out" / "figures.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(figures["rows"], table, strict=True):
        assert float(line["held_out_loss"]) == row["held_out_loss"] and float(line["t900"]) == row["by_timestep"][9]
        made = dit_task.load_run(str(root / "work" / f"x{row['factor']}-seed0"))
        held = load_library(root / "work" / "held")
        found = loss_by_timestep(made.dit, made.text_encoder, made.objective, held)
        assert row["held_out_loss"] == pytest.approx(found.mean, rel=1e-5)
        assert row["by_timestep"] == pytest.approx(found.by_timestep.tolist(), rel=1e-5)
    free = load_library(root / "work" / "free")
    assert not any(abs(a.start - b.start) < 9 for a in free for b in held) and len(held) == 2
    assert (len(free), len(held)) == (figures["windows"], figures["held_out_windows"])
    assert (root / "out" / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (root / "out" / "scaling.svg").read_text()


def test_a_second_call_trains_what_is_missing_only(done, monkeypatch, capsys):
    root, argv, code = done
    before = (root / "out" / "figures.json").read_bytes()
    asked = []

    def planted(vae, free, held, recipe, factor, seed, work, arguments):
        asked.append((factor, seed))
        return json.loads(before)["rows"][0] | dict(factor=factor, seed=seed, held_out_loss=9.0 + factor)

    monkeypatch.setattr(scaling, "train", planted)
    assert scaling.main(argv) == code and not asked
    assert (root / "out" / "figures.json").read_bytes() == before
    fresh = [*argv[: argv.index("--seeds")], "--seeds", "0", "1", *argv[argv.index("--seeds") + 2 :]]
    assert scaling.main(fresh) == 1 and asked == [(1, 1), (2, 1)]
    assert "seed 1: 11.0000 at 2x is not below 10.0000 at 1x" in capsys.readouterr().out
    found = json.loads((root / "out" / "figures.json").read_text())["rows"]
    assert [(row["factor"], row["seed"]) for row in found] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    (root / "out" / "figures.json").write_bytes(before)


def test_a_row_that_is_measured_again_names_the_code_that_trained_it(done, monkeypatch):
    root, argv, code = done
    before = json.loads((root / "out" / "figures.json").read_text())
    monkeypatch.setattr(scaling, "machine", lambda *_: dict(commit="later", changed=None, torch="0", machine="another"))
    with smaller(dit_task.PRESETS, **SMALL):
        assert scaling.main([*argv, "--fresh"]) == code
    again = json.loads((root / "out" / "figures.json").read_text())
    for row, other in zip(before["rows"], again["rows"], strict=True):
        assert row["commit"] == other["commit"] != "later" and row["machine"] == other["machine"]
        assert other["held_out_loss"] == pytest.approx(row["held_out_loss"], rel=1e-5)


def test_rows_of_two_recipes_are_never_mixed(done, capsys):
    root, argv, _ = done
    other = [*argv, "--stride", "15"]
    assert scaling.main(other) == 2 and "hold rows of this recipe" in capsys.readouterr().err
    assert scaling.main([*other, "--fresh"]) == 2 and "pass another --work" in capsys.readouterr().err
    assert scaling.main([*argv, "--steps", "0"]) == 2 and "of 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit) as told:
        scaling.main(["--help"])
    assert told.value.code == 0 and "held-out loss" in capsys.readouterr().out


def test_the_command_makes_the_same_run():
    given = Namespace(steps=3, vae_steps=4, stride=5, factors=[1, 4], seeds=[0, 2], device="cpu", threads=1, data="clips",
                      vae="")
    assert scaling.command(given) == ("python -m sora_fast.benchmarks.scaling --steps 3 --vae-steps 4 --stride 5 --factors "
                                      "1 4 --seeds 0 2 --device cpu --threads 1 --data clips")
