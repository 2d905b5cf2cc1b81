"""sora-fast bench compare."""


def add_arguments(parser) -> None:
    parser.add_argument("base", help="the run to compare with: its folder, or its bench.jsonl")
    parser.add_argument("new", help="the other run, on the same GPU")
    parser.add_argument("--fail-slower", default="5%", metavar="SHARE",
                        help="exit with 1 if a row is slower by more than this")


def run(arguments) -> int:
    """Print a verdict for every row that two runs share; 1 if one is slower by more than --fail-slower."""
    from ..benchmarks import compare, rows

    result = compare.compare(rows.read_run(arguments.base), rows.read_run(arguments.new), fraction(arguments.fail_slower))
    print(result)
    return result.exit_code


def fraction(text: str) -> float:
    """0.05 of "5%" or "0.05"."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise ValueError(f"--fail-slower: expected a share such as 5% or 0.05, got {text!r}; write it so")
    return value
