"""Blocks that projects copy from file to file: those of facebookresearch/DiT, and timm's vision transformer block.

Their module path can be anything. So a class is recognised by its name and children, and each object is verified by a trial
(trials.py): its forward must give the results of ours. Anything else under the same name is left alone.

B batch, N tokens, D width.
"""

from itertools import chain

from torch import nn

from .known import always
from .mixin import Fast, has_own_forward, is_fast, is_sharded, original_of, runs_only_forward
from .transformer import add, add_norm_modulate, is_plain_norm, norm_modulate
from .trials import Proofs


class ProvenBlock(Fast):
    """Runs its form's ``compute`` while its proof holds, else the original forward.

    The proof covers the absorbed children.
    """

    def forward(self, *args, **kwargs):
        proofs = self.__dict__["_sora_fast_proofs"]
        proof = proofs.current(self)
        if proof is not None and proof.reason is None and proof.calls_plain_children(self):
            inputs = (*args, *(kwargs[name] for name in proof.names[len(args):] if name in kwargs))
            if len(inputs) == len(proof.names) == len(args) + len(kwargs):
                return proofs.form.compute(self, *inputs)
        return super().forward(*args, **kwargs)


class DiTBlock(ProvenBlock):
    report = "norm_modulate, gate_residual_norm_modulate, gate_residual"
    absorbs = dict.fromkeys(("norm1", "norm2"), always)


class FinalLayer(ProvenBlock):
    report = "norm_modulate"
    absorbs = dict(norm_final=always)


class Block(ProvenBlock):
    report = "gate_residual_norm_modulate, gate_residual"
    absorbs = dict.fromkeys(("norm2", "ls1", "ls2", "drop_path", "drop_path1", "drop_path2"), always)


class Form:
    """A known block. Not part of the mixin, whose attributes would shadow children of the same name.

    ``parts``: required children. ``calls``: the children that it calls with one argument, as the original does; True if the
    output has the width of their last layer, not of the input. ``norm``: the layer norm whose width is the block's.
    """

    mixin: type[ProvenBlock]
    norm = "norm2"
    calls: dict[str, bool] = {}
    parts: tuple[str, ...] = ()

    @classmethod
    def shapes(cls, module) -> list[tuple[int, ...]]:
        """Of what a trial gives it: x (B, N, D) and, where it has adaLN, the conditioning (B, C)."""
        width = getattr(module, cls.norm).normalized_shape[-1]
        if "adaLN_modulation" not in cls.calls:
            return [(2, 5, width)]
        layers = [layer.in_features for layer in module.adaLN_modulation.modules() if hasattr(layer, "in_features")]
        return [(2, 5, width), (2, (layers or [width])[0])]


class DiTForm(Form):
    mixin = DiTBlock
    calls = {"attn": False, "mlp": False, "adaLN_modulation": True}
    parts = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")

    @staticmethod
    def compute(self, x, c):
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.adaLN_modulation(c).chunk(6, dim=1)
        y = self.attn(norm_modulate(self.norm1, x, shift, scale))
        x, h = add_norm_modulate(self.norm2, x, y, gate, ff_shift, ff_scale)
        return add(x, self.mlp(h), ff_gate)


class FinalForm(Form):
    mixin = FinalLayer
    calls = {"linear": True, "adaLN_modulation": True}
    parts = ("norm_final", "linear", "adaLN_modulation")
    norm = "norm_final"

    @staticmethod
    def compute(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(norm_modulate(self.norm_final, x, shift, scale))


class BlockForm(Form):
    """timm's, with optional layer scale and with drop path off."""

    mixin = Block
    calls = {"norm1": False, "attn": False, "mlp": False}
    parts = ("norm1", "attn", "norm2", "mlp")

    @staticmethod
    def compute(self, x):
        x, h = add_norm_modulate(self.norm2, x, self.attn(self.norm1(x)), _scale(self, "ls1", x), None, None)
        return add(x, self.mlp(h), _scale(self, "ls2", x))


_FORMS = {"DiTBlock": DiTForm, "FinalLayer": FinalForm, "Block": BlockForm}


def mixin_of(module: nn.Module) -> tuple[type[Fast] | None, str | None]:
    """The mixin for a module of one of these forms; or None, and why it is left (None: no form has its name)."""
    form = _FORMS.get(original_of(type(module)).__name__)
    if form is None or not all(isinstance(getattr(module, part, None), nn.Module) for part in form.parts):
        return None, None
    if has_own_forward(module) and not is_fast(module):
        return None, "its forward was replaced, as hooks that offload or cast do; accelerate before they are added"
    reason = _why_weights_unavailable(module)
    if reason is None and not _norms_are_plain(module, form):
        reason = "a norm was replaced, has a hook, or is not PyTorch's"
    if reason is None and form is BlockForm and _drops_paths(module):
        reason = "its drop path is on"
    if reason is not None:
        return None, reason
    proofs = Proofs(form)
    reason = proofs.current(module).reason
    if reason is not None:
        return None, reason
    module._sora_fast_proofs = proofs
    return form.mixin, None


def _why_weights_unavailable(module) -> str | None:
    """Why the weights of a block are not available outside of a call, as with offloading or sharding."""
    if any(is_sharded(inner) for inner in module.modules()):
        return "it is sharded; accelerate before fully_shard"
    for weight in chain(module.parameters(), module.buffers()):
        if weight.is_meta:
            return "its weights are on the meta device, as offloading leaves them; load them, and accelerate before that"
        if type(weight).__name__ == "DTensor":
            return "its weights are sharded; accelerate before that"
    return None


def _norms_are_plain(module, form) -> bool:
    absorbs = form.mixin.absorbs
    return all(
        is_plain_norm(child) if name.startswith("norm") else child is None or runs_only_forward(child)
        for name, child in zip(absorbs, [getattr(module, name, None) for name in absorbs], strict=True))


def _drops_paths(module) -> bool:
    paths = [getattr(module, name, None) for name in ("drop_path", "drop_path1", "drop_path2")]
    return any(getattr(path, "drop_prob", 0.0) for path in paths)


def _scale(module, name: str, x):
    """The layer scale (1, D), or ones without one."""
    gamma = getattr(getattr(module, name, None), "gamma", None)
    return x.new_ones((1, x.shape[-1])) if gamma is None else gamma[None]
