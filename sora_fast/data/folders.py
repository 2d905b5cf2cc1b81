"""What a folder of clips and images holds: items, their captions, and what cannot be used, by name and reason."""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..progress import bar
from .media import CLIP_SUFFIXES, IMAGE_SUFFIXES, MediaItem, probe_file, reason, shown
from .packages import require


@dataclass(frozen=True)
class Library:
    """What a folder holds.

    skipped: (path, reason) of every file or folder that cannot be used; a reason's words before its first colon are its
    kind ("truncated", "empty", ...). others: (suffix, count) of files that are neither media nor captions; ("hidden",
    count) of files and folders whose name begins with a dot.
    """

    items: tuple[MediaItem, ...]
    skipped: tuple[tuple[Path, str], ...] = ()
    others: tuple[tuple[str, int], ...] = ()

    @property
    def uncaptioned(self) -> int:
        """Items with an empty caption, which is legal."""
        return sum(not item.caption for item in self.items)

    @property
    def reasons(self) -> dict[str, int]:
        """{kind of reason: skipped files}, most frequent first."""
        return dict(Counter(why.partition(":")[0] for _, why in self.skipped).most_common())

    def summary(self) -> str:
        """One line of counts, one each of what is missing where something is, and one per skipped file."""
        clips, bare = sum(item.kind == "clip" for item in self.items), self.uncaptioned
        counts = f"{clips} clips, {len(self.items) - clips} images, {bare} without a caption, "
        lines = [f"{counts}{len(self.skipped)} skipped"]
        if bare:
            names = [shown(item.path.name) for item in self.items if not item.caption][:3]
            lines.append(f"without a caption: {', '.join(names)}" + (f" and {bare - 3} more" if bare > 3 else ""))
        if self.others:
            lines.append("not read: " + ", ".join(f"{count} {suffix}" for suffix, count in self.others))
        if len(self.skipped) > 1:  # of a single one its own line says all
            lines.append("skipped: " + ", ".join(f"{count} {kind}" for kind, count in self.reasons.items()))
        return "\n".join(lines + [f"skipped {shown(path)}: {shown(why)}" for path, why in self.skipped])


