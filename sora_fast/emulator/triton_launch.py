"""Triton launches on CPU tensors: compiled for a GPU that need not be present, and executed by the emulator.

``launching(emulator)`` is a scope of the calling context (a ContextVar): in other threads, and outside, kernels are launched
as Triton does. Triton's own methods are replaced while a scope is open anywhere, and put back when the last one ends.
"""

import contextlib
import struct
import threading
from collections.abc import Iterator

import numpy as np
import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from . import memory, tma
from .launches import Emulator, current_emulator
from .triton_compile import CompiledKernel, compiled

PACK = {"i1": "<b", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q",
        "fp32": "<f", "f32": "<f", "fp64": "<d", "u1": "<B"}

_lock = threading.Lock()
_open_scopes = 0  # scopes, in all threads
_original_run = {JITFunction: JITFunction.run, Autotuner: Autotuner.run}


@contextlib.contextmanager
def launching(emulator: Emulator) -> Iterator[None]:
    """Inside, in this context, ``kernel[grid](...)`` runs on ``emulator``; scopes can be nested."""
    global _open_scopes
    with _lock:
        _open_scopes += 1
        if _open_scopes == 1:
            JITFunction.run, Autotuner.run = _run, _run_tuned
    token = current_emulator.set(emulator)
    try:
        yield
    finally:
        current_emulator.reset(token)
        with _lock:
            _open_scopes -= 1
            if _open_scopes == 0:
                JITFunction.run, Autotuner.run = _original_run[JITFunction], _original_run[Autotuner]


def _run(self, *args, grid, warmup, **options):
    """Replaces JITFunction.run."""
    emulator = current_emulator.get()
    if emulator is None:
        try:
            return _original_run[JITFunction](self, *args, grid=grid, warmup=warmup, **options)
        except RuntimeError as error:
            if "active drivers" not in str(error):
                raise
            raise RuntimeError(f"{self.__name__}: expected a GPU, or a launch in the context that opened emulated_gpu, got "
                               f"neither; in a thread of your own run it with contextvars.copy_context().run") from error
    for hook in self.pre_run_hooks:
        hook(*args, **options)

    kernel, bound = compiled(self, args, options, emulator.compute_capability, emulator.cache, _launch)
    if not warmup:
        _launch(kernel, bound, grid(bound) if callable(grid) else grid)
    return kernel


def _run_tuned(self, *args, **options):
    """Replaces Autotuner.run: nothing is timed; the config is the first after pruning, or the one named."""
    emulator = current_emulator.get()
    if emulator is None:
        return _original_run[Autotuner](self, *args, **options)
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    configs = self.configs
    if self.early_config_prune:
        configs = self.early_config_prune(configs, self.nargs, **options)
    config = self.best_config = _choose_config(self.base_fn.__name__, configs, emulator.configs)
    if config.pre_hook is not None:
        config.pre_hook({**self.nargs, **options, **config.all_kwargs()})
    try:
        return self.fn.run(*args, **options, **config.all_kwargs())
    finally:
        self.nargs = None


def _choose_config(name: str, configs: list, named: dict) -> "triton.Config":
    wanted = named.get(name, {})
    for config in configs:
        values = config.all_kwargs()
        if all(values.get(key) == value for key, value in wanted.items()):
            return config
    raise ValueError(f"emulated_gpu: expected a config of {name} with {wanted}, got "
                     f"{'; '.join(map(str, configs)) or 'none'}; name values that one of them has")


def _launch(kernel: CompiledKernel, bound: dict, grid) -> None:
    emulator = current_emulator.get()
    if emulator is None:
        raise RuntimeError(f"{kernel.name}: expected a launch inside emulated_gpu, for which it was compiled, got one "
                           f"outside; launch the function itself")
    grid = (*grid, 1, 1)[:3]
    if 0 in grid:
        return
    metadata = kernel.metadata
    if metadata.num_ctas != 1:
        raise NotImplementedError(f"{kernel.name}: expected num_ctas=1, got {metadata.num_ctas}: thread-block clusters are "
                                  f"not executed; launch it without")
    if emulator.shared is not None and metadata.shared > emulator.shared:
        raise OutOfResources(metadata.shared, emulator.shared, "shared memory")
    allocations = memory.Allocations()
    values = _arguments(kernel, bound, allocations)
    ctas, keep = int(np.prod(grid)), []
    for size in (metadata.global_scratch_size, metadata.profile_scratch_size):
        scratch = np.zeros(size * ctas + 128, np.uint8)
        keep.append(scratch)
        start = scratch.ctypes.data + -scratch.ctypes.data % 128
        allocations.add(start, size * ctas, "the scratch memory of the launch")
        values.append(struct.pack("<Q", start if size else 0))

    def parameters(program) -> bytes:
        params = program.kernel.params
        if [len(value) for value in values] != [param.size for param in params]:
            raise RuntimeError(f"{kernel.name}: expected parameters of {[p.size for p in params]} bytes, got arguments of "
                               f"{[len(value) for value in values]}: this Triton passes them otherwise; report it")
        raw = bytearray(params[-1].offset + params[-1].size)
        for param, value in zip(params, values, strict=True):
            raw[param.offset:param.offset + param.size] = value
        return bytes(raw)

    emulator.execute(kernel.name, kernel.asm["ptx"], grid, (32 * metadata.num_warps, 1, 1), parameters, allocations,
                     metadata.shared)


