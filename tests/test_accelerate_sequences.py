"""Pairs in an nn.Sequential: which are one op, which are left and why, and what hooks, offloading and changes do to them."""

import copy
from collections import OrderedDict

import accelerate_checks as checks
import pytest
import torch
from accelerate_checks import draw
from test_accelerate_trials import HOOKS, close, hook
from torch import nn
from torch.nn.utils import parametrize, prune

import sora_fast
from sora_fast.integrations.mixin import is_fast

PAST = (1, 1, 1, 1, 2, 0)


def causal(pad=None, conv=None):
    return nn.Sequential(pad or nn.ZeroPad3d(PAST), conv or nn.Conv3d(4, 4, 3))


def norm_act():
    return nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())


def clip(*shape):
    return draw(*(shape or (2, 4, 4, 6, 5))).float().requires_grad_()


def agrees(model, x=None, swapped=True):
    """A swapped copy computes what the model does, gradients included; its report."""
    checks.randomise(model)
    fast, x = copy.deepcopy(model), clip() if x is None else x
    report = sora_fast.accelerate(fast)
    assert is_fast(fast) == swapped, report
    outputs = model(x), fast(x)
    close(outputs[1], outputs[0])
    weights = draw(*outputs[0].shape).float()
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), [x, *m.parameters()])
                      for y, m in zip(outputs, (model, fast), strict=True)), strict=True):
        close(b, a)
    return report


# ------------------------------------------------------------------------------------------------ what is covered
COVERED = {
    "zeros given as a constant": causal(nn.ConstantPad3d(PAST, 0)),
    "the convolution pads space": causal(nn.ZeroPad3d((0, 0, 0, 0, 2, 0)), nn.Conv3d(4, 4, 3, padding=(0, 1, 1))),
    "both pad space": causal(nn.ZeroPad3d((1, 0, 2, 1, 2, 0)), nn.Conv3d(4, 4, 3, padding=(0, 1, 2))),
    "the convolution pads around repeated frames": causal(nn.ReplicationPad3d((0, 0, 0, 0, 2, 0)),
                                                          nn.Conv3d(4, 4, 3, padding=(0, 1, 1))),
    "the last frame's kernel alone": causal(nn.ReplicationPad3d((1, 1, 1, 1, 0, 0)), nn.Conv3d(4, 4, (1, 3, 3))),
    "valid": causal(None, nn.Conv3d(4, 4, 3, padding="valid", stride=(2, 1, 2))),
    "the same": causal(nn.ZeroPad3d((0, 1, 2, 0, 0, 0)), nn.Conv3d(4, 4, (1, 4, 3), padding="same")),
    "the convolution repeats the border": causal(nn.ZeroPad3d((0, 0, 0, 0, 2, 0)), nn.Conv3d(
        4, 4, 3, padding=(0, 1, 2), padding_mode="replicate")),
    "both repeat it": causal(nn.ReplicationPad3d((1, 0, 2, 1, 2, 0)), nn.Conv3d(
        4, 4, 3, padding=(0, 1, 2), padding_mode="replicate")),
    "the convolution reflects it": causal(nn.ReplicationPad3d((0, 0, 0, 0, 2, 0)), nn.Conv3d(
        4, 4, 3, padding=(0, 2, 1), padding_mode="reflect")),
}


@pytest.mark.parametrize("what", COVERED)
def test_pads(what):
    agrees(COVERED[what])


def several():
    return nn.Sequential(OrderedDict(
        enter=nn.Conv3d(4, 4, 1), norm=nn.GroupNorm(2, 4), act=nn.SiLU(), pad=nn.ZeroPad3d(PAST), conv=nn.Conv3d(4, 4, 3),
        again=nn.GroupNorm(2, 4), act2=nn.SiLU(), pad2=nn.ReplicationPad3d(PAST), conv2=nn.Conv3d(4, 4, 3),
        leave=nn.Conv3d(4, 2, 1)))


