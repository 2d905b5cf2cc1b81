"""The command line: settings, sentences, exit codes, the whole way from media to pictures, and torch alone."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from cli_checks import options, refused

import sora_fast
from sora_fast.cli.__main__ import is_sentence, main
from sora_fast.explanation import MODELS, all_ops, explain
from sora_fast.training.config import DiTTraining, VAETraining

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("demo", "train-vae", "train", "generate", "eval", "setup", "info", "explain", "validate", "bench",
            "bench compare", "bench report", "bench collect", "bench readme")


# ---- Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_names_its_defaults(cli, command):
    code, out, _ = cli(*command.split(), "--help")
    assert code == 0
    if command not in ("info", "bench collect"):  # which have no flags
        flags = [flag for flag in out.split("\n  --")[1:]]
        told = [flag for flag in flags if "default" in " ".join(flag.split())]
        required = ("config", "prompt", "size", "impl", "jsonl")
        missing = [flag.split()[0] for flag in flags if flag not in told and flag.split()[0] not in required]
        assert told and not missing, missing


def test_help_and_version(cli):
    code, out, _ = cli("--help")
    assert code == 0 and all(command in out for command in COMMANDS)
    code, out, _ = cli("--version")
    assert code == 0 and out.strip() == f"sora_fast {sora_fast.__version__}"
    code, out, _ = cli()
    assert code == 0 and "This machine: " in out and "sora-fast demo" in out and "sora-fast --help" in out
    code, _, wrong = cli("trian")
    assert code == 2 and "trian" in wrong


# ---- Settings


def test_flags_win_over_the_file_and_both_over_defaults(tmp_path):
    pytest.importorskip("yaml")
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-4\nsteps: 7\nwarmup: 3\nsave-every: 11\nfps: 8\nshift: 3\ncheckpointing: true\n")
    got = options(DiTTraining, "--config", file, "--steps", 9, "--no-tensorboard", "--clip", 2)
    assert (got.lr, got.steps, got.warmup, got.save_every, got.fps, got.shift) == (1e-4, 9, 3, 11, 8.0, "3")
    assert got.checkpointing and not got.tensorboard and got.clip == 2.0 and got.budget == DiTTraining().budget
    assert options(DiTTraining) == DiTTraining() and options(VAETraining) == VAETraining()
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert options(VAETraining, "--config", tmp_path / "empty.yaml") == VAETraining()


@pytest.mark.parametrize("config", (VAETraining, DiTTraining))
def test_a_printed_config_is_read_again(cli, config, tmp_path):
    """Every setting, with a comment; so is a run's config.json, whose folder is not the new run's."""
    pytest.importorskip("yaml")
    command = "train-vae" if config is VAETraining else "train"
    code, out, _ = cli(command, "--print-config", "--lr", "3e-5", "--steps", "7")
    (tmp_path / "run.yaml").write_text(out)
    wanted = replace(config(), lr=3e-5, steps=7)
    assert code == 0 and out.count("# ") >= len(fields(config))
    assert options(config, "--config", tmp_path / "run.yaml") == wanted
    saved = dict(kind="dit", training=asdict(replace(wanted, out="elsewhere", resume=True)))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert options(config, "--config", tmp_path / "config.json") == wanted


@pytest.mark.parametrize("text, parts", [
    ("stepz: 3", ["expected settings among", "'stepz'", "fix its name"]),
    ("steps: many", ["expected steps as int", "'many'"]),
    ("steps: 2.5", ["expected steps as int", "2.5"]),
    ("steps: true", ["expected steps as int", "True"]),
    ("lr: quick", ["expected lr as float", "'quick'"]),
    ("lr: null", ["expected lr as float", "None"]),
    ("resume: 1", ["expected resume as bool", "1"]),
    ("preset: huge", ["preset: expected one of tiny, wan2.1", "'huge'"]),
    ("steps: 0", ["steps: expected 1 or more, got 0"]),
    ("- a\n- b", ["expected settings as 'name: value' lines", "list"]),
    ("a: [", ["expected YAML"]),
    ("3: 4", ["expected settings among", "'3'"]),
])
def test_wrong_files_get_a_sentence(cli, tmp_path, text, parts):
    pytest.importorskip("yaml")
    (tmp_path / "run.yaml").write_text(text)
    refused(cli("train-vae", "--config", tmp_path / "run.yaml"), *parts)


def test_wrong_flags_get_a_sentence(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(cli("train-vae", "--config", "missing.yaml"), "no file at missing.yaml")
    refused(cli("train-vae"), "expected --data FOLDER")
    refused(cli("train-vae", "--data", "nowhere"), "nowhere")
    refused(cli("train-vae", "--keep", "0"), "keep: expected 1 or more, got 0")
    refused(cli("train-vae", "--resume"), "expected a run folder with a checkpoint", "train first")
    refused(cli("train", "--shift", "high"), "--shift: expected tokens or a number, got 'high'")
    refused(cli("train", "--preset", "S/3"), "expected preset to be one of nano, tiny, S/2", "'S/3'")
    refused(cli("train", "--vae", "nowhere"), "expected a run folder of sora-fast train-vae")
    refused(cli("generate", "nowhere", "--prompt", "a", "--size", "1x8x8"), "expected a run folder of sora-fast train")
    refused(cli("generate", "nowhere", "--prompt", "a", "--size", "1x8x8", "--steps", 0), "--steps of 1 or more", "got 0")
    refused(cli("generate", "nowhere", "--prompt", "a", "--size", "1x8x8", "--device", "gpu"), "--device: expected auto",
            "'gpu'")
    code, _, wrong = cli("train", "--steps", "many")
    assert code == 2 and "invalid int value: 'many'" in wrong and "Traceback" not in wrong
    code, _, wrong = cli("train", "--objective", "edm")
    assert code == 2 and "objective: expected one of flow, ddpm, got 'edm'" in wrong
    refused(cli("train", "--objective", "torch.nn:Identity"), "the methods of sora_fast.diffusion.Objective", "add_noise")
    refused(cli("train", "--objective", "sora_fast.diffusion:DDPM", "--prediction", "x0"), "--prediction: expected")
    assert not list(tmp_path.iterdir())  # nothing is begun for a wrong flag


def test_bugs_keep_their_traceback(monkeypatch):
    import sora_fast.explanation as module

    def slip():
        return None + 1

    for error in (slip, lambda: [][1], lambda: int("x")):
        monkeypatch.setattr(module, "info", error)
        with pytest.raises((TypeError, IndexError, ValueError)):
            main(["info"])
    try:
        explain("nothing")
    except ValueError as error:
        assert is_sentence(error)
    try:
        torch.zeros(2).view(3)
    except RuntimeError as error:
        assert not is_sentence(error)


# ---- From media to pictures


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Made media, and the folders of the two runs, by the commands themselves."""
    for package in ("av", "PIL", "safetensors", "diffusers", "yaml"):
        pytest.importorskip(package, reason="the train extra is not installed")
    from sora_fast.data import write_image, write_video

    root = tmp_path_factory.mktemp("my runs")
    ramp = torch.arange(48, dtype=torch.uint8) * 5
    picture = ramp[:, None, None].expand(48, 48, 3)
    write_video(root / "media" / "clip.mp4", picture[None].repeat(9, 1, 1, 1), 8)
    write_image(root / "media" / "image.png", picture)
    (root / "media" / "clip.txt").write_text("a ramp that stands still")
    common = "steps: 2\nwarmup: 1\nlog-every: 1\nthreads: 1\ndevice: cpu\ntensorboard: false\n"
    (root / "vae.yaml").write_text(common + "crop: 16\nframes: 5\nimages: 2\n")
    (root / "dit.yaml").write_text(common + "budget: 64\nlook_ahead: 3\nshort_side: 32\nframes: 5\nwindows: 2\n"
                                   f"latent-cache: {root}/latents\n")
    printed = []
    for command in (["train-vae", "--config", f"{root}/vae.yaml", "--out", f"{root}/vae", "--data", f"{root}/media"],
                    ["train", "--config", f"{root}/dit.yaml", "--out", f"{root}/dit", "--vae", f"{root}/vae", "--data",
                     f"{root}/media"]):
        out, wrong = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(wrong), pytest.raises(SystemExit) as done:
            main(command)
        assert done.value.code == 0 and "Traceback" not in wrong.getvalue(), wrong.getvalue()
        printed.append(out.getvalue())
    return root, *printed


