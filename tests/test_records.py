"""A kernel is taken by auto only with a record of it as it stands; and caches that many processes write lose nothing."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sora_fast.benchmarks
import sora_fast.kernels
from sora_fast import env, files, ops, records, use_backend, validate
from sora_fast.dispatch import Backend
from sora_fast.explanation import explain
from sora_fast.kernels import arch
from sora_fast.ops import modulation
from sora_fast.testing import launches

ROOT = Path(__file__).resolve().parents[1]
KERNEL = '''"""A planted kernel."""
from .planted_loads import load


def kernel(x, y, gate):
    """Adds."""
    # a comment
    return load(x) + gate * y
'''
LOADS = "def load(x):\n    return x\n"


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Planted kernel files, an empty cache, no shipped records, and Triton 3.6; returns the folder of the kernels."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "planted.py").write_text(KERNEL)
    (folder / "planted_loads.py").write_text(LOADS)
    monkeypatch.setattr(sora_fast.kernels, "__path__", [str(folder)])
    monkeypatch.setattr(sora_fast.benchmarks, "__path__", [str(tmp_path / "benchmarks")])
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "triton_minor", lambda: "3.6")
    records.forget()
    yield folder
    records.forget()


@pytest.fixture
def op(room, monkeypatch):
    """gate_residual with a planted Triton backend."""
    op = modulation.GATE_RESIDUAL
    monkeypatch.setattr(op, "told", False)
    monkeypatch.setitem(op.backends, "triton", Backend("triton", op.backends["reference"].run, kernel="planted"))
    return op


def record(**changes):
    row = dict(schema=1, row="validate", op="gate_residual", implementation="triton", backend="triton",
               direction="forward", dtype="bfloat16", passed=True, cases=7, comparisons=14, error=1e-3, allowed=1e-2,
               tensor="output", case="a case", failed=[], raised=[], refused=[], kernel="planted",
               kernel_hash=records.kernel_hash("planted"), arch="sm90",
               environment=dict(device="NVIDIA H200", triton="3.6.0", time="2026-05-01T10:00:00+00:00"))
    environment = changes.pop("environment", {})
    return row | changes | {"environment": row["environment"] | environment}


def problem(device="cuda:sm90", dtype=torch.bfloat16, grad=False):
    return modulation._example(device, dtype, grad)


def taken(op, **facts):
    return op.choose(problem(**facts)).name


def reasons(op, backend="triton", **facts):
    return " ".join(records.why_not(op.name, op.backends[backend], problem(**facts)))


def test_without_a_record_auto_takes_torch_and_says_so(op, caplog):
    assert taken(op) == "torch"
    assert op.choose(problem(), "triton").name == "triton"  # by name without a record
    with use_backend("triton"):
        assert taken(op) == "triton"
    said = explain("gate_residual", every=True, device="cuda:sm90")
    (line,) = [line for line in said.splitlines() if line.split()[:2] == ["gate_residual", "triton"]]
    for part in (" ok ", "Forward and backward in bfloat16: there is no validation record of any NVIDIA GPU.",
                 "Run sora-fast validate --op gate_residual --backend triton --device cuda", "backend='triton'"):
        assert part in line
    assert "gate_residual                torch       *" in said
    assert "auto takes a kernel only with a validation record" in said
    assumed = explain("gate_residual", every=True, device="cuda:sm90", assume_validated=True)
    assert "gate_residual                triton      *   taken by auto" in assumed and "no validation record" not in assumed
    with caplog.at_level("WARNING", logger="sora_fast"):
        x = torch.randn(3, 8)
        for _ in range(2):
            op._tell_if_slow(op.backends["torch"], problem(), "auto")
        op.told = False
        op._tell_if_slow(op.backends["torch"], problem(device="cpu"), "auto")
        assert ops.gate_residual(x, x, x[:1]).shape == x.shape
    (told,) = caplog.records
    assert "runs on its torch backend on cuda:sm90, not on its kernel" in told.message
    assert "sora-fast validate --op gate_residual --backend triton" in told.message


def test_a_record_makes_the_kernel_eligible(op):
    assert records.save([record()]) == records.user_file()
    assert taken(op) == "triton" and reasons(op) == ""
    assert taken(op, device="cuda:sm120") == "torch"  # a Triton kernel needs a GPU of its own class
    assert ("of a GPU with mma.sync, as sm120 has it, and the last is of NVIDIA H200 (sm90), 2026-05-01, which has wgmma."
            in reasons(op, device="cuda:sm120"))
    assert taken(op, grad=True) == "torch" and "Backward in bfloat16: there is no" in reasons(op, grad=True)
    assert taken(op, dtype=torch.float32) == "torch" and "Forward in float32" in reasons(op, dtype=torch.float32)
    records.save([record(direction="backward")])
    assert taken(op, grad=True) == "triton"
    said = explain("gate_residual", every=True, device="cuda:sm90")
    assert "taken by auto; validated on NVIDIA H200 (sm90), 2026-05-01" in said
    assert "for CUDA GPUs" in reasons(op, device="cpu") and taken(op, device="cpu") == "torch"


CLASSES = {"mma.sync": {"sm80", "sm86", "sm89", "sm120", "sm121"}, "wgmma": {"sm90"}, "tcgen05": {"sm100", "sm103", "sm110"}}


@pytest.mark.parametrize("units", CLASSES)
def test_a_record_is_for_a_class_of_tensor_cores(op, units):
    records.save([record(arch=max(CLASSES[units]))])
    every = set.union(*CLASSES.values())
    assert {gpu for gpu in every if taken(op, device=f"cuda:{gpu}") == "triton"} == CLASSES[units]
    assert all(arch.uses_mma_sync(gpu) is (units == "mma.sync") for gpu in CLASSES[units])


def test_a_changed_kernel_has_no_record(op, room):
    records.save([record()])
    assert taken(op) == "triton"
    file = room / "planted.py"
    file.write_text(KERNEL.replace("# a comment", "# another\n    'and a string'").replace('"""Adds."""', "'''Sums.'''\n"))
    records.forget()
    assert taken(op) == "triton", "comments, docstrings and blank lines are no code"
    for before, after in (("gate * y", "gate * y * 1.0"), ("+", "-"), ("gate * y", "y * gate")):
        file.write_text(KERNEL.replace(before, after))
        records.forget()
        assert taken(op) == "torch"
        assert ("Forward in bfloat16: the kernel has changed since it was validated on NVIDIA H200 (sm90), 2026-05-01."
                in explain("gate_residual", every=True, device="cuda:sm90", grad=False))
    file.write_text(KERNEL)
    (room / "planted_loads.py").write_text(LOADS.replace("return x", "return x * 2"))
    records.forget()
    assert taken(op) == "torch" and "has changed since" in reasons(op), "a module that the kernel imports counts"
    (room / "planted_loads.py").write_text(LOADS)
    records.forget()
    assert taken(op) == "triton"
    file.unlink()
    records.forget()
    assert taken(op) == "torch" and "sora_fast.kernels.planted cannot be read" in reasons(op)


@pytest.mark.parametrize("file, record, config", [
    ("planted_candidates", True, True), ("planted_config", False, True), ("planted", False, False),
    ("planted_loads", False, False)])
def test_what_an_edit_voids(room, file, record, config):
    """A candidate list: nothing. A heuristic: records. A kernel, its launcher or what they call: tuned configs too."""
    (room / "planted.py").write_text("from .planted_config import Config\n" + KERNEL)
    (room / "planted_config.py").write_text("Config = int\n")
    (room / "planted_candidates.py").write_text("from .planted_config import Config\n")
    hashes = lambda: (records.forget(), records.kernel_hash("planted"), records.launch_hash("planted"))[1:]
    before = hashes()
    path = room / f"{file}.py"
    path.write_text(path.read_text() + "# a comment\n")
    assert hashes() == before
    path.write_text(path.read_text() + "WARPS = 4\n")
    assert [old == new for old, new in zip(before, hashes(), strict=True)] == [record, config]


def test_what_the_hashes_of_our_kernels_cover():
    """Each family's heuristics, and no candidate list."""
    for module in (*launches.FAMILIES, "norm_convolution"):
        said = set(records._trees(module))
        families = ("convolution", "normalization") if module == "norm_convolution" else (module,)
        assert {f"{family}_config" for family in families} < said
        assert not any(name.endswith("_candidates") for name in said)