def test_pairs_anywhere_in_a_longer_sequence_and_under_any_name():
    model = several()
    report = agrees(model)
    assert {row.name for row in report.rows if row.state == "inside"} == {*model._modules} - {"enter", "leave"}
    assert {row.name for row in report.left} == {"enter", "leave"}


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5), (2, 4, 6, 5), (2, 4, 2, 2, 3, 2)], ids=str)
def test_group_norms_of_any_rank(shape):
    agrees(norm_act(), clip(*shape))


def test_a_clip_without_a_batch():
    agrees(causal(), clip(4, 4, 6, 5))


LEFT = {
    "ConstantPad3d fills with 0.5, not with 0": causal(nn.ConstantPad3d(PAST, 0.5)),
    "ReflectionPad3d is not a pad this library knows": causal(nn.ReflectionPad3d(PAST)),
    "CircularPad3d is not a pad this library knows": causal(nn.CircularPad3d(PAST)),
    "ZeroPad3d does not pad the past alone, as a causal kernel of 3 frames needs": causal(nn.ZeroPad3d(1)),
    "ZeroPad3d cuts off what is at the border": causal(nn.ZeroPad3d((1, -1, 1, 1, 2, 0))),
    "its convolution has groups or dilation": causal(None, nn.Conv3d(4, 4, 3, groups=2)),
    "its convolution pads in time itself": causal(None, nn.Conv3d(4, 4, 3, padding=1)),
    "its convolution pads with circular around ZeroPad3d": causal(nn.ZeroPad3d((0, 0, 0, 0, 2, 0)), nn.Conv3d(
        4, 4, 3, padding=(0, 1, 1), padding_mode="circular")),
    "its convolution pads with zeros around ReplicationPad3d": causal(nn.ReplicationPad3d(PAST), nn.Conv3d(
        4, 4, 3, padding=(0, 1, 1))),
    "its convolution pads with replicate around ZeroPad3d": causal(nn.ZeroPad3d(PAST), nn.Conv3d(
        4, 4, 3, padding=(0, 1, 1), padding_mode="replicate")),
    "its convolution pads with reflect around ReplicationPad3d": causal(nn.ReplicationPad3d(PAST), nn.Conv3d(
        4, 4, 3, padding=(0, 1, 1), padding_mode="reflect")),
    "ZeroPad3d has no Conv3d behind it": nn.Sequential(nn.Conv3d(4, 4, 1), nn.ZeroPad3d(PAST)),
    "Dropout3d behind ConstantPad3d is not Conv3d": nn.Sequential(nn.ConstantPad3d(PAST, 0), nn.Dropout3d(0.0), nn.Conv3d(
        4, 4, 3)),
    "GroupNorm has no SiLU behind it": nn.Sequential(nn.Conv3d(4, 4, 1), nn.GroupNorm(2, 4)),
    "BatchNorm3d before SiLU is not a norm this library knows": nn.Sequential(nn.BatchNorm3d(4), nn.SiLU()),
    "GELU behind GroupNorm is not SiLU, ReflectionPad3d is not a pad this library knows": nn.Sequential(
        nn.GroupNorm(2, 4), nn.GELU(), nn.ReflectionPad3d(PAST), nn.Conv3d(4, 4, 3)),
    "GELU behind GroupNorm is not SiLU": nn.Sequential(nn.GroupNorm(2, 4), nn.GELU()),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_says_what_was_missing(why):
    assert agrees(LEFT[why], swapped=False).rows[0].note == f"a container; {why}"


@pytest.mark.parametrize("note, model", [
    ("norm_act", norm_act()), ("causal_conv3d", causal()),
    ("norm_act and causal_conv3d", nn.Sequential(*norm_act(), *causal())),
    ("causal_conv3d; unchanged in it: GELU behind GroupNorm is not SiLU", nn.Sequential(
        nn.GroupNorm(2, 4), nn.GELU(), *causal(nn.ConstantPad3d(PAST, 0)))),
    ("causal_conv3d and norm_act; unchanged in it: its convolution has groups or dilation", nn.Sequential(
        *causal(), *norm_act(), *causal(None, nn.Conv3d(4, 4, 3, groups=2))))])
def test_what_is_swapped_says_which_op_runs(note, model):
    assert agrees(model).rows[0].note == note


def test_a_module_that_only_contains_is_called_so():
    assert agrees(nn.Sequential(nn.Conv3d(4, 4, 1), nn.SiLU()), swapped=False).rows[0].note == "a container"


# ------------------------------------------------------------------------------------------------ hooks
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("make", [norm_act, causal])
def test_hooks_on_the_children_of_a_pair_are_called(make, kind):
    for place in (0, 1):
        for early in (True, False):
            model, calls, x = checks.randomise(make()), [], clip()
            wanted = model(x)
            off = hook(kind, model[place], calls) if early else None
            report = sora_fast.accelerate(model)
            assert is_fast(model) != early and (not early or "hook" in report.rows[0].note)
            off = off or hook(kind, model[place], calls)
            got = model(x)
            close(got, wanted)
            got.sum().backward()
            off()
            assert len(calls) == 1, (place, early)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", ["forward of its own", "hook"])
def test_what_hooks_and_forwards_make_of_it_counts(kind, place):
    for make in (norm_act, causal):
        fast, early, plain = (checks.randomise(make()) for _ in range(3))
        sora_fast.accelerate(fast)
        for model in (fast, early, plain):
            inner = model[place].forward
            if kind == "hook":
                model[place].register_forward_pre_hook(lambda m, given: 2 * given[0] + 1)
            else:
                model[place].forward = lambda x, inner=inner: inner(2 * x) - 3
        sora_fast.accelerate(early)
        assert not is_fast(early)
        for model in (fast, early):
            close(model(clip()), plain(clip()))


def test_parametrized_and_subclassed_children():
    for make in (norm_act, causal):
        for change in (lambda m: parametrize.register_parametrization(m, "weight", nn.Softplus()),
                       lambda m: prune.l1_unstructured(m, "weight", 0.5)):
            fast, plain = checks.randomise(make()), checks.randomise(make())
            sora_fast.accelerate(fast)
            for model in (fast, plain):
                change(next(child for child in model if hasattr(child, "weight")))
            close(fast(clip()), plain(clip()))
            early = checks.randomise(make())
            change(next(child for child in early if hasattr(child, "weight")))
            sora_fast.accelerate(early)
            close(early(clip()), plain(clip()))


# ------------------------------------------------------------------------------------------------ changes
CHANGES = {
    "another fill": lambda m: setattr(m[0], "value", 1.0),
    "another pad": lambda m: setattr(m[0], "padding", (1, 1, 1, 1, 1, 1)),
    "dilation": lambda m: setattr(m[1], "dilation", (1, 2, 2)),
    "the convolution pads": lambda m: setattr(m[1], "padding", (0, 1, 0)),
    "a kernel without the past": lambda m: setattr(m[1], "weight", nn.Parameter(m[1].weight.detach()[:, :, :1])),
    "one child more": lambda m: m.append(nn.Conv3d(4, 4, 1, bias=False).requires_grad_(False).apply(
        lambda conv: conv.weight.fill_(0.5))),
    "one child less": lambda m: m.pop(1),
    "another child": lambda m: m.__setitem__(1, nn.AvgPool3d(2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_it_was_swapped(change):
    fast, plain = checks.randomise(causal()), checks.randomise(causal())
    sora_fast.accelerate(fast)
    for model in (fast, plain):
        CHANGES[change](model)
    got, wanted = fast(clip()), plain(clip())
    assert got.shape == wanted.shape
    close(got, wanted)


def test_slices_and_keywords():
    for make in (causal, norm_act, lambda: nn.Sequential(*causal(), *norm_act())):
        model, x = checks.randomise(make()), clip()
        wanted = model(x)
        sora_fast.accelerate(model)
        assert is_fast(model)
        close(model(input=x), wanted)
        for part in (model[:1], model[1:3], model[3:]):
            x = part(x)
        close(x, wanted)
