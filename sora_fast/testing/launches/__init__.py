"""Launches of every kernel at shapes of models, on tensors without memory: what is compiled where there is no GPU.

Each module is of a family and has ``aot_cases()``, which yields a name, a function that launches kernels on tensors of the
device "meta", and what their machine code must show: the fields of sora_fast.testing.aot.AotCase from ``wants_matrix`` on::

    yield "norm_modulate bf16 1152", lambda: norm_modulate(x, ...), dict(wants_wide=True)

A family with kernels in csrc has ``cuda_cases()`` too: a name, and a call of the op with backend="cuda" on CPU tensors.
"""

import pkgutil

FAMILIES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