def test_the_hash_is_the_same_for_every_python(room):
    """A record made under one Python counts under another: this figure is written down."""
    (room / "planted.py").write_text('"""Doc."""\nfrom . import planted_loads\nimport sora_fast.kernels.planted_loads as p\n'
                                     'async def f(x: int = 1, *, y=2.5, **z) -> "int":\n'
                                     '    "doc"\n    return [i for i in x if i] + (not y) if z else f"{x!r} b" "c"\n'
                                     'class A(B, c=1):\n    """Doc."""\n    x: int\n    def g(self): pass\n')
    records.forget()
    assert records.kernel_hash("planted") == "f3256ceaba317bb5"
    assert records.kernel_hash("nothing") is None
    (room / "planted.py").write_text("def (")
    records.forget()
    assert records.kernel_hash("planted") is None


def test_another_triton_voids_a_record(op, monkeypatch):
    records.save([record(environment=dict(triton="3.5.1"))])
    assert taken(op) == "torch"
    assert "validated on NVIDIA H200 (sm90), 2026-05-01 with Triton 3.5, and here is Triton 3.6" in reasons(op)
    records.save([record(environment=dict(triton="3.6.9"))])
    assert taken(op) == "triton"
    monkeypatch.setattr(records, "triton_minor", lambda: None)
    records.forget()
    assert "here is no Triton" in reasons(op)


