"""What every wrong command line must look like."""


def refused(result, *parts):
    """One sentence on stderr and exit code 2."""
    code, _, wrong = result
    assert code == 2 and wrong.startswith("sora-fast: ") and wrong.count("\n") == 1 and "Traceback" not in wrong, wrong
    for part in parts:
        assert part in wrong, wrong
