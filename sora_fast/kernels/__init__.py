"""In a checkout: the top-level folder kernels/. An installed copy holds that folder's files instead."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "kernels")]
