"""What Triton kernels compile to, without a GPU: the gate of sora_fast.testing.aot, fed with kernels that must pass and with
one of each fault it must refuse, and then with the first case of each of ours on sm_90. test_aot_elsewhere.py has more.

The table of registers, shared memory and instruction counts is ``aot.md`` in pytest's base folder
(``--basetemp DIR`` puts it into DIR).
"""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to compile")
if sys.platform != "linux":
    pytest.skip("cuobjdump comes with Triton's wheels for Linux only", allow_module_level=True)

import aot_kernels  # noqa: E402
import structure  # noqa: E402
import triton  # noqa: E402

from sora_fast.testing import aot, launches, sass  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # beside other tests, which have the other core


@pytest.fixture(autouse=True)
def compiled_here(request):
    own = request.function is test_without_the_interpreter
    if triton.knobs.runtime.interpret and not own:
        pytest.skip("this process interprets kernels; test_without_the_interpreter compiles them in another")


def run_again(python_path: str = "", *arguments: str) -> str:
    """Tests in a process without the interpreter, ``python_path`` first among the imports."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [python_path, environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments],
                          cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="this process compiles kernels itself")
def test_without_the_interpreter():
    run_again("", __file__)


# ---- Planted kernels


def total(dtype="bf16", aligned=("x_ptr", "y_ptr", "out_ptr", "n"), block=2048, **wants):
    pointer = f"*{dtype}"
    signature = {"x_ptr": pointer, "y_ptr": pointer, "out_ptr": pointer, "n": "i32", "BLOCK": "constexpr"}
    return aot.AotCase("sum", aot_kernels.good, signature, {"BLOCK": block}, aligned, {"num_warps": 4},
                       wants_wide=True, **wants)


def matmul(dtype="bf16", m=128, n=64, k=32, warps=4, stages=3, precision="tf32", name="matmul", **wants):
    pointer, constant = f"*{dtype}", "constexpr"
    signature = {"a_ptr": pointer, "b_ptr": pointer, "out_ptr": pointer, "k_size": "i32", "PRECISION": constant,
                 "BLOCK_M": constant, "BLOCK_N": constant, "BLOCK_K": constant}
    constants = {"PRECISION": precision, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return aot.AotCase(name, aot_kernels.matmul, signature, constants, ("a_ptr", "b_ptr", "out_ptr", "k_size"),
                       {"num_warps": warps, "num_stages": stages}, wants_wide=True, **wants)


def trapping():
    signature = {"x_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"}
    return aot.AotCase("trap", aot_kernels.trapping, signature, {"BLOCK": 1024}, ("x_ptr", "out_ptr"))


def chained():
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*bf16", "k_size": "i32",
                 "BLOCK_M": "constexpr", "BLOCK_N": "constexpr"}
    return aot.AotCase("chained", aot_kernels.chained, signature, {"BLOCK_M": 128, "BLOCK_N": 128},
                       ("a_ptr", "b_ptr", "out_ptr", "k_size"), {"num_warps": 8}, wants_matrix=True, expected_drains=0)


def doubled():
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*bf16", "k_size": "i32",
                 "BLOCK_M": "constexpr", "BLOCK_N": "constexpr", "BLOCK_K": "constexpr"}
    return aot.AotCase("doubled", aot_kernels.doubled, signature, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64},
                       ("a_ptr", "b_ptr", "out_ptr", "k_size"), {"num_warps": 4}, wants_matrix=True, wants_shared=True)


def without_matrix():
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*bf16",
                 "BLOCK_M": "constexpr", "BLOCK_N": "constexpr", "BLOCK_K": "constexpr"}
    return aot.AotCase("no matrix", aot_kernels.scalar_products, signature, {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
                       ("a_ptr", "b_ptr", "out_ptr"), wants_matrix=True)


def test_good_kernels_pass(tmp_path_factory, ccs=(80, 90, 100)):
    """On one architecture of each kind of matrix instruction."""
    cases = [total(), matmul(wants_matrix=True, expected_drains=0, wants_shared=True)]
    results, wrong = aot.check_all(cases, ccs, PROCESSES)
    assert wrong == []
    assert [(result.case.name, result.cc) for result in results] == [(case.name, cc) for case in cases for cc in ccs]
    seen = {(result.case.name, result.cc): result.compiled for result in results}
    assert [seen["matmul", cc].matrix for cc in ccs] == [{90: "HGMMA", 100: "UTCHMMA"}.get(cc, "HMMA") for cc in ccs]
    assert seen["matmul", 90].drains == (0,)
    assert seen["matmul", 100].tmem == 64  # columns: the accumulator's 64
    (wide,) = aot.violations(dataclasses.replace(seen["matmul", 100], tmem=513), 100)
    assert wide == "expected at most 512 columns of tensor memory, got 513; use smaller blocks."
    assert seen["sum", 90].widest_load == seen["sum", 90].widest_store == 16
    assert all(0 < found.registers <= 255 for found in seen.values())

    text = aot.table(results)
    (tmp_path_factory.getbasetemp() / "aot.md").write_text(text, encoding="utf-8")
    assert text.count("\n") == 2 + len(results)
    found = seen["matmul", 90]
    assert (f"| matmul | PRECISION=tf32 BLOCK_M=128 BLOCK_N=64 BLOCK_K=32 num_warps=4 num_stages=3 | sm_90 | "
            f"{triton.__version__} | {found.registers} | {found.shared} | 0 | 0 | HGMMA | 16 | 16 | 0 |\n") in text


@pytest.mark.parametrize("case, cc, sentences", [
    # 128 x 256 float32 sums on 128 threads are 256 registers of each; there are 255.
    (matmul(n=256, name="spilling"), 80, ["spilling, sm_80: expected at most 0 spill instructions"]),
    (matmul(n=128, k=64, warps=8, stages=9), 90, ["expected at most 232,448 bytes of shared memory, got 294,912"]),
    (matmul(n=128, k=64, warps=8, stages=5), 86, ["expected at most 101,376 bytes of shared memory, got 131,072"]),
    (trapping(), 80, ["got a bare trap"]),
    (trapping(), 90, ["got a bare trap"]),
    (chained(), 90, ["expected 0 waits for all wgmma (WARPGROUP.DEPBAR.LE gsb0, 0x0) in the main loop, got 1"]),
    (matmul(m=32, expected_drains=0), 90, ["expected a loop with HGMMA, got none"]),
    (doubled(), 90, ["expected wgmma in a pipeline", "expected both factors of a product from shared memory, got"]),
    (without_matrix(), 80, ["expected HMMA, HGMMA or UTCHMMA for a product of 16-bit numbers, got none"]),
    (total(aligned=()), 80, ["expected a load of 16 bytes, got 2", "expected a store of 16 bytes, got 2"]),
    (matmul("fp32", m=64), 80, ["expected float32 products in float32, got TF32"]),
    (matmul("fp32", m=64), 100, ["expected float32 products in float32, got TF32"]),
    (total(block=1000), 90, ["expected a kernel that compiles, got CompilationError"]),
], ids=lambda value: value.name if isinstance(value, aot.AotCase) else None)
def test_a_planted_fault_is_refused(case, cc, sentences):
    results, wrong = aot.check_all([case], (cc,))
    assert len(wrong) == len(sentences), wrong
    for got, sentence in zip(wrong, sentences, strict=True):
        assert sentence in got and got.startswith(f"{case.name}, sm_{cc}: ") and got.endswith(".")
    assert len(results) == 1 and len(results[0].violations) == len(sentences)


def test_serialised_wgmma_is_refused_with_the_message_of_ptxas():
    case = matmul(n=256, k=64)
    compiled = aot.compile_for(case.fn, case.signature, case.constexprs, case.aligned, 90, **case.options)
    assert compiled.drains == (8,) and "C7511" in compiled.losses[0]
    plain = aot.violations(compiled, 90, allowed_spills=compiled.spills)
    assert len(plain) == 1 and "C7511" in plain[0]
    assert aot.violations(compiled, 90, allowed_spills=compiled.spills, expected_drains=8) == []


@pytest.mark.parametrize("precision, expected", [("tf32", True), ("tf32x3", False), ("ieee", False)])
def test_tf32_is_seen(precision, expected):
    case = matmul("fp32", m=64, precision=precision)
    compiled = aot.compile_for(case.fn, case.signature, case.constexprs, case.aligned, 90, **case.options)
    assert aot.uses_tf32(compiled) is expected


def test_what_is_not_gated_is_only_reported():
    results, wrong = aot.check_all([total(aligned=(), gated=False)], (80,))
    assert wrong == [] and len(results[0].violations) == 2


def test_a_case_is_compiled_only_where_it_is_for():
    results, _ = aot.check_all([total(ccs=(90, 100))], (80, 90))
    assert [result.cc for result in results] == [90]


def test_the_interpreter_is_refused(monkeypatch):
    case = total()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="import kernels with TRITON_INTERPRET unset"):
        aot.compile_for(case.fn, case.signature, case.constexprs, case.aligned, 90)


# ---- Loops of machine code

LISTING = """
        Function : example
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0020*/              @!P0 BRA 0x90 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   STG.E.128 desc[UR6][R2.64], R24 ;
        /*0080*/                   EXIT ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00a0*/              @!P0 BRA 0x90 ;
        /*00b0*/                   BRA 0x30 ;
        /*00c0*/                   BRA 0xc0;
