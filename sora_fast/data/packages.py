"""Packages that reading and writing media need, imported when they are first used."""

import importlib


def require(module: str, package: str, extra: str = "train"):
    """The imported module, or an ImportError that says which extra brings its package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"sora_fast.data: {package} is needed here and could not be imported ({error}); install it with "
            f'pip install "sora_fast[{extra}]"'
        ) from error
