"""What pyproject.toml cannot express: where the packages are, and how sora_fast._C is built (csrc/README.md).

kernels/ and benchmarks/ are at the top of the repository and are installed as sora_fast.<room>. They have no __init__.py
there, because with the repository's root on sys.path a regular package would shadow third-party packages named `kernels`; in
a checkout sora_fast/<room>/__init__.py are shims that point at these folders.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ROOMS = ("kernels", "benchmarks")

# Per family: the target of its kernels, and the other families whose kernels its backends launch.
KERNELS = {
    "normalization": ("any", ()),
    "wgmma_selftest": ("hopper", ()),
    "convolution": ("hopper", ("normalization",)),
}
HOST = [f"{name}.cpp" for name in ("bindings", "emulated", "host", "runtime", "tensor_map")]
PYTHON = sysconfig.get_paths()["include"]
LEAST = (12, 5)  # of nvcc: the first with cudaGetDriverEntryPointByVersion
FLAGS = "-std=c++17 -O3 -lineinfo -Xptxas=-v -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas".split()


def room_packages(room: str) -> list[str]:
    """sora_fast.<room>, and a sub-package for each folder below it that holds .py files."""
    folders = {Path(room)} | {path.parent.relative_to(ROOT) for path in (ROOT / room).rglob("*.py")}
    return sorted(".".join(("sora_fast", *folder.parts)) for folder in folders)


def find_nvcc() -> tuple[str | None, str]:  # and its version
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    said = dict(capture_output=True, encoding="utf-8", errors="replace")
    version = re.search(r"V(\d+\.\d+\.\d+)", subprocess.run([found, "--version"], **said).stdout if found else "")
    return (found, version[1]) if version else (None, "")


def skipped() -> str | None:
    """Why the extension is not built, or None."""
    asked = os.environ.get("SORA_FAST_BUILD_CUDA", "auto")
    needed = {"g++": shutil.which("g++"), "Python.h": Path(PYTHON, "Python.h").exists(),
              **{f"the package {name}": find_spec(name) for name in ("ninja", "pybind11")}}
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"SORA_FAST_BUILD_CUDA: expected 0, 1 or auto, got {asked!r}; set one of them")
    if asked == "0":
        return "SORA_FAST_BUILD_CUDA was 0"
    if not NVCC or tuple(map(int, VERSION.split("."))) < LEAST:
        found = f"nvcc was {VERSION}" if NVCC else "there was no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda"
        reason = f"{found}, and {LEAST[0]}.{LEAST[1]} or newer is needed"
    elif not all(needed.values()):
        reason = f"{' and '.join(name for name, there in needed.items() if not there)} could not be found"
    else:
        return None
    if asked == "1":
        raise SystemExit(f"SORA_FAST_BUILD_CUDA=1: expected to build csrc/, but {reason}; fix that, or set it to 0")
    return reason


def architectures(kind: str) -> list[str]:
    asked = os.environ.get("SORA_FAST_CUDA_ARCHS", "80;90")
    if not re.fullmatch(r"(8|9|1\d)\da?( *[;, ] *(8|9|1\d)\da?)*", asked):
        raise SystemExit(f'SORA_FAST_CUDA_ARCHS: expected numbers from 80 on, as in "80;90", got {asked!r}; fix it')
    numbers = sorted({int(each) for each in re.findall(r"\d+", asked)})
    ends = sorted({numbers[0], numbers[-1]})  # with PTX too: for the emulator, and for newer GPUs
    return ["sm_90a", "compute_90a"] if kind == "hopper" else [f"sm_{n}" for n in numbers] + [f"compute_{n}" for n in ends]


def kernel_hash(family: str) -> str:
    """A hash of a family's sources and their includes, without comments and whitespace, and of nvcc's minor version."""
    texts, waiting = {}, [f"{each}.cu" for each in (family, *KERNELS[family][1])]
    while waiting:
        path = ROOT / "csrc" / waiting.pop()
        if path.name not in texts and path.exists():  # simt.h is the tests'
            text = path.read_text(encoding="utf-8")
            waiting += re.findall(r'#include "(.+)"', text)
            texts[path.name] = "".join(re.sub(r"//.*", "", text).split())
    told = [VERSION.rpartition(".")[0], sorted(texts.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def build() -> Path:
    """Build incrementally in build/cuda, from scratch with another nvcc; the report of ptxas is kept beside each object."""
    import pybind11

    folder = ROOT / "build" / "cuda"
    # pip's build environments have a new path each time: a symlink keeps ninja's commands unchanged
    headers = folder / f"pybind11-{pybind11.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    headers.unlink(missing_ok=True)
    headers.symlink_to(pybind11.get_include())
    lines = ["rule compile", "  depfile = $out.d", "  deps = gcc",
             f"  command = {shlex.quote(NVCC)} {' '.join(FLAGS)} -isystem {headers.name} -isystem {shlex.quote(PYTHON)} "
             f"-DSF_NVCC={VERSION} $gpus -MMD -MF $out.d -c $in -o $out > $log 2>&1 || {{ cat $log; exit 1; }}",
             "rule link", f"  command = {shlex.quote(NVCC)} -shared -cudart static $in -o $out"]
    gpus = {f"{name}.cu": architectures(kind) for name, (kind, _) in KERNELS.items()}
    stems = {source: source.partition(".")[0] for source in (*HOST, *gpus)}
    for source, stem in stems.items():
        flags = [f"-gencode=arch=compute_{each.partition('_')[2]},code={each}" for each in gpus.get(source, ())]
        lines += [f"build {stem}.o: compile ../../csrc/{source}", f"  gpus = {' '.join(flags)}", f"  log = {stem}.log"]
    lines.append(f"build _C.so: link {' '.join(f'{stem}.o' for stem in stems.values())}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if subprocess.run([sys.executable, "-m", "ninja", "-C", folder]).returncode:
        raise SystemExit("csrc/: expected nvcc to compile it, got the messages above; SORA_FAST_BUILD_CUDA=0 does without")
    return folder / "_C.so"


class BuildExtension(build_ext):
    def build_extension(self, extension: Extension) -> None:
        self.mkpath(str(Path(self.get_ext_fullpath(extension.name)).parent))
        shutil.copy(build(), self.get_ext_fullpath(extension.name))


class BuildPackages(build_py):
    def run(self) -> None:
        super().run()
        if not SKIPPED:
            build()  # before _build_info.json says so
        info = {"skipped": SKIPPED} if SKIPPED else {
            "nvcc": VERSION, "flags": FLAGS, "architectures": {name: architectures(KERNELS[name][0]) for name in KERNELS},
            "kernels": {name: kernel_hash(name) for name in KERNELS}}
        package = ROOT / "sora_fast" if self.editable_mode else Path(self.build_lib, "sora_fast")
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


NVCC, VERSION = find_nvcc()
SKIPPED = skipped()
setup(
    license="Apache-2.0",
    packages=find_packages(str(ROOT), include=["sora_fast", "sora_fast.*"], exclude=[f"sora_fast.{room}" for room in ROOMS])
    + [package for room in ROOMS for package in room_packages(room)],
    package_dir={f"sora_fast.{room}": room for room in ROOMS},
    ext_modules=[] if SKIPPED else [Extension("sora_fast._C", [])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackages},
)
