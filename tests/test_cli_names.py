"""Names on the command line: whole flags and commands, what was probably meant, and what is told before any work is done."""

import json

import pytest
import torch
from cli_checks import options, refused
from training_checks import little

from sora_fast.cli.__main__ import parser
from sora_fast.cli.parsing import Parser, meant
from sora_fast.training import checkpoint, throughput
from sora_fast.training.config import DiTTraining, VAETraining


def every_parser(top):
    found = [top]
    for action in top._subparsers._group_actions if top._subparsers else ():
        found += [inner for sub in action.choices.values() for inner in every_parser(sub)]
    return found


def test_no_parser_takes_abbreviations():
    found = every_parser(parser())
    assert len(found) == 17 and all(type(each) is Parser and not each.allow_abbrev for each in found)


@pytest.mark.parametrize("argv, came, guess", [
    (("train", "--dat", "x"), "--dat;", "did you mean --data?"),
    (("train-vae", "--data", "x", "--stpes=3"), "--stpes;", "did you mean --steps?"),
    (("train", "--short_side", "3"), "--short_side;", "did you mean --short-side?"),
    (("train", "-data", "x"), "-data;", "did you mean --data?"),
    (("train", "--no-tensorbord"), "--no-tensorbord;", "did you mean --no-tensorboard?"),
    (("generate", "runs/dit", "--promt", "a rabbit"), "--promt;", "did you mean --prompt?"),
    (("generate", "--prmpt", "a rabbit", "runs/dit"), "--prmpt;", "did you mean --prompt?"),
    (("eval", "runs/vae", "--dat", "x"), "--dat;", "did you mean --data?"),
    (("explain", "--assume-validate"), "--assume-validate;", "did you mean --assume-validated?"),
    (("bench", "compare", "a", "b", "--fail-slow", "5%"), "--fail-slow;", "did you mean --fail-slower?"),
    (("tune", "--minuets", "2"), "--minuets;", "did you mean --minutes?"),
    (("--verson",), "--verson;", "did you mean --version?"),
    (("trian",), "trian;", "did you mean train?"),
    (("train_vae", "--data", "x"), "train_vae;", "did you mean train-vae?"),
    (("evaluate", "runs/vae"), "evaluate;", "did you mean"),
    (("tun",), "tun;", "did you mean tune?"),
    (("bench", "comprae", "a", "b"), "bench comprae;", "did you mean bench compare?"),
    (("train", "--xyzzy", "1"), "--xyzzy;", None),
    (("xyzzy",), "xyzzy;", None),
])
def test_near_misses_are_told(cli, argv, came, guess):
    refused(cli(*argv), "expected a ", f"got {came}", "--help lists them", *([guess] if guess else []))
    assert guess is not None or "did you mean" not in cli(*argv)[2]


def test_values_are_no_flags():
    arguments = parser().parse_args(["generate", "runs/dit", "--prompt", "a --rabbit", "--prompt=--x y", "--seed", "-3"])
    assert arguments.prompt == ["a --rabbit", "--x y"] and arguments.seed == -3
    assert meant("stepz", ("steps", "seed")) == "did you mean steps? "
    assert meant("s", [f"s{n}" for n in range(9)]) == ""  # too many begin with it


def test_a_key_near_a_setting_is_told(cli, tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "run.yaml").write_text("stepz: 3")
    refused(cli("train-vae", "--config", tmp_path / "run.yaml"), "got 'stepz'; did you mean steps? remove it or fix")


