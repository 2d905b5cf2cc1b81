"""How far something is: a bar in a terminal, a line every ten seconds in a log."""

import sys
import time

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
        elif text and text != self.said and (last or time.monotonic() - self.last >= LOG_SECONDS):
            print(f"{self.label} {step:,}/{self.steps:,}: {text}", flush=True)
            self.last, self.said = time.monotonic(), text

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def bar(values, label: str, show: bool = True, **settings):
    """``values`` with a bar of their progress in a terminal, where tqdm is installed; never in a log. settings: tqdm's."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return values
    return tqdm(values, **dict(desc=label, disable=None if show else True, leave=False) | settings)
