"""Ctrl-C in a run: the step at hand is finished."""

import signal
import threading
from contextlib import contextmanager


@contextmanager
def finish_on_interrupt():
    """Ctrl-C inside sets the yielded event, so that the step at hand is finished; a second Ctrl-C stops at once.

    Only the main thread may set handlers, and whoever has set another one (or ignores Ctrl-C) keeps it.
    """
    asked = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield asked
        return

    def once(signum, frame):
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, once)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
