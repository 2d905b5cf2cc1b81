"""What every wrong command line must look like, and the settings that a right one gives."""

from sora_fast.cli.__main__ import parser
from sora_fast.cli.options import read_options
from sora_fast.training.config import VAETraining


def refused(result, *parts):
    """One sentence on stderr and exit code 2."""
    code, _, wrong = result
    assert code == 2 and wrong.startswith("sora-fast: ") and wrong.count("\n") == 1 and "Traceback" not in wrong, wrong
    for part in parts:
        assert part in wrong, wrong


def options(config, *argv):
    """What ``argv`` makes of the settings of train-vae or train."""
    return read_options(parser().parse_args(["train-vae" if config is VAETraining else "train", *map(str, argv)]), config)
