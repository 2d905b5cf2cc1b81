"""Blocks known by their form: the official DiT's and timm's, written here as in those files; what differs is left alone."""

import inspect
import re
import sys
import textwrap
import types
from pathlib import Path

import accelerate_checks as checks
import torch
from accelerate_checks import draw
from torch import nn

import sora_fast
from sora_fast.integrations import swapping


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(width):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp = Attention(width, 2), mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        a, b, g, d, e, h = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g[:, None] * self.attn(modulate(self.norm1(x), a, b))
        return x + h[:, None] * self.mlp(modulate(self.norm2(x), d, e))


class FinalLayer(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear, self.adaLN_modulation = nn.Linear(width, 8), nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class DiT(nn.Module):
    def __init__(self, block=DiTBlock):
        super().__init__()
        self.blocks, self.final_layer = nn.ModuleList(block() for _ in range(2)), FinalLayer()

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        keep = 1 - self.drop_prob * self.training
        return x if keep == 1 else x * (torch.rand(x.shape[0], 1, 1) < keep) / keep


class Block(nn.Module):
    def __init__(self, width=24, scaled=True, drop=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, 2), mlp(width)
        self.ls1, self.ls2 = (LayerScale(width) if scaled else nn.Identity() for _ in range(2))
        self.drop_path1, self.drop_path2 = DropPath(drop), DropPath(drop)

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_the_official_dit():
    model = checks.randomise(DiT())
    _, report = checks.accelerated(model)
    assert [row.name for row in report.swapped] == ["blocks.0", "blocks.1", "final_layer"]
    run, given = (lambda model, x, c: [model(x, c)]), dict(x=draw(3, 7, 24), c=draw(3, 24, seed=1))
    checks.assert_catches(*checks.assert_accelerates(model, run, given))
    checks.assert_accelerates(model, run, [{name: value + n for name, value in given.items()} for n in range(4)],
                              torch.bfloat16)


def test_timm_s_block():
    for scaled in (True, False):
        model = checks.randomise(nn.Sequential(Block(scaled=scaled), Block(scaled=scaled)))
        checks.assert_catches(*checks.assert_accelerates(model, lambda m, x: [m(x)], dict(x=draw(2, 5, 24))))
    report = sora_fast.accelerate(nn.Sequential(Block(drop=0.1)))
    assert not report.swapped and "drop path is on" in report.rows[1].note


def test_what_has_the_name_and_does_something_else_is_left():
    """A post-norm block, an order of its own in the modulation, a forward that fails: each with its reason."""
    Real = DiTBlock

    def variant(change):
        return type("DiTBlock", (nn.Module,), {"__init__": Real.__init__, "forward": change, "__module__": __name__})

    def gate_first(self, x, c):
        g, a, b, d, e, h = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g[:, None] * self.attn(modulate(self.norm1(x), a, b))
        return x + h[:, None] * self.mlp(modulate(self.norm2(x), d, e))

    def fails(self, x, c):
        raise RuntimeError("needs a mask")

    for forward, words in ((gate_first, "is not that of"), (fails, "could not be tried: needs a mask")):
        kind = variant(forward)
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        source = Real()
        for name, child in source.named_children():
            module.add_module(name, child)
        report = sora_fast.accelerate(module)
        assert not report.swapped and words in report.rows[0].note, report.rows[0]
    hooked = Real()
    hooked.norm2.register_forward_hook(lambda m, i, o: o)
    assert "hook" in sora_fast.accelerate(hooked).rows[0].note


THEIRS = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(24, elementwise_affine=False), nn.LayerNorm(24)
        self.attn, self.mlp, self.modulation = Attention(24, 2), mlp(24), nn.Linear(24, 144)

    def forward(self, x, c):
"""


def test_the_template_for_another_model_is_as_right_as_what_it_replaces(monkeypatch):
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code, = re.findall("^```python\n(.*?)^```", text, flags=re.M | re.S)
    family = dict(__name__="sora_fast.integrations.theirs", __package__="sora_fast.integrations")
    exec(compile(code, "CONTRIBUTING.md", "exec"), family)
    theirs = types.ModuleType("theirs.models")
    vars(theirs).update(nn=nn, Attention=Attention, mlp=mlp)
    exec(THEIRS + textwrap.indent(inspect.getdoc(family["Block"]).partition("\n")[2], " " * 8), vars(theirs))
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    for path, mixin in family["SWAPS"].items():
        monkeypatch.setitem(swapping.SWAPS, path, mixin)
    block, given = checks.randomise(theirs.Block()), dict(x=draw(2, 5, 24), c=draw(2, 24, seed=1))
    run = lambda block, x, c: [block(x, c)]
    checks.assert_catches(*checks.assert_accelerates(block, run, given))
    block.norm2.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    assert not sora_fast.accelerate(block).swapped and len(code.splitlines()) <= 35
