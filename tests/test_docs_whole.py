"""docs/: every page's code runs, and the pages build without a warning."""

import subprocess
import sys

import pytest
from test_docs import MODULES, PAGES, ROOT, blocks, run_examples

pytestmark = [pytest.mark.full, pytest.mark.ci]


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_runs(page):
    """The blocks of a page in order, as a reader would paste them."""
    names = {}
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize("module", sorted({*MODULES} - {"ops", "nn"}))
def test_examples_of_docstrings_run(module):
    pytest.importorskip("diffusers")
    objectives = {"FlowMatching", "DDPM", "LearnedVariance", "training_loss"} if module == "diffusion" else set()
    assert objectives <= run_examples(module)


def test_pages_build_without_a_warning(tmp_path):
    built = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(tmp_path)], cwd=ROOT,
                           capture_output=True, encoding="utf-8")
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "reference/ops.html").read_text(encoding="utf-8").count("causal_conv3d") > 1
