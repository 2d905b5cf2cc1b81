"""What is changed in an accelerated model acts: a child is read past where it is exactly what was proven, else it runs."""

import copy
import functools
import io

import accelerate_changes as changes
import accelerate_checks as checks
import pytest
import test_accelerate_wan_vae as wan
import torch
from accelerate_checks import draw
from torch import nn

import sora_fast
from sora_fast.integrations import mixin
from sora_fast.integrations.mixin import is_fast

diffusers = pytest.importorskip("diffusers")

RESAMPLE = "vae 2.1 encoder.down_blocks.1"
UPSAMPLE = "vae 2.1 decoder.up_blocks.0.upsamplers.0"
COG_UPSAMPLE = "vae cogvideox decoder.up_blocks.0.upsamplers.0"


def set_to(**values):
    return lambda module: [setattr(module, name, value) for name, value in values.items()]


def replaced(make):
    def change(model, path):
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).register_module(name, make(model.get_submodule(path)))
    change.of_model = True
    return change


def with_bias(norm):
    norm.bias = nn.Parameter(draw(*norm.gamma.shape, seed=3).float())


def affine(norm):
    norm.weight = nn.Parameter(1 + draw(*norm.normalized_shape, seed=3).float())
    norm.bias = nn.Parameter(draw(*norm.normalized_shape, seed=4).float())


def scaled_tables(rope):
    rope.freqs_cos.mul_(0.5)


def other_tables(rope):
    rope.freqs_sin = rope.freqs_sin.roll(3, 0)


