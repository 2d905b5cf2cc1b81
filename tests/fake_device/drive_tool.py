"""The fake device itself: every check of it fails with a planted fault, and names the planted line."""

import inspect
from pathlib import Path
from types import CodeType

import pytest
import torch

from sora_fast import Pack, ops, use_backend
from sora_fast.kernels import modulation as launches
from sora_fast.models import VideoVAE, vae_stream
from sora_fast.ops import modulation, uploads
from sora_fast.to_device import to_device

from . import graphs, waits


def plant(monkeypatch, function, old, new):
    """Change one line of ``function`` while it keeps its place in the file; returns ``file:line``."""
    path = function.__code__.co_filename
    source = Path(path).read_text("utf-8")
    lines, start = inspect.getsourcelines(function)
    (at,) = [start + i for i, line in enumerate(lines) if old in line]
    every = source.splitlines(keepends=True)
    every[at - 1] = every[at - 1].replace(old, new)
    pending = [compile("".join(every), path, "exec")]
    while pending:
        code = pending.pop()
        if code.co_name == function.__code__.co_name and code.co_firstlineno == function.__code__.co_firstlineno:
            monkeypatch.setattr(function, "__code__", code)
            return f"{Path(path).relative_to(waits.ROOT)}:{at}"
        pending += [each for each in code.co_consts if isinstance(each, CodeType)]
    raise AssertionError(f"{function.__name__} is not in {path}")


def append(monkeypatch, place, statement):
    """Plant ``statement`` behind a line; ``place``: function and line."""
    return plant(monkeypatch, *place, f"{place[1]}; {statement}")


def residual(backend, grad=False):
    """A call of gate_residual on the device, and its backward."""
    pack = Pack([(1, 2, 2), (1, 1, 3)], device="cuda")
    x, y, gate = (torch.randn(n, 8, device="cuda", requires_grad=grad) for n in (7, 7, 2))

    def call():
        out = ops.gate_residual(x, y, gate, pack, backend=backend)
        return torch.autograd.grad(out, (y, gate), torch.ones_like(out)) if grad else out
    return call


FORWARD = launches.forward, "tokens, width = x.shape"
BACKWARD = launches.backward, "tokens, width = like.shape"
TORCH = modulation._torch_gate_residual, "wide = wide_dtype(x, y, gate)"
WAITS = [
    (FORWARD, "x.sum().item()", "item"),
    (FORWARD, "float(x[0, 0])", "item"),
    (FORWARD, "rows.tolist()", "tolist"),
    (BACKWARD, "rows.cpu()", "copy to the host"),
    (TORCH, "rows.nonzero()", "nonzero"),
    (TORCH, "x[rows > 0]", "indexing by a mask"),
    (TORCH, "rows.to('cpu', non_blocking=True)", "copy to the host"),
    (TORCH, "torch.tensor([1.0], device=x.device)", "copy from the host"),
    (TORCH, "torch.ones(3).to(x.device, non_blocking=True)", "copy from memory that is not pinned"),
    (TORCH, "torch.cuda.synchronize()", "torch.cuda.synchronize")]
each_wait = pytest.mark.parametrize("place, statement, what", WAITS, ids=[row[1] for row in WAITS])


@each_wait
def test_a_planted_wait(monkeypatch, kernels, place, statement, what):
    call = residual("torch" if place is TORCH else "triton", grad=True)
    with waits.none():
        call()
    where = append(monkeypatch, place, statement)
    with waits.none(), pytest.raises(waits.HiddenWait, match=f"{what} at {where} in {place[0].__name__}: "):
        call()
    with waits.seen() as found:
        call()
    assert [f"{wait.what} at {wait.file}:{wait.line}" for wait in found] == [f"{what} at {where}"]


@each_wait
def test_a_planted_wait_in_a_capture(monkeypatch, kernels, place, statement, what):
    call = residual("torch" if place is TORCH else "triton", grad=True)
    call()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        call()
    where = append(monkeypatch, place, statement)
    with pytest.raises(waits.NotCapturable, match=f"operation not permitted when stream is capturing: {what} at {where} "):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
    assert not torch.cuda.is_current_stream_capturing()


