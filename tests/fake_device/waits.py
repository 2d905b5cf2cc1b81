"""What waits for the device: noted with its source line, an error inside ``none()``, and in a stream capture always."""

import contextlib
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ROOMS = tuple(f"{ROOT / room}/" for room in ("sora_fast", "kernels", "benchmarks"))


class HiddenWait(RuntimeError):
    """The host waits for the device where it may not."""


class NotCapturable(RuntimeError):
    """What CUDA refuses while a stream is captured."""


@dataclass(frozen=True)
class Wait:
    """``what`` waited, and the innermost line of the library that made it."""

    what: str
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        text = linecache.getline(str(ROOT / self.file), self.line).strip()
        return f"{self.what} at {self.file}:{self.line} in {self.function}: {text}"


class _State:
    capture = None  # graphs.Tape of the stream capture that is open
    forbidden = False
    listeners: tuple[list[Wait], ...] = ()


state = _State()


def _wait(what: str) -> Wait:
    frame, other = sys._getframe(2), None
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOMS):
            return Wait(what, str(Path(path).relative_to(ROOT)), frame.f_lineno, frame.f_code.co_name)
        if other is None and not path.startswith(str(HERE / "")) and "/torch/" not in path and not path.startswith("<"):
            other = Wait(what, path.removeprefix(f"{ROOT}/"), frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return other or Wait(what, "?", 0, "?")


def note(what: str) -> None:
    """Called before the host waits for the device in an operator or a call of torch.cuda named ``what``."""
    wait = _wait(what)
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
