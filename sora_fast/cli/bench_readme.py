"""sora-fast bench readme."""

import json
from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("--file", action="append", metavar="PAGE",
                        help="pages to bring up to date (default: README.md, docs/measured.md, docs/kernels/ and README's "
                             "figure, docs/images/limits.svg)")
    parser.add_argument("--predictions", metavar="FILE",
                        help="keep these, a predictions.json of sora-fast predict, for the tables of kernels (default: "
                             "those kept)")
    parser.add_argument("--check", action="store_true", help="fail if the tables or the figure differ (default: write them)")


def run(arguments) -> int:
    """Write the tables and the figure of README.md and docs/ from the committed results, or say that they differ."""
    from ..benchmarks import evidence, limits, pages

    if arguments.predictions:
        path = Path(arguments.predictions)
        if not path.is_file():
            raise ValueError(f"--predictions: expected a predictions.json of sora-fast predict, got no file at {path}; "
                             f"check the path")
        print(f"kept {evidence.keep(json.loads(path.read_text(encoding='utf-8')))} predictions")
    updates = [(page, pages.update) for page in arguments.file or pages.pages(Path())]
    for page, update in updates if arguments.file else [*updates, (limits.FIGURE, limits.update)]:
        update(page, check=arguments.check)
        print(f"{page} {'matches' if arguments.check else 'holds'} the committed results")
    return 0
