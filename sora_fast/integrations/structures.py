"""Blocks that people copy from file to file: the official DiT's, and those of vision transformers in timm's form.

Their modules have any name, so a class is known by its own name and parts, and by trying: on a random copy in float64 its
forward must give what ours gives. What does something else under the same name is left alone.

B batch, N tokens, D width.
"""

import copy

import torch
from torch import nn

from .swapping import Fast, has_own_forward, original_of
from .transformer import add, add_norm_modulate, is_plain_norm, norm_modulate

_TRIED: dict[type, str | None] = {}  # class -> why it is not what its name says, or None


class DiTBlock(Fast):
    runs = "norm_modulate, gate_residual_norm_modulate, gate_residual"
    reads = ("norm1", "norm2")
    parts = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")

    def forward(self, x, c, *args, **kwargs):
        if args or kwargs or not _plain(self):
            return super().forward(x, c, *args, **kwargs)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.adaLN_modulation(c).chunk(6, dim=1)
        y = self.attn(norm_modulate(self.norm1, x, shift, scale))
        x, h = add_norm_modulate(self.norm2, x, y, gate, ff_shift, ff_scale)
        return add(x, self.mlp(h), ff_gate)


class FinalLayer(Fast):
    runs = "norm_modulate"
    reads = ("norm_final",)
    parts = ("norm_final", "linear", "adaLN_modulation")

    def forward(self, x, c, *args, **kwargs):
        if args or kwargs or not _plain(self):
            return super().forward(x, c, *args, **kwargs)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(norm_modulate(self.norm_final, x, shift, scale))


class Block(Fast):
    """timm's: layer scale where there is one, drop path where it drops nothing."""

    runs = "gate_residual_norm_modulate, gate_residual"
    reads = ("norm2", "ls1", "ls2")
    parts = ("norm1", "attn", "norm2", "mlp")

    def forward(self, x, *args, **kwargs):
        if args or kwargs or not _plain(self) or self.training and _drops(self):
            return super().forward(x, *args, **kwargs)
        x, h = add_norm_modulate(self.norm2, x, self.attn(self.norm1(x)), _scale(self, "ls1", x), None, None)
        return add(x, self.mlp(h), _scale(self, "ls2", x))


_MIXINS = {"DiTBlock": DiTBlock, "FinalLayer": FinalLayer, "Block": Block}


def mixin_of(module: nn.Module) -> tuple[type[Fast] | None, str | None]:
    """The mixin for a module of one of these forms, or None and why one of that name is left (None: it has no such name)."""
    original = original_of(type(module))
    mixin = _MIXINS.get(original.__name__)
    if mixin is None or not all(isinstance(getattr(module, part, None), nn.Module) for part in mixin.parts):
        return None, None
    if not _plain(module):
        return None, "a norm was replaced, has a hook, or is none of PyTorch's"
    if mixin is Block and _drops(module):
        return None, "its drop path is on"
    if original not in _TRIED:
        _TRIED[original] = _try(module, mixin)
    return (None, _TRIED[original]) if _TRIED[original] else (mixin, None)


def _plain(module) -> bool:
    norms = [getattr(module, name) for name in ("norm1", "norm2", "norm_final") if hasattr(module, name)]
    scales = [getattr(module, name) for name in ("ls1", "ls2") if hasattr(module, name)]
    return (all(is_plain_norm(norm) for norm in norms)
            and all(not (scale._forward_hooks or scale._forward_pre_hooks or has_own_forward(scale)) for scale in scales))


def _drops(module) -> bool:
    paths = [getattr(module, name, None) for name in ("drop_path", "drop_path1", "drop_path2")]
    return any(getattr(path, "drop_prob", 0.0) for path in paths)


def _scale(module, name: str, x):
    """The layer scale (1, D), or ones where there is none."""
    gamma = getattr(getattr(module, name, None), "gamma", None)
    return x.new_ones((1, x.shape[-1])) if gamma is None else gamma[None]


@torch.no_grad()
def _try(module, mixin) -> str | None:
    """Why ``module``'s own forward is not ``mixin``'s, tried on a random copy; None where they agree to 1e-10."""
    try:
        other = copy.deepcopy(module).cpu().double().eval()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        for p in other.parameters():
            p.copy_(draw(*p.shape) / max(p.shape[-1], 1) ** 0.5)
        norm = next(m for m in other.modules() if isinstance(m, nn.LayerNorm))
        x = draw(2, 5, norm.normalized_shape[0])
        given = (x,) if mixin is Block else (x, draw(2, _linear(other).in_features))
        wanted, got = original_of(type(module)).forward(other, *given), mixin.forward(other, *given)
        if isinstance(wanted, torch.Tensor) and wanted.shape == got.shape:
            if (wanted - got).abs().max() <= 1e-10 * wanted.abs().max():
                return None
    except Exception as error:  # whatever a stranger's forward raises
        return f"its forward could not be tried: {' '.join(str(error).split())[:120]}"
    return f"its forward is not that of the {original_of(type(module)).__name__} known here"


def _linear(module) -> nn.Linear:
    return next(m for m in module.adaLN_modulation.modules() if isinstance(m, nn.Linear))