def test_a_failure_of_the_own_architecture_counts_most(op):
    later = dict(time="2026-06-01T10:00:00+00:00")
    records.save([record(passed=False, error=0.5)])
    assert taken(op) == "torch"
    assert "it failed on NVIDIA H200 (sm90), 2026-05-01 (case 'a case', output: error 5.00e-01, allowed" in reasons(op)
    records.save([record(arch="sm80", environment=dict(device="NVIDIA A100"))])
    assert taken(op) == "torch" and taken(op, device="cuda:sm80") == "triton" and taken(op, device="cuda:sm89") == "triton"
    records.save([record(environment=later)])  # the same GPU again, and it passes
    assert taken(op) == "triton" and len(list(files.json_lines(records.user_file().read_text()))) == 2
    records.save([record(passed=False, error=None, environment=later | dict(device="NVIDIA H100"))])
    assert taken(op) == "torch" and "it failed on NVIDIA H100 (sm90), 2026-06-01." in reasons(op)


def test_a_cuda_kernel_needs_a_record_of_its_own_architecture(op, monkeypatch):
    monkeypatch.setitem(op.backends, "cuda", Backend("cuda", op.backends["reference"].run, kernel="planted"))
    built = {"kernels": {"planted": "of csrc"}}
    monkeypatch.setattr(records.environment, "build_info", lambda: built)
    of_cuda = dict(backend="cuda", kernel_hash="of csrc", environment=dict(triton=None))
    assert "no validation record of sm90" in reasons(op, "cuda")
    records.save([record(arch="sm80", **of_cuda)])
    assert taken(op) == "torch" and taken(op, device="cuda:sm80") == "cuda"
    assert "record of its own architecture, sm90, and the last is of NVIDIA H200 (sm80)" in reasons(op, "cuda")
    records.save([record(**of_cuda)])
    assert taken(op) == "cuda"  # whichever Triton there is

    changed = "the kernel, or the nvcc that builds it, has changed since it was validated on NVIDIA H200 (sm90)"
    for now, reason in (({"planted": "changed"}, changed), ({}, "the CUDA kernel planted is not in this build")):
        built["kernels"] = now
        records.forget()
        assert taken(op) == "torch" and reason in reasons(op, "cuda")


