"""sora-fast info."""


def add_arguments(parser) -> None:
    """None but --help."""


def run(arguments) -> int:
    from ..explanation import info

    print(info())
    return 0
