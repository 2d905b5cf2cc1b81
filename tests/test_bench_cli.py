"""sora-fast bench from the command line: rows, report, resume, compare, collect, exit codes."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from cli_checks import refused

from sora_fast.benchmarks import rows, suites
from sora_fast.cli.bench_collect import slug
from sora_fast.ops import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
ONE = ("--device", "cpu", "--quick", "--case", "kl_sample / VideoVAE", "--providers", "torch", "reference")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run: its folder."""
    from sora_fast.cli.__main__ import main

    out = tmp_path_factory.mktemp("run")
    with pytest.raises(SystemExit) as done:
        main(["bench", "latents", *ONE, "--out", str(out)])
    assert done.value.code == 0
    return out


def changed(source: Path, target: Path, change) -> Path:
    """A copy of a run's rows, each as ``change`` left it."""
    found = [json.loads(line) for line in source.read_text().splitlines()]
    for row in found:
        change(row)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in found))
    return target


def slower(factor, provider):
    def change(row):
        if row["row"] == "time" and row["provider"] == provider:
            for name in ("min_ms", "p20_ms", "median_ms", "q3_ms", "p80_ms"):
                row[name] *= factor
    return change


def test_a_run_writes_rows_and_a_report_and_goes_on(cli, run):
    found = [row for row in rows.read(run / "bench.jsonl") if row["row"] == "time"]
    assert {(row["provider"], row["direction"]) for row in found} == {
        (p, d) for p in ("torch", "reference") for d in ("forward", "backward")}
    assert {row["status"] for row in found} == {"PASSED"} and (run / "report.html").stat().st_size > 5000
    before = (run / "bench.jsonl").read_bytes()
    code, out, _ = cli("bench", "latents", *ONE, "--out", run)
    assert "ours: 4 PASSED\npeers: no rows\n" in out
    assert code == 0 and (run / "bench.jsonl").read_bytes() == before and "[1/1]" not in out


def test_compare_with_itself_and_with_a_slower_one(cli, run, tmp_path):
    base = run / "bench.jsonl"
    code, out, _ = cli("bench", "compare", run, base)  # a folder, or a file
    assert code == 0 and "SAME 4, UNDECIDED 0, FAST 0, SLOW 0" in out
    code, out, _ = cli("bench", "compare", base, changed(base, tmp_path / "slow.jsonl", slower(1.2, "torch")),
                       "--fail-slower", "5%")
    lines = [line for line in out.splitlines() if line.split()[-1:] == ["SLOW"]]
    assert code == 1 and len(lines) == 2 and all(" torch " in line for line in lines)
    code, out, _ = cli("bench", "compare", base, tmp_path / "slow.jsonl", "--fail-slower", "0.5")
    assert code == 0
    refused(cli("bench", "compare", base, base, "--fail-slower", "much"), "--fail-slower", "'much'")


@pytest.mark.parametrize("name, value", [("l2", "cold"), ("dtype", "float16"), ("device", "NVIDIA H200")])
def test_compare_refuses_other_conditions_by_name(cli, run, tmp_path, name, value):
    def change(row):
        if name == "device":
            row["environment"]["device"] = value
        elif row["row"] == "time" or name == "l2":
            row[name] = value

    other = changed(run / "bench.jsonl", tmp_path / "other.jsonl", change)
    refused(cli("bench", "compare", run / "bench.jsonl", other), value)


def test_report_of_two_gpus(cli, run, tmp_path):
    def on(gpu):
        return lambda row: row["environment"].update(device=gpu, kind="cuda")

    files = [changed(run / "bench.jsonl", tmp_path / name / "bench.jsonl", on(gpu))
             for name, gpu in (("a", "NVIDIA H100 PCIe"), ("b", "NVIDIA H200"))]
    code, out, _ = cli("bench", "report", *files, "--out", tmp_path / "both")
    text = (tmp_path / "both" / "report.html").read_text()
    assert code == 0 and "NVIDIA H100 PCIe" in text and "NVIDIA H200" in text
    (tmp_path / "empty.jsonl").write_text("")
    refused(cli("bench", "report", tmp_path / "empty.jsonl", "--out", tmp_path / "no"), "empty.jsonl")


def test_collect_keeps_one_gpus_rows_and_no_cpus(cli, run, tmp_path, monkeypatch):
    import sora_fast.benchmarks

    room = tmp_path / "benchmarks"
    monkeypatch.setattr(sora_fast.benchmarks, "__path__", [str(room), *sora_fast.benchmarks.__path__])
    refused(cli("bench", "collect", run), "one GPU")
    refused(cli("bench", "collect", tmp_path), "*.jsonl")
    gpu = lambda row: row["environment"].update(device="NVIDIA H200", kind="cuda")
    changed(run / "bench.jsonl", tmp_path / "gpu" / "bench.jsonl", gpu)
    code, out, _ = cli("bench", "collect", tmp_path / "gpu")
    kept = room / "results" / "nvidia-h200" / "bench.jsonl"
    assert code == 0 and kept.read_text() == (tmp_path / "gpu" / "bench.jsonl").read_text()
    (tmp_path / "gpu" / "bench.jsonl").write_text("{}\n")
    refused(cli("bench", "collect", tmp_path / "gpu"), "line 1")
    assert slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


