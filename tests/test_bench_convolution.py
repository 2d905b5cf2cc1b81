"""The benchmark's convolutions and norms: their counts, their peers, and the bound on a convolution's rounding."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sora_fast import ops
from sora_fast.benchmarks.case import nbytes
from sora_fast.benchmarks.specs import convolution, normalization, spec
from sora_fast.testing import truth
from sora_fast.testing.rule import random_cotangents, run, tensors

CPU = torch.device("cpu")
EVERY = [*normalization.CASES, *convolution.CASES]
QUICK = [case for case in EVERY if "quick" in case.suites]
named = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.id)


def providers(case):
    return spec("normalization" if case.op == "norm_act" else "convolution").providers(case.op)


def provider(name, op="causal_conv3d"):
    return next(p for p in spec("normalization" if op == "norm_act" else "convolution").providers(op) if p.name == name)


def called(case, names, device=CPU):
    """Leaves, outputs, and cotangents for those that need one, of one call on the backend "torch"."""
    inputs = {name: value.requires_grad_(name in names) if isinstance(value, torch.Tensor) else value
              for name, value in case.inputs(device, 0).items()}
    outputs = tensors(getattr(ops, case.op)(**inputs, backend="torch"))
    return inputs, outputs, [torch.empty_like(o) if o.requires_grad else None for o in outputs]


def gradients(inputs, outputs, cotangents, names):
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    return torch.autograd.grad([o for o, _ in pairs], [inputs[name] for name in names], [c for _, c in pairs],
                               allow_unused=True)


# --------------------------------------------------------------------------------------------------------- the cases
def test_cases_are_named_once_and_rows_can_hold_them():
    assert len({case.id for case in EVERY}) == len({(case.op, case.label) for case in EVERY}) == len(EVERY)
    for op in ("norm_act", "causal_conv3d", "norm_act_conv3d"):
        suites = {suite: [case for case in EVERY if case.op == op and suite in case.suites] for suite in ("quick", "full")}
        assert all(suites.values()) and all(case.dtype == torch.bfloat16 or "float32" in case.label
                                            for case in suites["full"])
    for case in EVERY:
        assert json.loads(json.dumps(case.shape())) == case.shape()
        assert (case.op == "norm_act_conv3d") == (case.op != "norm_act" and case.norm is not None)


def test_a_seed_gives_the_same_numbers():
    for case in QUICK:
        first, again, other = (tensors(case.inputs(CPU, seed)) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("case", [c for c in EVERY if c.op != "norm_act"], ids=lambda case: case.id)
def test_flops_are_those_that_pytorch_counts(case):
    wide = replace(case, dtype=torch.bfloat16)  # oneDNN's own operator, which float32 takes, is not counted
    for direction, names in case.directions().items():
        with FakeTensorMode(), FlopCounterMode(display=False) as counted:
            inputs, outputs, cotangents = called(wide, names)
            forward = counted.get_total_flops()
            if names:
                gradients(inputs, outputs, cotangents, names)
        assert counted.get_total_flops() - (forward if names else 0) == case.flops(direction) > 0, direction


def test_flops_are_those_of_the_published_decoder():
    flops = {case.label: case.flops("forward") for case in convolution.CASES if case.op == "causal_conv3d"}
    # TFLOP of a stage of Wan 2.1's decoder over 81 frames at 480p, and how many frames that stage puts out
    for label, frames, total, passed in (("Wan 2.1, 480p, 192 channels", 4, 96.59, 486),
                                         ("Wan 2.1, 480p, 96 channels", 4, 96.59, 486),
                                         ("Wan 2.1, 480p, 384 channels", 2, 40.74, 205),
                                         ("Wan 2.1, 480p, 384 channels, one latent frame", 1, 10.43, 210),
                                         ("Wan 2.1, 480p, 384 to 192 channels after upsampling", 4, 10.73, 81),
                                         ("Wan 2.1, 480p, 384 to 768 channels in time", 2, 1.77, 40)):
        assert flops[label] / frames * passed / 1e12 == pytest.approx(total, rel=3e-3), label


def shrunk(case):
    if case.op == "norm_act":
        return replace(case, channels=32, frames=2, height=4, width=5)
    channels = 32 if case.norm == "group" else 4
    return replace(case, in_channels=channels, out_channels=3, frames=min(case.frames, 3), height=7, width=8)


def what_is_read(case, names):
    """Inputs whose numbers change an output, or those of ``names``' gradients; and the outputs whose cotangents do."""
    inputs = case.inputs(CPU, 0)
    call = partial(getattr(ops, case.op), backend="reference")
    cotangents = random_cotangents(run(call, inputs, None)[0], 0)

    def results(inputs, cotangents):
        outputs, grads = run(call, inputs, cotangents if names else None, names)
        return list(grads.values()) if names else outputs

    before = results(inputs, cotangents)
    changes = lambda *changed: not all(torch.equal(a, b) for a, b in zip(results(*changed), before, strict=True))
    others = case.inputs(CPU, 1)
    read = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)
            and changes(inputs | {name: others[name]}, cotangents)]
    if not names:
        return read, []
    other = random_cotangents(cotangents, 1)
    return read, [place for place in range(len(other))
                  if changes(inputs, [*cotangents[:place], other[place], *cotangents[place + 1:]])]


