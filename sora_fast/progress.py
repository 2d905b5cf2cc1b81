"""How far something is: a bar in a terminal, a line every ten seconds in a log."""

import sys
import time
from collections.abc import Iterable, Iterator

LOG_SECONDS = 10.0


class Progress:
    """``update(step, text)`` after every step; ``text`` is what is known so far.

    Args:
        label: what runs. steps: how many there will be. first: how many are done already. quiet: say nothing.
    """

    def __init__(self, label: str, steps: int, first: int, quiet: bool = False):
        self.label, self.steps, self.quiet = label, steps, quiet
        self.last, self.said, self.bar = 0.0, "", None
        if sys.stderr.isatty() and not quiet:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=steps, initial=first, desc=label, unit="step", mininterval=1.0,
                            bar_format="{desc} {n_fmt}/{total_fmt} [{elapsed}] {postfix}")

    def update(self, step: int, text: str, *, last: bool = False) -> None:
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif (text != self.said or not text) and (last or time.monotonic() - self.last >= LOG_SECONDS):
            print(f"{self.label} {step:,}/{self.steps:,}{': ' * bool(text)}{text}", flush=True)
            self.last, self.said = time.monotonic(), text

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def bar(values: Iterable, label: str, show: bool = True, **settings) -> Iterable:
    """``values`` with a bar of their progress in a terminal, where tqdm is installed, and a line now and then in a log.

    Args:
        show: False says nothing. settings: tqdm's, of which a log takes ``total``.
    """
    if not show or settings.get("disable"):
        return values
    if sys.stderr.isatty():
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return values
        return tqdm(values, **dict(desc=label, leave=False) | settings)
    return _logged(values, label, settings.get("total") or (len(values) if hasattr(values, "__len__") else 0))


def _logged(values: Iterable, label: str, total: int) -> Iterator:
    last = time.monotonic()  # what is over within ten seconds needs no line
    for place, value in enumerate(values):
        if time.monotonic() - last >= LOG_SECONDS:
            print(f"{label} {place:,}{f'/{total:,}' if total else ''}", flush=True)
            last = time.monotonic()
        yield value
