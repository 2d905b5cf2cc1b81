"""The install matrix: editable, plain, and the sdist's wheel, each used from the root and from elsewhere; with the CUDA
extension, without it, and where there is no nvcc.

Everything happens in a copy of the checkout, so that no build/ or egg-info is left in it. The fresh
environments see the packages of the current one (torch is too large to install three times) through a folder
of links that leaves out any sora_fast installed there.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    "pyproject.toml setup.py MANIFEST.in README.md LICENSE CONTRIBUTING.md constraints.txt .ci "
    "csrc docs kernels benchmarks sora_fast tests"
).split()
SHIMS = {"sora_fast/kernels/__init__.py", "sora_fast/benchmarks/__init__.py"}


def run(*command, cwd: Path, stderr: int = subprocess.PIPE, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=170)
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A clean copy of what is shipped, without what earlier builds may have left."""
    copy = tmp_path_factory.mktemp("checkout") / "sora"
    copy.mkdir()
    built = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=built)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory) -> Path:
    """Links to every package of this environment but sora_fast itself."""
    links = tmp_path_factory.mktemp("neighbours") / "site-packages"
    links.mkdir()
    folders = [Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    for folder in folders:
        for package in folder.iterdir():
            link = links / package.name
            if "sora_fast" not in package.name and package.suffix != ".pth" and not link.is_symlink():
                link.symlink_to(package)
    assert (links / "torch").exists(), "torch is not in a site-packages folder of sys.path"
    return links


class Environment:
    def __init__(self, folder: Path, neighbours: Path):
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.python = folder / "bin" / "python"
        self.script = folder / "bin" / "sora-fast"
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.packages = Path(run(self.python, "-c", code, cwd=folder).strip())
        (self.packages / "neighbours.pth").write_text(f"{neighbours}\n")

    def pip(self, verb: str, *what, cwd: Path, **variables: str) -> str:
        """pip is a neighbour too; without dependencies and isolation nothing is fetched. Returns all that was said."""
        alone = ("--verbose", "--no-deps", "--no-build-isolation", "--no-index")
        return run(self.python, "-m", "pip", verb, *alone, *what, cwd=cwd, stderr=subprocess.STDOUT, **variables)

    def extension(self, cwd: Path) -> str:
        """What `sora-fast info` says of the CUDA extension."""
        (line,) = [line for line in run(self.script, "info", cwd=cwd).splitlines() if line.startswith("CUDA extension:")]
        return line


# Where the copy in use, its mapped rooms, and a spawned worker's copy lie.
WHERE = """
import json, multiprocessing, os, sora_fast, sora_fast.kernels, sora_fast.benchmarks
rooms = [os.path.realpath(room.__path__[0]) for room in (sora_fast.kernels, sora_fast.benchmarks)]
with multiprocessing.get_context("spawn").Pool(1) as pool:
    worker = pool.apply(eval, ("__import__('sora_fast').__file__",))
print(json.dumps([os.path.realpath(sora_fast.__file__), *rooms, os.path.realpath(worker)]))
"""


def files(checkout: Path, *folders: str) -> set[str]:
    """What the sources hold, without what an install wrote beside them."""
    paths = [path for folder in folders for path in (checkout / folder).rglob("*")]
    return {p.relative_to(checkout).as_posix() for p in paths
            if p.is_file() and p.suffix not in (".pyc", ".so") and p.name != "_build_info.json"}


def places(folder: Path, *, installed: bool) -> list[str]:
    package = folder.resolve() / "sora_fast"
    rooms = package if installed else folder.resolve()
    file = str(package / "__init__.py")
    return [file, str(rooms / "kernels"), str(rooms / "benchmarks"), file]


def check(environment: Environment, checkout: Path, elsewhere: Path, editable: bool) -> None:
    """In the checkout's root Python uses the checkout; elsewhere, and from the script, what was installed."""
    in_root = places(checkout, installed=False)
    installed = in_root if editable else places(environment.packages, installed=True)
    file = checkout / "tests" / "test_packaging.py"
    quick = ("pytest", "-q", "-p", "no:cacheprovider", file, "-k", "shadow")
    for folder, expected in ((checkout, in_root), (elsewhere, installed)):
        assert json.loads(run(environment.python, "-c", WHERE, cwd=folder)) == expected
        info = run(environment.python, "-m", "sora_fast.cli", "info", cwd=folder)
        assert str(Path(expected[0]).parent) in info
        assert str(Path(installed[0]).parent) in run(environment.script, "info", cwd=folder)
        assert "1 passed" in run(environment.python, "-m", *quick, cwd=folder)


def test_editable(checkout, neighbours, tmp_path):
    environment = Environment(tmp_path / "venv", neighbours)
    said = environment.pip("install", "-e", ".", cwd=checkout)
    check(environment, checkout, tmp_path, editable=True)
    if not shutil.which("nvcc"):
        assert "was not built: there was no nvcc" in environment.extension(tmp_path)
        return
    assert "[7/7]" in said and "built by nvcc" in environment.extension(tmp_path)
    run(environment.python, "-c", "import sora_fast._C", cwd=tmp_path)

    said = environment.pip("install", "-e", ".", cwd=checkout)
    assert "ninja: no work to do." in said and "[1/" not in said
    with open(checkout / "csrc" / "host.cpp", "a") as file:
        file.write("// more\n")
    assert "[2/2]" in environment.pip("install", "-e", ".", cwd=checkout)  # one object, and the link

    environment.pip("install", "-e", ".", cwd=checkout, SORA_FAST_BUILD_CUDA="0")
    assert "was not built: SORA_FAST_BUILD_CUDA was 0" in environment.extension(tmp_path)


def test_plain(checkout, neighbours, tmp_path):
    environment = Environment(tmp_path / "venv", neighbours)
    environment.pip("install", ".", cwd=checkout, CUDA_HOME=str(tmp_path))
    assert "was not built: there was no nvcc" in environment.extension(tmp_path)
    check(environment, checkout, tmp_path, editable=False)


def test_wheel_from_sdist(checkout, neighbours, tmp_path):
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", tmp_path, ".", cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    environment = Environment(tmp_path / "venv", neighbours)
    environment.pip("wheel", "--wheel-dir", tmp_path, sdist, cwd=tmp_path, SORA_FAST_BUILD_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")

    with tarfile.open(sdist) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    code = files(checkout, "sora_fast", "kernels", "benchmarks")
    ours = code | files(checkout, "csrc", "tests") | {"constraints.txt", "LICENSE"}
    assert ours <= carried, f"not in the sdist: {sorted(ours - carried)}"

    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    mapped = {name if name.startswith("sora_fast/") else f"sora_fast/{name}" for name in code - SHIMS}
    mapped.add("sora_fast/_build_info.json")
    needed = {name for name in mapped if name.endswith((".py", ".jsonl", ".json", "py.typed"))}
    assert needed <= held, f"not in the wheel: {sorted(needed - held)}"
    assert held <= mapped, f"not to be in the wheel: {sorted(held - mapped)}"

    environment.pip("install", wheel, cwd=tmp_path)
    check(environment, checkout, tmp_path, editable=False)