@named
def test_bytes_are_those_of_what_is_read_and_written(case):
    for direction, names in case.directions().items():
        read, cotangents_read = what_is_read(replace(shrunk(case), dtype=torch.float32), names)
        with FakeTensorMode():
            inputs, outputs, cotangents = called(case, names)
            written = gradients(inputs, outputs, cotangents, names) if names else outputs
        cotangents = [torch.empty(0) if c is None else c for c in cotangents]
        moved = [*(inputs[name] for name in read), *(cotangents[place] for place in cotangents_read), *written]
        # dresidual is dy itself; dx and dcache are parts of one memory
        memory = {(t.untyped_storage()._cdata, t.storage_offset()): nbytes(t) for t in moved}
        assert sum(memory.values()) == case.least_bytes(direction), direction


def test_the_truth_of_every_case_fits_a_gpu():
    for case in convolution.CASES:
        shapes = case.tensors()
        unfolded = 8 * math.prod(shapes["weight"][1:]) * shapes["y"][0] * math.prod(shapes["y"][2:])
        assert unfolded < 64 * 2**30 and max(map(math.prod, shapes.values())) < 2**31, case.id


# --------------------------------------------------------------------------------------------------------- the peers
def test_what_a_peer_cannot_do_is_a_sentence():
    cases = {case.label: case for case in QUICK if case.op == "causal_conv3d"}
    returns, flat = cases["3x3x3, 96 channels, cache in and out"], cases["(1, 3, 3), stride 2, uneven padding"]
    refused = lambda name, case, device=CPU: provider(name, case.op).unavailable(case, "forward", device)
    assert "returns a cache" in refused("cudnn_prepadded", returns) and not refused("cudnn_prepadded", flat)
    assert "this case has 3" in refused("cudnn_2d", returns) and not refused("cudnn_2d", flat)
    for name in ("cudnn", "cudnn_prepadded", "cudnn_ncdhw", "cudnn_2d"):
        assert "of type mps" in refused(name, flat, torch.device("mps"))
    rms, group = (next(c for c in QUICK if c.op == "norm_act" and c.norm == norm) for norm in ("rms", "group"))
    assert "'rms'" in refused("normalize", group) and "'rms'" in refused("rms_norm", group)
    border, time = (cases[f"{label}, replicate"] for label in ("3x3x3, 96 to 3 channels", "(3, 1, 1), 48 to 96 channels"))
    compiler = provider("compile").unavailable
    assert "replication_pad2d_backward" in compiler(border, "dgrad", CPU) and not compiler(border, "forward", CPU)
    assert not compiler(time, "dgrad", CPU) + compiler(border, "dgrad", torch.device("cuda"))
    assert "'group'" in refused("group_norm", rms) and not refused("group_norm", group) + refused("normalize", rms)


