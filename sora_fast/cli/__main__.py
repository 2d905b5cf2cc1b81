"""sora-fast: its commands, and what one that fails says and leaves as exit code."""

import argparse
import codecs
import difflib
import dis
import importlib
import io
import os
import re
import sys
from collections.abc import Container
from pathlib import Path

from .. import __version__
from ..files import FULL
from .overview import first_screen, overview
from .parsing import Parser

# What --help says of each. A command is a module of this room ("bench compare" the module bench_compare) with
# add_arguments(parser), run(arguments), which returns the exit code, and a DESCRIPTION where one line is not enough. It
# imports torch when it runs and not before: --help and a wrong flag are answered at once.
COMMANDS = {
    "demo": "train a VAE and a DiT on real clips and photos, generate, and write a report",
    "train-vae": "train a VideoVAE on a folder of clips and images",
    "train": "train a text-conditioned DiT on packs of clips and images of any size",
    "generate": "generate clips and images of any sizes from captions, images and clips",
    "eval": "judge a trained VAE or DiT: reconstruction, loss over timesteps, samples, a report",
    "setup": "make auto take the fastest here: judge kernels and time backends on this GPU, in minutes",
    "info": "what is installed, and which backend runs what",
    "explain": "which backend each op takes on a device, and why",
    "validate": "check ops, or a function of yours, against the reference in float64",
    "bench": "measure every op beside every peer that is installed: gate, then time",
    "predict": "what the kernels would take on a GPU, from their machine code; no GPU is needed",
    "tune": "find the fastest launches of the Triton kernels on this GPU, and keep them",
    "bench compare": "SAME, FAST, SLOW or UNDECIDED for every row of two runs",
    "bench report": "report.html, report.md and report.csv of one run, or of several side by side",
    "bench collect": "keep a GPU run's result files in benchmarks/results/<gpu>/",
    "bench readme": "write README.md's tables of evidence and of measured results from the committed files",
}


def parser(named: Container[str] = COMMANDS) -> Parser:
    """The whole command line; a command that is not ``named`` has no flags yet."""
    top = Parser(prog="sora-fast", usage="sora-fast COMMAND [--help] ...", description=overview(COMMANDS),
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"sora_fast {__version__}")
    commands = top.add_subparsers(prog="sora-fast", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for name, help in COMMANDS.items():
        sub = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in named:
            module = importlib.import_module(f".{re.sub('[ -]', '_', name)}", __package__)
            sub.description = getattr(module, "DESCRIPTION", help)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return top


def join_words(argv: list[str]) -> list[str]:
    """``bench compare a b`` names the command "bench compare"; argparse takes one word for a command.

    What is near one of these is joined too, so that it is reported as a command and not as a family.
    """
    second = [name.removeprefix("bench ") for name in COMMANDS if " " in name]
    two = argv[:1] == ["bench"] and argv[1:2] and difflib.get_close_matches(argv[1], second, 1, 0.75)
    return [" ".join(argv[:2]), *argv[2:]] if two else argv


def is_sentence(error: BaseException) -> bool:
    """Whether ``error`` is a sentence made for people: from a raise statement of ours, not from a slip of the code."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    from .. import benchmarks, kernels  # in a checkout their files lie outside the package

    ours = any(Path(code.co_filename).is_relative_to(room)
               for room in (Path(__file__).parents[1], *benchmarks.__path__, *kernels.__path__))
    return ours and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit: 0, 1 for a failed validation, 2 with one sentence for what is wrong, 130 for Ctrl-C."""
    _print_anything()
    words = join_words(sys.argv[1:] if argv is None else argv)
    if not words:
        print(first_screen())
        sys.exit(0)
    arguments = parser(words).parse_args(words)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output has gone, as in: sora-fast info | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError, FloatingPointError) as error:
        # A missing package or file is no bug of ours; everything else that no raise statement of ours made keeps its
        # traceback.
        foreign = isinstance(error, OSError) or (
            isinstance(error, ImportError) and (error.name or "").partition(".")[0] != "sora_fast")
        if not foreign and not is_sentence(error):
            raise
        print(f"sora-fast: {_told(error)}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _print_anything() -> None:
    """Captions and file names hold letters, and bytes, that the encoding of the output may lack: no reason to stop.

    Names go out with the bytes that they came with, other letters escaped.
    """
    codecs.register_error("sora_fast.shown", _shown)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="sora_fast.shown")


def _shown(error: UnicodeError):
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def _told(error: BaseException) -> str:
    """An error's own words; what to do besides where they do not say it."""
    if isinstance(error, ModuleNotFoundError) and not is_sentence(error):
        return f"{error}; run pip install 'sora_fast[train]'"
    if isinstance(error, OSError) and error.errno in FULL:
        return (f"expected room for {error.filename or 'what is written'}, got {error.strerror!r}; free some, or write to "
                f"another disk")
    return str(error)


if __name__ == "__main__":
    main()