def test_shipped_records_count_and_bad_lines_do_not(op, tmp_path):
    folder = tmp_path / "benchmarks" / "results" / "nvidia-h200"
    folder.mkdir(parents=True)
    good, rows = json.dumps(record()), [record(arch=None), record(kernel_hash=None), record(backend=None), record(schema=2),
                                        record(row="time"), record(passed="yes"), record() | {"environment": None}]
    (folder / "validate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "nonsense\n[]\n" + good[:-9])
    records.forget()
    assert taken(op) == "torch" and "there is no validation record" in reasons(op)
    with open(folder / "validate.jsonl", "a") as file:
        file.write("\n" + good + "\n")
    assert taken(op) == "torch"  # read once
    records.forget()
    assert taken(op) == "triton"


def test_save_takes_only_records(room):
    assert records.save([record(arch=None), record(backend=None, kernel_hash=None), record(comparisons=0)]) is None
    assert not records.user_file().exists()
    records.save([record(comparisons=0, passed=False, raised=[dict(case="a", reason="it raised")])])
    (row,) = files.json_lines(records.user_file().read_text())
    assert row["raised"] and not row["passed"]


def test_validate_makes_the_records(op, monkeypatch):
    """From the report to the choice; the interpreter's and the CPU's rows are none."""
    report = validate("gate_residual", backend="triton", dtypes=(torch.bfloat16,))
    assert report.passed and records.save(report.to_dicts()) is None
    monkeypatch.setattr("sora_fast.testing.validation._arch", lambda device: "sm90")
    monkeypatch.setattr("sora_fast.environment.version", lambda package: "3.6.0")
    assert records.save(validate("gate_residual", dtypes=(torch.bfloat16,)).to_dicts()) is None  # auto is no kernel
    rows = validate("gate_residual", backend="triton", dtypes=(torch.bfloat16,)).to_dicts()
    assert {row["kernel_hash"] for row in rows} == {records.kernel_hash("planted")} and {row["kernel"] for row in rows} == {
        "planted"}
    assert taken(op, grad=True) == "torch"
    records.save(rows)
    assert taken(op, grad=True) == "triton" and taken(op, dtype=torch.float16) == "torch"


def test_a_graph_has_the_choice_as_a_constant(op, monkeypatch):
    monkeypatch.setattr(modulation, "device_name", lambda tensor: "cuda:sm90")
    ran = []
    for name in ("triton", "torch"):
        one = lambda x, add=name == "triton", **rest: x + 1 if add else x - 1
        monkeypatch.setitem(op.backends, name, Backend(name, one, kernel="planted" if name == "triton" else ""))
    x = torch.zeros(2, 8)
    for expected in (-1, 1):
        torch._dynamo.reset()
        fn = torch.compile(lambda: ops.gate_residual(x, x, x[:1]), backend="eager", fullgraph=True)
        ran.append(float(fn()[0, 0]))
        assert ran[-1] == expected == float(ops.gate_residual(x, x, x[:1])[0, 0])
        records.save([record(dtype="float32")])


def test_the_choice_costs_little(op):
    records.save([record()])
    ask = problem()
    op.choose(ask)
    best = min(_seconds(lambda: op.choose(ask)) for _ in range(5))
    assert best < 50e-6, f"{best * 1e6:.1f} us per choice"


def _seconds(call, n=1000):
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n


def test_the_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SORA_FAST_CACHE", str(tmp_path))
    assert env.cache() == tmp_path
    monkeypatch.delenv("SORA_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert env.cache() == tmp_path / "xdg" / "sora_fast"
    for relative in ("", "here"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert env.cache() == Path.home() / ".cache" / "sora_fast"


# ------------------------------------------------------------------------------------------------------------- files
EDITOR = """
import sys
from pathlib import Path
from sora_fast import files
if sys.argv[3] == "exclusive":
    files.fcntl = None
for place in range(25):
    files.edit(Path(sys.argv[1]), lambda text: text + f'{{"who": "{sys.argv[2]}", "place": {place}}}\\n')
"""


@pytest.mark.parametrize("lock", ["system", "exclusive"])
def test_processes_that_write_at_once_lose_nothing(tmp_path, lock):
    path = tmp_path / "deep" / "rows.jsonl"
    workers = [subprocess.Popen([sys.executable, "-c", EDITOR, path, str(who), lock], cwd=ROOT) for who in range(4)]
    assert [worker.wait(timeout=100) for worker in workers] == [0] * 4
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [(who, place) for who in range(4) for place in range(25)]
    assert sorted((int(row["who"]), row["place"]) for row in rows) == expected
    left = {each.name for each in path.parent.iterdir()} - {"rows.jsonl"}
    assert left <= ({"rows.jsonl.lock"} if lock == "system" else set())


@pytest.mark.parametrize("lock", ["system", "exclusive"])
def test_a_lock_that_is_not_had_is_a_sentence(tmp_path, monkeypatch, lock):
    monkeypatch.setattr(files, "WAIT_S", 0.05)
    if lock == "exclusive":
        monkeypatch.setattr(files, "fcntl", None)
    path = tmp_path / "x.json"
    with files.locked(path):
        with pytest.raises(TimeoutError, match=r"^files: expected the lock .*json\.lock within 0.05 s, got none; .*delete"):
            files.edit(path, lambda text: "lost")
    assert not path.exists()
    files.edit(path, lambda text: text + "kept")
    assert path.read_text() == "kept"


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.txt"
    files.save_text(path, "as it was\r\n")

    def half(temporary):
        temporary.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.replace(path, half)
    with pytest.raises(KeyError):
        files.edit(path, lambda text: {}[text])
    assert path.read_bytes() == b"as it was\r\n"
    assert {each.name for each in tmp_path.iterdir()} <= {"x.txt", "x.txt.lock"}
    assert files.read_text(tmp_path / "nothing") == ""
