"""Every op on the fake device, by its own composition and by its kernels: the error rule, no wait, and as a CUDA graph."""

from itertools import islice

import pytest
import torch
from torch.nn.attention import varlen

from sora_fast import Pack, configs, explain, ops
from sora_fast.explanation import all_ops
from sora_fast.kernels import rotary
from sora_fast.ops import attention_torch, cuda_backend, rotary_triton, uploads
from sora_fast.testing import truth
from sora_fast.testing.cases import cases
from sora_fast.testing.rule import run, same_bits

from . import graphs, waits

RAW = ("varlen_attention_forward", "varlen_attention_backward")  # without gradients of their own
CALLS = [(op, backend) for op in ops.__all__ for backend in ("torch", "triton") if backend in all_ops()[op].backends]
each_call = pytest.mark.parametrize("op, backend", CALLS)
COUNT = dict(torch=20, triton=2)  # cases, of which the emulator takes seconds each


def on(op, backend):
    return lambda **inputs: getattr(ops, op)(**inputs, backend=backend)


def few(op, backend, dtype):
    """The first cases that the backend takes, those for models' channels left out."""
    of_cpus = [label for label, _ in cases(op, dtype, "cpu")]
    found = []
    for label, inputs in cases(op, dtype, "cuda"):
        if len(found) == COUNT[backend] or label not in of_cpus:
            break
        try:
            with torch.no_grad():
                run(on(op, backend), inputs, None)
        except NotImplementedError:
            continue
        found.append((label, inputs))
    assert found
    return found


@each_call
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_an_op(kernels, op, backend, dtype):
    """Outputs and gradients by the error rule; nothing waits, forward or backward, but the judge."""
    for label, inputs in few(op, backend, dtype):
        wanted = truth(op, inputs, grads=op not in RAW)
        with waits.seen() as found:
            compared = wanted.compare(on(op, backend))
        hidden = [str(wait) for wait in found if not wait.file.startswith("sora_fast/testing/")]
        assert not hidden, f"{label}: {hidden}"
        assert not (failed := [str(each) for each in compared if not each.passed]), f"{label}: {failed}"
    assert backend == "torch" or kernels.records


# Forward alone: these kernels have no backward.
CUDA = [("norm_act", dict(x=(1, 8, 2, 3, 3), weight=(8,))),
        ("causal_conv3d", dict(x=(1, 96, 2, 4, 8), weight=(96, 96, 1, 3, 3), bias=(96,)))]


@pytest.mark.parametrize("op, shapes", CUDA, ids=[row[0] for row in CUDA])
def test_a_kernel_in_cuda(kernels, op, shapes):
    inputs = {name: torch.randn(shape, device="cuda").bfloat16() for name, shape in shapes.items()}
    call = lambda: run(on(op, "cuda"), inputs, None)[0]
    with torch.no_grad(), waits.none():
        if cuda_backend.extension()[0] is None:
            with pytest.raises(NotImplementedError, match="The CUDA extension"):
                call()
            return
        outputs = call()
    compared = truth(op, inputs, grads=False).compare(outputs)
    assert kernels.records and not (failed := [str(each) for each in compared if not each.passed]), failed


@each_call
def test_an_op_as_a_cuda_graph(kernels, op, backend):
    """Captured after one call, replayed on other numbers: the bits of a call without a graph."""
    (label, inputs), *_ = few(op, backend, torch.bfloat16)
    call = lambda: run(on(op, backend), inputs, None)[0]
    with torch.no_grad():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        for value in islice((v for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()), 1):
            value.mul_(0.5)
        graph.replay()
        assert all(same_bits(a, b) for a, b in zip(outputs, call(), strict=True)), label


def test_the_gpu_is_asked_for_its_name_once(monkeypatch, kernels):
    asked, name = [], torch.cuda.get_device_name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: (asked.append(device), name(device))[1])
    configs.gpu_name.cache_clear()
    for width in (8, 16):  # a launch each, with a Config of its own
        ops.norm_modulate(torch.randn(3, width, device="cuda"), None, None, backend="triton")
    assert len(asked) == 1