# ------------------------------------------------------------------------------------------------ before any work
def test_eval_blames_the_run_and_not_its_data(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sora_fast.data.scan", lambda *given, **more: pytest.fail("the folder was read"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"kind": "mae"}')
    for kind in ("vae", "dit"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps(dict(kind=kind, training=dict(data="media"))))
    for more in ((), ("--data", tmp_path)):
        for run, came in (("runs/nope", "nothing there"), ("folder", "no config.json there"), ("other", "'mae'")):
            refused(cli("eval", run, *more), f"{run}: expected a run folder of sora-fast train-vae or train", came)
        for run in ("vae", "dit"):
            refused(cli("eval", run, *more), f"{run}: expected a run folder with a checkpoint")
    assert not (tmp_path / "out").exists()


def test_lengths_are_checked_before_media_are_read(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sora_fast.data.scan", lambda *given, **more: pytest.fail("the folder was read"))
    refused(cli("train-vae", "--data", tmp_path, "--frames", 10), "--frames 1 + 4 k, got 64 and 10")
    refused(cli("train-vae", "--data", tmp_path, "--crop", 60), "--crop a multiple of 8", "got 60")

    class Vae:
        class config:
            time_factor = 4

    monkeypatch.setattr("sora_fast.training.vae.load_vae", lambda *given: Vae)
    refused(cli("train", "--data", tmp_path, "--frames", 10), "--frames of 1 + 4 k", "got 10; the nearest are 9 or 13")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ --resume auto
def test_resume_auto_goes_on_where_there_is_a_checkpoint(cli, tmp_path):
    run = tmp_path / "run"
    for config in (VAETraining, DiTTraining):
        assert options(config, "--out", run, "--resume", "auto").resume is False
        assert options(config, "--out", run, "--resume").resume is True
        assert options(config, "--out", run, "--resume", "--no-resume").resume is False
    refused(cli("train-vae", "--out", run, "--resume"), "--resume: expected a run folder with a checkpoint", "--resume auto")
    run.mkdir()
    (run / "config.json").write_text('{"training": {"lr": 0.5}}')  # killed before its first checkpoint: begun anew
    assert options(DiTTraining, "--out", run, "--resume", "auto").lr == DiTTraining().lr
    little(run, steps=2, save_every=1, lr=0.25).run()
    found = options(DiTTraining, "--out", run, "--resume", "auto", "--steps", 9)
    assert found.resume is True and found.lr == 0.25 and found.steps == 9
    for each in checkpoint.everything(run):
        (each / "state.json").unlink()
    assert options(DiTTraining, "--out", run, "--resume", "auto").resume is False
    code, _, wrong = cli("train-vae", "--out", run, "--resume", "always")
    assert code == 2 and "invalid choice: 'always'" in wrong and "auto" in wrong


def test_resume_in_a_file_and_in_code(cli, tmp_path):
    pytest.importorskip("yaml")
    for text, wanted in (("auto", False), ("true", True), ("false", False)):
        (tmp_path / "run.yaml").write_text(f"resume: {text}\nout: {tmp_path / 'run'}\n")
        assert options(VAETraining, "--config", tmp_path / "run.yaml").resume is wanted
    (tmp_path / "run.yaml").write_text("resume: always")
    refused(cli("train-vae", "--config", tmp_path / "run.yaml"), "expected resume as bool", "'always'")
    with pytest.raises(ValueError, match="resume: expected True or False, got 'auto'; "):
        VAETraining(resume="auto")


def test_a_requeued_job_begins_and_goes_on_with_one_command(tmp_path, capsys):
    """What ``little`` is to a job: the same settings each time."""
    for steps in (2, 4):
        resume = bool(checkpoint.everything(tmp_path / "run"))
        assert options(DiTTraining, "--out", tmp_path / "run", "--resume", "auto").resume is resume is (steps == 4)
        little(tmp_path / "run", steps=steps, resume=resume).run()
    assert checkpoint.newest(tmp_path / "run").name == "step-00000004"


# ------------------------------------------------------------------------------------------------ --precision auto
@pytest.mark.parametrize("emulated", [True, False])
def test_a_cpu_without_bfloat16_trains_in_float32(emulated, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "emulated_on_cpu", lambda dtype: emulated)
    assert VAETraining().precision == DiTTraining().precision == "auto"
    trainer = little(tmp_path, steps=1, precision="auto")
    wanted = "fp32" if emulated else "bf16"
    assert trainer.config.precision == wanted
    assert json.loads((tmp_path / "config.json").read_text())["training"]["precision"] == wanted  # a resumed run keeps it
    with trainer.autocast():
        assert torch.is_autocast_enabled("cpu") != emulated
    trainer.run()
    assert "several times faster" not in capsys.readouterr().out or not emulated
    assert throughput.pick_precision("bf16", trainer.device) == "bf16"  # who asks for one gets it


@pytest.mark.parametrize("capability, wanted", [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_a_gpu_trains_in_bfloat16_where_it_has_instructions_for_it(capability, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert throughput.pick_precision("auto", torch.device("cuda")) == wanted
    assert throughput.pick_precision("auto", torch.device("mps")) == "fp32"
