"""How an accelerated model is compared with the class it came from.

The original in float64 says what is right; the accelerated model may be off by twice what the original is in the same dtype
(and, in float32, a millionth of the whole). Outputs and the gradient of every parameter and input.
"""

import copy

import pytest
import torch
from float64_checks import draw

import sora_fast

NO_GRADIENT = ("image_rotary_emb",)  # tables, which no one trains


def randomise(model, seed=0):
    """Every parameter random, the zeros and ones of the start too, so that every path is open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan = p[0].numel() if p.dim() > 1 and p.numel() > p.shape[0] else 1
            noise = torch.randn(p.shape, generator=generator) / (fan**0.5 if fan > 1 else 4)
            p.copy_(1 + noise if fan == 1 and name.endswith(("weight", "gamma")) else noise)
    return model


def results(model, run, inputs, dtype, grads=True):
    """Named outputs, and named gradients of their weighted sum, in float64."""
    given = {name: value.detach().to(dtype, copy=True).requires_grad_(grads and name not in NO_GRADIENT)
             if value.is_floating_point() else value for name, value in inputs.items()}
    model.zero_grad()
    with torch.set_grad_enabled(grads):
        out = run(model, **given)
    found = {f"output {place}": each.detach().double() for place, each in enumerate(out)}
    if grads:
        sum((each.double() * draw(*each.shape, seed=90 + place)).sum() for place, each in enumerate(out)).backward()
        leaves = {name: value for name, value in given.items() if value.requires_grad} | dict(model.named_parameters())
        # None and zeros say the same: a part that had no share in the result
        found |= {f"gradient of {name}": torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
                  for name, p in leaves.items()}
    return found


def assert_as_right(got, plain, wide, floor):
    """``||got - wide|| <= 2 ||plain - wide|| + floor ||whole||`` for every output and gradient, and the same ones exist.

    The whole is the output itself, and all gradients together: a gradient of a few numbers is off by chance as often by more
    than twice the original's error as by less than half of it.
    """
    assert got.keys() == plain.keys() == wide.keys()
    is_gradient = lambda name: name.startswith("gradient")
    gradients = sum(exact.square().sum() for name, exact in wide.items() if is_gradient(name))
    for name, exact in wide.items():
        whole = torch.as_tensor(gradients).sqrt() if is_gradient(name) else exact.norm()
        error, allowed = (got[name] - exact).norm(), 2 * (plain[name] - exact).norm() + floor * whole
        assert got[name].shape == exact.shape and error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}"


def accelerated(model, **options):
    """A swapped copy and its report."""
    fast = copy.deepcopy(model)
    report = sora_fast.accelerate(fast, **options)
    assert report.swapped
    return fast, report


def assert_accelerates(model, run, inputs, dtype=torch.float32, grads=True):
    """The whole promise for one model and one call: as right as the original, and ``restore`` gives its bits back.

    ``inputs``: of one call, or a list of several, whose errors are judged together: in 16 bits a network's error is so much
    larger on one draw than on another that one draw says little.
    """
    model = model.to(dtype)
    fast, _ = accelerated(model)
    wide = copy.deepcopy(model).double()
    several = [{name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
               for given in (inputs if isinstance(inputs, list) else [inputs])]

    def together(model, dtype):
        found = [results(model, run, given, dtype, grads) for given in several]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    plain, exact, got = together(model, dtype), together(wide, torch.float64), together(fast, dtype)
    assert_as_right(got, plain, exact, 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 8)
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert sora_fast.restore(fast) and [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]
    again = together(fast, dtype)
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    return got, plain, exact


def assert_catches(got, plain, exact, floor=1e-6):
    """The comparison is not empty: one number off by a thousandth of all fails it."""
    for name in (next(iter(got)), next(reversed(got))):
        spoiled = got[name].clone(memory_format=torch.contiguous_format)
        spoiled.flatten()[0] += 1e-3 * max(value.norm() for value in exact.values())
        with pytest.raises(AssertionError):
            assert_as_right(got | {name: spoiled}, plain, exact, floor)
