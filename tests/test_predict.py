"""sora-fast predict, on kernels from outside the package: each planted fault is told, and each gets its report."""

import importlib
import json
import subprocess
import sys
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("cuobjdump comes with Triton's wheels for Linux only", allow_module_level=True)

import structure  # noqa: E402
from cli_checks import refused  # noqa: E402

from sora_fast import configs, ops  # noqa: E402
from sora_fast.benchmarks import figures  # noqa: E402
from sora_fast.benchmarks.specs import normalization  # noqa: E402
from sora_fast.cli import tune_predicted  # noqa: E402
from sora_fast.kernels import modulation_config  # noqa: E402
from sora_fast.testing import aot, emulated_gpu, launches  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.ci]


@pytest.mark.parametrize("fault", ["division", "prefetch", "local memory", "occupancy"])
def test_a_planted_fault_is_told(cli, tmp_path, fault):
    code, out, wrong = cli("predict", "--impl", f"planted_structure:{fault.replace(' ', '_')}", "--gpu", "a100", "--out",
                           tmp_path, "--turns", "32")
    assert code == 0, wrong
    assert "predicted " in out and " TFLOP/s on A100 (the model's error: " in out
    (faults,) = [line.rpartition("FAULTS: ")[2] for line in out.splitlines() if "FAULTS" in line]
    assert fault in faults.split(", ")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    (row,) = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    share = f"{row['outside'] / (row['outside'] + 32 * row['cycles']):.0%}"
    assert f"outside the loop {row['outside']:,.0f} cycles, {share} at 32 turns" in out and f"<td>{share}</td>" in page
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
    refused(cli("predict", "--impl", path, "--gpu", "h100", "--warps", "4", "--emulate"), "--emulate: expected Triton")
    refused(cli("predict", "attention", "--turns", "4"), "--turns: expected it beside --impl")
    code, out, _ = cli("predict", "--impl", path, "--gpu", "h100", "--warps", "4", "--out", tmp_path, "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["kernel"] == "good" and 0.3 < row["copy_share"] <= 1 and row["predicted"]
    assert row["lines"] == []
    code, out, _ = cli("predict", "--impl", path, "--gpu", "h100", "--warps", "4", "--out", tmp_path, "--lines", "2")
    (row,) = json.loads((tmp_path / "predictions.json").read_text())
    first, _ = [line for line in out.splitlines() if "  | " in line]
    counts = [line["instructions"] for line in row["lines"]]
    assert code == 0 and sum(counts) == row["instructions"] and counts == sorted(counts, reverse=True)
    top = row["lines"][0]
    source = open(top["file"]).read().splitlines()[top["line"] - 1].strip()
    assert first.split()[0] == str(counts[0]) and first.endswith(source)
    refused(cli("predict", "--impl", "aot_kernels:good"), "expected a function without arguments that launches your kernel")
    refused(cli("predict", "attention", "--case", "no such"), "expected --case to leave a kernel on H200")


def test_a_second_run_compiles_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    compiles, runs = mock.Mock(wraps=aot.compile_for), mock.Mock(wraps=subprocess.run)
    monkeypatch.setattr(aot, "compile_for", compiles)
    monkeypatch.setattr(subprocess, "run", runs)

    def predicted(gpu="a100"):
        code, out, wrong = cli("predict", "--impl", "planted_structure:prefetch", "--gpu", gpu, "--out", tmp_path / "out",
                               "--json")
        assert code == 0, wrong
        return json.loads(out)

    first = predicted()
    assert (compiles.call_count, runs.called) == (1, True)  # of cuobjdump
    runs.reset_mock()
    assert predicted() == first and (compiles.call_count, runs.called) == (1, False)
    assert predicted("h200") != first and compiles.call_count == 2
    for kept in (tmp_path / "cache" / "predict").iterdir():  # a drive that lost the second half
        kept.write_bytes(kept.read_bytes()[:1000])
    assert predicted() == first and compiles.call_count == 3
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "cache").write_text("a file")
    refused(cli("predict", "--impl", "planted_structure:prefetch", "--gpu", "a100"), "SORA_FAST_CACHE: expected a folder")


