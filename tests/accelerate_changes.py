"""Changes that people make to a model before or after accelerate, and what the plain model with the same change gives.

A change is drawn for any module of a model: another class of the same name, a hook, another forward, a parametrization, a
setting. Where the plain model cannot run with it, there is nothing to compare.
"""

import copy
import functools

import accelerate_checks as checks
import test_accelerate_other_vaes as others
import test_accelerate_sequences as sequences
import test_accelerate_structures as structures
import test_accelerate_transformers as transformers
import test_accelerate_wan_vae as wan
import torch
from accelerate_checks import draw
from torch import nn

import sora_fast

FORMS = {  # known by their form, and pairs of a Sequential: a model, and what is given to it
    "form dit": (structures.DiT, dict(x=draw(3, 7, 24).float(), c=draw(3, 24, seed=1).float())),
    "form timm": (lambda: structures.Stack(structures.Block(), structures.Block(scaled=False)), dict(
        x=draw(2, 5, 24).float())),
    "pairs": (sequences.several, dict(input=draw(2, 4, 4, 6, 5).float())),
}
NAMES = [*(f"vae {name}" for name in ("2.1", "2.2", "qwen", "hunyuan", "cogvideox")), *transformers.MODELS, *FORMS]


@functools.cache
def plain_model(name):
    """A model without any change; copy it."""
    kind = name.removeprefix("vae ")
    if name in FORMS:
        return checks.randomise(FORMS[name][0]())
    if not name.startswith("vae "):
        return transformers.make(name)
    return (wan if kind in wan.CONFIGS else others).make(kind).eval()


@functools.cache
def given_to(name):
    if name in FORMS:
        return FORMS[name][1]
    if name.startswith("vae "):
        return dict(sample=draw(1, 3, 9, 16, 16).float())
    return {key: value.float() if value.is_floating_point() else value
            for key, value in transformers.inputs_of(name, batch=2, frames=2).items()}


def result(model, name, train=False, grads=False, dtype=torch.float32):
    """The output, and the gradient of the first input where wanted; drawn numbers (dropout) are the same each time."""
    torch.manual_seed(7)
    model.train(train)
    given = {key: value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
             for key, value in given_to(name).items()}
    first = next(iter(given.values())).requires_grad_(grads)
    with torch.set_grad_enabled(grads):
        out = model(**given) if name in FORMS else model(return_dict=False, **given)[0]
        found = {"output": out.detach().double()}
        if grads:
            weights = draw(*out.shape, seed=5).to(dtype)
            found["gradient of the input"] = torch.autograd.grad((out * weights).sum(), first)[0].double()
    return found


def right_of(model, name, train=False, grads=False):
    """What a plain model gives in float32 and in float64; None where float32 says nothing of it."""
    plain, wide = (result(copied, name, train, grads, dtype)
                   for copied, dtype in ((model, torch.float32), (copy.deepcopy(model).double(), torch.float64)))
    for key, exact in wide.items():
        if not exact.isfinite().all() or not (plain[key] - exact).norm() <= 1e-3 * exact.norm():
            return None
    return plain, wide


def compare(name, change, when, train=False, grads=False):
    """Whether there was something to compare: ``change(model)`` on a plain model and on one accelerated before or after."""
    plain, fast = copy.deepcopy(plain_model(name)), copy.deepcopy(plain_model(name))
    try:
        change(plain)
        right = right_of(plain, name, train, grads)
    except Exception:  # whatever diffusers and PyTorch raise at a setting that makes no sense
        return False
    if right is None:
        return False
    if when == "after":
        assert sora_fast.accelerate(fast).swapped
    change(fast)
    if when == "before":
        sora_fast.accelerate(fast)
    checks.assert_as_right(result(fast, name, train, grads), *right, floor=1e-6)
    sora_fast.restore(fast)
    if not any("forward" in vars(module) for module in fast.modules()):  # what replaced a forward comes off before
        checks.assert_as_right(result(fast, name, train, grads), *right, floor=1e-6)
    return True


# ------------------------------------------------------------------------------------------------ changes of any module
def scaled(value, by=1.5):
    """Every floating tensor in what a module returns, times ``by``."""
    if isinstance(value, torch.Tensor):
        return value * by if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(scaled(each, by) for each in value)
    return value


def subclass(module, spoof=False):
    """The module becomes one of a subclass that bears its class's own name, and with ``spoof`` its module's as well."""
    cls = type(module)

    def forward(self, *args, **kwargs):
        return scaled(super(changed, self).forward(*args, **kwargs))

    names = dict(__module__=cls.__module__, __qualname__=cls.__qualname__) if spoof else dict(__module__=__name__)
    changed = type(cls)(cls.__name__, (cls,), dict(forward=forward) | names)
    module.__class__ = changed


def own_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))


def hook(module):
    module.register_forward_hook(lambda module, inputs, output: scaled(output))


def mixing_hook(module):
    """It mixes frames, so that it matters how a clip is cut."""
    module.register_forward_hook(lambda module, inputs, output: output + output.mean(dim=2, keepdim=True)
                                 if isinstance(output, torch.Tensor) and output.dim() == 5 else output)


def pre_hook(module):
    module.register_forward_pre_hook(lambda module, inputs: (scaled(inputs[0]), *inputs[1:]) if inputs else None)


def backward_hook(module):
    module.register_full_backward_hook(lambda module, inputs, outputs: tuple(each if each is None else 2 * each
                                                                            for each in inputs))


