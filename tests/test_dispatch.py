"""Which backend runs, and what is said when none does."""

import gc
from dataclasses import replace

import numpy as np
import op_checks
import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from sora_fast import dispatch, first_order, ops, use_backend
from sora_fast.dispatch import Backend, Op, Problem
from sora_fast.ops import attention, operators

FACTS = ("cpu", torch.float32, False)  # of a Problem


def made_up(**refusals):
    """An op whose backends say their own name; ``refusals`` gives the sentences of those that cannot run."""
    example = lambda device, dtype, grad: Problem(device, dtype, grad)
    return Op("made_up", "none", example, [
        Backend(name, lambda name=name: name, lambda problem, why=why: list(why)) for name, why in refusals.items()])


def run(op, facts, requested="auto"):
    return op.run(op.plan(facts, requested), None)


def test_auto_takes_the_first_of_the_visible_order():
    assert dispatch.ORDER == ("cuda", "triton", "torch", "reference")
    assert run(made_up(reference=[], torch=[]), FACTS) == "torch"
    assert run(made_up(reference=[], torch=["It cannot."]), FACTS) == "reference"
    assert run(made_up(reference=[]), FACTS) == "reference"


def test_a_named_backend_never_falls_back():
    op = made_up(reference=[], torch=["It is too small.", "It is too green."])
    assert run(op, FACTS, "reference") == "reference"
    with pytest.raises(NotImplementedError, match="made_up.*'torch'.*too small.*too green"):
        run(op, FACTS, "torch")
    with use_backend("torch"), pytest.raises(NotImplementedError, match="too small"):
        run(op, FACTS)
    with pytest.raises(NotImplementedError, match="made_up.*'torch'.*does not implement.*'reference'"):
        run(made_up(reference=[]), FACTS, "torch")
    for unknown in ("fast", "", 3, None, ["torch"]):
        op_checks.assert_refused(lambda unknown=unknown: run(op, FACTS, unknown), "made_up", "'reference'", "'torch'")


def test_when_nothing_fits_every_backend_gives_its_reasons():
    op = made_up(reference=["It has one reason.", "It has two."], torch=["It has another."], elsewhere=[])
    with pytest.raises(NotImplementedError) as caught:
        run(op, FACTS)
    for part in ("made_up:", "[reference] It has one reason. It has two.", "[torch] It has another.", "[elsewhere]"):
        assert part in str(caught.value)
    assert run(op, FACTS, "elsewhere") == "elsewhere"
    op.backends["triton"] = Backend("triton", lambda: "triton", kernel="made_up")
    with pytest.raises(NotImplementedError, match=r"\[triton\] It is a kernel for CUDA GPUs and auto takes it there only"):
        run(op, FACTS)
    assert run(op, FACTS, "triton") == "triton"


def test_use_backend_nests_and_goes_before_the_environment(monkeypatch):
    op = made_up(reference=[], torch=[])
    ran = lambda requested="auto": run(op, FACTS, requested)
    monkeypatch.setenv("SORA_FAST_BACKEND", "reference")
    assert ran() == "reference" and ran("torch") == "torch"
    with use_backend("torch"):
        assert ran() == "torch" and ran("reference") == "reference"
        with use_backend("reference"):
            assert ran() == "reference"
            with use_backend("auto"):
                assert ran() == "torch"
        assert ran() == "torch"
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert ran() == "torch"
    assert ran() == "reference"
    monkeypatch.setenv("SORA_FAST_BACKEND", "nonsense")
    op_checks.assert_refused(ran, "made_up", "'nonsense'")
    for unknown in ("nonsense", 3, None):
        with pytest.raises(ValueError) as caught, use_backend(unknown):
            pass
        op_checks.assert_sentence(str(caught.value), "use_backend")


