"""Compiles @triton.jit functions to PTX for a GPU that need not be present, without ptxas and without Triton's cache.

The stages are Triton's own up to PTX (triton.compiler.compile runs them too, then ptxas). Works with Triton 3.6 to 3.9.
"""

import hashlib
import json
import os
import tempfile
from collections import namedtuple
from pathlib import Path

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars, ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .memory import Fault


class CompiledKernel:
    """Returned by ``kernel[grid](...)`` and ``kernel.warmup(...)`` in place of Triton's class of this name.

    ``name``, ``hash``, ``src``, ``metadata`` (num_warps, shared, ...) and ``asm`` ("ttir", "ttgir", "llir", "ptx") are as
    Triton's; ``self[grid](*arguments)`` launches again with all arguments of the function in their order. What ptxas or a
    driver would know (n_regs, n_spills, asm["cubin"]) is not there.
    """

    def __init__(self, src, hash: str, asm: dict[str, str], metadata: dict, launch):
        self.src, self.hash, self.asm = src, hash, asm
        self.name = metadata["name"]
        self.metadata = namedtuple("KernelMetadata", sorted(metadata))(**metadata)
        self._launch = launch

    def __getitem__(self, grid):
        return lambda *arguments: self._launch(self, dict(zip(self.src.fn.arg_names, arguments, strict=True)), grid)

    def __getattr__(self, name):
        if name in ("n_regs", "n_spills", "n_max_threads", "kernel", "function", "module", "run"):
            raise AttributeError(f"{self.name}: expected an attribute that compilation to PTX gives, got {name!r}, which "
                                 f"ptxas or a driver gives; compile outside emulated_gpu for it")
        raise AttributeError(name)


_binders: dict = {}
_kernels: dict = {}


def bind(fn, arguments, options: dict, compute_capability: int):
    """(arguments by name with defaults, their specialization, options), as Triton's launch has them."""
    key = (fn, compute_capability)
    if key not in _binders:
        backend = make_backend(GPUTarget("cuda", compute_capability, 32))
        _binders[key] = backend, create_function_from_signature(fn.signature, fn.params, backend)
    backend, binder = _binders[key]
    return backend, *binder(*arguments, **options)


def compiled(fn, arguments, options: dict, compute_capability: int, cache: Path | None,
             launch) -> tuple[CompiledKernel, dict]:
    """The kernel for these arguments, and the arguments by name."""
    options = dict(options)
    options["debug"] = options.get("debug", fn.debug) or knobs.runtime.debug
    backend, bound, specialization, given = bind(fn, arguments, options, compute_capability)
    key = (fn, compute_capability, str(specialization), str(given), cache)
    if key not in _kernels:
        parsed, signature, constants, attributes = fn._pack_args(backend, options, bound, specialization, given)
        source = _source(fn)(fn, signature, constants, attributes)
        _kernels[key] = _compile(source, backend, parsed, GPUTarget("cuda", compute_capability, 32), cache, launch)
    for (name, _), (value, where) in fn.used_global_vals.items():
        if where.get(name) != value:
            raise RuntimeError(f"Global variable {name} has changed since we compiled this kernel, from {value} to "
                               f"{where.get(name)}")
    return _kernels[key], bound


def _source(fn) -> type:
    if not fn.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _compile(source, backend, options, target: GPUTarget, cache: Path | None, launch) -> CompiledKernel:
    variables = sorted(get_cache_invalidating_env_vars().items())
    inputs = [source.hash(), options.hash(), triton.__version__, str(target), str(variables)]
    key = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
    path = None if cache is None else Path(cache) / f"{key}.json"
    found = _read(path)
    if found is None:
        found = _stages(source, backend, options, target)
        _write(path, found)
    return CompiledKernel(source, key, found["asm"], found["metadata"], launch)


def _stages(source, backend, options, target: GPUTarget) -> dict:
    """The text of every stage up to PTX, and the metadata of the stages."""
    metadata = dict(target=target, triton_version=triton.__version__, **options.__dict__)
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    asm = {}
    for name, stage in stages.items():
        if name == "cubin":
            break
        module = stage(module, metadata)
        asm[name] = str(module)
    return json.loads(json.dumps(dict(asm=asm, metadata=metadata), default=vars))


def _read(path: Path | None) -> dict | None:
    try:
        found = None if path is None else json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and {"asm", "metadata"} <= found.keys() else None
    except (OSError, ValueError):  # there is none, or half of one
        return None


def _write(path: Path | None, found: dict) -> None:
    """Written atomically: another process may read it."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(found, file)
        os.replace(file.name, path)
    except OSError as error:
        raise Fault(f"emulated_gpu: expected to keep PTX in {path.parent}, got: {error}; set SORA_FAST_CACHE to a folder "
                    f"that can be written") from error