def _arguments(kernel: CompiledKernel, bound: dict, allocations: memory.Allocations) -> list[bytes]:
    """The bytes of every parameter that an argument makes, in order; tensors become allocations."""
    values, descriptors = [], 0
    for name, value, kind in _flatten_arguments(kernel.src.signature, bound):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            of = kernel.metadata.tensordesc_meta  # none on a GPU without TMA
            values += _descriptor(value, of[descriptors] if of else None, allocations, name)
            descriptors += 1
        elif kind.startswith("*"):
            values.append(struct.pack("<Q", _address(kernel, name, value, allocations)))
        elif kind in ("fp16", "bf16"):
            raise NotImplementedError(f"{kernel.name}: expected {name} to be a float32, got {kind}; pass a float")
        elif kind in PACK:
            values.append(struct.pack(PACK[kind], value))
        else:
            raise NotImplementedError(f"{kernel.name}: expected {name} to be a tensor, a number or a descriptor, got one of "
                                      f"type {kind}; the emulator does not pass it")
    return values


def _flatten_arguments(signature: dict, bound: dict):
    """(name, value, type) of every argument; the elements of a tuple are arguments of their own."""
    def walk(name, value, kind):
        if isinstance(kind, tuple):
            for place, (each, of) in enumerate(zip(value, kind, strict=True)):
                yield from walk(f"{name}[{place}]", each, of)
        else:
            yield name, value, kind
    for name, kind in signature.items():
        yield from walk(name, bound[name], kind)


def _address(kernel: CompiledKernel, name: str, value, allocations: memory.Allocations) -> int:
    if value is None:
        return 0
    value = getattr(value, "base", None) if type(value).__name__ == "TensorWrapper" else value
    if not hasattr(value, "is_cuda") or value.is_cuda or value.device.type != "cpu":
        raise ValueError(f"{kernel.name}: expected {name} to be a CPU tensor in emulated_gpu, got one on "
                         f"{getattr(value, 'device', type(value).__name__)}; move it to the CPU")
    allocations.add_tensor(value, name)
    return value.data_ptr()


def _descriptor(value, meta: dict | None, allocations: memory.Allocations, name: str) -> list[bytes]:
    """A host-side TensorDescriptor as Triton's launcher passes it: a tensor map by value, then its shape and strides.

    Without ``meta``, on a GPU without TMA: its fields in place of the map.
    """
    allocations.add_tensor(value.base, name)
    rest = [*(struct.pack("<i", size) for size in value.shape), *(struct.pack("<q", stride) for stride in value.strides)]
    if meta is None:
        flags = [value.padding == "nan", *([value.round_f32_to_tf32] if hasattr(value, "round_f32_to_tf32") else [])]
        sizes = (struct.pack("<q", size) for size in (*value.shape, *value.strides))
        return [struct.pack("<Q", value.base.data_ptr()), *sizes, *(struct.pack("<B", flag) for flag in flags), *rest]
    tensor_map = np.zeros(1, tma.MAP)
    rank, block = len(value.shape), meta["block_size"]
    tensor_map["address"], tensor_map["rank"], tensor_map["swizzle"] = value.base.data_ptr(), rank, meta["swizzle"]
    tensor_map["type"] = tma.ELEMTYPE.get(meta["elem_type"], meta["elem_type"])
    tensor_map["dims"][0, :rank], tensor_map["box"][0, :rank] = value.shape[::-1], block[::-1]
    tensor_map["strides"][0, :rank - 1] = [stride * meta["elem_size"] for stride in value.strides[-2::-1]]
    tensor_map["steps"][0, :rank] = 1
    tensor_map["fill"] = value.padding == "nan"
    return [tensor_map.tobytes(), *rest]
