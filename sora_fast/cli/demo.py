"""sora-fast demo."""

import shutil
from pathlib import Path

from ..files import claimed

DESCRIPTION = """\
The whole system on three real clips and twelve photos that come with two Python packages: trains
a small VAE and a small DiT, generates clips and images from captions, images and clips, and
writes OUT/report.html.
It measures the machine first, chooses the number of steps, and says how long it will take: about
six minutes on two CPU cores."""


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--out", default="out/demo", help="folder for the report and all beside it")
    add("--vae-steps", type=int, default=0, help="training steps of the VAE; 0: as --minutes allows")
    add("--dit-steps", type=int, default=0, help="training steps of the DiT; 0: as --minutes allows")
    add("--minutes", type=float, default=4.0,
        help="about how long to train: steps are chosen from this machine's measured speed, never fewer than what "
             "recognisable samples need; 0: the most")
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