# What is made at the first call with new settings, and kept.
KEEPS = {
    "qk_norm_rope": (rotary_triton._fixed, lambda: dict(
        q=torch.randn(6, 2, 24, device="cuda"), k=None, coords=Pack([(1, 2, 3)], device="cuda").coords, axes=(8, 8, 8))),
    "unpatchify": (uploads._upload, lambda: dict(
        tokens=torch.randn(6, 12, device="cuda"), grids=((1, 2, 3),), patch=(1, 2, 2), channels=3, flat=True))}


@pytest.mark.parametrize("op, kept, make", [(op, *of_op) for op, of_op in KEEPS.items()], ids=KEEPS)
def test_what_is_kept_is_in_no_pool_of_a_graph(kernels, op, kept, make):
    """torch.compile's first run of a graph allocates in the graph's pool, whose memory is then used again."""
    inputs, pool = make(), graphs.Pool()
    rotary.frequencies.cache_clear()
    kept.cache_clear()
    with torch.no_grad():
        with torch.cuda.stream(torch.cuda.Stream()), pool.open():
            (wanted,) = run(on(op, "triton"), inputs, None)[0]
            wanted = wanted.cpu()
        assert pool.held, "the op's own output, at least"
        pool.use_again()
        (got,) = run(on(op, "triton"), inputs, None)[0]
        assert same_bits(got.cpu(), wanted)
        kept.cache_clear()
        with pytest.raises(RuntimeError, match="used once before a CUDA graph is captured, got new ones"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                run(on(op, "triton"), inputs, None)


# ------------------------------------------------------------------------------------------------ attention by PyTorch
def attention_inputs(lengths=(150, 0, 30)):
    """q, k, v of bf16 and an unequal pack, with more rows than the 128 up to which PyTorch's choice never changes."""
    cu_seqlens = torch.tensor([0, *lengths], device="cpu").cumsum(0).to("cuda", torch.int32)
    q, k, v = (torch.randn(sum(lengths), 2, 16, device="cuda").bfloat16() for _ in range(3))
    return dict(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)


def test_flash_attention_is_kept(monkeypatch):
    """PyTorch 2.14 gives what has no window to cuDNN: here it gets a window that is none."""
    kernel, chosen = varlen.varlen_attn, []

    def of_2_14(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        chosen.append("cudnn" if max_q > 128 and window_size == (-1, -1) else "flash")
        return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", of_2_14)
    monkeypatch.setattr(attention_torch, "VARLEN_MAY_BE_CUDNN", True)
    for masks in (dict(), dict(causal=True), dict(window=(3, -1)), dict(window=(-1, 2))):
        compared = truth("varlen_attention", attention_inputs() | masks).compare(on("varlen_attention", "torch"))
        assert not (failed := [str(each) for each in compared if not each.passed]), f"{masks}: {failed}"
    assert chosen == ["flash"] * 4
    assert "FlashAttention-2 by torch.nn.attention.varlen (kept from cuDNN" in explain("varlen_attention", device="cuda")
    monkeypatch.setattr(attention_torch, "VARLEN_MAY_BE_CUDNN", False)
    on("varlen_attention", "torch")(**attention_inputs())
    assert chosen[4:] == ["cudnn"]  # as an older PyTorch is called, which has no such choice
    assert "kept from cuDNN" not in explain("varlen_attention", device="cuda")


def test_deterministic_attention_by_pytorch(monkeypatch):
    """Its gradients come from no kernel that adds up dq in any order."""
    fused, sdpa = [], attention_torch.F.scaled_dot_product_attention

    def watched(*arguments, **options):
        cuda = torch.backends.cuda
        fused.append(cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())
        return sdpa(*arguments, **options)

    monkeypatch.setattr(attention_torch.F, "scaled_dot_product_attention", watched)
    inputs = attention_inputs() | dict(deterministic=True)
    call = on("varlen_attention", "torch")
    compared = truth("varlen_attention", inputs).compare(call)
    assert all(each.passed for each in compared) and fused == [False]
    with torch.no_grad():
        call(**inputs)
    assert fused[1:] == [True], "a forward has the same bits by every kernel"