def test_a_trace_keeps_the_backend_it_was_made_with():
    x, noise = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    seen = []
    fn = torch.compile(lambda: ops.kl_sample(x, noise), backend=lambda graph, _: seen.append(
        "expm1" in graph.code) or graph, fullgraph=True)
    with use_backend("reference"):
        fn()
    fn()
    assert seen == [False, True]  # only the torch backend uses expm1; the other choice made another graph


def test_deterministic_algorithms_imply_deterministic(monkeypatch):
    q, cu = torch.randn(4, 2, 16), torch.tensor([0, 4], dtype=torch.int32)
    seen = []
    spy = lambda **arguments: seen.append(arguments["deterministic"]) or arguments["q"]
    for op in (attention.VARLEN_ATTENTION, attention.VARLEN_ATTENTION_BACKWARD):
        monkeypatch.setitem(op.backends, "reference", Backend("reference", spy))
    lse = torch.zeros(2, 4)
    run = lambda: (ops.varlen_attention(q, q, q, cu, cu, backend="reference"),
                   ops.varlen_attention_backward(q, None, q, q, q, q, lse, cu, cu, backend="reference"))
    run()
    torch.use_deterministic_algorithms(True)
    try:
        run()
    finally:
        torch.use_deterministic_algorithms(False)
    ops.varlen_attention(q, q, q, cu, cu, deterministic=True, backend="reference")
    assert seen == [False, False, True, True, True]


def test_deterministic_algorithms_run_every_op():
    torch.use_deterministic_algorithms(True)
    try:
        for op in ops.__all__:
            for _, inputs in op_checks.all_cases(op, torch.float32):
                fresh, leaves = op_checks.with_grad(inputs)
                out = getattr(ops, op)(**fresh)
                if any(o.requires_grad for o in op_checks.tensors(out)):
                    op_checks.gradients(out, leaves)
    finally:
        torch.use_deterministic_algorithms(False)


def test_problems_hold_no_size_but_its_bucket():
    """What a backend is told is the same for any number of tokens, samples, frames and pixels, but the power of four that
    measured times go by."""
    seen = {}

    def spy(op):
        plan = op.plan
        op.plan = lambda facts, requested: seen.setdefault(op.name, []).append(op.problem(*facts)) or plan(facts, requested)
        return op

    dispatch.forget()  # what is remembered is planned no more
    watched = [spy(op) for op in (attention.VARLEN_ATTENTION, ops.convolution.CAUSAL_CONV3D,
                                  ops.modulation.NORM_MODULATE, ops.patches.PATCH_EMBED)]
    try:
        for n in (1, 16, 17):
            cu = torch.tensor([0, n], dtype=torch.int32)
            q = torch.randn(n, 2, 16)
            ops.varlen_attention(q, q, q, cu, cu, n, n)
            ops.causal_conv3d(torch.randn(1, 2, n, n, 3), torch.randn(2, 2, 3, 3, 3))
            ops.norm_modulate(torch.randn(n, 8), None, None)
            ops.patch_embed(torch.randn(n * 4), torch.randn(2, 1, 1, 2, 2), grids=[(n, 1, 1)])
    finally:
        for op in watched:
            del op.plan
    assert len(seen) == 4
    for problems in seen.values():
        assert len({replace(problem, size=()) for problem in problems}) == 1
        assert len(problems) == 3
    assert [problem.size for problem in seen["norm_modulate"]] == [(1,), (16,), (64,)]


class Symbol(int):
    """A size of a traced graph: it can be compared, and a sentence that shows it bakes it in."""

    def __format__(self, spec):
        raise AssertionError("a sentence shows a size of the graph")

    __str__ = __repr__ = lambda self: format(self, "")


def _each(kind, value):
    """``kind`` of every int in ``value``, those above 1 beyond what kernels take."""
    if isinstance(value, tuple):
        return tuple(_each(kind, part) for part in value)
    return kind(20_011 if value > 1 else value) if type(value) is int else value


