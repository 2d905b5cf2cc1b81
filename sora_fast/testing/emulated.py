"""``emulated_gpu``: Triton's and our CUDA kernels on CPU tensors, compiled for a GPU and executed by sora_fast.emulator."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from .. import env
from ..dispatch import use_emulated_gpu
from ..kernels.arch import SHARED

if TYPE_CHECKING:
    from ..emulator.launches import Emulator

ARCHITECTURES = tuple(f"sm{capability}" for capability in SHARED)


@contextlib.contextmanager
def emulated_gpu(arch: str = "sm90", *, schedules: int | str | Iterable[str] = "late", race: bool = False,
                 counters: bool = False, configs: Mapping[str, Mapping[str, object]] | None = None,
                 change: Callable[[str], str] | None = None, raises: bool = True) -> Iterator["Emulator"]:
    """Inside, in this context (a thread, an asyncio task), kernels take CPU tensors and run as on a GPU that is not here.

    Every launch of a ``@triton.jit`` or ``@gluon.jit`` function, the user's own too, is compiled to PTX for ``arch``, and
    that PTX is executed in this process; ops take ``backend="triton"`` and ``backend="cuda"`` for CPU tensors, with the
    configs that such a GPU gets. ``auto`` chooses as outside. PTX is kept in SORA_FAST_CACHE/emulator, never in Triton's
    cache. torch.compile of our ops is refused inside.

    Args:
        arch: "sm80", "sm86", "sm89", "sm90", "sm100" or "sm120". tcgen05 and clusters are refused by name.
        schedules: when asynchronous copies and MMAs complete, and in which order warps run: "late" (as late as the PTX ISA
            allows), "early" (at once), "random" (by a seed), several of them, or how many of late, early, random, random,
            ... Each launch is executed once under each, from the same memory; the last one's results stay.
        race: look for races and missing fences too, three to five times as slow.
        counters: count instructions, transactions and FLOPs of each launch.
        configs: by name of an autotuned kernel, values that its config is to have, as in {"kernel": {"BLOCK": 64}}; without,
            it is the first that pruning leaves. Nothing is timed.
        change: takes and returns the PTX of each kernel, to plant faults.
        raises: False leaves findings in the records alone.

    Yields:
        The Emulator: ``records`` lists the launches in order, each with name, grid, ptx, findings and counters.

    Raises:
        ValueError: an unknown ``arch`` or schedule. ImportError: Triton, numpy or threadpoolctl is missing.
        sora_fast.emulator.memory.Fault: from a launch that touches what is not its own, races, deadlocks, reads what was not
            written, ..., with the kernel's file and line, the instruction, warp and lane.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"emulated_gpu: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}; choose one of them")
    needed = ("triton", "numpy", "threadpoolctl")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"emulated_gpu: expected the packages {', '.join(needed)}, got no {' and no '.join(missing)}; run "
                          f"pip install 'sora_fast[emulator]'")
    if env.interpreted():
        raise RuntimeError("emulated_gpu: expected kernels that Triton compiles, got TRITON_INTERPRET=1, with which it "
                           "interprets them; unset it")
    from ..emulator import launches, triton_launch

    capability = int(arch.removeprefix("sm"))
    emulator = launches.Emulator(
        compute_capability=capability, shared=SHARED[capability], schedules=launches.schedules(schedules), race=race,
        count=counters, configs={name: dict(values) for name, values in (configs or {}).items()},
        cache=env.cache() / "emulator", change=change, raises=raises)
    with triton_launch.launching(emulator), use_emulated_gpu(Device(arch, emulator)):
        yield emulator


class Device:
    """What dispatch asks of a GPU that is emulated."""

    def __init__(self, arch: str, emulator):
        self.arch, self.emulator = arch, emulator

    def launch(self, extension, op: str, fields: dict) -> None:
        import torch

        from ..emulator import csrc_launch

        tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
        addresses = {name: value.data_ptr() for name, value in tensors.items()}
        csrc_launch.launch(self.emulator, extension, op, tensors, {**fields, **addresses})
