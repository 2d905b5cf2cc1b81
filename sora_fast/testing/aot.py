"""Ahead-of-time proof of Triton kernels: compiled for GPUs that are not here, their machine code judged.

A family takes part through ``aot_cases()`` in sora_fast.testing.launches. The launches are recorded instead of made, and
what is compiled is what Triton would compile for them: types, constants, alignment and options are its own. A width that
masks or strides must be a constant or specialised: under do_not_specialize nothing is known to be a multiple of 16, and
loads shrink to single numbers.

Works with Triton 3.6 to 3.9. Nothing here runs a kernel or needs a driver.
"""

import contextlib
import importlib
import io
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from ..kernels.arch import SHARED, TMEM
from . import sass

CCS = tuple(SHARED)  # compute capabilities: 80 is sm_80
ALIGNED = ["tt.divisibility", 16]
FUSION = {"enable_fp_fusion": True}  # explicit: the default changes in Triton 3.10, and 3.9 warns where none is given


@dataclass(frozen=True)
class AotCase:
    """One kernel with its constants, and what its machine code must show."""

    name: str
    fn: JITFunction
    signature: Mapping[str, str]  # every parameter: "*bf16", "i32", "i64", "fp32", "constexpr"
    constexprs: Mapping[str, object]
    aligned: tuple[str, ...] = ()  # parameters that are multiples of 16: pointers in bytes, sizes in elements
    options: Mapping[str, object] = field(default_factory=dict)  # num_warps, num_stages, maxnreg, ...
    ccs: tuple[int, ...] = CCS
    wants_matrix: bool = False  # a product of 16-bit numbers: HMMA, HGMMA or UTCHMMA
    expected_drains: int | None = None  # sm_90: waits for all wgmma in one iteration of each main loop
    wants_shared: bool = False  # sm_90: both factors of every product from shared memory
    wants_wide: bool = False  # at least one load and one store of 16 bytes
    allowed_spills: int = 0  # LDL and STL; say beside it which measurement excuses them
    gated: bool = True  # False: in the table, not in the verdict


@dataclass(frozen=True)
class Launch:
    """What a kernel was launched with: fn[grid](*args, **kwargs)."""

    fn: JITFunction
    grid: object
    args: tuple
    kwargs: dict

    def case(self, name: str, **wants) -> AotCase:
        backend, binder = _binder(self.fn)
        bound, specialization, options = binder(*self.args, **self.kwargs)
        kwargs = {**FUSION, **self.kwargs}
        _, signature, constexprs, attrs = self.fn._pack_args(backend, kwargs, bound, specialization, options)
        if any(len(path) != 1 for path in (*constexprs, *attrs)):
            raise TypeError(f"Launch.case: {self.fn.__name__} must take no tuples of arguments; pass them one by one")
        names = self.fn.arg_names
        # Triton 3.6 lists constant strings among the attributes too, hence the second condition.
        aligned = tuple(names[i] for (i,), found in attrs.items() if ALIGNED in found and signature[names[i]] != "constexpr")
        constants = {names[i]: value for (i,), value in constexprs.items()}
        return AotCase(name, self.fn, signature, constants, aligned, options, **wants)