def test_training_tells_what_it_does(trained):
    root, vae, dit = trained
    assert "1 clips, 1 images, 1 without a caption" in vae and "crops of 16 x 16 from 2 items" in vae
    assert f"next: sora-fast train --vae '{root}/vae' --data '{root}/media'\n" in vae  # to be pasted into a shell
    assert f"next: sora-fast generate '{root}/dit' --prompt" in dit
    assert f"latents: 0 of 2 files from the cache in {root}/latents, 2 encoded" in dit
    for out, run in ((vae, "vae"), (dit, "dit")):
        assert out.index("memory: about") < out.index(f"{run} 1/2: loss")
        assert f"{run} 2/2: loss" in out and "tokens/s" in out and "pad " in out and "min left" in out
        assert len((root / run / "losses.csv").read_text().splitlines()) == 3
        assert (root / run / "checkpoints" / "step-00000002" / "state.json").is_file()


def test_generate_writes_clips_and_images(trained, cli, tmp_path):
    root, _, _ = trained
    code, out, _ = cli("generate", root / "dit", "--prompt", "a ramp", "--prompt", "an image", "--size", "5x32x48",
                       "--size", "1x16x32", "--steps", 2, "--guidance", 2.0, "--out", tmp_path, "--device", "cpu")
    assert code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["sample-00.mp4", "sample-01.png"]
    assert "5x32x48, 'a ramp'" in out and "1x16x32, 'an image'" in out
    from sora_fast.data import probe

    clip, image = probe(tmp_path / "sample-00.mp4"), probe(tmp_path / "sample-01.png")
    assert (clip.frames, clip.height, clip.width, clip.fps) == (5, 32, 48, 12.0)
    assert (image.height, image.width) == (16, 32)
    code, _, _ = cli("generate", root / "dit", "--prompt", "a", "--size", "5x16x16", "--steps", 1, "--gif", "--out",
                     tmp_path / "gif", "--device", "cpu")
    assert code == 0 and (tmp_path / "gif" / "sample-00.gif").is_file()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("sample-*")}
    (tmp_path / "sample-07.png").touch()  # and beside another that takes 08 meanwhile
    (tmp_path / ".sample-08").touch()
    code, out, _ = cli("generate", root / "dit", "--prompt", "another", "--size", "1x16x16", "--steps", 1, "--out", tmp_path,
                       "--device", "cpu")
    assert code == 0 and (tmp_path / "sample-09.png").stat().st_size and f"{tmp_path / 'sample-09.png'}: " in out
    assert before == {name: (tmp_path / name).read_bytes() for name in before} and not (tmp_path / ".sample-09").exists()