"""


def test_code_moved_out_of_line_belongs_to_its_loop():
    (code,) = sass.functions(LISTING)
    addresses = [[i.address for i in loop] for loop in sass.loops(code)]
    # The retry at 0x90 jumps backwards to 0x30, behind the drain at 0x60, which is outside the loop all the same.
    assert addresses == [[0x10, 0x20, 0x30, 0x40, 0x50, 0x90, 0xA0, 0xB0], [0x90, 0xA0]]
    assert sass.drains(code) == (0,)
    assert sass.drains(sass.functions(LISTING.replace("0x1 ;", "0x0 ;"))[0]) == (1,)


# ---- Launches and cache keys

SIZES = (1, 15, 16, 17, 2**31 + 1)


def launch(fn, n):
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    return lambda: fn[(triton.cdiv(n, 2048),)](x, x, x, n, BLOCK=2048, num_warps=8)


def test_a_launch_is_recorded_as_the_case_triton_would_compile():
    (recorded,) = aot.launches(launch(aot_kernels.good, 4096))
    assert recorded.grid == (2,)
    case = recorded.case("sum", wants_wide=True)
    assert case.signature == {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"}
    assert case.constexprs == {"BLOCK": 2048} and case.options == {"num_warps": 8}
    assert case.aligned == ("x_ptr", "y_ptr", "out_ptr", "n")
    assert aot.cases_of("sum", launch(aot_kernels.good, 4095), {})[0].aligned == ("x_ptr", "y_ptr", "out_ptr")
    assert aot.check_all([case], (90,))[1] == []
    with pytest.raises(ValueError, match="must launch a kernel, got no launch"):
        aot.cases_of("nothing", lambda: None, {})


def test_what_a_call_wants_may_differ_between_its_kernels():
    def call():
        launch(aot_kernels.good, 4096)()
        launch(aot_kernels.one_key, 4096)()

    cases = aot.cases_of("two", call, {"wants_wide": True, "one_key": {"wants_wide": False, "ccs": (90,)}})
    assert [(case.name, case.wants_wide, case.ccs) for case in cases] == [("two: good", True, aot.CCS),
                                                                         ("two: one_key", False, (90,))]
    with pytest.raises(TypeError, match="no_such_kernel"):
        aot.cases_of("two", call, {"no_such_kernel": {"wants_wide": False}})


def test_sizes_in_the_cache_key_are_counted():
    assert aot.cache_violations(launch(aot_kernels.one_key, n) for n in SIZES) == []
    # A plain int: 1 is a constant, 16 divisible by 16, 15 and 17 alike, 2**31 + 1 an i64.
    assert aot.cache_violations(launch(aot_kernels.good, n) for n in SIZES) == [
        "good: expected one cache entry for all sizes, got 4, because of n; "
        "make sizes tl.int64 and name them in do_not_specialize."]
    calls = [((1, 1, 1, n), {"BLOCK": 16}) for n in (15, 17)]
    assert len(aot.specialization_keys(aot_kernels.good, calls)) == 1


# ---- Our kernels


ARCHITECTURE = 90


def first_of_each(cases: list[aot.AotCase], cc: int) -> list[aot.AotCase]:
    return list({case.fn.__name__: case for case in reversed(cases) if cc in case.ccs}.values())


def assert_passes(name: str, cases: list[aot.AotCase], ccs: tuple[int, ...], folder: Path) -> list[aot.Result]:
    results, wrong = aot.check_all(cases, ccs, PROCESSES)
    (folder / f"aot-{name}.md").write_text(aot.table(results), encoding="utf-8")
    assert results and wrong == [], "\n".join(wrong)
    return results


def assert_structure(results: list[aot.Result]):
    wrong = structure.violations(results)
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("family", launches.FAMILIES)
def test_the_first_case_of_each_of_our_kernels_passes(family, tmp_path_factory):
    cases = first_of_each(aot.ours(family), ARCHITECTURE)
    assert_structure(assert_passes(f"{family}-first", cases, (ARCHITECTURE,), tmp_path_factory.getbasetemp()))


def test_every_kernel_is_compiled():
    """A kernel that no family's cases launch would be proven by nobody."""
    compiled, defined = set(), set()
    for path in (ROOT / "kernels").glob("*.py"):
        module = importlib.import_module(f"sora_fast.kernels.{path.stem}")
        defined |= {name for name, value in vars(module).items()
                    if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel")}
    for family in launches.FAMILIES:
        compiled |= {case.fn.__name__ for case in aot.ours(family)}
    assert defined == compiled