class Noted(TorchDispatchMode):
    """Notes the operators that run, a backward's included: name, cudnn.benchmark at that time, first argument."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.overloadpacket.__name__, torch.backends.cudnn.benchmark, args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["cudnn", "cudnn_prepadded", "cudnn_ncdhw", "cudnn_2d"])
def test_cudnn_searches_in_both_directions_and_copies_nothing(name):
    torch.backends.cudnn.benchmark = False
    case = next(c for c in convolution.CASES if c.label == "(1, 3, 3), stride 2, uneven padding")
    peer = provider(name)
    given = peer.prepare(case.inputs(CPU, 0))
    given = {key: v.detach().requires_grad_(key in ("x", "weight", "bias")) if isinstance(v, torch.Tensor) else v
             for key, v in given.items()}
    with Noted() as noted:
        y = peer.run(**given)
        torch.autograd.grad(y, [given["x"], given["weight"], given["bias"]], torch.randn_like(y))
    assert [(op, flag) for op, flag, _ in noted.seen if "convolution" in op] == [("convolution", True),
                                                                                 ("convolution_backward", True)]
    assert not torch.backends.cudnn.benchmark
    x = next(first for op, _, first in noted.seen if op == "convolution")
    assert x.is_contiguous(memory_format={"cudnn_ncdhw": torch.contiguous_format,
                                          "cudnn_2d": torch.channels_last}.get(name, torch.channels_last_3d))
    ran = {op for op, _, _ in noted.seen}
    assert not ran & {"clone", "copy_", "_to_copy"} and ("constant_pad_nd" in ran) == (name != "cudnn_prepadded")


# ------------------------------------------------------------------------------------- the bound on a convolution
def frames_summed_in_16_bits(x, weight, bias=None, **options):
    """A 3x3x3 kernel that rounds after each frame of taps, as three calls of a 2-D convolution do."""
    padded = F.pad(x, (1, 1, 1, 1, 2, 0))
    y = sum(F.conv3d(padded[:, :, t : t + x.shape[2]], weight[:, :, t : t + 1]) for t in range(3))
    return y if bias is None else y + bias[:, None, None, None]


def random(dtype, bias=True, channels=96):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    found = dict(x=draw(1, 32, 3, 20, 20), weight=draw(channels, 32, 3, 3, 3) / (32 * 27) ** 0.5)
    return {k: v.to(dtype) for k, v in (found | (dict(bias=0.1 * draw(channels)) if bias else {})).items()}


@pytest.mark.parametrize("bias", [False, True])
def test_partial_sums_in_16_bits_are_no_convolution(bias):
    found = truth("causal_conv3d", random(torch.bfloat16, bias), grads=False)
    for backend in ("torch", "reference"):
        result, = found.compare(partial(ops.causal_conv3d, backend=backend))
        assert result.passed and not result.problem, result
    result, = found.compare(frames_summed_in_16_bits)
    assert result.error_max <= result.allowed_max and result.error_rms <= result.allowed_rms, "the rule alone lets it pass"
    assert not result.passed and "sums in float32" in result.problem, result
    few = truth("causal_conv3d", random(torch.bfloat16, bias, channels=8), grads=False)
    assert few.compare(frames_summed_in_16_bits)[0].passed, "too few numbers to judge by"


def test_a_bias_added_after_a_rounding_of_its_own_is_a_convolution():
    def bias_apart(x, weight, bias, **options):
        return ops.causal_conv3d(x, weight, backend="reference") + bias[:, None, None, None]

    result, = truth("causal_conv3d", random(torch.bfloat16), grads=False).compare(bias_apart)
    assert result.passed, result


@pytest.mark.usefixtures("sums_of_real_clips")
def test_shortened_factors_are_no_float32_convolution():
    inputs = random(torch.float32)
    found = truth("causal_conv3d", inputs, grads=False)
    assert found.compare(partial(ops.causal_conv3d, backend="torch"))[0].passed
    slightly = partial(ops.causal_conv3d, backend="reference")
    result, = found.compare(lambda x, **rest: slightly(x=(x * 2**20).round() / 2**20, **rest))
    assert result.passed, result  # 2**-21 of a number near 1, which is within float32's own
    result, = found.compare(lambda x, **rest: slightly(x=x.half().float(), **rest))  # as short as TF32's
    assert not result.passed and "sums in float32" in result.problem, result
