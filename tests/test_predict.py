"""sora-fast predict, on kernels from outside the package: each planted fault is told, and each gets its report."""

import json
import sys

import pytest

pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("cuobjdump comes with Triton's wheels for Linux only", allow_module_level=True)

import structure  # noqa: E402
from cli_checks import refused  # noqa: E402

from sora_fast.testing import aot  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.ci]


@pytest.mark.parametrize("fault", ["division", "prefetch", "local memory", "occupancy"])
def test_a_planted_fault_is_told(cli, tmp_path, fault):
    code, out, wrong = cli("predict", "--impl", f"planted_structure:{fault.replace(' ', '_')}", "--gpu", "a100", "--out",
                           tmp_path)
    assert code == 0, wrong
    assert "predicted " in out and " TFLOP/s on A100 (the model's error: " in out
    (faults,) = [line.rpartition("FAULTS: ")[2] for line in out.splitlines() if "FAULTS" in line]
    assert fault in faults.split(", ")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    (row,) = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert f"<p class=fault>{faults}</p>" in page and "predicted</p>" in page and row["faults"] == faults.split(", ")
    assert "http" not in page.partition("How far the model was off")[0]  # nothing is loaded from elsewhere


def test_a_cubin_gets_a_report_and_its_own_questions(cli, tmp_path):
    import aot_kernels
    from test_aot import total

    case = total()
    kernel, _ = aot.build(aot_kernels.good, case.signature, case.constexprs, case.aligned, 90, case.options)
    path = tmp_path / "sum.cubin"
    path.write_bytes(kernel.asm["cubin"])
    refused(cli("predict", "--impl", path, "--gpu", "h100", "--out", tmp_path), "expected --warps beside sum.cubin")
    refused(cli("predict", "--impl", path, "--gpu", "a100", "--warps", "4", "--out", tmp_path), "expected a GPU of sm_90")
    code, out, _ = cli("predict", "--impl", path, "--gpu", "h100", "--warps", "4", "--out", tmp_path, "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["kernel"] == "good" and 0.3 < row["copy_share"] <= 1 and row["predicted"]
    refused(cli("predict", "--impl", "aot_kernels:good"), "expected a function without arguments that launches your kernel")
    refused(cli("predict", "attention", "--case", "no such"), "expected --case to leave a kernel on H200")


def test_the_gate_tells_what_is_new_and_what_is_gone(monkeypatch):
    import planted_structure

    (case,) = aot.cases_of("planted", planted_structure.prefetch, {})
    compiled = aot.compile_for(case.fn, case.signature, case.constexprs, case.aligned, 80, **case.options)
    result = aot.Result(case, 80, compiled, ())
    entry = structure.entry(result)
    table = lambda **changes: {"triton": structure.TABLE["triton"], "kernels": {"sm_80": {structure.family(result): {
        "matmul": entry | changes}}}}
    if structure.triton.__version__ != structure.TABLE["triton"]:
        pytest.skip("the table is of another Triton")
    assert entry["faults"].keys() == {"prefetch"} and structure.violations([result], table()) == []
    (new,) = structure.violations([result], table(faults={}))
    (gone,) = structure.violations([result], table(faults={"prefetch": "", "division": ""}))
    (blocks,) = structure.violations([result], table(blocks=entry["blocks"] + 1))
    monkeypatch.setattr(structure, "MEMORY", (structure.family(result),))
    (issue,) = structure.violations([result], table(issue=0))
    assert "expected at most 0% of DRAM's time" in issue and structure.violations([result], table(issue=10**6)) == []
    assert "expected no prefetch fault, got one" in new and "expected the listed division fault, got none" in gone
    assert "blocks an SM" in blocks


def test_what_is_read_of_launches():
    from sora_fast.cli import predict_kernels
    from sora_fast.cyclemodel import GPUS

    work = list(predict_kernels.ours("modulation", GPUS["h200"], "1152, bfloat16"))
    assert {each.case.fn.__name__ for each in work} == {"forward_kernel", "backward_kernel", "join_kernel"}
    (forward,) = (each for each in work if each.case.fn.__name__ == "forward_kernel")
    # x and y are read, x_new and h written; a row of the table serves many tokens
    assert forward.kernel(GPUS["h200"]).traffic == 2.0
    constants = dict(E=72, E0=64, E1=16, TMA=True, BLOCK_M=64, BLOCK_N=128, PRECISION="ieee")
    assert predict_kernels._useful("dq_kernel", constants, {"q": "*bf16"}) == 72 / 80
    assert [predict_kernels._bulk(name, constants) for name in ("dq_kernel", "dkdv_kernel")] == [
        2 * rows * 80 * 2 for rows in (128, 64)]
    alone = list(predict_kernels.ours("attention", GPUS["h200"], "128 bfloat16, sm90"))
    tried = list(predict_kernels.ours("attention", GPUS["h200"], "128 bfloat16, sm90", candidates=True))
    tiles = {(each.case.constexprs["BLOCK_M"], each.case.constexprs["BLOCK_N"]) for each in tried}
    assert len(alone) == 3 and len(tried) > 60 and {(64, 64), (128, 64), (64, 128)} <= tiles
