"""Recorded launches executed by the emulator: what only addresses say of a kernel, counted on a program or a few.

Their tensors, of the device "meta", get memory that holds zeros, so that data decides nothing but the ends of samples, which
are spread evenly.
"""

import re
from collections.abc import Callable

import torch

from . import aot
from .emulated import emulated_gpu

WHOLE = 8  # programs: a launch of no more is executed as it is, of a larger one the first program


class _Memory:
    """Tensors on the CPU in the place of those on "meta"; what shared memory shares it."""

    def __init__(self, launches: list[aot.Launch]):
        self.storages: dict[int, torch.UntypedStorage] = {}
        named = [dict(zip(launch.fn.arg_names, launch.args, strict=False)) | launch.kwargs for launch in launches]
        for given in named:  # first those that need values
            for name, value in given.items():
                if re.fullmatch(r"cu_[qk]", name) and isinstance(value, torch.Tensor):
                    rows = given[name[-1]].shape[0]
                    self.real(value).copy_(torch.linspace(0, rows, len(value), dtype=torch.float64, device="cpu").int())

    def real(self, value):
        if hasattr(value, "block_shape"):  # a descriptor of Triton's
            return type(value)(self.real(value.base), value.shape, value.strides, value.block_shape, value.padding)
        if not isinstance(value, torch.Tensor) or value.device.type != "meta":
            return value
        storage = value.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = torch.zeros(storage.nbytes(), dtype=torch.uint8, device="cpu").untyped_storage()
        made = torch.empty(0, dtype=value.dtype, device="cpu")
        return made.set_(self.storages[storage._cdata], value.storage_offset(), value.shape, value.stride())


def wavefronts(call: Callable[[], object], cc: int) -> list[dict[str, float] | None]:
    """Of each launch that ``call`` makes: of what its loops access shared memory with, the wavefronts over the ideal.

    By SASS's opcodes: LDS, STS, LDSM, STSM, LDGSTS; those that are in no loop are left out. None: nothing was executed
    twice, as where sizes are in tensors whose values nobody here knows.

    Raises:
        ImportError: numpy is missing. memory.Fault: what the emulator finds.
    """
    launches = aot.launches(call)
    memory, found = _Memory(launches), []
    with emulated_gpu(f"sm{cc}", counters=True) as emulator:
        for launch in launches:
            def grid(bound, launch=launch):
                asked = launch.grid(bound) if callable(launch.grid) else launch.grid
                programs = 1
                for size in asked:
                    programs *= size
                return asked if programs <= WHOLE else (1,) * len(asked)

            launch.fn[grid](*map(memory.real, launch.args), **{name: memory.real(value)
                                                              for name, value in launch.kwargs.items()})
            counters = emulator.records[-1].counters
            found.append(counters.conflicts_in_loops() if counters.blocks.max() > counters.blocks[0] else None)
    return found
