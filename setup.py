"""What pyproject.toml cannot say: where the packages lie.

The rooms kernels/ and benchmarks/ stand at the top of the repository and are installed as sora_fast.kernels
and sora_fast.benchmarks. They hold no __init__.py there, because with the repository's root on sys.path a
regular package would shadow other people's `kernels`; in a checkout sora_fast/<room>/__init__.py are shims
that point at these folders.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
ROOMS = ("kernels", "benchmarks")


def plain_packages() -> list[str]:
    """Packages that lie where their names say; the rooms' shims serve the checkout only."""
    shims = [f"sora_fast.{room}" for room in ROOMS]
    return find_packages(str(ROOT), include=["sora_fast", "sora_fast.*"], exclude=shims)


def room_packages(room: str) -> list[str]:
    """sora_fast.<room>, and a sub-package for each folder below it that holds .py files."""
    folders = {Path(room)} | {path.parent.relative_to(ROOT) for path in (ROOT / room).rglob("*.py")}
    return sorted(".".join(("sora_fast", *folder.parts)) for folder in folders)


setup(
    license="Apache-2.0",
    packages=plain_packages() + [package for room in ROOMS for package in room_packages(room)],
    package_dir={f"sora_fast.{room}": room for room in ROOMS},
)
