"""What waits for the device: noted with its source line, an error inside ``none()``, and in a stream capture always."""

import contextlib
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = tuple(f"{ROOT / room}/" for room in ("sora_fast", "kernels", "benchmarks"))
TOOL = tuple(str(Path(__file__).with_name(f"{name}.py")) for name in ("waits", "tensors", "graphs", "cuda", "kernels"))


UNSEEN = ("torch.cuda.synchronize", "Event.synchronize")  # by PyTorch's sync_debug_mode


class HiddenWait(RuntimeError):
    """The host waits for the device where it may not."""


class NotCapturable(RuntimeError):
    """What CUDA refuses while a stream is captured."""


@dataclass(frozen=True)
class Wait:
    """``what`` waited, the innermost line of the library that made it, and where the library called that."""

    what: str
    file: str
    line: int
    function: str
    caller: str = ""

    def __str__(self) -> str:
        text = linecache.getline(str(ROOT / self.file), self.line).strip()
        called = f" (called from {self.caller})" if self.caller else ""
        return f"{self.what} at {self.file}:{self.line} in {self.function}: {text}{called}"


class _State:
    capture = None  # graphs.Tape of the stream capture that is open
    pool = None  # graphs.Pool that is open
    forbidden = False
    sync_debug_mode = 0  # PyTorch's own, 2 for errors
    listeners: tuple[list[Wait], ...] = ()


state = _State()


def _wait(what: str) -> Wait:
    """Where no line of the library asked, that of a test or of another package."""
    library, others, frame = [], [], sys._getframe(2)
    while frame is not None and len(library) < 2:
        path = frame.f_code.co_filename
        line = path.removeprefix(f"{ROOT}/"), frame.f_lineno, frame.f_code.co_name
        if path.startswith(ROOMS):
            library.append(line)
        elif not path.startswith((*TOOL, "<")) and "/torch/" not in path:
            others.append(line)
        frame = frame.f_back
    caller = "{}:{}".format(*library[1]) if len(library) > 1 else ""
    return Wait(what, *(library or others or [("?", 0, "?")])[0], caller)


def note(what: str) -> None:
    """Called before the host waits for the device in an operator or a call of torch.cuda named ``what``."""
    wait = _wait(what)
    if state.sync_debug_mode == 2 and what not in UNSEEN:
        raise RuntimeError(f"called a synchronizing CUDA operation: {wait}")
    if state.capture is not None:
        raise NotCapturable(f"operation not permitted when stream is capturing: {wait}")
    if state.forbidden:
        raise HiddenWait(f"expected no wait for the device, got {wait}")
    for listener in state.listeners:
        listener.append(wait)


def here(what: str) -> str:
    """``what`` with its source line, for the message of another error."""
    return str(_wait(what))


@contextlib.contextmanager
def none() -> Iterator[None]:
    """Inside, whatever waits raises HiddenWait."""
    before, state.forbidden = state.forbidden, True
    try:
        yield
    finally:
        state.forbidden = before


@contextlib.contextmanager
def seen() -> Iterator[list[Wait]]:
    """The waits inside, in order."""
    found, before = [], state.listeners
    state.listeners = (*before, found)
    try:
        yield found
    finally:
        state.listeners = before
