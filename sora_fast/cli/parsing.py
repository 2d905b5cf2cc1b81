"""A parser that takes flags and commands by their whole names, and says which one was probably meant; what flags share."""

import argparse
import difflib
import re
from collections.abc import Iterable

DTYPES = ("float64", "float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations: a flag that comes later must not change what a shorter one meant."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def add_argument(self, *names, **settings):
        """The help ends with the default, unless it says so itself."""
        if settings.get("default") not in (None, argparse.SUPPRESS) and "(default" not in settings["help"]:
            settings["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **settings)

    def parse_known_args(self, args=None, namespace=None):
        self._check_names(list(args or ()))
        return super().parse_known_args(args, namespace)

    def _check_names(self, words: list[str]) -> None:
        """Unknown names are reported first: without their values the rest may look like another mistake."""
        commands = self._subparsers._group_actions[0].choices if self._subparsers else None
        for word in words:
            if word == "--":
                return
            flag = word.partition("=")[0]
            if re.match(r"--?[A-Za-z]", word) and " " not in word:  # with a space it is a value, to argparse too
                if flag not in self._option_string_actions:
                    self._refuse("flag", flag, [name for name in self._option_string_actions if name.startswith("--")])
            elif commands is not None:
                if word not in commands:
                    self._refuse("command", word, commands)
                return

    def _refuse(self, kind: str, came: str, known: Iterable[str]) -> None:
        self.exit(2, f"sora-fast: expected a {kind} of {self.prog}, got {came}; {meant(came, known)}{self.prog} --help "
                     f"lists them\n")


def meant(came: str, known: Iterable[str]) -> str:
    """"did you mean --data? " for a name that is near one of ``known`` or begins it, else nothing."""
    known = list(known)
    near = [name for name in known if name.startswith(came)] or difflib.get_close_matches(came, known, 1)
    return f"did you mean {' or '.join(near)}? " if 0 < len(near) <= 3 else ""


def typed(text: str) -> str:
    """A flag's text as it was typed, also where Python took its bytes for no letters of the system's encoding."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
