"""Every block known by its form is tried by itself, in training too; a later change is noticed; nothing else is touched."""

import copy
import pickle
import random
from types import SimpleNamespace

import accelerate_checks as checks
import numpy as np
import pytest
import test_accelerate_structures as forms
import torch
from accelerate_checks import draw
from test_accelerate_structures import modulate
from torch import nn
from torch.overrides import TorchFunctionMode

import sora_fast
from sora_fast.integrations import trials
from sora_fast.integrations.mixin import is_fast


class Scaled(forms.DiTBlock):
    """The official block, its two branches times a number of the layer."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.res_scale = scale

    def forward(self, x, c):
        a, b, g, d, e, h = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + self.res_scale * g[:, None] * self.attn(modulate(self.norm1(x), a, b))
        return x + self.res_scale * h[:, None] * self.mlp(modulate(self.norm2(x), d, e))


Scaled.__name__ = "DiTBlock"


def block(forward=None, kind=forms.DiTBlock, **attributes):
    """A DiTBlock whose class has that forward, with these attributes of its own."""
    made = type(kind.__name__, (kind,), dict(forward=forward) if forward else {})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return checks.randomise(made)


def given(seed=0):
    return draw(3, 7, 24, seed=seed).float(), draw(3, 24, seed=seed + 1).float()


def close(a, b):
    error, whole = float((a - b).detach().norm()), float(b.detach().norm())
    assert error <= 1e-5 * whole


def note(module):
    report = sora_fast.accelerate(module)
    assert report.rows[0].state == ("swapped" if is_fast(module) else "left")
    return report.rows[0].note


def drops(x, p=0.1):
    """Drop path that does not scale what it keeps."""
    return x * torch.bernoulli(torch.full((x.shape[0], 1, 1), 1 - p))


def attended(change):
    """The official forward with ``change(self, y, x)`` around what attention gives."""
    def forward(self, x, c):
        a, b, g, d, e, h = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g[:, None] * change(self, self.attn(modulate(self.norm1(x), a, b)), x)
        return x + h[:, None] * self.mlp(modulate(self.norm2(x), d, e))
    return forward


# ------------------------------------------------------------------------------------------------ every object
def test_every_block_is_tried_by_itself():
    plain = checks.randomise(nn.ModuleList([Scaled(1.0), Scaled(0.5), Scaled(1.0)]))
    fast, report = checks.accelerated(plain)
    assert [row.name for row in report.swapped] == ["0", "2"]
    assert not is_fast(fast[1]) and "is not that of" in next(row.note for row in report.rows if row.name == "1")
    for a, b in zip(fast, plain, strict=True):
        close(a(*given()), b(*given()))


def counts(self, x, c):
    self.calls += 1
    return forms.DiTBlock.forward(self, x, c)


LEFT = {
    "dropout in forward": (attended(lambda self, y, x: nn.functional.dropout(y, 0.1, self.training)), {}, "random"),
    "a dropout": (attended(lambda self, y, x: self.drop(y)), dict(drop=nn.Dropout(0.1)), "random"),
    "drop path": (attended(lambda self, y, x: drops(y, 0.01) if self.training else y), {}, "random"),
    "drops whole layers": (attended(lambda self, y, x: y * (not self.training or random.random() > 1e-3)), {}, "random"),
    "numpy's numbers": (attended(lambda self, y, x: y * (not self.training or np.random.rand() > 1e-3)), {}, "random"),
    "noise always": (attended(lambda self, y, x: y + 0 * torch.randn_like(y)), {}, "random"),
    "other in training": (attended(lambda self, y, x: 2 * y if self.training else y), {}, "in training"),
    "other in evaluation": (attended(lambda self, y, x: y if self.training else 2 * y), {}, "in evaluation"),
    "a stopped gradient": (attended(lambda self, y, x: y.detach()), {}, "is not that of"),
    "its own parameter": (attended(lambda self, y, x: y * self.gain), dict(gain=nn.Parameter(torch.ones(24))), "own gain"),
    "a list": (attended(lambda self, y, x: y * self.scales[0]), dict(scales=[1.0]), "may change unseen"),
    "a config": (attended(lambda self, y, x: y * self.config.scale), dict(config=SimpleNamespace(scale=1.0)),
                 "config, a SimpleNamespace"),
    "a tensor": (attended(lambda self, y, x: y * self.scale), dict(scale=torch.ones(())), "may change unseen"),
    "a child with weights": (attended(lambda self, y, x: y + self.extra(x)), dict(extra=nn.Linear(24, 24)),
                             "is not that of"),
    "a child with a past": (attended(lambda self, y, x: self.extra(y)), dict(extra=nn.BatchNorm1d(24)), "has buffers"),
    "a large child": (attended(lambda self, y, x: y + self.extra(x)), dict(extra=nn.Linear(24, 2**16)), "too large"),
    "calls counted": (counts, dict(calls=0), "changes its calls"),
    "a part called twice": (attended(lambda self, y, x: y + 0 * self.attn(x)), {}, "several times"),
    "another argument": (attended(lambda self, y, x: self.attn(x, 2.0)), dict(attn=None), "scale to its attn"),
}


class ScaledAttention(forms.Attention):
    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


@pytest.mark.parametrize("what", LEFT)
def test_what_a_trial_finds_is_left_and_goes_on_as_it_was(what):
    forward, attributes, words = LEFT[what]
    if what == "another argument":
        attributes = dict(attn=ScaledAttention(24, 2))
    module = block(forward, **copy.deepcopy(attributes))
    for training in (True, False):
        module.train(training)
        before = copy.deepcopy(vars(module))
        assert words in note(module) and not is_fast(module)
        assert vars(module).keys() == before.keys() and module.training == training
        assert getattr(module, "calls", 0) == 0


def test_what_a_trial_has_to_let_pass():
    """Attributes that are not read, rates of 0, branches that are not taken, arguments at their defaults."""
    def forward(self, x, c):
        if self.recompute and self.training:
            raise NotImplementedError
        a, b, g, d, e, h = self.adaLN_modulation(c).chunk(6, dim=1)
        y = self.drop(self.attn(modulate(self.norm1(x), a, b), scale=self.scale))
        x = x + g[:, None] * (y if getattr(self, "skip", None) is None else x)
        return x + h[:, None] * self.mlp(modulate(self.norm2(x), d, e))

    module = block(forward, drop=nn.Dropout(0.0), recompute=False, config={}, history=[], scale=1.0,
                   unread=nn.BatchNorm1d(2), attn=ScaledAttention(24, 2))
    wanted = module(*given())
    assert "norm_modulate" in note(module) and is_fast(module)
    close(module(*given()), wanted)
    module.scale = 3.0
    changed = module(*given())
    sora_fast.restore(module)
    close(changed, module(*given()))
    assert float((changed - wanted).detach().norm()) > 1e-3


# ------------------------------------------------------------------------------------------------ changes
def test_a_change_is_noticed_and_so_is_its_end(monkeypatch):
    fast, plain = Scaled(1.0), Scaled(1.0)
    checks.randomise(fast), checks.randomise(plain)
    sora_fast.accelerate(fast)
    tried, attempt = [], trials.attempt
    monkeypatch.setattr(trials, "attempt", lambda *a: tried.append(1) or attempt(*a))
    for scale, times in ((1.0, 0), (0.5, 1), (1.0, 1), (0.5, 1), (2.0, 2)):
        fast.res_scale = plain.res_scale = scale
        for mode in (True, False):
            close(fast.train(mode)(*given()), plain.train(mode)(*given()))
        assert len(tried) == times, scale
        assert (fast._sora_fast_proofs.current(fast).reason is None) == (scale == 1.0)
    for step in range(20):  # what changes with every call is not tried for ever
        fast.res_scale = plain.res_scale = 0.1 * step
        close(fast(*given()), plain(*given()))
    assert len(tried) < 10


CHANGES = {
    "a child it had not": lambda m, kind: setattr(m, "skip", nn.Identity()),
    "an attribute it had not": lambda m, kind: setattr(m, "skip", 1),
    "of the class": lambda m, kind: setattr(kind, "gain", 3.0),
    "that hides the class's": lambda m, kind: setattr(m, "gain", 3.0),
    "of a dropout": lambda m, kind: setattr(m.drop, "p", 0.5),
    "another dropout": lambda m, kind: setattr(m, "drop", nn.Dropout(0.5)),
    "a norm by the same name": lambda m, kind: setattr(m, "norm2", type("LayerNorm", (nn.LayerNorm,), dict(
        forward=lambda self, x: 2 * nn.LayerNorm.forward(self, x)))(24, elementwise_affine=False)),
    "eps": lambda m, kind: setattr(m.norm2, "eps", 0.5),
    "the forward of the class": lambda m, kind: setattr(kind, "forward", attended(lambda self, y, x: 2 * y)),
    "a method of the class": lambda m, kind: setattr(kind, "around", lambda self, y: 2 * y),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_every_kind(change):
    class DiTBlock(forms.DiTBlock):
        gain = 1.0

        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.0)

        def around(self, y):
            return self.drop(y) if getattr(self, "skip", None) is None else 0.5 * y

        forward = attended(lambda self, y, x: self.gain * self.around(y))

    fast, plain = checks.randomise(DiTBlock()), checks.randomise(DiTBlock())
    sora_fast.accelerate(fast)
    assert is_fast(fast)
    outputs = [fast(*given())]
    for module in (fast, plain):
        CHANGES[change](module, DiTBlock)
        torch.manual_seed(1)
        outputs.append(module(*given()))
    before, got, wanted = outputs
    close(got, wanted)
    assert bool((before - wanted).norm() > 1e-3 * wanted.norm())


def hook(kind, module, calls):
    """A hook of that kind, which counts its calls; what takes it off again."""
    every = nn.modules.module
    if kind == "forward of the object":
        inner = module.forward
        module.forward = lambda *a: calls.append(1) or inner(*a)
        return lambda: vars(module).pop("forward")
    seen = lambda m, *a: calls.append(1) if m is module else None
    made = {"forward": lambda: module.register_forward_hook(seen),
            "forward_pre": lambda: module.register_forward_pre_hook(seen),
            "forward with kwargs": lambda: module.register_forward_hook(seen, with_kwargs=True),
            "forward_pre with kwargs": lambda: module.register_forward_pre_hook(seen, with_kwargs=True),
            "full_backward": lambda: module.register_full_backward_hook(seen),
            "full_backward_pre": lambda: module.register_full_backward_pre_hook(seen),
            "global forward": lambda: every.register_module_forward_hook(seen),
            "global forward_pre": lambda: every.register_module_forward_pre_hook(seen),
            "global full_backward": lambda: every.register_module_full_backward_hook(seen),
            "global full_backward_pre": lambda: every.register_module_full_backward_pre_hook(seen)}[kind]()
    return made.remove


HOOKS = ("forward", "forward_pre", "forward with kwargs", "forward_pre with kwargs", "full_backward", "full_backward_pre",
         "global forward", "global forward_pre", "global full_backward", "global full_backward_pre",
         "forward of the object")


@pytest.fixture(scope="module")
def swapped():
    """Every form: a plain block, one that was swapped, and inputs."""
    made = []
    for make, inputs in ((forms.DiTBlock, given()), (forms.FinalLayer, given()), (forms.Block, given()[:1])):
        plain, fast = checks.randomise(make()), checks.randomise(make())
        sora_fast.accelerate(fast)
        assert is_fast(fast)
        made.append((plain, fast, tuple(x.requires_grad_() for x in inputs)))
    return made


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_children_that_are_passed_by_are_called(kind, swapped):
    """Norms, layer scales and drop paths, hooked before accelerate or after; and off again, the block is fast."""
    for plain, fast, inputs in swapped:
        wanted = plain(*inputs).detach()
        for name, _ in plain.named_children():
            for module in (fast, plain):
                early, calls = module is plain and name in fast.absorbs, []
                off = hook(kind, module.get_submodule(name), calls)
                assert not early or "hook" in note(plain) and not is_fast(plain)
                got = module(*inputs)
                close(got, wanted)
                got.sum().backward()
                off()
                assert len(calls) == 1, (kind, name)
        assert fast._sora_fast_proofs.current(fast).calls_plain_children(fast)


# ------------------------------------------------------------------------------------------------ no trace
def test_a_trial_leaves_nothing_behind():
    class Counting(forms.Attention):
        def forward(self, x):
            self.seen += 1
            return super().forward(x)

    model = forms.DiT(lambda: block(attended(lambda self, y, x: nn.functional.dropout(y, 0.5, self.training))))
    for each in model.blocks:
        each.attn = Counting(24, 2)
        each.attn.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    calls = []
    model.final_layer.linear.register_forward_hook(lambda m, *a: calls.append(m))
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = lambda: [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in model.modules()]
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    before, kept = attributes(), states()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), sora_fast.use_backend("reference"):
        sora_fast.accelerate(model)
    assert is_fast(model.final_layer) and not is_fast(model.blocks[0])
    assert attributes() == before and states() == kept and not calls
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_trial_during_a_call_is_not_seen_by_hooks_on_all_modules():
    fast = Scaled(1.0)
    sora_fast.accelerate(fast)
    fast.res_scale, calls = 1.5, []
    off = nn.modules.module.register_module_forward_hook(lambda m, *a: calls.append(m))
    fast(*given())
    off.remove()
    inner = set(fast.modules())
    assert fast._sora_fast_proofs.current(fast).reason and len(calls) == len(inner) and set(calls) == inner


class Largest(TorchFunctionMode):
    """The most numbers of any tensor that is made inside."""

    numbers = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return out


def test_a_trial_takes_memory_of_a_few_rows():
    """The weights of its large parts are neither copied nor read."""
    module = forms.DiTBlock(512)
    for p in module.parameters():
        nn.init.constant_(p, torch.nan)
    with Largest() as largest:
        sora_fast.accelerate(module)
    assert is_fast(module) and 512 * 10 <= largest.numbers <= 512 * 12 < max(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------------ weights elsewhere
def test_weights_that_are_elsewhere():
    assert "meta" in note(forms.DiTBlock().to("meta"))
    module = forms.DiTBlock()
    module.attn.register_buffer("table", torch.empty(3, device="meta"))
    assert "meta" in note(module)


# ------------------------------------------------------------------------------------------------ calls and copies
def test_arguments_by_name_and_more_of_them():
    def forward(self, tokens, condition, scale=1.0):
        return scale * forms.DiTBlock.forward(self, tokens, condition)

    module = block(forward)
    x, c = given()
    wanted = module(x, c)
    sora_fast.accelerate(module)
    assert is_fast(module)
    for got in (module(x, c), module(x, condition=c), module(condition=c, tokens=x), module(tokens=x, condition=c)):
        close(got, wanted)
    close(module(x, c, 2.0), 2 * wanted)
    close(module(x, c, scale=2.0), 2 * wanted)
    with pytest.raises(TypeError, match="c"):
        module(x, c=c)


def test_copies_and_pickles_notice_changes_of_their_own(monkeypatch):
    fast = checks.randomise(forms.DiTBlock())
    wanted = fast(*given())
    sora_fast.accelerate(fast)
    loaded = pickle.loads(pickle.dumps(fast))
    close(loaded(*given()), wanted)
    assert loaded._sora_fast_proofs.found[0].reason is None
    monkeypatch.setattr(trials, "attempt", None)  # none is needed of a copy
    other = copy.deepcopy(fast)
    close(other(*given()), wanted)
    monkeypatch.undo()
    other.norm2 = nn.LayerNorm(24)
    other.norm2.eps = 2.0
    assert (other(*given()) - wanted).norm() > 1e-3 * wanted.norm()
    close(fast(*given()), wanted)
    assert sora_fast.restore(fast) == 1 and not [name for name in vars(fast) if "sora" in name]


def test_a_norm_that_goes_and_comes_back():
    fast, plain = checks.randomise(forms.DiTBlock()), checks.randomise(forms.DiTBlock())
    sora_fast.accelerate(fast)
    norm, proofs = fast.norm2, fast._sora_fast_proofs
    fast.norm2 = plain.norm2 = nn.Identity()
    close(fast(*given()), plain(*given()))
    assert proofs.current(fast).reason
    fast.norm2 = plain.norm2 = norm
    close(fast(*given()), plain(*given()))
    assert proofs.current(fast).reason is None


def test_children_are_not_hidden_by_what_a_mixin_is_called():
    """A fast block that falls back finds its own children under any name."""
    module = block(attended(lambda self, y, x: self.norm(y + x)), norm=nn.LayerNorm(24), calls=nn.Identity())
    for name in ("calls", "parts", "form", "norm"):
        assert "is not that of" in note(module)
        module.add_module(name, nn.LayerNorm(24))
    fast = checks.randomise(Scaled(1.0))
    for name in ("norm", "calls", "parts", "form", "compute", "shapes"):
        fast.add_module(name, nn.Identity())
    sora_fast.accelerate(fast)
    assert is_fast(fast) and all(isinstance(getattr(fast, name), nn.Module) for name, _ in fast.named_children())