def test_kernels_of_csrc_are_predicted(cli, tmp_path, monkeypatch):
    from sora_fast.cli import predict_kernels
    from sora_fast.ops import cuda_backend

    monkeypatch.setattr(predict_kernels, "ours", lambda *arguments: ())  # Triton's, which take long to compile
    asked = "predict", "convolution", "normalization", "--case", "96", "--out", tmp_path, "--json", "--gpu"
    if not cuda_backend.extension()[1]:
        code, out, wrong = cli(*asked, "h200")
        assert code == 0 and "predict:" not in wrong, wrong
        rows = {row["case"]: row for row in json.loads(out)}
        assert rows.keys() == {"convolution 96 to 96 bfloat16", "normalization 96, bfloat16"}
        convolution, norm = rows.values()
        assert convolution["kernel"] == "causal_conv3d_kernel<96, 1>" and convolution["facts"]["blocks"] == 1
        # 96 channels of a tap: 6 k16 products of 256 x 96, and their boxes from L2
        assert convolution["units"]["tensor"] == 6 * 256 * 96 * 16 * 2 / 4096
        assert convolution["units"]["L2"] == 2 * (256 + 96) * 96 / 32
        assert norm["lanes"] == 1 and norm["units"]["xu"] > 0 and 0.5 < norm["copy_share"] <= 1
        code, _, wrong = cli(*asked, "a100")
        assert code == 0 and "predict: convolution: without the kernels of csrc. Its kernel was built for sm_90a" in wrong
    monkeypatch.setattr(cuda_backend, "extension", lambda: (None, "It was not built."))
    _, _, wrong = cli(*asked, "h200")
    assert wrong.splitlines()[:2] == [f"predict: {family}: without the kernels of csrc. It was not built."
                                      for family in ("convolution", "normalization")]