@pytest.mark.parametrize("size, parts", [
    ("5x100x48", ["lines as a multiple of 16, got 100", "96 or 112"]),
    ("5x32x8", ["columns as a multiple of 16, got 8", "nearest are 16"]),
    ("7x32x48", ["frames as 1 + 4 k, got 7", "5 or 9"]),
    ("0x32x48", ["frames as 1 + 4 k, got 0", "1"]),
    ("32x48", ["expected TxHxW", "'32x48'"]),
    ("axbxc", ["expected TxHxW"]),
])
def test_sizes_that_do_not_fit_name_the_nearest(trained, cli, tmp_path, size, parts):
    refused(cli("generate", trained[0] / "dit", "--prompt", "a", "--size", size, "--out", tmp_path / "x", "--device",
                "cpu"), "--size", *parts)
    assert not (tmp_path / "x").exists()


def test_generate_wants_as_many_sizes_as_prompts(trained, cli):
    refused(cli("generate", trained[0] / "dit", "--prompt", "a", "--prompt", "b", "--prompt", "c", "--size", "1x16x16",
                "--size", "1x16x32", "--device", "cpu"), "one per --prompt (3), got 2")
    refused(cli("generate", trained[0] / "vae", "--prompt", "a", "--size", "1x16x16", "--device", "cpu"),
            "expected a run of sora-fast train, got one of kind 'vae'")


