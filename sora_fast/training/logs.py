"""Tables and TensorBoard events of a run."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .. import files


class Table:
    """A CSV file of a run with a column ``step``. A resumed run drops the rows of steps that it will make again.

    Args:
        quiet: write nothing (another process does).
    """

    def __init__(self, path: Path, quiet: bool = False):
        self.path, self.quiet = path, quiet

    def begin(self, step: int) -> list[dict]:
        """Keep rows up to ``step`` (of step 0 none: a table that a run without a checkpoint left) and return them."""
        try:
            with open(self.path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = [row for row in csv.DictReader(file) if all(row.values()) and int(row["step"]) <= step]
        except FileNotFoundError:
            return []
        rows = rows if step else []
        if self.quiet:
            return rows
        if not rows:
            self.path.unlink(missing_ok=True)
            return []
        files.replace(self.path, lambda temporary: temporary.write_bytes(_lines(rows, header=True)))
        return rows

    def append(self, rows: Sequence[Mapping]) -> None:
        if self.quiet or not rows:
            return
        rows = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        files.append(self.path, _lines(rows, header=not self.path.exists() or not self.path.stat().st_size))


def _lines(rows: Sequence[Mapping], header: bool) -> bytes:
    """CSV in UTF-8; names of files may hold bytes that are none, which stay as they are."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=list(rows[0]))
    if header:
        table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


class Events:
    """TensorBoard scalars of a run; nothing where they are not wanted, or cannot be (no tensorboard; which is said)."""

    def __init__(self, folder: Path, step: int, wanted: bool):
        self.writer, self.folder = None, folder
        if not wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("tensorboard is not installed: losses go to losses.csv only", flush=True)
            return
        try:
            str(folder).encode()
        except UnicodeEncodeError:  # the system's encoding has not the letters of the name
            print("tensorboard takes no folder whose name is no text in this encoding: losses go to losses.csv only; set "
                  "LC_ALL=C.UTF-8", flush=True)
            return
        # Events after the checkpoint that a resumed run begins from will be written again.
        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._call(lambda writer: [writer.add_scalar(name, value, step) for name, value in values.items()])

    def close(self) -> None:
        self._call(lambda writer: writer.close())

    def _call(self, act: Callable) -> None:
        """``act`` on the writer; one that cannot write says so once, and not again when it is closed."""
        if self.writer is None:
            return
        try:
            with files.writing(self.folder):
                act(self.writer)
        except OSError:
            self.writer = None
            raise