@dataclass(frozen=True)
class Compiled:
    kernel: str
    cc: int
    sass: str
    ttir: str  # Triton's own intermediate form, before it is lowered; "" of Gluon, which begins below it
    registers: int  # of one thread
    shared: int  # bytes of one block
    tmem: int  # columns of tensor memory
    losses: tuple[str, ...]  # ptxas on serialised wgmma: C7511, C7513, C7515, ... (not in every case: count drains)

    @cached_property
    def functions(self) -> list[list[sass.Instruction]]:
        return sass.functions(self.sass)

    @property
    def code(self) -> list[sass.Instruction]:
        return [i for function in self.functions for i in function]

    @property
    def spills(self) -> int:
        """Loads and stores of local memory; cuobjdump's own LOCAL column is always 0."""
        return sum(i.base in ("LDL", "STL") for i in self.code)

    @property
    def matrix(self) -> str:
        """The matrix instructions: "HGMMA", or "" for none."""
        return " ".join(base for base in sass.MATRIX if any(i.base == base for i in self.code))

    @property
    def from_registers(self) -> int:
        """HGMMA whose first factor is in registers: another one stands between its sums and the descriptors."""
        return sum(i.base == "HGMMA" and i.text.partition("gdesc")[0].count("R") > 1 for i in self.code)

    @property
    def drains(self) -> tuple[int, ...]:
        return tuple(count for function in self.functions for count in sass.drains(function))

    @property
    def bare_trap(self) -> bool:
        """Nothing is written and there is a trap. (A trap alone is normal: sm_100 has them behind barriers.)"""
        writes = {"STG", "RED", "REDG", "ATOM", "ATOMG", "ST", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED"}
        found = {i.base for i in self.code}
        return "BPT" in found and not found & writes

    @property
    def widest_load(self) -> int:
        return sass.widest(self.code, "LDG", "LDGSTS", bulk="UTMALDG")

    @property
    def widest_store(self) -> int:
        return sass.widest(self.code, "STG", bulk="UTMASTG")


@dataclass(frozen=True)
class Result:
    case: AotCase
    cc: int
    compiled: Compiled | None  # None: it does not compile
    violations: tuple[str, ...]


def _refuse_interpreter(fn) -> None:
    if knobs.runtime.interpret or not isinstance(fn, JITFunction):
        raise RuntimeError(f"aot: expected a compiled @triton.jit function, got {type(fn).__name__} with the interpreter "
                           f"{'on' if knobs.runtime.interpret else 'off'}; import kernels with TRITON_INTERPRET unset")


def _binder(fn: JITFunction, cc: int = 90):
    """Triton's backend and its reading of a call's arguments: (values, (type, specialization) of each, options)."""
    _refuse_interpreter(fn)
    backend = make_backend(GPUTarget("cuda", cc, 32))
    return backend, create_function_from_signature(fn.signature, fn.params, backend)


def launches(call: Callable[[], object]) -> list[Launch]:
    """The launches ``call`` makes, recorded instead of made; it may use tensors of the device "meta"."""
    found = []

    def record(self, *args, grid, warmup, **kwargs):
        _refuse_interpreter(self)
        found.append(Launch(self, grid, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return found


def specialization_keys(fn: JITFunction, calls: Iterable[tuple[tuple, dict]]) -> set[str]:
    """Keys under which Triton's cache would look for a kernel, one per compilation, for calls (args, kwargs)."""
    _, binder = _binder(fn)
    return {compute_cache_key({}, *binder(*args, **kwargs)[1:]) for args, kwargs in calls}


def cache_violations(calls: Iterable[Callable[[], object]]) -> list[str]:
    """Sentences on every kernel that Triton would compile more than once for ``calls``, which differ only in sizes."""
    seen: dict[JITFunction, list[tuple[tuple, dict]]] = {}
    for call in calls:
        for launch in launches(call):
            seen.setdefault(launch.fn, []).append((launch.args, launch.kwargs))
    found = []
    for fn, made in seen.items():
        count = len(specialization_keys(fn, made))
        if count > 1:
            _, binder = _binder(fn)
            read = [binder(*args, **kwargs)[1] for args, kwargs in made]
            names = [name for name, *column in zip(fn.arg_names, *read, strict=True) if len(set(map(str, column))) > 1]
            found.append(f"{fn.__name__}: expected one cache entry for all sizes, got {count}, because of "
                         f"{', '.join(names) or 'the options'}; make sizes tl.int64 and name them in do_not_specialize.")
    return found


def source_of(fn, signature, constexprs, aligned) -> ASTSource:
    """What Triton compiles for these arguments."""
    _refuse_interpreter(fn)
    attrs = {(fn.arg_names.index(name),): [ALIGNED] for name in aligned}
    kind = ASTSource
    if fn.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as kind
    # The order of the signature is the order of the parameters.
    return kind(fn, {name: signature[name] for name in fn.arg_names}, dict(constexprs), attrs)


def build(fn, signature, constexprs, aligned, cc, options):
    """(Triton's compiled kernel, what ptxas printed). Always from the start: a cached kernel has no messages."""
    source = source_of(fn, signature, constexprs, aligned)
    printed = io.StringIO()
    with (tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope(),
          contextlib.redirect_stdout(printed)):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options={**FUSION, **options})
    return kernel, printed.getvalue()


def _read(kernel, printed: str, cc: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", printed))
    ttir = kernel.asm["ttir"] if "ttir" in kernel.asm else ""
    # C7519 is none: ptxas adds a fence before a product, which costs one instruction and waits for nothing
    losses = tuple(re.findall(r"\(C75(?!19)\d\d\) .*", printed))
    return Compiled(kernel.metadata.name, cc, listing.stdout, ttir, registers, kernel.metadata.shared,
                    getattr(kernel.metadata, "tmem_size", None) or 0, losses)


def compile_for(fn: JITFunction, signature: Mapping[str, str], constexprs: Mapping[str, object], aligned: Iterable[str],
                cc: int, **options) -> Compiled:
    """``fn`` compiled for compute capability ``cc`` (90: sm_90); arguments as in AotCase, options by keyword."""
    return _read(*build(fn, signature, constexprs, aligned, cc, options), cc)


def uses_tf32(compiled: Compiled) -> bool:
    """Whether a float32 product drops 13 bits of its factors. tf32x3 does not count: it is exact to float32's rounding."""
    return re.search(r"tt\.dot .*inputPrecision = tf32 : tensor<[\dx]+xf32> \*", compiled.ttir) is not None


def violations(compiled: Compiled, cc: int, *, wants_matrix: bool = False, expected_drains: int | None = None,
               wants_shared: bool = False, wants_wide: bool = False, allowed_spills: int = 0) -> list[str]:
    """What is wrong with the machine code, in full sentences."""
    if compiled.bare_trap:
        return ["expected a kernel that writes its outputs, got a bare trap; look for an assumption that cannot hold "
                "or a value that is always undefined."]
    found = []
    if compiled.spills > allowed_spills:
        found.append(f"expected at most {allowed_spills} spill instructions (LDL, STL), got {compiled.spills} at "
                     f"{compiled.registers} registers; use smaller blocks or more warps.")
    if compiled.shared > SHARED[cc]:
        found.append(f"expected at most {SHARED[cc]:,} bytes of shared memory, got {compiled.shared:,}; "
                     f"use smaller blocks or fewer stages.")
    if compiled.tmem > TMEM:
        found.append(f"expected at most {TMEM} columns of tensor memory, got {compiled.tmem}; use smaller blocks.")
    if wants_matrix and not compiled.matrix:
        found.append("expected HMMA, HGMMA or UTCHMMA for a product of 16-bit numbers, got none; use tl.dot.")
    if uses_tf32(compiled):
        found.append("expected float32 products in float32, got TF32; pass input_precision 'tf32x3' or 'ieee' to tl.dot.")
    if cc == 90 and expected_drains is None and compiled.losses:
        found.append(f"expected wgmma in a pipeline, got the message of ptxas: {compiled.losses[0]}.")
    if cc == 90 and expected_drains is not None:
        if not compiled.drains:
            found.append("expected a loop with HGMMA, got none; wgmma needs 4 warps and at least 64 rows.")
        for drains in compiled.drains:
            if drains != expected_drains:
                why = compiled.losses[0] if compiled.losses else "ptxas gave no message"
                found.append(f"expected {expected_drains} waits for all wgmma ({sass.DRAIN}) in the main loop, "
                             f"got {drains}: {why}.")
    if wants_shared and cc == 90 and compiled.from_registers:
        found.append(f"expected both factors of a product from shared memory, got {compiled.from_registers} HGMMA with one "
                     f"in registers; give tl.dot what was loaded, transposed at the most.")
    if wants_wide:
        for what, width in (("load", compiled.widest_load), ("store", compiled.widest_store)):
            if width < 16:
                found.append(f"expected a {what} of 16 bytes, got {width} at most; give pointers, strides and masking "
                             f"widths their alignment (constants, or specialised), each thread 16 bytes in a row.")
    return found


def cases_of(name: str, call: Callable[[], object], wants: Mapping[str, object]) -> list[AotCase]:
    """A case for each kernel that ``call`` launches; refuses a call that launches none.

    ``wants`` are for all of them, but for what stands under a kernel's own name:
    {"reduce_slots_kernel": {"wants_wide": False}}.
    """
    found = launches(call)
    if not found:
        raise ValueError(f"cases_of: {name!r} must launch a kernel, got no launch; give it a call that reaches one")
    kernels = {launch.fn.__name__ for launch in found}
    common = {key: value for key, value in wants.items() if key not in kernels}
    return [launch.case(name if len(found) == 1 else f"{name}: {launch.fn.__name__}",
                        **{**common, **wants.get(launch.fn.__name__, {})}) for launch in found]


def ours(family: str) -> list[AotCase]:
    """The cases of a family of sora_fast.testing.launches."""
    module = importlib.import_module(f"{__package__}.launches.{family}")
    return [case for name, call, wants in module.aot_cases() for case in cases_of(name, call, wants)]


def _judge(case: AotCase, cc: int) -> Result:
    try:
        compiled = compile_for(case.fn, case.signature, case.constexprs, case.aligned, cc, **case.options)
    except Exception as error:  # whatever the compiler raises is a finding, and the others still count
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Result(case, cc, None, (f"expected a kernel that compiles, got {type(error).__name__}: {lines[-1]}.",))
    return Result(case, cc, compiled, tuple(violations(
        compiled, cc, wants_matrix=case.wants_matrix, expected_drains=case.expected_drains, wants_shared=case.wants_shared,
        wants_wide=case.wants_wide, allowed_spills=case.allowed_spills)))


_work: list[tuple[AotCase, int]] = []  # of the processes that check_all forks


def _judge_at(place: int) -> tuple[Compiled | None, tuple[str, ...]]:
    result = _judge(*_work[place])
    return result.compiled, result.violations


def check_all(cases: Iterable[AotCase], ccs: tuple[int, ...] = CCS, processes: int = 2) -> tuple[list[Result], list[str]]:
    """Every case on every architecture it is for: the results, and the violations of the gated ones as sentences."""
    work = [(case, cc) for case in cases for cc in ccs if cc in case.ccs]
    if len(work) < 8:
        results = [_judge(*each) for each in work]
    else:
        # Triton compiles under Python's lock, hence processes; forks, because kernels cannot be sent to another.
        _work[:] = work
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
            found = pool.map(_judge_at, range(len(work)))
            results = [Result(*each, *parts) for each, parts in zip(work, found, strict=True)]
    return results, [f"{result.case.name}, sm_{result.cc}: {sentence}"
                     for result in results if result.case.gated for sentence in result.violations]


def table(results: Iterable[Result]) -> str:
    """The resources of every result, as markdown."""
    head = ("kernel", "config", "arch", "Triton", "registers", "shared (bytes)", "tmem", "spills", "matrix", "load (bytes)",
            "store (bytes)", "drains")
    rows = [head, ("---",) * len(head)]
    for result in results:
        settings = {**result.case.constexprs, **result.case.options}
        config = " ".join(f"{key}={value}" for key, value in settings.items())
        start, found = (result.case.name, config, f"sm_{result.cc}", triton.__version__), result.compiled
        if found is None:
            rows.append((*start, "does not compile", *[""] * (len(head) - len(start) - 1)))
            continue
        counts = (found.registers, found.shared, found.tmem, found.spills, found.matrix or "none", found.widest_load,
                  found.widest_store, " ".join(map(str, found.drains)) or "-")
        rows.append((*start, *map(str, counts)))
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
