"""How long the default tests may take."""

LIMIT = 600  # seconds on two slow cores: eight minutes, and two for the slowest machine


def too_long(config, seconds: float) -> str:
    """Why a run of pytest with ``config`` that took ``seconds`` fails: every contributor waits for the default tests.

    "" where it was not of all of them, or in time.
    """
    whole = config.args_source.name == "TESTPATHS" and config.option.markexpr == "not full" and not config.option.keyword
    if not whole or seconds <= LIMIT:
        return ""
    return f"the default tests took {seconds:.0f} s, and may take {LIMIT}: make them faster, or mark modules full"
