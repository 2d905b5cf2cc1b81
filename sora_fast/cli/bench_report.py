"""sora-fast bench report."""

from pathlib import Path

from ..files import check_folder


def add_arguments(parser) -> None:
    parser.add_argument("files", nargs="+", metavar="RUN",
                        help="folders or bench.jsonl of runs, of the same or of different GPUs")
    parser.add_argument("--out", default="out/report", help="folder for the report")


def run(arguments) -> int:
    """Write report.html, report.md and report.csv of one or more runs; the files of one folder are one run."""
    from ..benchmarks import report, rows

    folder = lambda path: path if path.is_dir() else path.parent
    out = Path(arguments.out)
    check_folder("--out", out)
    runs: dict[str, list] = {}
    for path in arguments.files:
        found = rows.read_run(path)
        if not found:
            raise ValueError(f"bench report: expected rows in {path}, got none; pass the bench.jsonl of a finished run")
        runs.setdefault(folder(Path(path).resolve()).name, []).extend(found)
    report.write(list(runs.items()), out)
    print(f"wrote {out / 'report.html'}, report.md and report.csv")
    return 0
