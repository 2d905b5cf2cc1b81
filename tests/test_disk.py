"""A disk that is full, or a save that is stopped: one error that names the file, and nothing half written.

The limit of the system on the size of files stands for the full disk. It is met as one: a part is written, and for the
rest there is an error, or none.
"""

import contextlib
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from cli_checks import refused
from training_checks import little, write_media

from sora_fast import files
from sora_fast.data import FitPolicy, scan, write_image, write_video
from sora_fast.models import VideoVAE, weights
from sora_fast.training import checkpoint
from sora_fast.training.latent_cache import LatentCache
from sora_fast.training.latents import encode_library
from sora_fast.training.logs import Events, Table

resource = pytest.importorskip("resource", reason="this system has no limit on the size of files")
ROOM = 2000
TENSORS = {"x": torch.zeros(10_000), "y": torch.zeros(2)}


@contextlib.contextmanager
def only(room=ROOM):
    """No file may be longer than that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WRITERS = {
    "tensors.safetensors": lambda path: checkpoint.save_tensors(path, TENSORS),
    "weights.safetensors": lambda path: weights.write("save_dit", path, TENSORS, None),
    "weights.pt": lambda path: weights.write("save_dit", path, TENSORS, None),
    "settings.json": lambda path: checkpoint.save_json(path, list(range(1000))),
    "page.html": lambda path: files.save_text(path, "x" * 5000),
    "edited.jsonl": lambda path: files.edit(path, lambda text: text + "x" * 5000),
    "clip.mp4": lambda path: write_video(path, noise(5, 64, 64, 3), 8),
    "clip.gif": lambda path: write_video(path, noise(5, 64, 64, 3), 8),
    **{f"picture{suffix}": lambda path: write_image(path, noise(64, 64, 3)) for suffix in (".png", ".jpg", ".webp", ".bmp")},
}


@pytest.mark.parametrize("old", [True, False], ids=["over an old file", "new"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path, name, old):
    path = tmp_path / name
    if old:
        path.write_bytes(b"as it was")
    files.edit(tmp_path / "edited.jsonl", lambda text: text)  # its lock stays
    before = everything(tmp_path)
    with only(), pytest.raises(OSError) as raised:
        WRITERS[name](path)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    assert everything(tmp_path) == before
    WRITERS[name](path)
    assert path.stat().st_size > ROOM  # so that the limit was met


def test_the_errors_of_every_library_are_known():
    class SafetensorError(Exception):
        pass

    known = files._reason
    for text in ("Error while serializing: I/O error: No space left on device (os error 28)",
                 'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'):
        assert known(SafetensorError(text)) == (28, os.strerror(28))
    assert known(SafetensorError("Error while serializing: InvalidTensorView")) is None
    assert known(RuntimeError("inline_container.cc:672] . unexpected pos")) is None and known(ValueError("28")) is None
    assert known(OSError("cannot write mode F as PNG")) is None  # a sentence, and not the system's


@pytest.mark.parametrize("room", [0, 1, 30])
def test_what_is_appended_is_appended_whole(tmp_path, room):
    from sora_fast.benchmarks import rows

    table = Table(tmp_path / "losses.csv")
    first = dict(step=1, loss=0.123456789, keys="a clip.mp4")
    table.append([first])
    row = dict(schema=rows.SCHEMA, reason="x" * 40)
    rows.append(tmp_path / "bench.jsonl", [row])
    for path, add in ((table.path, lambda: table.append([first | dict(keys="b" * 60)])),
                      (tmp_path / "bench.jsonl", lambda: rows.append(tmp_path / "bench.jsonl", [row]))):
        before = everything(tmp_path)
        with only(path.stat().st_size + room), pytest.raises(OSError) as raised:
            add()
        assert raised.value.filename == str(path) and everything(tmp_path) == before
        add()
    assert [kept["keys"] for kept in table.begin(1)] == ["a clip.mp4", "b" * 60]
    assert rows.read(tmp_path / "bench.jsonl") == [row, row]


def test_a_table_that_could_not_be_begun_has_its_heading_later(tmp_path):
    table = Table(tmp_path / "losses.csv")
    with only(3), pytest.raises(OSError):
        table.append([dict(step=1, loss=0.5)])
    table.append([dict(step=2, loss=0.25)])
    assert table.path.read_bytes() == b"step,loss\r\n2,0.25\r\n"


def test_a_full_cache_of_latents_stops_nothing(tmp_path, capsys):
    """safetensors' error of a full disk is no OSError; training goes on without the cache, and says so once."""
    for package in ("av", "PIL"):
        pytest.importorskip(package, reason="the train extra is not installed")
    write_media(tmp_path / "media")
    vae, items = VideoVAE.preset("tiny", width=4).eval(), scan(tmp_path / "media", progress=False).items
    policy = FitPolicy(short_side=48, fps=None, max_frames=5, space_multiple=16)

    def encode(folder):
        cache = LatentCache(folder, vae, policy, windows=1, span=(0.0, 1.0))
        return encode_library(vae, items, policy, windows=1, progress=False, cache=cache)

    with only(100):
        made = encode(tmp_path / "cache")
    said = capsys.readouterr().out
    assert said.count("cannot be written") == 1 and "File too large" in said and "--latent-cache" in said
    assert everything(tmp_path / "cache") == {}
    for one, other in zip(made, encode(None), strict=True):
        assert torch.equal(one.latent, other.latent)


