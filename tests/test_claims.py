"""One run at a time in a folder: the second is told, a killed one's claim has gone with it."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_checks import little

from sora_fast import files
from sora_fast.cli.__main__ import main

HERE = Path(__file__).parent
HOLDER = """
import sys
from pathlib import Path
from sora_fast import files
with files.claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def holder(tmp_path_factory):
    """A process that has claimed the folder runs/one, and the folder."""
    folder = tmp_path_factory.mktemp("claims") / "runs" / "one"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=HERE.parent, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    yield process, folder
    process.kill()
    process.communicate()


def told(folder, process):
    return (rf"{folder}: expected a folder that no other run writes in, got one that process {process.pid} on \S+ "
            rf"\(since [-0-9]+ [:0-9]+\) writes in now; wait until that has ended, or pass another --out")


def test_a_second_run_is_refused_until_the_first_has_ended(holder, tmp_path, capsys):
    """Every command that writes a run, and the trainer by itself; a killed process holds nothing."""
    pytest.importorskip("safetensors", reason="the train extra is not installed")
    process, folder = holder
    (folder / "vae").mkdir()
    (folder / "vae" / "kept").touch()
    for command in (("train-vae", "--data", tmp_path), ("train", "--data", tmp_path), ("demo",),
                    ("bench", "latents", "--quick", "--device", "cpu")):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, command), "--out", str(folder)])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"sora-fast: {folder}: expected a folder that no other run writes in")
    with pytest.raises(FileExistsError, match=told(folder, process)):
        little(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "vae"] and (folder / "vae" / "kept").exists()
    process.kill()
    process.wait()
    little(folder, steps=1).run()
    assert (folder / "checkpoints").is_dir() and not (folder / ".lock").exists()


def test_a_run_holds_its_folder_to_its_end(tmp_path):
    trainer, seen = little(tmp_path, steps=2), []
    trainer.run(lambda row: seen.append((tmp_path / ".lock").exists()))
    assert seen == [True, True] and not (tmp_path / ".lock").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_a_fork_does_not_hold_a_claim(tmp_path):
    """A worker that outlives a killed run. Here the run closes its handle, as its death would, while the fork lives."""
    ends, goes = os.pipe(), os.pipe()
    claim = files.claimed(tmp_path)
    claim.__enter__()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            claim.__exit__(None, None, None)  # takes nothing of its parent's away
        os.write(goes[1], b"x")
        os.read(ends[0], 1)
        os._exit(0)
    try:
        os.read(goes[0], 1)
        assert (tmp_path / ".lock").exists() and files._take(tmp_path / ".lock") is None
        os.close(files._claims[os.path.realpath(tmp_path), os.getpid()].handle)
        handle = files._take(tmp_path / ".lock")
        assert handle is not None
        os.close(handle)
        files._claims.clear()
    finally:
        os.write(ends[1], b"x")
        os.waitpid(child, 0)
        for each in (*ends, *goes):
            os.close(each)


def test_a_claim_is_the_process_s_and_leaves_nothing(tmp_path):
    folder, inside = tmp_path / "a" / "b", []
    with files.claimed(folder):
        with files.claimed(tmp_path / "a" / "." / "b"):
            pass
        thread = threading.Thread(target=lambda: inside.append(files._take(folder / ".lock")))
        thread.start()
        thread.join()
        assert inside == [None]  # still held after the inner claim has ended
    assert not (tmp_path / "a").exists()
    first, second = files.claimed(folder), files.claimed(folder)  # of two threads: the first to claim is the first to end
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert files._take(folder / ".lock") is None
    second.__exit__(None, None, None)
    assert not (tmp_path / "a").exists()
    with pytest.raises(KeyError), files.claimed(folder):
        (folder / "written").touch()
        raise KeyError
    assert [path.name for path in folder.iterdir()] == ["written"]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="--out: expected a folder that is there or can be made"), \
            files.claimed(tmp_path / "file"):
        pass


def test_a_lock_file_taken_away_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """The holder takes its file away between another's opening and locking of it."""
    take, taken = files._take, []

    def late(lock):
        handle = take(lock)
        if not taken:
            lock.unlink()
        taken.append(handle)
        return handle

    monkeypatch.setattr(files, "_take", late)
    with files.claimed(tmp_path):
        assert len(taken) == 2 and take(tmp_path / ".lock") is None


def test_where_a_drive_has_no_locks_it_is_said(tmp_path, monkeypatch):
    if files.fcntl is None:
        pytest.skip("no flock here")

    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    with pytest.warns(UserWarning, match=r"its drive has no locks \(No locks available\): a second run in it would"), \
            files.claimed(tmp_path):
        pass


def test_windows_locks(tmp_path, monkeypatch):
    """As msvcrt does: one byte far behind what the file says, released with the handle."""
    held = {}

    def locking(handle, how, count):
        place = os.lseek(handle, 0, os.SEEK_CUR)
        assert place == files.FAR and (how, count) == (1, 1)
        for other in held.values():
            try:
                os.fstat(other)
            except OSError:
                continue
            raise OSError(errno.EACCES, "Permission denied")
        held[handle] = os.dup(handle)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=1))
    with files.claimed(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert files._take(tmp_path / ".lock") is None
    for copy in held.values():
        os.close(copy)
    assert not (tmp_path / ".lock").exists()
    with files.claimed(tmp_path):
        pass
