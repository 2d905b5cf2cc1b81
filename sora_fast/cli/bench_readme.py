"""sora-fast bench readme."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("--file", default="README.md", help="(default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="fail if the tables differ (default: write them)")


def run(arguments) -> int:
    """Write README.md's measured tables from the committed results, or say that they differ."""
    from ..benchmarks import tables

    tables.update_readme(Path(arguments.file), check=arguments.check)
    print(f"{arguments.file} {'matches' if arguments.check else 'holds'} the committed results")
    return 0
