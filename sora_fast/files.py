"""Files that are whole or not there, also where several processes write them at once."""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WAIT_S = 60.0  # for another process's lock: an edit of a cache takes milliseconds


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """``write(temporary)``, flushed to the disk, then renamed to ``path``; nothing is left of a write that fails.

    Raises:
        OSError: a folder that is missing or cannot be written. On Windows also a ``path`` that somebody has open.
    """
    # a name of its own: two writers of one file must not share the unfinished one
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_text(path: Path, text: str) -> None:
    """Write text atomically, in UTF-8, its line ends as they are."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def read_text(path: Path) -> str:
    """The text of a file, "" where there is none; bytes that are no UTF-8 become replacement characters."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _take(lock: Path) -> int | None:
    """An open handle that holds ``lock``, or None while somebody else does."""
    if fcntl is None:
        try:
            return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return None
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return handle


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` (a file of its own, beside it) against every other process and thread.

    Where fcntl exists the system releases the lock of a process that dies. Elsewhere the lock is a file made
    exclusively: one that a killed process left stands until somebody deletes it, and the error says so.

    Raises:
        TimeoutError: not had within 60 s.
    """
    lock = path.with_name(path.name + ".lock")
    end = time.monotonic() + WAIT_S
    while (handle := _take(lock)) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"files: expected the lock {lock} within {WAIT_S:g} s, got none; if no other sora_fast runs, "
                               f"delete that file")
        time.sleep(0.01)
    try:
        yield
    finally:
        os.close(handle)  # which releases an flock
        if not fcntl:
            lock.unlink()


def edit(path: Path, change: Callable[[str], str]) -> None:
    """Replace the text of ``path`` ("" where there is none) by ``change(text)``; editors take turns, so none is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        save_text(path, change(read_text(path)))


def json_lines(text: str) -> Iterator[dict]:
    """The objects of a JSONL text; lines that hold none (cut short, another format) are passed over."""
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
