"""sora_fast: fast, differentiable, ragged layers for Sora-style video models.

The names below load on first use, so that ``import sora_fast`` costs little more than ``import torch``.
"""

import importlib

__version__ = "0.2.0"

_HOME = {
    "Pack": "sora_fast.pack",
    "use_backend": "sora_fast.dispatch",
    "explain": "sora_fast.explanation",
    "info": "sora_fast.explanation",
    "validate": "sora_fast.testing",
    "setup": "sora_fast.tuning.setting_up",
    "accelerate": "sora_fast.integrations",
    "restore": "sora_fast.integrations",
} | dict.fromkeys(("ops", "nn", "models", "integrations", "diffusion", "data", "compat", "reference", "testing"))

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        from .other_names import missing

        raise missing(__name__, _HOME, name)
    home = _HOME[name]
    if home is None:
        return importlib.import_module(f"sora_fast.{name}")
    module = importlib.import_module(home)
    value = getattr(module, name)
    globals()[name] = value  # the function, not the module of the same name that the import has just bound here
    return value


def __dir__():
    return sorted(__all__)