@pytest.mark.parametrize("op", [op for family in ops.FAMILIES for op in getattr(ops, family).OPS], ids=lambda op: op.name)
def test_no_reason_shows_a_size_of_a_traced_graph(op, monkeypatch):
    found = {}
    for kind in (Symbol, int):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda kind=kind: kind is Symbol)
        examples = [op.example(device, torch.float32, True) for device in ("cpu", "cuda:sm80", "cuda:sm120")]
        large = [replace(plain, **{name: _each(kind, value) for name, value in vars(plain).items()}) for plain in examples]
        found[kind] = " ".join(reason for problem in large for backend in op.backends.values()
                               for reason in backend.unsupported(problem))
    shown = op.family not in ("attention", "latents") or op.name in ("varlen_attention", "varlen_attention_forward")
    assert ("<traced>" in found[Symbol]) == ("20,011" in found[int]) == shown


@pytest.mark.parametrize("op, call", [
    ("causal_conv3d", lambda c: dict(x=torch.randn(1, c, 3, 5, 7), weight=torch.randn(c, c, 1, 3, 3))),
    ("norm_act", lambda c: dict(x=torch.randn(1, c, 3, 5, 7), weight=torch.randn(c)))])
def test_one_graph_of_channels_that_no_kernel_takes(op, call):
    torch._dynamo.reset()
    fn = torch.compile(lambda tensors: getattr(ops, op)(**tensors), dynamic=True, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for channels in (10, 18):
            torch.testing.assert_close(fn(given := call(channels)), getattr(ops, op)(**given))


def test_fake_and_meta_tensors():
    """Shapes without numbers go through both plain backends."""
    from torch._subclasses import FakeTensorMode

    def run(make):
        q, cu = make(6, 2, 16), make(3, dtype=torch.int32)
        for backend in ("torch", "reference"):
            assert ops.varlen_attention(q, q, q, cu, cu, causal=True, backend=backend).shape == (6, 2, 16)
            x, rows = make(6, 8), make(6, dtype=torch.int32)
            assert ops.norm_modulate(x, make(2, 8), make(2, 8), rows, backend=backend).shape == (6, 8)
            video = make(1, 4, 3, 5, 6)
            assert ops.norm_act_conv3d(video, make(2, 4, 3, 3, 3), backend=backend).shape == (1, 2, 3, 5, 6)

    run(lambda *shape, **options: torch.empty(*shape, device="meta", **options))
    with FakeTensorMode():
        run(lambda *shape, **options: torch.empty(*shape, **options))


def test_a_slow_path_on_a_gpu_is_told_once(caplog):
    refuses = Backend("torch", lambda: "fast", lambda problem: ["It cannot today."])
    op = Op("made_up", "none", lambda *facts: Problem(*facts), [refuses, Backend("reference", lambda: "slow")])
    on_gpu, on_cpu = ((device, torch.float32, False) for device in ("cuda:sm90", "cpu"))
    with caplog.at_level("WARNING", logger="sora_fast"):
        run(op, on_cpu)
        with use_backend("reference"):
            run(op, on_gpu)
        run(op, on_gpu, "reference")
        assert not caplog.records  # asked for, or no GPU: nothing to tell
        assert run(op, on_gpu) == run(op, on_gpu) == "slow"
    (record,) = caplog.records
    assert "made_up runs on its reference on cuda:sm90" in record.message and "It cannot today." in record.message


def test_an_operator_that_is_defined_anew_takes_the_old_ones_place():
    """As by a package that was deleted and imported again; what was made first goes, and takes nothing along."""
    x = torch.ones(3)
    for factor in (2.0, 3.0):
        operators.define("times(Tensor x) -> Tensor", lambda x, factor=factor: factor * x, torch.empty_like)
        gc.collect()
        assert torch.equal(torch.ops.sora_fast.times(x), factor * x)
        assert torch.ops.sora_fast.times(x.to("meta")).shape == (3,)


def test_an_operator_is_dispatched_where_somebody_sees_it_or_arguments_are_converted():
    given, arguments = [], (torch.ones(6), 1.0, (2, 3))

    def added(x, amount, sizes):
        given.append((amount, sizes))
        return (x + amount).view(list(sizes))

    call = operators.define("added(Tensor x, float amount, int[] sizes) -> Tensor", added,
                            lambda x, amount, sizes: x.new_empty(sizes))
    direct = lambda: given[-1][1] is arguments[2]  # PyTorch makes a list of it
    assert call(*arguments).shape == (2, 3) and direct()
    with FlopCounterMode(display=False):
        assert call(*arguments).shape == (2, 3) and not direct()
    with FakeTensorMode() as mode:
        assert isinstance(call(mode.from_tensor(arguments[0]), *arguments[1:]), FakeTensor)
    with torch.profiler.profile() as profile:
        call(*arguments)
    assert any(event.key == "sora_fast::added" for event in profile.key_averages())
    for amount, sizes in ((1, (2, 3)), (1.0, (2, np.int64(3)))):
        assert call(arguments[0], amount, sizes).shape == (2, 3) and not direct()
        assert [type(value) for value in (given[-1][0], *given[-1][1])] == [float, int, int]
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(*arguments), torch.full((2, 3), 2.0))
    assert not direct()

    class Added(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: call(x, 1.0, (2, 3)))
        backward = staticmethod(lambda ctx, grad: grad.flatten())

    Added.apply(torch.ones(6, requires_grad=True)).mul_(2)  # what an operator makes is no view of anything