def test_resume_goes_on_with_the_runs_own_settings(trained, cli, capsys):
    """Only what changes has to be said again; latents and VAE are the run's own."""
    root, _, _ = trained
    latents = (root / "dit" / "latents.safetensors").stat().st_mtime_ns
    refused(cli("train", "--config", root / "dit.yaml", "--out", root / "dit", "--vae", root / "vae", "--data",
                root / "media"), "got one with checkpoints; pass --resume")
    assert (root / "dit" / "latents.safetensors").stat().st_mtime_ns == latents  # refused before anything is written
    refused(cli("train", "--out", root / "dit", "--resume", "--prediction", "x0"), "expected prediction ''", "got 'x0'")
    refused(cli("train", "--out", root / "dit", "--resume", "--preset", "S/8"), "expected preset 'tiny'", "got 'S/8'")
    code, out, _ = cli("train", "--out", root / "dit", "--resume", "--steps", 3)
    assert code == 0 and "latents and VAE are those of" in out and "dit 3/3: loss" in out
    saved = json.loads((root / "dit" / "config.json").read_text())["training"]
    assert saved["budget"] == 64 and saved["steps"] == 3
    assert len((root / "dit" / "losses.csv").read_text().splitlines()) == 4
    assert options(DiTTraining, "--out", root / "dit", "--resume", "--lr", 1.0).look_ahead == 3


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_saves_and_says_how_to_go_on(trained, tmp_path):
    root, _, _ = trained
    process = subprocess.Popen(
        [sys.executable, "-m", "sora_fast.cli", "train-vae", "--config", f"{root}/vae.yaml", "--data", f"{root}/media",
         "--out", f"{tmp_path}/vae", "--steps", "100000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert any("/100,000: loss" in line for line in process.stdout), process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, wrong = process.communicate(timeout=100)
    assert process.returncode == 130 and wrong == "stopped\n", wrong
    saved = next((tmp_path / "vae" / "checkpoints").iterdir())
    assert f"interrupted: saved {saved}; go on with the same command and --resume" in out


# ---- info and explain


def test_info_says_where_it_came_from(cli, monkeypatch):
    code, out, _ = cli("info")
    assert code == 0 and f"sora_fast {sora_fast.__version__} from {Path(sora_fast.__file__).parent}" in out
    assert f"torch {torch.__version__}" in out and "SORA_FAST_BACKEND is not set" in out and "varlen_attention" in out
    monkeypatch.setenv("SORA_FAST_BACKEND", "torch")
    code, out, _ = cli("info")
    # The raw pair has no torch backend: said, in place of an error.
    assert code == 0 and "SORA_FAST_BACKEND=torch" in out and "'torch' was asked for by name" in out
    monkeypatch.setenv("SORA_FAST_BACKEND", "fast")
    code, out, _ = cli("info")
    assert code == 0 and "got 'fast'" in out


def marks(text):
    """{op: backend marked with *} of an explanation."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) > 2 and row[2] == "*"}


def test_explain_marks_what_auto_takes(cli, monkeypatch):
    code, out, _ = cli("explain", "dit", "--all", "--device", "cuda:sm90")
    assert code == 0
    taken = marks(out)
    assert set(taken) == {"patch_embed", "norm_modulate", "qk_norm_rope", "varlen_attention",
                          "gate_residual_norm_modulate", "gate_residual", "unpatchify"}
    from sora_fast.explanation import all_ops

    for name, backend in taken.items():
        op = all_ops()[name]
        assert op.choose(op.example("cuda:sm90", torch.bfloat16, True)).name == backend
    monkeypatch.setenv("SORA_FAST_BACKEND", "reference")
    code, out, _ = cli("explain", "dit", "--all", "--device", "cuda:sm90")
    assert code == 0 and set(marks(out).values()) == {"reference"}
    assert "taken, as SORA_FAST_BACKEND=reference says" in out and "taken by auto" not in out


def test_explain_has_a_line_for_each_op(cli, monkeypatch):
    """What it runs on and why on nothing faster; nothing of the backends that are no choice."""
    code, out, _ = cli("explain", "dit", "--device", "cuda:sm90")
    lines = [line.split(maxsplit=2) for line in out.splitlines()[1:-3]]
    assert code == 0 and sorted(op for op, *_ in lines) == sorted(MODELS["dit"])
    assert {name for _, name, _ in lines} == {"torch"}
    assert all(why.startswith("not triton: ") and why.count(": ") <= 2 for *_, why in lines)
    monkeypatch.setenv("SORA_FAST_BACKEND", "triton")
    code, out, _ = cli("explain", "kl_sample")
    assert code == 0 and out.splitlines()[1].split()[:2] == ["kl_sample", "none"] and "does not implement" in out


def test_explain_takes_models_families_and_ops(cli):
    for what, wanted in (("vae", "causal_conv3d"), ("rotary", "qk_norm_rope"), ("norm_act", "norm_act")):
        code, out, _ = cli("explain", what, "--all", "--dtype", "float32", "--no-grad")
        assert code == 0 and wanted in marks(out)
    refused(cli("explain", "unet"), "expected all, dit, vae, a family", "'unet'")
    for device in ("cuda:sm", "gpu", "sm90"):
        refused(cli("explain", "dit", "--device", device), "cpu, cuda or an architecture such as cuda:sm90", device)
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:0"):
            refused(cli("explain", "dit", "--device", device), "none here; name an architecture")


# ---- validate


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module of a user's functions in the working folder."""
    (tmp_path / "mine_of_cli.py").write_text("""
import torch
from sora_fast import reference
def right(**arguments): return reference.gate_residual(**arguments)
def wrong(**arguments): return reference.gate_residual(**arguments) * 1.01
def shape(**arguments): return reference.gate_residual(**arguments)[:1]
def writes(**arguments):
    out = reference.gate_residual(**arguments)
    arguments["x"].data.zero_()
    return out
def raises(**arguments): raise KeyError("no such row")
def refuses(**arguments): raise NotImplementedError("only on Sundays")
number = 3
""")
    (tmp_path / "broken_of_cli.py").write_text("import not_a_package_of_anybody\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine_of_cli", None)


def check(cli, function, *more):
    return cli("validate", "--op", "gate_residual", "--impl", f"mine_of_cli:{function}", "--dtype", "float32", *more)


def test_validate_a_users_function(cli, functions):
    code, out, _ = check(cli, "right", "--jsonl", functions / "deep" / "report.jsonl")
    assert code == 0 and "validate: every comparison passed" in out
    rows = [json.loads(line) for line in (functions / "deep" / "report.jsonl").read_text().splitlines()]
    assert [(row["dtype"], row["direction"], row["backend"], row["implementation"]) for row in rows] == [
        ("float32", "forward", None, "right"), ("float32", "backward", None, "right")]
    assert all(row["row"] == "validate" and row["passed"] and row["op"] == "gate_residual" for row in rows)
    for function in ("wrong", "shape"):
        code, out, _ = check(cli, function)
        assert code == 1 and "FAILED: case" in out and out.endswith("validate: FAILED\n")
    code, out, _ = check(cli, "writes", "--jsonl", functions / "failed.jsonl")
    assert code == 1 and "It writes into what it is given: argument x." in out
    assert not any(json.loads(line)["passed"] for line in (functions / "failed.jsonl").read_text().splitlines())
    code, out, _ = check(cli, "refuses")
    assert code == 1 and "only on Sundays" in out
    code, out, wrong = check(cli, "raises")
    assert code == 1 and "raises raised KeyError where gate_residual does not" in out and "validate: FAILED" in out
    assert "mine_of_cli.py" in wrong  # a user's bug keeps its traceback


def test_validate_wrong_flags(cli, functions):
    refused(cli("validate", "--impl", "mine_of_cli:right"), "exactly one --op", "got 0")
    refused(cli("validate", "--op", "gate_residual", "--impl", "mine_of_cli"), "expected pkg.mod:fn")
    refused(cli("validate", "--op", "gate_residual", "--impl", "./mine_of_cli:f"), "name of a module, got './mine_of_cli'")
    refused(check(cli, "absent"), "expected a function 'absent'")
    refused(check(cli, "number"), "expected a function 'number'")
    refused(cli("validate", "--op", "gate_residual", "--impl", "nowhere_at_all:f"), "No module named 'nowhere_at_all'")
    refused(cli("validate", "--op", "gate_residual", "--impl", "broken_of_cli:f"), "not_a_package_of_anybody")
    refused(check(cli, "right", "--backend", "torch"), "no --backend beside it")
    refused(cli("validate", "--op", "gate_residue"), "expected ops among", "gate_residue")
    refused(cli("validate", "--backend", "tritium"), "expected one of auto, ", "'tritium'")
    refused(cli("validate", "--op", "gate_residual", "--device", "gpu"), "--device", "'gpu'")
    refused(cli("validate", "--op", "varlen_attention_forward", "--backend", "torch"), "does not implement this op")


def test_validate_ours(cli):
    code, out, _ = cli("validate", "--op", "gate_residual", "--op", "kl_sample", "--dtype", "bfloat16")
    assert code == 0 and out.count("ok\n") == 8 and "FAILED" not in out and "records" not in out
    code, out, _ = cli("validate", "--op", "varlen_attention_backward", "--dtype", "float32")
    assert code == 0 and "varlen_attention_backward" in out


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """gate_residual with a kernel, on what passes for an NVIDIA GPU."""
    import sora_fast.kernels
    from sora_fast import records
    from sora_fast.dispatch import Backend
    from sora_fast.ops.modulation import GATE_RESIDUAL

    (tmp_path / "planted.py").write_text("def kernel(x): return x\n")
    monkeypatch.setattr(sora_fast.kernels, "__path__", [str(tmp_path)])
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sora_fast.testing.validation._arch", lambda device: "sm90")
    refuses = lambda problem: ["It takes no float64."] if problem.dtype == torch.float64 else []
    monkeypatch.setitem(GATE_RESIDUAL.backends, "triton",
                        Backend("triton", GATE_RESIDUAL.backends["torch"].run, refuses, kernel="planted"))
    records.forget()
    yield tmp_path
    records.forget()


def test_explain_shows_the_dits_kernels(cli):
    """With their records every op of a DiT would run on Triton, on any architecture that they are proven for."""
    pytest.importorskip("triton")
    for gpu in ("sm80", "sm90", "sm120"):
        code, out, _ = cli("explain", "dit", "--all", "--device", f"cuda:{gpu}", "--assume-validated")
        taken = marks(out)
        assert code == 0 and len(taken) == 7 and set(taken.values()) == {"triton"}, taken


def test_validate_writes_records_that_explain_reads(cli, planted):
    pytest.importorskip("triton")  # a record without its version is one of another Triton
    ask = ("explain", "gate_residual", "--all", "--device", "cuda:sm90")
    code, out, _ = cli(*ask)
    assert code == 0 and marks(out) == {"gate_residual": "torch"} and "there is no validation record" in out
    code, out, _ = cli(*ask, "--assume-validated")
    assert code == 0 and marks(out) == {"gate_residual": "triton"} and "as asked" in out
    code, out, _ = cli("validate", "--op", "gate_residual", "--dtype", "bfloat16")
    assert code == 0 and f"records of these kernels are in {planted / 'cache' / 'validate.jsonl'}" in out
    code, out, _ = cli(*ask)
    assert code == 0 and marks(out) == {"gate_residual": "triton"} and "taken by auto; validated on" in out
    code, out, _ = cli("info")
    assert code == 0 and "planted" in out and "triton (our Triton kernels)" in out


def test_validate_of_what_refuses_everything(cli, planted):
    """A kernel that nobody named may refuse a dtype; one that was named has not passed."""
    code, out, _ = cli("validate", "--op", "gate_residual", "--dtype", "float64")
    assert code == 0 and "every case was refused" in out and "It takes no float64." in out
    code, out, _ = cli("validate", "--op", "gate_residual", "--dtype", "float64", "--backend", "triton")
    assert code == 1 and "validate: FAILED" in out


def test_validate_of_a_kernel_without_a_backward(cli, planted, monkeypatch):
    """What it does is judged; a dtype that was named must be done all the same."""
    backends = all_ops()["gate_residual"].backends
    refuses = lambda problem: ["It has no backward."] * problem.grad + ["No float64."] * (problem.dtype == torch.float64)
    monkeypatch.setitem(backends, "triton", replace(backends["triton"], unsupported=refuses))
    ask = ("validate", "--op", "gate_residual", "--backend", "triton")
    for more in ((), ("--dtype", "bfloat16")):
        code, out, _ = cli(*ask, *more)
        assert code == 0 and "It has no backward." in out and "every case was refused" in out
    for more in (("--dtype", "float64"), ("--dtype", "float64", "--dtype", "bfloat16")):
        code, out, _ = cli(*ask, *more)
        assert code == 1 and out.endswith("validate: FAILED\n")


def test_validate_says_where_records_cannot_go(cli, planted, monkeypatch):
    (planted / "file").write_text("no folder")
    monkeypatch.setenv("SORA_FAST_CACHE", str(planted / "file"))
    code, out, wrong = cli("validate", "--op", "gate_residual", "--dtype", "bfloat16", "--backend", "triton")
    assert code == 0 and "every comparison passed" in out
    assert wrong.startswith("validate: expected to write records to") and wrong.endswith("a folder that can be written\n")


# ---- With torch alone

BLOCKED = "numpy,yaml,tqdm,av,PIL,safetensors,diffusers,transformers,tensorboard,matplotlib,skimage,skvideo"
BLOCKER = """
import importlib.machinery, sys, warnings
names, finder = sys.argv.pop(1).split(","), importlib.machinery.PathFinder
real = finder.find_spec
finder.find_spec = classmethod(lambda cls, name, *rest: None if name.partition(".")[0] in names else real(name, *rest))
warnings.simplefilter("ignore")
from sora_fast.cli.__main__ import main
for argv in __import__("json").loads(sys.argv.pop(1)):
    try:
        main(argv)
    except SystemExit as done:
        print("exit", argv[0], done.code, flush=True)
"""
