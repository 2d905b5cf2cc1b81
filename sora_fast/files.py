"""Files that are whole or not there, also where several processes write them at once."""

import errno
import json
import os
import re
import socket
import stat
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None

WAIT_S = 60.0  # for another process's lock: an edit of a cache takes milliseconds
CLAIM = ".lock"  # in a folder that a process has claimed
FAR = 2**30  # the byte that Windows locks: others may read what the file says
HELD = frozenset((errno.EAGAIN, errno.EACCES, errno.EDEADLK))  # what systems answer for a lock that another has
LOCKLESS = frozenset(getattr(errno, name) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP") if hasattr(errno, name))
# Errors that end where there is room: the disk, somebody's quota or a file at its limit (Windows has no quotas).
FULL = frozenset(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, whatever cannot be written for the disk's sake is an OSError that has its number and names ``path``.

    safetensors and PyTorch raise errors of their own for a full disk, and the system names the unfinished file, or none.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OSError(*reason, str(path)) from error


def _reason(error: BaseException | None) -> tuple[int, str] | None:
    """The system's number and words of an error that a disk is the reason of, else None."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"(?:os error|code:) (\d+)", text)):
        return int(found[1]), os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and "inline_container" in text:  # PyTorch's, whose file raised what stands behind it
        return _reason(error.__context__)
    return None


def check_folder(flag: str, folder: Path) -> None:
    """One sentence where files could not be written to ``folder``, which need not be there yet; nothing is made.

    Raises:
        OSError: a file or a link to nothing stands in its place or above it, or it may not be written.
    """
    place = Path(folder).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        what = "the file" if place.exists() else "a link to nothing,"
        raise FileExistsError(f"{flag}: expected a folder that is there or can be made, got {what} {place}; pass another "
                              f"{flag}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{flag}: expected a folder that can be written, got {place}, which may not be; pass another "
                              f"{flag}")


def check_file(flag: str, path: Path) -> None:
    """One sentence where ``path`` could not be written as a file; nothing is made."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{flag}: expected a file, got the folder {path}; pass the name of a file in it")
    check_folder(flag, path.parent)
    if path.is_file() and not os.access(path, os.W_OK):
        raise PermissionError(f"{flag}: expected a file that can be written, got {path}, which may not be; pass another "
                              f"{flag}")


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """``write(temporary)``, flushed to the disk, then renamed to ``path``; nothing is left of a write that fails.

    The file has ordinary permissions, those that the umask leaves, whatever ``write`` gives it: safetensors' own files are
    for their owner alone.

    Raises:
        OSError: a full disk, a folder that is missing or cannot be written. On Windows also a ``path`` that somebody has
            open.
    """
    # a name of its own: two writers of one file must not share the unfinished one
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        try:
            temporary.touch(exist_ok=False)
            ordinary = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            if stat.S_IMODE(temporary.stat().st_mode) != ordinary:
                temporary.chmod(ordinary)
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append(path: Path, data: bytes, *, flush: bool = False) -> None:
    """Add ``data`` to the end of a file, all of it or nothing; ``flush``: and wait until it is on the disk."""
    with writing(path), open(path, "ab", buffering=0) as file:
        whole, left = file.tell(), memoryview(data)
        try:
            while left:  # a disk that fills up takes a part without an error
                left = left[file.write(left):]
            if flush:
                os.fsync(file.fileno())
        except BaseException:
            file.truncate(whole)
            raise


def save_text(path: Path, text: str) -> None:
    """Write text atomically, in UTF-8, its line ends as they are, and bytes of file names that are no text as they are."""
    replace(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", "surrogateescape")))


def read_text(path: Path) -> str:
    """The text of a file, "" where there is none; bytes that are no UTF-8 become replacement characters."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _take(lock: Path) -> int | None:
    """An open handle that holds ``lock``, or None if another process does. The system releases it when the process ends."""
    if fcntl is None and msvcrt is None:
        try:
            return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return None
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(handle, FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        os.close(handle)
        if error.errno in HELD:
            return None
        raise
    return handle


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` (a file of its own, beside it) against every other process and thread.

    The system releases the lock of a process that dies. Where it has no such locks, the lock is a file made exclusively: one
    that a killed process left stands until somebody deletes it, and the error says so.

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
        os.close(handle)  # which releases it
        if fcntl is None and msvcrt is None:
            lock.unlink()


@dataclass
class _Claim:
    """A folder that this process has claimed ``times`` times, the handle of its lock, and the folders made for it."""

    handle: int | None
    made: list[Path]
    times: int = 0


_claims: dict[tuple[str, int], _Claim] = {}  # by folder and process: a forked one has claimed nothing
_claiming = threading.Lock()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside, ``folder`` is this process's to write in: another process that claims it gets one sentence.

    The folder is made, and taken away again where nothing was written. A process may claim a folder it has claimed already.
    The claim is a lock of the system on ``.lock`` in it, which ends with the process, killed or not; on a network drive it
    holds between machines as far as the drive's locks do.

    Raises:
        FileExistsError: another process has it; who, and since when.
        OSError: as ``check_folder``.
    """
    folder = Path(folder).absolute()
    key = os.path.realpath(folder), os.getpid()
    with _claiming:
        if key not in _claims:
            check_folder("--out", folder)
            _kept_from_forks()
            made = [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            _claims[key] = _Claim(_lock_of(folder), made)
        _claims[key].times += 1
    try:
        yield
    finally:
        with _claiming:
            if key in _claims:  # not in a fork of the process that claimed it
                _claims[key].times -= 1
                if not _claims[key].times:
                    _release(folder, _claims.pop(key))


@cache
def _kept_from_forks() -> None:
    """A forked process, a worker that outlives a killed run, say, does not hold this one's claims."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    global _claiming
    _claiming = threading.Lock()  # another thread may have held it
    for claim in _claims.values():
        if claim.handle is not None:
            os.close(claim.handle)  # the lock itself stays with the process that took it
    _claims.clear()


def _lock_of(folder: Path) -> int | None:
    """The handle that holds a folder's lock; None, with a warning, on a drive without locks."""
    lock = folder / CLAIM
    while True:
        try:
            handle = _take(lock)
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
            warnings.warn(f"{folder}: its drive has no locks ({error.strerror}): a second run in it would not be noticed",
                          stacklevel=4)
            return None
        if handle is None:
            who = read_text(lock).strip() or "another process"
            raise FileExistsError(f"{folder}: expected a folder that no other run writes in, got one that {who} writes in "
                                  f"now; wait until that has ended, or pass another --out")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                break
        os.close(handle)  # of a file that its holder took away between our opening and our locking it
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()} (since {now})".encode())
    return handle


def _release(folder: Path, claim: _Claim) -> None:
    if claim.handle is not None:
        with suppress(OSError):
            (folder / CLAIM).unlink()  # before another can hold it; Windows takes no open file away
        os.close(claim.handle)
        if fcntl is None:
            with suppress(OSError):
                (folder / CLAIM).unlink()
    for each in claim.made:
        try:
            each.rmdir()
        except OSError:  # something was written
            return


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