class Cubed(torch.autograd.Function):
    """With a gradient that autograd takes for a constant, as a kernel's."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.detach() ** 3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (3 * x * x * grad).detach()


def others_node(x, hook):
    cubed = Cubed.apply(x)
    cubed.grad_fn.register_hook(hook)
    return cubed.view(2, 3).flatten()


class OursCubed(Cubed):
    backward = staticmethod(first_order.opaque(Cubed.backward))


@pytest.mark.parametrize("backend", (
    Backend("torch", lambda x: x ** 3), Backend("torch", lambda x: (x ** 3).view(3, 2).flatten()),
    Backend("torch", lambda x: OursCubed.apply(x)), Backend("torch", lambda x: OursCubed.apply(x).view(6)),
    Backend("torch", lambda x: Cubed.apply(x), foreign=True), Backend("torch", others_node, hooked=True)),
    ids=("PyTorch's", "a view", "ours", "a view of ours", "others'", "a node of others"))
@pytest.mark.parametrize("change", (lambda y: y, lambda y: y.mul_(2)), ids=("", "changed in place"))
def test_a_second_derivative_is_refused(backend, change):
    """Whether autograd could take it or would take the first for a constant, and whatever becomes of the result."""
    op, x = Op("made_up", "none", lambda *facts: Problem(*facts), [backend]), torch.arange(6.0).requires_grad_()
    x_of_op = x * 1
    key = dispatch.call_key(op, "torch", (x_of_op,))
    y = change(op.run(op.plan(("cpu", torch.float32, True), "torch"), key, x=x_of_op))
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(grad.detach(), 3 * x.detach() ** 2 * (1 if y.sum() == 225 else 2))
    for of in (x, x_of_op):
        with pytest.raises(RuntimeError) as caught:
            torch.autograd.grad(grad.sum(), of, retain_graph=True, allow_unused=True)
        op_checks.assert_sentence(str(caught.value), "made_up")


def test_what_refuses_it_keeps_no_tensor():
    op = Op("made_up", "none", lambda *facts: Problem(*facts), [Backend("torch", lambda x, y: x + y)])
    x, y = (torch.ones(3, requires_grad=True) * 2 for _ in range(2))
    out = op.run(op.plan(("cpu", torch.float32, True), "torch"), dispatch.call_key(op, "torch", (x, y)), x=x, y=y)
    storages = [StorageWeakRef(t.untyped_storage()) for t in (x, y)]
    del x, y
    assert all(each.expired() for each in storages) and out.sum() == 12
