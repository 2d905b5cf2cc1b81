"""Triton's launches on CPU tensors: compiled for a GPU that is not here, and executed by the emulator.

    with emulated(90): ops.norm_modulate(..., backend="triton")
"""

import contextlib
import hashlib
import os
import struct
import time
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import memory, tma
from .codegen import Program
from .machine import Launch, Schedule
from .ptx import parse

PACK = {"i1": "<b", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f",
        "f32": "<f", "fp64": "<d", "u1": "<B"}


class Record:
    """What was launched, for whoever asks."""

    def __init__(self, name, ptx, config, seconds, compile_seconds, launch):
        self.name, self.ptx, self.config, self.seconds, self.compile_seconds, self.launch = (
            name, ptx, config, seconds, compile_seconds, launch)


class Settings:
    """How the emulator runs; changed by tests."""

    def __init__(self, cc=90, **options):
        self.cc = cc
        self.options = options  # of Launch: schedule, checks, race, counters (a function), batch
        self.records: list[Record] = []
        self.change = None  # takes and returns PTX text: planted faults
        self.keep = True
        self.fail_on_findings = True


_binders, _kernels, _programs = {}, {}, {}


def binder_of(fn, cc):
    key = (fn, cc)
    if key not in _binders:
        backend = make_backend(GPUTarget("cuda", cc, 32))
        _binders[key] = backend, create_function_from_signature(fn.signature, fn.params, backend)
    return _binders[key]


def program_of(ptx: str, change=None) -> Program:
    if change is not None:
        ptx = change(ptx)
    key = hashlib.sha256(ptx.encode()).digest()
    if key not in _programs:
        (kernel,) = parse(ptx).values()
        _programs[key] = Program(kernel)
    return _programs[key]


def compiled(fn, args, kwargs, cc):
    backend, binder = binder_of(fn, cc)
    bound, specialization, options = binder(*args, **kwargs)
    key = (fn, cc, str(specialization), str(options))
    if key not in _kernels:
        kwargs = {"enable_fp_fusion": True, **kwargs}
        options, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(fn, signature, constexprs, attrs)
        kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options.__dict__)
        _kernels[key] = kernel, signature
    kernel, signature = _kernels[key]
    return kernel, signature, bound


def descriptor(value, meta, allocations, name):
    """A host-side TensorDescriptor as Triton's launcher passes it: a tensor map by value, then its shape and strides."""
    made = np.zeros(1, tma.MAP)
    rank, block = len(value.shape), meta["block_size"]
    allocations.add_tensor(value.base, name)
    made["address"], made["rank"], made["swizzle"] = value.base.data_ptr(), rank, meta["swizzle"]
    made["type"] = tma.ELEMTYPE.get(meta["elem_type"], meta["elem_type"])
    made["dims"][0, :rank], made["box"][0, :rank] = value.shape[::-1], block[::-1]
    made["strides"][0, :rank - 1] = [stride * meta["elem_size"] for stride in value.strides[-2::-1]]
    made["steps"][0, :rank] = 1
    made["fill"] = value.padding == "nan"
    return [made.tobytes(), *(struct.pack("<i", size) for size in value.shape),
            *(struct.pack("<q", stride) for stride in value.strides)]


def run_launch(settings: Settings, fn, args, grid, kwargs):
    start = time.perf_counter()
    kernel, signature, bound = compiled(fn, args, kwargs, settings.cc)
    ptx = kernel.asm["ptx"]
    program = program_of(ptx, settings.change)
    compile_seconds = time.perf_counter() - start
    if callable(grid):
        grid = grid(bound)
    grid = (*grid, 1, 1)[:3]
    if 0 in grid:
        return
    allocations = memory.Allocations()
    values, keep, descriptors = [], [], 0
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        value = bound[name]
        if kind.startswith("tensordesc"):
            values += descriptor(value, kernel.metadata.tensordesc_meta[descriptors], allocations, name)
            descriptors += 1
            continue
        if kind.startswith("*"):
            if value is None:
                values.append(struct.pack("<Q", 0))
                continue
            allocations.add_tensor(value, name)
            values.append(struct.pack("<Q", value.data_ptr()))
        elif kind in PACK:
            values.append(struct.pack(PACK[kind], value))
        else:
            raise NotImplementedError(f"an argument of type {kind}")
    params = program.kernel.params
    ctas = int(np.prod(grid))
    metadata = kernel.metadata
    for size, align in ((metadata.global_scratch_size, metadata.global_scratch_align), (metadata.profile_scratch_size, 128)):
        if size:
            scratch = np.zeros(size * ctas + 256, np.uint8)
            at = scratch.ctypes.data + -scratch.ctypes.data % 128
            keep.append(scratch)
            allocations.add(at, size * ctas, "scratch")
            values.append(struct.pack("<Q", at))
        else:
            values.append(struct.pack("<Q", 0))
    if len(values) != len(params):
        raise RuntimeError(f"{len(values)} arguments for {len(params)} parameters: {params}")
    raw = bytearray(params[-1].offset + params[-1].size)
    for param, value in zip(params, values):
        assert len(value) == param.size, (param, value)
        raw[param.offset:param.offset + param.size] = value
    threads = 32 * metadata.num_warps
    options = {key: value() if callable(value) and key == "counters" else value for key, value in settings.options.items()}
    start = time.perf_counter()
    launch = Launch(program, grid, (threads, 1, 1), bytes(raw), allocations, shared=metadata.shared, **options)
    seconds = time.perf_counter() - start
    if settings.keep:
        settings.records.append(Record(fn.__name__, ptx, dict(grid=grid, **kwargs), seconds, compile_seconds, launch))
    if launch.findings and settings.fail_on_findings:
        raise memory.Fault("; ".join(launch.findings.values()))


@contextlib.contextmanager
def emulated(cc=90, *, gpu=None, **options):
    """Triton's launches run on the emulator; ops of sora_fast take their Triton backend on the CPU, with a GPU's configs."""
    settings = Settings(cc, **options)

    def run(self, *args, grid, warmup, **kwargs):
        run_launch(settings, self, args, grid, kwargs)

    from sora_fast import env
    from sora_fast.ops import triton_backend

    with contextlib.ExitStack() as stack:
        patch = lambda *a: stack.enter_context(mock.patch.object(*a))
        patch(JITFunction, "run", run)
        patch(nvidia.CUDABackend, "make_cubin", lambda self, src, metadata, opt, capability: b"")
        patch(env, "interpreted", lambda: True)
        triton_backend._reasons.cache_clear() if hasattr(triton_backend._reasons, "cache_clear") else None
        if gpu is not None:
            patch(triton_backend, "gpu_name", lambda device: gpu)
        yield settings