def scan(folder: str | os.PathLike, *, progress: bool = True) -> Library:
    """Every clip and image in `folder` and its sub-folders, ordered by path; hidden files are left out.

    A caption is the text of `name.txt` beside the file, else `text` or `caption` of the entry with its
    `file_name` or `path` (relative to that folder) in a `metadata.jsonl` in a folder above or beside it, else
    empty. Files that cannot be used are in `Library.skipped` and never end the scan. Every image is decoded
    once and of every clip one frame: a clip that is damaged further on is told where it is read. Links to folders are
    followed, once each. progress: show a bar where tqdm is installed. 10,000 files of 200 KB: half a minute on one core.

    Raises:
        FileNotFoundError: no such folder. ValueError: not a folder, no usable file, a malformed metadata.jsonl.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"scan: expected a folder of media, got {folder}, which is not there")
    if not folder.is_dir():
        raise ValueError(f"scan: expected a folder of media, got the file {folder}; pass the folder it is in")
    files, skipped, hidden = _walk(folder)
    captions: dict[str, tuple[Path, str]] = {}
    # Outer folders first: the metadata.jsonl nearest to an item has the last word.
    for path in sorted((p for p in files if p.name == "metadata.jsonl"), key=lambda p: len(p.parts)):
        captions.update(_read_metadata(path))
    media = [path for path in files if path.suffix.lower() in CLIP_SUFFIXES + IMAGE_SUFFIXES]
    if any(path.suffix.lower() in CLIP_SUFFIXES for path in media):
        require("av", "PyAV")
    if media:
        require("PIL.Image", "Pillow")

    def attempt(path: Path) -> MediaItem | str:
        try:
            str(path).encode()
        except UnicodeEncodeError:  # logs, cards and caches of a training hold names as text
            return "name not text: its bytes are no UTF-8; rename it"
        try:
            return probe_file(path, _caption(path, captions))
        except Exception as error:  # decoders raise anything on a damaged file: SyntaxError, struct.error
            return reason(error)

    items = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        shown_files = bar(pool.map(attempt, media), "scan", total=len(media), unit="file", leave=True,
                          disable=not (progress and media))
        for path, found in zip(media, shown_files, strict=True):
            if isinstance(found, str):
                skipped.append((path, found))
            else:
                items.append(found)
    present = {_key(path) for path in files}
    skipped += [
        (path, "missing: metadata.jsonl names it, but there is no such file")
        for key, (path, _) in captions.items()
        if key not in present and not path.exists()
    ]
    if not items:
        reasons = "; ".join(f"{shown(path.name)}: {why}" for path, why in skipped[:3])
        raise ValueError(
            f"scan: expected at least one readable file of {' '.join(CLIP_SUFFIXES + IMAGE_SUFFIXES)} in "
            f"{str(folder)!r}, got {len(files)} files of which {len(media)} have such a name"
            + (f" and none can be read ({reasons})" if skipped else "; check the path")
        )
    return Library(tuple(items), tuple(skipped), _others(files, media, hidden))


def _walk(folder: Path) -> tuple[list[Path], list[tuple[Path, str]], int]:
    """(files by path, what cannot be entered and why, how many names are hidden)."""
    files, skipped, hidden = [], [], 0
    inside, linked, seen = [folder], [], set()
    while inside or linked:  # links last: a folder is known by its own name rather than by a link's
        here = inside.pop() if inside else linked.pop(0)
        try:
            status, entries = here.stat(), sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            skipped.append((here, reason(error)))
            continue
        if (status.st_dev, status.st_ino) in seen:
            skipped.append((here, "repeated folder: it is read already under another name"))
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                hidden += 1
            elif os.path.isdir(entry) and entry.is_symlink():
                # One that leads to a folder it is in would bring all that is beside the scanned folder too.
                if Path(os.path.realpath(here)).is_relative_to(os.path.realpath(path)):
                    skipped.append((path, "link loop: it leads to a folder that it is in"))
                else:
                    linked.append(path)
            elif os.path.isdir(entry):
                inside.append(path)
            elif os.path.isfile(entry):
                files.append(path)
            elif entry.is_symlink():
                skipped.append((path, "broken link: it leads to no file that can be reached"))
            else:
                skipped.append((path, "no file: it is a pipe, a socket or a device"))
    return sorted(files), skipped, hidden


def _others(files: list[Path], media: list[Path], hidden: int) -> tuple[tuple[str, int], ...]:
    stems = {path.with_suffix("") for path in media}
    known = {".txt": lambda path: path.with_suffix("") in stems, ".jsonl": lambda path: path.name == "metadata.jsonl"}
    suffixes = Counter(path.suffix.lower() for path in files if not known.get(path.suffix, lambda _: False)(path))
    others = [(shown(suffix) or "without a suffix", count) for suffix, count in sorted(suffixes.items())
              if suffix not in CLIP_SUFFIXES + IMAGE_SUFFIXES]
    return (*others, ("hidden", hidden)) if hidden else tuple(others)


def _key(path: Path) -> str:
    """What two spellings of a path have in common: some systems write accents as letters of their own (NFD)."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


def _read_metadata(path: Path) -> dict[str, tuple[Path, str]]:
    """{key: (file, caption)} of one metadata.jsonl; the caption of an entry without one is empty."""
    captions = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(
            f"scan: {path} must be UTF-8 text that can be read, got {error}; correct it or move it away"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        known = entry if isinstance(entry, dict) else {}
        name = known.get("file_name") or known.get("path")
        text = known.get("text") or known.get("caption") or ""
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"scan: {path} line {number} must be one JSON object with file_name (or path) and text (or "
                f"caption), got {line.strip()[:80]!r}; correct that line"
            )
        named = Path(os.path.normpath(path.parent / name))
        # JSON can hold half a surrogate pair, as cut-off emojis leave it, and no tokenizer takes that.
        captions[_key(named)] = named, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
    return captions


def _caption(path: Path, captions: dict[str, tuple[Path, str]]) -> str:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return captions.get(_key(path), (path, ""))[1]
    try:
        return beside.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"caption not readable: {beside.name} is not UTF-8 text ({error})") from None
    except OSError as error:
        raise ValueError(f"caption not readable: {beside.name}, {error.strerror}") from None
