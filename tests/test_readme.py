"""README.md's own lines are run."""

import re
from pathlib import Path

import pytest

import sora_fast

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_the_three_uses_run(capsys):
    pytest.importorskip("diffusers")
    dropped_in, written = blocks("python")
    names: dict = {}
    exec(compile(dropped_in, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count("modules replaced") == 2 and type(names["vae"]).__name__ == "AutoencoderKLWan"
    assert sora_fast.restore(names["transformer"]) == 4
    exec(compile(written, "README.md", "exec"), names)
    assert [tuple(latent.shape) for latent in names["latents"]] == [(16, 5, 12, 20), (16, 1, 16, 16)]
    assert names["dit"].x_embedder.proj.weight.grad is not None and names["y"].shape == (names["pack"].num_tokens, 64)
    assert capsys.readouterr().out.count("torch.Size") == 5


def test_it_is_short():
    prose = re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", README, flags=re.S)
    assert len(README.splitlines()) <= 150 and len(prose.split()) <= 1100


def test_commands_named_in_the_text_exist():
    from sora_fast.cli.__main__ import parser

    known = set(next(a for a in parser()._actions if a.choices).choices)
    named = set(re.findall(r"sora-fast ([a-z][a-z-]+)", README))
    assert named and named <= known
    assert "sora-fast nothing" not in README and {"demo", "validate", "train"} <= named


def test_tables_and_figure_are_those_of_the_committed_results(tmp_path):
    from sora_fast.benchmarks import limits, pages

    root = Path(__file__).parents[1]
    for page in pages.pages(root):
        pages.update(page, check=True)
    limits.update(root / limits.FIGURE, check=True)
    (tmp_path / "limits.svg").write_text((root / limits.FIGURE).read_text().replace("forward", "sideways"))
    with pytest.raises(ValueError, match="run sora-fast bench readme"):
        limits.update(tmp_path / "limits.svg", check=True)


def test_pictures_are_there_and_small():
    shown = re.findall(r"!\[.+?\]\((docs/images/[\w.]+)\)", README)
    assert len(shown) == 2 and "Blender Foundation" in README
    for path in shown:
        assert (Path(__file__).parents[1] / path).stat().st_size < 200_000