def backward_pre_hook(module):
    module.register_full_backward_pre_hook(lambda module, outputs: tuple(each if each is None else 2 * each
                                                                        for each in outputs))


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrize(module):
    nn.utils.parametrize.register_parametrization(module, "weight", Twice())


def weight_norm(module):
    nn.utils.parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data.mul_(1.5)


ANY = (subclass, functools.partial(subclass, spoof=True), own_forward, hook, mixing_hook, pre_hook, backward_hook,
       backward_pre_hook, parametrize, weight_norm)


# ------------------------------------------------------------------------------------------------ settings
def settings_of(module):
    """(name, another value) of every number and word that is set on ``module``: its own, and those of its class."""
    found = []
    for name, value in vars(module).items():
        if name.startswith(("_sora", "training", "_is", "_backward", "_forward", "_load", "_state", "_non")):
            continue
        if isinstance(value, bool):
            found.append((name, not value))
        elif isinstance(value, int):
            found += [(name, max(1, value // 2)), (name, value + 1)]
        elif isinstance(value, float):
            found += [(name, value * 1.5 + 0.1), (name, value * 1e5)]
        elif isinstance(value, tuple) and value and all(type(each) in (int, float) for each in value):
            found += [(name, tuple(each + 1 for each in value)), (name, (*value[:-1], value[-1] + 1)),
                      (name, tuple(each * 2 for each in value))]
        elif isinstance(value, str):
            found += [(name, word) for word in ("circular", "reflect", "constant", "replicate", "bilinear", "nearest")]
        elif value is None and name in ("eps", "size"):
            found.append((name, 1e-2))
    return found


def tensors_of(module):
    """(name, what becomes of it) of parameters and buffers: scaled, left out, or there where none was."""
    found = []
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        found += [(name, "none"), (name, "scaled")] if value is not None else [(name, "there")]
    return found


def set_tensor(module, name, what):
    old = getattr(module, name)
    table = module._buffers if name in module._buffers else module._parameters
    if what == "there":
        shape = getattr(module, "normalized_shape", None) or (module.weight.shape[0],)
        table[name] = nn.Parameter(draw(*shape, seed=3).float())
    else:
        table[name] = None if what == "none" else nn.Parameter(old.detach() * 1.5) if isinstance(
            old, nn.Parameter) else old * 1.5


def others_of(module):
    """What people put in the place of ``module``: layers that take and give the same sizes."""
    eps = {"eps": 1e-2}
    if isinstance(module, nn.Dropout):
        return [nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Identity()]
    if isinstance(module, (nn.SiLU, nn.Identity)):
        return [nn.GELU(), nn.Tanh(), nn.SiLU(inplace=False)]
    if isinstance(module, structures.LayerScale):
        return [structures.LayerScale(len(module.gamma)), nn.Identity()]
    if isinstance(module, nn.GroupNorm):
        width = module.num_channels
        return [nn.GroupNorm(2, width), nn.GroupNorm(module.num_groups, width, affine=False), nn.InstanceNorm3d(width),
                nn.BatchNorm3d(width)]
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        return [nn.LayerNorm(shape, **eps), type(module)(shape, eps=1e-2, elementwise_affine=False), nn.Identity(),
                nn.RMSNorm(shape, **eps), checks.randomise(nn.LayerNorm(shape, bias=False))]
    if hasattr(module, "gamma"):
        return [nn.GroupNorm(2, module.gamma.numel()), nn.Identity()]
    if isinstance(module, nn.RMSNorm) or type(module).__name__ == "RMSNorm":
        shape = tuple(module.weight.shape)
        return [nn.RMSNorm(shape), nn.RMSNorm(shape, **eps), nn.LayerNorm(shape),
                nn.RMSNorm(shape, elementwise_affine=False)]
    if isinstance(module, nn.ZeroPad2d):
        return [nn.ReflectionPad2d((0, 1, 0, 1)), nn.ReplicationPad2d((0, 1, 0, 1)), nn.ConstantPad2d((0, 1, 0, 1), 1.0)]
    if isinstance(module, nn.Upsample):
        return [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=2, mode="nearest")]
    if isinstance(module, (nn.ZeroPad3d, nn.ReplicationPad3d)):
        sizes = module.padding
        return [nn.ConstantPad3d(sizes, 1.0), nn.ConstantPad3d(sizes, 0), nn.ReplicationPad3d(sizes),
                nn.ReflectionPad3d(sizes)]
    return []


def changes_of(module):
    """Every change that can be drawn for ``module``, in an order that is the same for two copies of a model."""
    found = [("any", place) for place in range(len(ANY))]
    found += [("set", *pair) for pair in settings_of(module)]
    found += [("tensor", *pair) for pair in tensors_of(module)]
    found += [("replace", place) for place in range(len(others_of(module)))]
    found += [("processor",)] * hasattr(module, "processor")
    return found


def apply(model, path, change):
    """``change``, one of ``changes_of``, of the module at ``path``."""
    module = model.get_submodule(path)
    kind, *rest = change
    if kind == "any":
        ANY[rest[0]](module)
    elif kind == "set":
        setattr(module, *rest)
    elif kind == "tensor":
        set_tensor(module, *rest)
    elif kind == "replace":
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).register_module(name, copy.deepcopy(others_of(module)[rest[0]]))
    else:
        cls = type(module.processor)

        def __call__(self, *args, **kwargs):
            return scaled(super(changed, self).__call__(*args, **kwargs))

        changed = type(cls.__name__, (cls,), dict(__call__=__call__))
        module.processor.__class__ = changed
