"""sora-fast demo."""

import shutil
from pathlib import Path

from ..files import claimed

DESCRIPTION = """\
The whole system on three real clips and twelve photos that come with two Python packages: trains
the tiny VAE and the tiny DiT, generates clips and images from captions, images and clips, and
writes OUT/report.html.
About six and a half minutes on two CPU cores."""


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--out", default="out/demo", help="folder for the report and all beside it")
    add("--vae-steps", type=int, default=500, help="training steps of the VAE")
    add("--dit-steps", type=int, default=1000, help="training steps of the DiT")
    add("--minutes", type=float, default=8.0, help="on a slow machine, shorten both trainings to end about then; 0: never")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--threads", type=int, default=0, help="CPU threads; 0: whichever is faster, one or all")
    add("--seed", type=int, default=0, help="seed of everything")


def run(arguments) -> int:
    from .demo_stages import demo

    out = Path(arguments.out)
    with claimed(out):
        for name in ("vae", "dit"):  # a demo starts from nothing; longer work has train --resume
            with claimed(out / name):  # unless somebody trains in it
                shutil.rmtree(out / name, ignore_errors=True)
        return demo(arguments, out)