def test_measured_rows_stand_beside(cli, tmp_path, monkeypatch):
    """Of this GPU, op, direction, backend and sizes, and PASSED; of two of one thing the later."""
    from sora_fast.cli import predict_csrc, predict_kernels

    # the backward takes long to compile
    forward_alone = lambda *arguments, ours=predict_kernels.ours: [next(ours(*arguments))]
    monkeypatch.setattr(predict_kernels, "ours", forward_alone)
    monkeypatch.setattr(predict_csrc, "ours", lambda *arguments: ())
    case = next(case for case in normalization.CASES if (case.channels, case.norm) == (192, "rms"))
    row = dict(schema=1, row="time", suite="full", op="norm_act", case="planted", direction="forward", provider="triton",
               dtype="bfloat16", shape=case.shape(), status="PASSED", reason="", flops=0, roof="copy", share=0.5,
               environment=dict(device="NVIDIA H200", time="2027-01-02T03:04:05"), **dict.fromkeys(figures.STATISTICS, 1.0))
    later = row | dict(share=0.6, environment=dict(device="NVIDIA H200", time="2027-02-02T03:04:05"))
    others = [later | dict(case=str(place)) | change for place, change in enumerate((
        dict(environment=dict(device="NVIDIA H100")), dict(direction="backward"), dict(provider="torch"),
        dict(shape=row["shape"] | dict(C=96)), dict(dtype="float16"),
        dict(status="FAILED", reason="wrong", **dict.fromkeys(figures.STATISTICS)), dict(environment=dict(device="GH200"))))]
    results = tmp_path / "results" / "nvidia-h200"
    results.mkdir(parents=True)
    (results / "bench.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (later, row, *others)))
    asked = ("predict", "normalization", "--case", "192, bfloat16", "--out", tmp_path / "out", "--results",
             tmp_path / "results")
    code, out, wrong = cli(*asked)
    assert code == 0, wrong
    (forward,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    (measured,) = forward["measured"]
    assert (forward["kernel"], measured["case"], measured["copy_share"]) == ("forward_kernel", "planted", 0.6)
    assert measured["error"] == pytest.approx(forward["copy_share"] / 0.6 - 1)
    line = f"measured 60% of the copy rate, predicted {measured['error']:+.0%} (planted; NVIDIA H200, 2027-02-02)"
    assert f"\n  {line}\n" in out and line in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    refused(cli(*asked[:-1], tmp_path / "nowhere"), "--results: expected a folder")


@pytest.mark.parametrize("family", launches.FAMILIES)
def test_rows_of_models_are_found(family):
    """Kernels and the benchmark's cases are named alike: of each family something that is predicted is measured too."""
    from sora_fast.cli.predict_measured import call_of

    specs = importlib.import_module(f"sora_fast.benchmarks.specs.{family}")
    calls = [call_of(family, case.fn.__name__, case.constexprs, case.signature) for case in aot.ours(family)]
    rows = [dict(op=case.op, direction="forward", provider="triton", dtype=str(case.dtype).removeprefix("torch."),
                 shape=case.shape()) for case in specs.CASES]
    assert any(call is not None and call.is_of(row) for call in calls for row in rows)


def bank_conflicts():
    import emulated_gluon_kernels

    x, y = (torch.empty(32, 32, device="meta") for _ in range(2))
    emulated_gluon_kernels.transposed_kernel[(100,)](x, y, 3, 32, num_warps=4)


def test_counted_wavefronts_enter(cli, tmp_path):
    """A column of shared memory is 32 wavefronts for one; Triton's own layouts are ideal."""
    def predicted(name, *flags):
        code, out, wrong = cli("predict", "--impl", name, "--gpu", "a100", "--out", tmp_path, *flags)
        assert code == 0, wrong
        return json.loads((tmp_path / "predictions.json").read_text())[0], out

    assumed, _ = predicted("test_predict:bank_conflicts")
    counted, out = predicted("test_predict:bank_conflicts", "--emulate")
    assert assumed["wavefronts"] == {} and counted["wavefronts"] == {"LDS": 32, "STS": 1}
    assert counted["units"]["smem"] == pytest.approx(assumed["units"]["smem"] * 33 / 2)
    assert counted["cycles"] > assumed["cycles"] and "wavefronts over the ideal, as emulated: LDS 32.00" in out
    assumed, _ = predicted("planted_structure:prefetch")
    counted, out = predicted("planted_structure:prefetch", "--emulate")
    assert set(counted["wavefronts"].values()) == {1} and counted["cycles"] == assumed["cycles"]
    assert "over the ideal, as emulated: none" in out


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
    assert {each.case.fn.__name__ for each in work} == {"forward_kernel", "backward_kernel", "reduce_slots_kernel"}
    (forward,) = (each for each in work if each.case.fn.__name__ == "forward_kernel")
    # x and y are read, x_new and h written; a row of the table serves many tokens
    assert forward.kernel(GPUS["h200"]).traffic == 2.0
    constants = dict(E=72, E0=64, E1=16, TMA=True, BLOCK_M=64, BLOCK_N=128, PRECISION="ieee")
    assert predict_kernels._useful("dq_kernel", constants, {"q": "*bf16"}) == 72 / 80
    assert [predict_kernels._bulk(name, constants) for name in ("dq_kernel", "dkdv_kernel")] == [
        2 * rows * 80 * 2 for rows in (128, 64)]
    unmasked = constants | dict(GROUP=2, LEFT=False, RIGHT=False)
    turns = lambda kernel, **more: predict_kernels._turns(kernel, unmasked | more, 8192)
    assert (turns("forward_kernel"), turns("dkdv_kernel"), turns("dq_kernel", RIGHT=True)) == (64, 256, 32)
    assert turns("dq_kernel", LEFT=True) is None
    taps = dict(KT=3, KH=3, KW=3, BLOCK_K=64)
    assert predict_kernels._turns("tma_kernel", dict(MADE=96, SUMMED=160, **taps), 0) == 27 * 3
    alone = list(predict_kernels.ours("attention", GPUS["h200"], "128 bfloat16, sm90"))
    tried = list(predict_kernels.ours("attention", GPUS["h200"], "128 bfloat16, sm90", candidates=True))
    tiles = {(each.case.constexprs["BLOCK_M"], each.case.constexprs["BLOCK_N"]) for each in tried}
    assert len(alone) == 3 and len(tried) > 60 and {(64, 64), (128, 64), (64, 128)} <= tiles


def test_the_tuner_begins_with_what_is_predicted_fastest(tmp_path, monkeypatch):
    """Of one kernel's candidates; where nothing can be predicted they stay as they are, and a sentence says why."""
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path))
    launch = modulation_config.Launch(1536, 64, torch.bfloat16, None, "layer", False)
    asked = configs.Asked("modulation", "forward", launch, "sm90-H200")
    x, table = torch.randn(64, 1536).bfloat16(), torch.randn(1, 1536)
    call = lambda: ops.norm_modulate(x, table, table, backend="triton")
    few = [modulation_config.ForwardConfig(16, 1), modulation_config.ForwardConfig(2, 1)]
    said = []
    with emulated_gpu("sm90"):
        found = tune_predicted.likeliest(asked, few, call, said.append)
        gpu = tune_predicted.gpu_like(asked.gpu)
        rates = [tune_predicted.rate_of(config, asked, call, gpu) for config in found]
        assert sorted(found, key=few.index) == few and rates == sorted(rates, reverse=True) and rates[0] > rates[-1]
        monkeypatch.setattr(tune_predicted, "predict", None)
        assert tune_predicted.likeliest(asked, few, call, said.append) == few
    assert len(said) == 1 and "nothing is predicted of its candidates" in said[0]
    assert tune_predicted.gpu_like("sm100-B200") is None and tune_predicted.gpu_like("sm90-H100-80GB").name == "H100"