def test_a_planted_wait_in_a_stream(monkeypatch, caplog):
    """decode_stream captures steady chunks, and the fault is met where it captures: its warning names the line."""
    vae, z = VideoVAE.preset("tiny", width=8).to("cuda"), torch.randn(1, 16, 10, 2, 2, device="cuda")
    list(vae.decode_stream(z, chunk=1))
    where = plant(monkeypatch, vae_stream.CapturedStream.__call__, "lambda: self.step(self.input)",
                  "lambda: (self.input.sum().item(), self.step(self.input))[1]")
    list(vae.decode_stream(z, chunk=1))
    assert f"operation not permitted when stream is capturing: item at {where} " in caplog.text


@pytest.mark.parametrize("statement, operator", [
    ("x = x + torch.ones(8)", "aten.add.Tensor"), ("torch.cat([x, torch.ones(1, 8)])", "aten.cat.default"),
    ("torch.stack([gate[0, 0], torch.ones(())])", "aten.stack.default"), ("torch.ones(7)[rows]", "aten.index.Tensor"),
    ("y.detach()[rows] = torch.ones(7, 8)", "aten.index_put_.default")])
def test_a_planted_cpu_tensor(monkeypatch, statement, operator):
    call = residual("torch")
    call()
    where = append(monkeypatch, TORCH, statement)
    with pytest.raises(RuntimeError, match=f"Expected all tensors to be on the same device, .* in {operator} at {where} "):
        call()


def test_a_planted_cpu_tensor_for_a_kernel(monkeypatch, kernels):
    call = residual("triton")
    call()
    plant(monkeypatch, launches.forward, "torch.empty_like(x)\n", "torch.empty(x.shape)\n")
    with pytest.raises(RuntimeError, match="forward_kernel: expected tensors on cuda:0, got x_new on the CPU at kernels"):
        call()


def test_a_planted_upload_in_a_capture(monkeypatch):
    """The library refuses new grids in a capture; without its refusal the fake device does."""
    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            uploads.uploaded_grids(((1, 4, 4),), torch.device("cuda", 0))

    uploads._upload.cache_clear()
    with pytest.raises(RuntimeError, match="grids: expected grids that were used once before a CUDA graph is captured"):
        capture()
    plant(monkeypatch, inspect.unwrap(uploads._upload), "torch.cuda.is_current_stream_capturing()", "False")
    with pytest.raises(waits.NotCapturable, match="copy from the host at sora_fast/to_device.py:.*called from .*uploads.py"):
        capture()


def test_a_capture_runs_nothing_and_a_replay_everything():
    """A graph that is never replayed gives NaN; what it writes is as before."""
    total, x = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x * 2).view(3) + total
        total += y
    assert total.tolist() == [0, 0, 0] and y.isnan().all()
    for wanted in ([2, 2, 2], [6, 6, 6]):
        graph.replay()
        assert total.tolist() == wanted
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [16, 16, 16]


def test_a_capture_of_what_gives_no_tensor():
    """Of the three gradients of a layer norm that has no bias, one is None."""
    x, graph = torch.randn(3, 8, device="cuda", requires_grad=True), torch.cuda.CUDAGraph()
    call = lambda: torch.autograd.grad(torch.nn.functional.layer_norm(x, (8,)), x, torch.ones(3, 8, device="cuda"))[0]
    wanted = call()
    with torch.cuda.graph(graph):
        got = call()
    graph.replay()
    assert torch.equal(got, wanted)


def test_a_capture_of_a_kernel(kernels):
    with torch.no_grad():
        call = residual("triton")
        wanted, graph, before = call(), torch.cuda.CUDAGraph(), len(kernels.records)
        with torch.cuda.graph(graph):
            out = call()
        assert out.isnan().all() and isinstance(graph, graphs.CUDAGraph)
        graph.replay()
        assert torch.equal(out, wanted) and len(kernels.records) == before + 2


def test_cpu_tensors_stay_on_the_cpu():
    """The fake device changes nothing of what runs beside it."""
    with waits.none():
        x = torch.arange(6.0)
        assert x.device.type == "cpu" and x[x > 2].sum().item() == 12 and x.numpy().sum() == 15
        assert torch.tensor([1, 2]).tolist() == [1, 2] and to_device(x, "cuda").is_cuda
    with use_backend("reference"):
        assert ops.kl_sample(torch.zeros(1, 2, 3))[0].device.type == "cpu"