double = changes.subclass
spoofed = functools.partial(changes.subclass, spoof=True)
FAULTS = {
    "a same-named LayerNorm": ("wan blocks.0.norm1", double),
    "a same-named norm that took its module's name too": ("dit transformer_blocks.1.norm3", spoofed),
    "a same-named RMSNorm": ("wan blocks.1.attn1.norm_q", double),
    "a same-named RMSNorm of diffusers": ("hunyuan transformer_blocks.0.attn.norm_added_k", double),
    "a same-named norm of adaLN": ("cogvideox transformer_blocks.0.norm1.norm", double),
    "a same-named CogVideoX norm": ("cogvideox transformer_blocks.0.norm2", double),
    "a same-named Conv2d": (f"{RESAMPLE}.resample.1", double),
    "a same-named convolution of Wan": ("vae 2.1 encoder.conv_in", double),
    "a same-named SiLU": ("vae 2.2 decoder.mid_block.resnets.1.nonlinearity", double),
    "a same-named Identity": ("vae 2.1 decoder.mid_block.resnets.1.conv_shortcut", double),
    "a same-named Identity as norm": ("wan without norm blocks.0.norm2", double),
    "a same-named GroupNorm": ("vae hunyuan encoder.mid_block.resnets.0.norm1", double),
    "a same-named Conv3d": ("vae hunyuan decoder.up_blocks.0.resnets.0.conv2.conv", double),
    "a same-named attention": ("vae hunyuan encoder.mid_block.attentions.0", double),
    "a same-named convolution of CogVideoX": ("vae cogvideox encoder.mid_block.resnets.0.conv2.conv", double),
    "a same-named norm in a spatial norm": ("vae cogvideox decoder.mid_block.resnets.0.norm1.norm_layer", double),
    "a same-named block that reads tables": ("wan blocks.0", double),
    "a same-named attention that reads tables": ("hunyuan transformer_blocks.0.attn", double),
    "a hook on tables": ("wan rope", changes.hook),
    "a hook on Identity": ("vae 2.1 decoder.mid_block.resnets.1.conv_shortcut", changes.hook),
    "a hook on an attention": ("vae hunyuan encoder.mid_block.attentions.0", changes.hook),
    "a hook before a gradient": ("vae 2.1 encoder.mid_block.resnets.1.conv1", changes.backward_pre_hook),
    "a hook that mixes frames": ("vae 2.1 encoder.mid_block.attentions.0", changes.mixing_hook),
    "a hook that mixes frames of a child": ("vae qwen encoder.mid_block.resnets.0.conv2", changes.mixing_hook),
    "circular padding in space": (f"{RESAMPLE}.resample.1", set_to(
        padding_mode="circular", _reversed_padding_repeated_twice=[1, 1, 1, 1])),
    "circular padding of a video": ("vae 2.1 encoder.mid_block.resnets.0.conv2", set_to(
        padding_mode="circular", _padding=(0, 0, 0, 0, 2, 0), _reversed_padding_repeated_twice=[1, 1, 1, 1, 0, 0])),
    "a dilated convolution": (f"{COG_UPSAMPLE}.conv", set_to(dilation=(2, 2), padding=(2, 2))),
    "circular padding in CogVideoX": (f"{COG_UPSAMPLE}.conv", set_to(padding_mode="circular")),
    "circular padding in HunyuanVideo": ("vae hunyuan decoder.conv_in.conv", set_to(
        padding_mode="circular", _reversed_padding_repeated_twice=[1, 1, 1, 1, 0, 0], padding=(0, 1, 1))),
    "a bilinear Upsample": (f"{UPSAMPLE}.resample.0", replaced(lambda m: nn.Upsample(scale_factor=2, mode="bilinear"))),
    "another mode of Upsample": (f"{UPSAMPLE}.resample.0", set_to(mode="bilinear")),
    "reflected borders": (f"{RESAMPLE}.resample.0", replaced(lambda m: nn.ReflectionPad2d((0, 1, 0, 1)))),
    "a border of ones": (f"{RESAMPLE}.resample.0", set_to(value=1.0)),
    "a norm with a bias": ("vae 2.1 decoder.mid_block.resnets.0.norm1", with_bias),
    "a norm of another scale": ("vae 2.1 decoder.norm_out", set_to(scale=1.0)),
    "a norm's bias that is a number": ("vae qwen encoder.mid_block.resnets.1.norm2", set_to(bias=0.5)),
    "a norm of an attention of another scale": ("vae 2.1 decoder.mid_block.attentions.0.norm", set_to(scale=1.0)),
    "a group norm that mixes frames": ("vae 2.1 encoder.mid_block.resnets.0.norm1", replaced(
        lambda m: nn.GroupNorm(2, m.gamma.numel()))),
    "weights of norm1": ("wan blocks.0.norm1", affine),
    "weights of norm3": ("wan blocks.1.norm3", affine),
    "dropout": ("vae 2.1 encoder.down_blocks.0.dropout", set_to(p=0.5)),
    "dropout in HunyuanVideo": ("vae hunyuan decoder.mid_block.resnets.0.dropout", set_to(p=0.5)),
    "dropout in CogVideoX": ("vae cogvideox decoder.mid_block.resnets.0.dropout", set_to(p=0.5)),
    "a PyTorch RMSNorm without eps": ("hunyuan transformer_blocks.0.attn.norm_q", replaced(lambda m: nn.RMSNorm(16))),
    "PyTorch's RMSNorm": ("hunyuan transformer_blocks.0.attn.norm_added_k", replaced(lambda m: nn.RMSNorm(16, eps=1e-6))),
    "tables written to": ("wan rope", scaled_tables),
    "other tables": ("wan rope", other_tables),
    "no residual connection": ("vae hunyuan decoder.mid_block.attentions.0", set_to(residual_connection=False)),
    "a convolution with its own method": ("vae 2.1 encoder.conv_in", lambda conv: setattr(
        conv, "_conv_forward", lambda x, weight, bias: 2 * type(conv)._conv_forward(conv, x, weight, bias))),
}
TRAINED = ("dropout", "mixes", "gradient")  # what shows with train() and gradients alone


# The others are in test_accelerate_drawn_many.py.
SOME = ("a same-named LayerNorm", "a same-named Conv2d", "a same-named GroupNorm", "weights of norm1",
        "a norm of another scale")


@pytest.mark.parametrize("fault", SOME)
def test_a_change_acts_whatever_the_order(fault):
    where, change = FAULTS[fault]
    name = next(name for name in sorted(changes.NAMES, key=len, reverse=True) if where.startswith(f"{name} "))
    path, train = where.removeprefix(f"{name} "), any(word in fault for word in TRAINED)
    of_model = getattr(change, "of_model", False)
    act = (lambda model: change(model, path)) if of_model else lambda model: change(model.get_submodule(path))
    for when in ("before", "after"):
        assert changes.compare(name, act, when, train, train), "the plain model cannot run with it"
    changed = copy.deepcopy(changes.plain_model(name))
    act(changed)
    with pytest.raises(AssertionError):  # it would be seen
        checks.assert_as_right(changes.result(changed, name, train, train),
                               *changes.right_of(changes.plain_model(name), name, train, train), floor=1e-6)