def test_a_cache_of_latents_that_may_not_be_looked_into_stops_nothing(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    vae = VideoVAE.preset("tiny", width=4)
    cache = LatentCache(tmp_path, vae, FitPolicy(), windows=1, span=(0.0, 1.0))
    monkeypatch.setattr(Path, "is_file", refuse)
    assert cache.read(tmp_path / "entry.safetensors", None) is None


def test_events_that_cannot_be_written_are_one_error(tmp_path):
    class Full:
        def add_scalar(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

        close = add_scalar

    for act in (lambda events: events.add(1, dict(loss=1.0)), lambda events: events.close()):
        events = Events(tmp_path / "tensorboard", 0, wanted=False)
        events.writer = Full()
        with pytest.raises(OSError) as raised:
            act(events)
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "tensorboard"))
        events.add(2, dict(loss=1.0))  # it has told why: what ends the run is not told again where the run is closed
        events.close()


class Stopped(BaseException):
    """As Ctrl-C, which pytest would take for its own."""


@pytest.mark.parametrize("kind", ["full", "stopped"])
def test_a_checkpoint_that_cannot_be_saved_leaves_the_one_before(tmp_path, monkeypatch, kind):
    trainer = little(tmp_path / "run", steps=2, save_every=1)
    trainer.run()
    before = everything(tmp_path)
    trainer.step = 3
    with monkeypatch.context() as patched:
        if kind == "stopped":
            def stop(*_):
                raise Stopped
            patched.setattr(checkpoint, "save_json", stop)  # the last of its files
        with only(300) if kind == "full" else contextlib.nullcontext(), pytest.raises((OSError, Stopped)) as raised:
            trainer.save()
    if kind == "full":
        folder = tmp_path / "run" / "checkpoints" / "step-00000003"
        assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(folder))
    assert everything(tmp_path) == before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert checkpoint.newest(tmp_path / "run").name == "step-00000002"
    trainer.save()
    assert checkpoint.newest(tmp_path / "run").name == "step-00000003"


@pytest.mark.parametrize("error, parts", [
    (OSError(errno.ENOSPC, "No space left on device", "runs/a/losses.csv"),
     ["expected room for runs/a/losses.csv", "No space left on device", "free some"]),
    (OSError(errno.ENOSPC, "No space left on device"), ["expected room for what is written"]),
    (PermissionError(errno.EACCES, "Permission denied", "runs/a"), ["Permission denied", "runs/a"]),
])
def test_the_command_line_tells_it_in_one_sentence(cli, monkeypatch, error, parts):
    def fail():
        raise error

    import sora_fast.explanation as module

    monkeypatch.setattr(module, "info", fail)
    refused(cli("info"), *parts)


def test_figures_of_a_report_are_whole(tmp_path):
    """The writers that commands have of their own go through the same door."""
    demo = pytest.importorskip("sora_fast.cli.demo_stages")
    (tmp_path / "figures.json").write_text("{}")
    watch = demo.Stopwatch()
    watch.stages = {str(place): 1.0 for place in range(500)}
    with only(), pytest.raises(OSError):
        demo.save_figures(tmp_path, [], [], watch)
    assert json.loads((tmp_path / "figures.json").read_text("utf-8")) == {} and len(everything(tmp_path)) == 1


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_files_have_ordinary_permissions(tmp_path):
    """Those that the umask leaves, for whoever reads them: of every writer, and of a whole run."""
    before = os.umask(0o027)
    try:
        for name, write in WRITERS.items():
            write(tmp_path / name)
        little(tmp_path / "run", steps=1).run()
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_file()}
    assert WRITERS.keys() | {"model.safetensors", "config.json", "losses.csv"} <= modes.keys()
    assert set(modes.values()) == {"0o640"}, modes