def test_a_model_is_the_sum_of_its_launches():
    """Kernels by what they launch, PyTorch's own at its floor; the models' own launches, which take long to compile."""
    from collections import Counter

    from sora_fast import ops
    from sora_fast.cli import predict_models
    from sora_fast.cyclemodel import GPUS

    def run():
        x, w = torch.empty(4096, 1152), torch.empty(1152, 1152)
        ops.norm_modulate(ops.norm_modulate(x, None, None) @ w, None, None).view(-1)

    gpu = GPUS["h200"]
    found = {layer.kernel: layer for layer in predict_models.layers(run, gpu)}
    norm, product = found.pop("modulation forward_kernel"), found.pop("PyTorch's mm")
    assert not found and (norm.count, product.count) == (2, 1)
    assert norm.amount == 2 * 2 * 4096 * 1152 * 2 and norm.floor_ms == pytest.approx(norm.amount / gpu.dram * 1e3)
    assert norm.predicted_ms > 0.99 * norm.floor_ms and product.predicted_ms is None
    assert product.floor_ms == pytest.approx(2 * 4096 * 1152**2 / 989.4e12 * 1e3, rel=1e-3)
    whole, *lines = predict_models.report("mine", gpu, [product, norm])
    assert whole.startswith("mine on H200: predicted 0.") and len(lines) == 2 and "at its floor" in lines[0]
    traces = (predict_models.trace(predict_models.MODELS[name], "sm90") for name in ("wan-block", "wan-vae"))
    block, vae = (Counter(launch.fn.__name__ for launch in each.launches) for each in traces)
    assert block["dkdv_kernel"] == 2 and block["schedule_kernel"] == 6 and block["backward_kernel"] == 6
    assert vae.keys() == {"tma_kernel", "forward_kernel"} and vae["tma_kernel"] > 30
