"""README.md's own lines are run."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import sora_fast
from sora_fast.testing import cases

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_ten_lines_of_use_run(capsys):
    code, _ = blocks("python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert [tuple(latent.shape) for latent in names["latents"]] == [(16, 5, 12, 20), (16, 1, 16, 16)]
    assert [tuple(v.shape) for v in names["velocity"]] == [(16, 5, 12, 20), (16, 1, 16, 16)]
    assert names["y"].shape == (10, 64)
    printed = capsys.readouterr().out
    assert printed.count("torch.Size") == 5 and "norm_modulate" in printed


def test_somebody_else_s_model_runs(capsys):
    pytest.importorskip("diffusers")
    from sora_fast.integrations.comparison import open_model

    pipe = SimpleNamespace(vae=open_model("AutoencoderKLWan"), transformer=open_model("WanTransformer3DModel"))
    kinds = [type(pipe.vae), type(pipe.transformer)]
    exec(compile(blocks("python")[1], "README.md", "exec"), dict(sora_fast=sora_fast, pipe=pipe))
    assert "modules swapped" in capsys.readouterr().out and type(pipe.vae) is kinds[0]
    assert type(pipe.transformer) is kinds[1]  # nothing of that class itself is swapped
    assert sora_fast.restore(pipe.transformer) > 4


def test_a_race_of_a_users_kernel_is_reported_as_printed(cli, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    (code,) = blocks("py")
    (shown,) = [block for block in blocks("text") if "emulated:sm90" in block]
    command, *lines = shown.splitlines()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sora_fast.testing.validation.cases", lambda *call: list(cases(*call))[:1])
    for written, expected in ((code, 1), (code.replace(" // 2", "").replace("(2 * len(x),)", "(len(x),)"), 0)):
        Path("my_kernels.py").write_text(written, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "my_kernels", raising=False)
        importlib.invalidate_caches()
        _, out, _ = cli(*command.split()[2:])
        assert all(line in out.splitlines() for line in lines) == bool(expected)
        assert ("forward     2.29e-02" in out and " ok" in out) != bool(expected)


def test_every_public_op_is_in_the_table():
    from sora_fast import ops

    table = README[README.index("## Ops, backends") : README.index("### Reading")]
    rows = table.replace("`_backward`", "`varlen_attention_backward`")
    missing = [name for name in ops.__all__ if f"`{name}`" not in rows]
    assert not missing


def test_commands_named_in_the_text_exist():
    from sora_fast.cli.__main__ import parser

    known = set(next(a for a in parser()._actions if a.choices).choices)
    named = set(re.findall(r"sora-fast ([a-z][a-z-]+)", README))
    assert named and named <= known
    assert "sora-fast nothing" not in README and {"demo", "validate", "train"} <= named


def test_measured_tables_are_those_of_the_committed_results():
    from sora_fast.benchmarks.tables import update_readme

    update_readme(Path(__file__).parents[1] / "README.md", check=True)
