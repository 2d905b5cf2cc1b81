"""Tests with other versions of PyTorch, each with the Triton that it pins, in environments that are thrown away:

    python tests/other_torches.py 2.11.0 2.14.1 2.15.0

What came of each is a line of tests/other_torches.md. An environment is a copy of the last commit with ``.[test]``; pip's
own settings say where wheels come from (PIP_INDEX_URL=https://download.pytorch.org/whl/cpu for builds without CUDA, which
are a tenth of the size; PIP_EXTRA_INDEX_URL then names the one for all other packages).
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "other_torches.md"
HEAD = """# Tests with other versions of PyTorch

Made by `python tests/other_torches.py VERSION...`, which runs {tests}.

| torch | Triton | Python | commit | passed | failed | skipped | minutes | failures |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
# What PyTorch changes from version to version: graphs, switches, attention's entry points, streams, host code for CUDA.
TESTS = ("test_precision.py", "test_attention.py", "test_convolution.py", "test_vae_stream.py", "test_pack.py",
         "test_op_graphs.py", "test_emulated.py", "test_emulated_core.py", "test_fake_device.py")
VERSIONS = "import sys, torch, triton; print(torch.__version__, triton.__version__, sys.version.split()[0])"


def call(*words: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=os.environ | environment, capture_output=True,
                          text=True)
    if done.returncode:
        raise RuntimeError(f"expected {' '.join(map(str, words))} to end well, got:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def install(version: str, folder: Path) -> Path:
    """The Python of an environment in ``folder`` with this PyTorch and a copy of the last commit beside it."""
    copy, python = folder / "copy", folder / "env" / "bin" / "python"
    copy.mkdir()
    call("git", "archive", "-o", folder / "copy.tar", "HEAD", cwd=HERE.parent)
    call("tar", "-xf", folder / "copy.tar", cwd=copy)
    bounds = [line for line in (copy / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("torch==")]
    (folder / "bounds.txt").write_text("\n".join([*bounds, f"torch=={version}", ""]), "utf-8")
    call(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    call(python, "-m", "pip", "install", "--quiet", "-c", folder / "bounds.txt", f"torch=={version}", "-e", ".[test]",
         cwd=copy, SORA_FAST_BUILD_CUDA="0")
    return python


def outcome(python: Path, copy: Path, tests=TESTS) -> str:
    """The line of the table that ``tests`` of ``copy`` give under ``python``."""
    versions, began, report = call(python, "-c", VERSIONS, cwd=copy).split(), time.monotonic(), copy / "report.xml"
    subprocess.run([str(python), "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", f"--junitxml={report}",
                    *(f"tests/{name}" for name in tests)], cwd=copy)
    cases = list(ElementTree.parse(report).iter("testcase"))
    of = lambda *kinds: [case for case in cases if any(case.find(kind) is not None for kind in kinds)]
    failed, skipped = of("failure", "error"), of("skipped")
    names = ", ".join(f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}" for case in failed)
    commit = call("git", "rev-parse", "--short", "HEAD", cwd=HERE.parent).strip()
    counts = (len(cases) - len(failed) - len(skipped), len(failed), len(skipped), round((time.monotonic() - began) / 60))
    return f"| {' | '.join([*versions, commit, *map(str, counts), names or '-'])} |\n"


def main(versions: list[str]) -> None:
    if not versions:
        raise SystemExit("other_torches.py: expected versions of torch, got none; name some, as in 2.11.0 2.14.1")
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            line = outcome(install(version, Path(folder)), Path(folder) / "copy")
        lines = FILE.read_text("utf-8") if FILE.exists() else HEAD.format(tests=", ".join(TESTS))
        FILE.write_text(lines + line, "utf-8")
        print(line, end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