@pytest.mark.parametrize("name", ["vae 2.1", "vae cogvideox", "wan"])
def test_what_is_read_past_computes_with_nothing_else(name):
    """Every attribute that the forward of such a child looks at is read too, or has the one value that is right."""
    model, inputs = copy.deepcopy(changes.plain_model(name)), {}
    mixin.resolve()
    kinds = {module: [kind for kind in mixin.KINDS if kind.reads is not None and kind(module)]
             for module in model.modules()}
    for module in {type(module): module for module, found in kinds.items() if found}.values():
        module.register_forward_pre_hook(lambda module, args, kwargs: inputs.setdefault(module, (args, kwargs)) and None,
                                         with_kwargs=True)
    with torch.no_grad():
        changes.result(model, name)
    assert inputs
    for module, (args, kwargs) in inputs.items():
        looked_at, cls = set(), type(module)

        def spy(self, attribute, looked_at=looked_at):
            looked_at.add(attribute)
            return nn.Module.__getattribute__(self, attribute)

        module.__class__ = type(cls.__name__, (cls,), {"__getattribute__": spy, "forward": cls.forward})
        with torch.no_grad():
            cls.forward(module, *args, **kwargs)
        module.__class__ = cls
        state = {*vars(module), *module._parameters, *module._buffers, *module._modules}
        own = {attribute for attribute in looked_at if callable(getattr(cls, attribute, None))} - set(dir(nn.Module))
        used = {attribute for attribute in looked_at if attribute in state or attribute in own and attribute != "forward"
                } - set(vars(nn.Module()))
        for kind in kinds[module]:
            said = {*kind.reads.split(), *kind.required, *kind.methods}
            assert used <= said, f"{cls.__name__} also computes with {used - said}"


def test_a_norm_without_eps_of_its_own_runs_itself():
    """PyTorch then takes the eps of its input's dtype."""
    change = lambda model: setattr(model.blocks[0].attn1, "norm_q", nn.RMSNorm(24))
    assert all(changes.compare("wan", change, when) for when in ("before", "after"))


def test_restore_gives_a_parametrized_module_its_class_back():
    vae = wan.make("2.1")
    cls = type(vae.quant_conv)
    sora_fast.accelerate(vae)
    nn.utils.parametrizations.weight_norm(vae.quant_conv)
    video = draw(1, 3, 5, 16, 16).float()
    with torch.no_grad():
        wanted = vae.encode(video).latent_dist.mean
    again = {row.name: row for row in sora_fast.accelerate(vae).rows}["quant_conv"]
    assert "stays as it is" in again.note
    assert sora_fast.restore(vae) == len(sora_fast.accelerate(wan.make("2.1")).swapped)
    assert not any(is_fast(module) for module in vae.modules())
    assert type(vae.quant_conv).__name__ == f"Parametrized{cls.__name__}"
    with torch.no_grad():
        assert torch.allclose(vae.encode(video).latent_dist.mean, wanted, atol=1e-5)
    nn.utils.parametrize.remove_parametrizations(vae.quant_conv, "weight")
    assert type(vae.quant_conv) is cls


def test_a_subclass_made_of_a_swapped_module_is_copied_as_such():
    fast, _ = checks.accelerated(wan.make("2.1"))
    changes.subclass(fast.decoder.mid_block.resnets[0])
    z = draw(1, 4, 1, 2, 2).float()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fast).decode(z).sample, fast.decode(z).sample)


class Bar:
    """A progress bar holds a lock and a stream, which are neither copied nor pickled."""

    def __init__(self):
        self.seen = []

    def __call__(self, done, total):
        self.seen.append(done)

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle a progress bar")


def test_a_model_with_a_progress_bar_is_copied_and_pickled():
    """Copies tell the same bar; what is read from a file tells none."""
    bar = Bar()
    fast, _ = checks.accelerated(wan.make("2.1"), progress=bar)
    other, buffer = copy.deepcopy(fast), io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    loaded, z = torch.load(buffer, weights_only=False), draw(1, 4, 2, 2, 2).float()
    with torch.no_grad():
        wanted = fast.decode(z).sample
        assert bar.seen == [1, 5]
        for model, told in ((other, [1, 5, 1, 5]), (loaded, [1, 5, 1, 5])):
            assert torch.equal(model.decode(z).sample, wanted) and bar.seen == told
    sora_fast.restore(fast)
    assert not [name for name in vars(fast) if name.startswith("_sora_fast")]