def test_misuse_is_one_sentence(cli, tmp_path):
    refused(cli("bench", "atention", "--device", "cpu"), "atention", "families among")
    refused(cli("bench", "--case", "no such case", "--out", tmp_path), "no such case")
    refused(cli("bench", "--device", "cpu", "--l2", "cold", "--out", tmp_path), "cold")
    (tmp_path / "bench.jsonl").write_text("not json\n")
    refused(cli("bench", "latents", *ONE, "--out", tmp_path), "line 1")
    refused(cli("bench", "compare", tmp_path / "nothing.jsonl", tmp_path / "nothing.jsonl"), "nothing.jsonl")
    (tmp_path / "empty").mkdir()
    refused(cli("bench", "compare", tmp_path / "empty", tmp_path / "empty"), "bench.jsonl in the folder")


def test_a_failure_of_ours_fails_the_run(cli, tmp_path, monkeypatch):
    from sora_fast.ops import latents

    right = latents.KL_SAMPLE.backends["torch"].run
    wrong = lambda **arguments: (right(**arguments)[0] * 1.001, right(**arguments)[1])
    object.__setattr__(latents.KL_SAMPLE.backends["torch"], "run", wrong)
    try:
        code, out, _ = cli("bench", "latents", *ONE, "--out", tmp_path)
    finally:
        object.__setattr__(latents.KL_SAMPLE.backends["torch"], "run", right)
    assert code == 1 and "bench: kl_sample" in out and "FAILED" in out
    failed = [row for row in rows.read(tmp_path / "bench.jsonl") if row["row"] == "time" and row["provider"] == "torch"]
    assert all(row["status"] == "FAILED" and row["median_ms"] is None for row in failed) and len(failed) == 2


def test_a_function_of_the_users_is_measured_beside_ours(cli, tmp_path, monkeypatch):
    (tmp_path / "users_kernels.py").write_text("""
from sora_fast import ops

def fine(moments, noise):
    return ops.kl_sample(moments, noise, backend="reference")

def one_off(moments, noise):
    z, kl = fine(moments, noise)
    z = z.clone()
    z.view(-1)[-1] += 0.01
    return z, kl
""")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ("bench", "--device", "cpu", "--quick", "--op", "kl_sample", "--case", "VideoVAE", "--providers", "torch")
    for name, want, status in (("fine", 0, "PASSED"), ("one_off", 1, "FAILED")):
        code, out, _ = cli(*flags, "--impl", f"users_kernels:{name}", "--out", tmp_path / name)
        found = {(row["provider"], row["direction"]): row for row in rows.read(tmp_path / name / "bench.jsonl")
                 if row["row"] == "time"}
        assert code == want and {key[0] for key in found} == {"torch", name}, out
        mine = found[name, "forward"]
        assert mine["status"] == status and (mine["median_ms"] is None) == (status == "FAILED")
    refused(cli(*flags[:4], "--impl", "users_kernels:fine"), "--op beside --impl")
    refused(cli(*flags, "--impl", "users_kernels:nothing"), "'nothing'")


def test_every_suite_has_every_family_and_every_case_a_name_of_its_own():
    for suite in ("quick", "full"):
        found = suites.work((), suite)
        assert set(FAMILIES) <= {family for family, _, _ in found}
        assert len({case.id for _, case, _ in found}) == len(found)
        for _, _, providers in found:
            assert len({p.name for p in providers}) == len(providers)
    assert {family for family, _, _ in suites.work((), "model")} == {"model"}
    on_cpu = {p.name for _, _, ps in suites.work(("convolution",), "quick", "cpu") for p in ps}
    assert {"onednn", "onednn_ncdhw"} <= on_cpu and not any("cudnn" in name for name in on_cpu)
    spared = [p for _, case, ps in suites.work((), "quick", spare_compiling=True) for p in ps
              if getattr(p, "compiled", False) and not p.unavailable(case, "forward", torch.device("cpu"))]
    assert len(spared) == 2


def test_gpu_run_refuses_what_it_does_not_know(tmp_path):
    script = str(ROOT / "benchmarks" / "gpu_run.sh")
    for arguments in (["--no-such-flag"], ["no-such-step", "--out", str(tmp_path / "out")], ["build", "--minutes"],
                      ["build", "--minutes", "eight"], ["build", "--peers", str(tmp_path / "nowhere")]):
        done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and "expected" in done.stderr and "gpu_run.sh" in done.stderr
    assert not (tmp_path / "out").exists() or not (tmp_path / "out" / "steps.log").read_text()
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--peers" in done.stdout


def test_gpu_run_goes_on_with_what_was_not_done(tmp_path):
    """With a Python that does nothing but fail as it is told: a build that failed makes what came after it void."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nfor part in $(cat {tmp_path}/fails); do case "$*" in *$part*) exit 1;; esac; done\n')
    python.chmod(0o755)
    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\necho ERROR SUMMARY: 0 errors\n")
    (tmp_path / "compute-sanitizer").chmod(0o755)
    places = dict(PYTHON=str(python), PATH=f"{tmp_path}:{os.environ['PATH']}")

    def run(fails):
        (tmp_path / "fails").write_text(fails)
        done = subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu_run.sh"), "--out", str(tmp_path / "out")],
                              capture_output=True, text=True, env=os.environ | places)
        return done.returncode, re.findall(r"^=== (\w+)$", done.stdout, re.M)

    steps = ["build", "chip", "primitives", "validate", "bench", "tune", "model", "parity", "sanitize", "report"]
    assert run("install parity report") == (1, steps)
    assert run("parity report") == (1, steps)
    assert run("report") == (1, ["build", "parity", "report"])
    assert run("report") == (1, ["build", "report"])
