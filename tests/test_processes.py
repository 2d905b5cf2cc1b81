"""What takes a process of its own: a package imported twice, and a system whose encoding is ASCII."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bench_cli import ONE

from sora_fast.tuning import workers

pytestmark = [pytest.mark.full, pytest.mark.ci]
ROOT = Path(__file__).parents[1]

TWICE = """
import gc, importlib, sys, torch
MODULES = ("ops", "models", "training.loop", "training.throughput", "integrations", "testing", "tuning.tuner", "compat",
           "cli.__main__")

def run():
    import sora_fast
    from sora_fast.training import throughput
    for name in MODULES:
        importlib.import_module(f"sora_fast.{name}")
    torch.manual_seed(0)
    x, y, gate = (torch.randn(5, 16, requires_grad=True) for _ in range(3))
    sora_fast.ops.gate_residual(x, y, gate[:1], None, backend="triton").square().sum().backward()
    pixels, weight = torch.randn(1, 4, 2, 4, 4), torch.ones(16, 4, 1, 2, 2, requires_grad=True)
    def embed():
        return sora_fast.ops.patch_embed(pixels, weight, backend="triton").sum()
    loss, flops = throughput.count(embed, ())
    assert sora_fast.ops.gate_residual(x, y, gate[:1], None).shape == x.shape
    return [x.grad, y.grad, gate.grad, weight.grad, loss, torch.tensor(flops)], sora_fast.ops

first, old = run()
for name in [name for name in sys.modules if name.partition(".")[0] == "sora_fast"]:
    del sys.modules[name]
again, new = run()
assert old is not new
del old
gc.collect()
last, _ = run()
assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, last, strict=True))
print("the same")
"""

COMMANDS = """
import json, sys
from sora_fast.cli.__main__ import main
assert sys.getfilesystemencoding() == "ascii" and not sys.argv[1].isascii(), (sys.getfilesystemencoding(), sys.argv)
for words in json.load(open("commands.json", encoding="utf-8")):
    try:
        main([word.replace("HERE", sys.argv[1]) for word in words])
    except SystemExit as done:
        print("exit", words[0], done.code)
"""


def process(code, *words, **more):
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, encoding="utf-8", timeout=200, **more)


def test_the_package_can_be_imported_anew():
    """As notebooks do that reload what they work on: PyTorch still has the operators of the first one."""
    pytest.importorskip("triton")
    done = process(TWICE, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and done.stdout == "the same\n", done.stdout + done.stderr


def test_outs_and_captions_of_any_letters_where_the_encoding_is_ascii(tmp_path):
    for package in ("av", "PIL", "safetensors", "diffusers", "matplotlib"):
        pytest.importorskip(package, reason="the train extra is not installed")
    from sora_fast.data import write_image, write_video

    here = tmp_path / "Überzug 雪"
    picture = (torch.arange(48, dtype=torch.uint8) * 5)[:, None, None].expand(48, 48, 3)
    write_video(tmp_path / "media" / "feet.mp4", picture[None].repeat(9, 1, 1, 1), 8)
    write_image(tmp_path / "media" / "photo.png", picture)
    (tmp_path / "media" / "feet.txt").write_text("ein Hase über 雪", encoding="utf-8")
    common = ["--steps", "2", "--warmup", "1", "--log-every", "1", "--threads", "1", "--device", "cpu",
              "--precision", "fp32", "--log-samples", "--frames", "5", "--data", "media"]
    size = ["--prompt", "HERE", "--size", "1x16x32", "--size", "5x16x32", "--steps", "1", "--device", "cpu"]
    commands = [
        ["train-vae", *common, "--out", "HERE/vae", "--crop", "16", "--images", "2"],
        ["train", *common, "--out", "HERE/dit", "--vae", "HERE/vae", "--budget", "64", "--look-ahead", "3", "--short-side",
         "32", "--latent-cache", "HERE/cache"],
        ["generate", "HERE/dit", *size, "--out", "HERE/samples"],
        ["eval", "HERE/vae", "--data", "media", "--device", "cpu", "--out", "HERE/eval", "--files", "1"],
        ["bench", "latents", *ONE, "--out", "HERE/bench"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = process(COMMANDS, str(here), cwd=tmp_path, env=os.environ | plain)
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert codes == [f"exit {words[0]} 0" for words in commands], done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert f"wrote {here}" in done.stdout
    written = {str(path.relative_to(here)) for path in here.rglob("*")}
    assert {"vae/vae.safetensors", "dit/losses.csv", "samples/sample-00.png", "samples/sample-01.mp4", "eval/report.html",
            "bench/report.html"} <= written
    assert f"{here}" in (here / "eval" / "report.html").read_text(encoding="utf-8")


def test_what_setup_has_to_do_is_found_quickly():
    """A call that finds nothing to do takes no longer; PyTorch's compiler alone would take seconds to import."""
    code = ("import sys, time, torch\nfrom sora_fast.tuning import plan, walk\n"
            "plan.records.settled = plan._is_measured = lambda *_: True  # as after a whole setup\n"
            "start = time.process_time()\nfound = plan.make(walk.common('cuda:sm90', 'full'))\n"
            "assert not (found.validations or found.groups or found.kernels) and 'torch._dynamo' not in sys.modules\n"
            "print(time.process_time() - start)")
    done = process(code, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and float(done.stdout) < 5, done.stdout + done.stderr


def test_tasks_of_setup_in_other_processes():
    """What each gives, and an exception where one raises: the others go on."""
    few = [Task(0), Task(1), Task(2)]
    found = dict(workers.run(few, "cpu", 2, print))
    assert {task.number: str(each) for task, each in found.items()} == {0: "0", 1: "ZeroDivisionError: of task 1", 2: "2"}


def test_setup_in_a_script_that_guards_nothing(tmp_path):
    """Its processes do not run it again."""
    script = tmp_path / "script.py"
    script.write_text("import torch\nfrom sora_fast.tuning import workers\nprint('begins')\n"
                      "work = [workers.Validation('gate_residual', 'torch', torch.float32)] * 2\n"
                      "for _, found in workers.run(work, 'cpu', 2, print):\n"
                      "    print([row['passed'] for row in found])\n", "utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.stdout.split("\n") == ["begins", "[True, True]", "[True, True]", ""], done.stderr


class Task:
    def __init__(self, number):
        self.number = number

    def run(self, device):
        if self.number == 1:
            raise ZeroDivisionError("of task 1")
        return self.number
