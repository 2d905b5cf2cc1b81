"""qk_norm_rope at the models' sizes. N tokens, H heads, E head dim."""

from dataclasses import dataclass, replace

import torch

from sora_fast.pack import Pack
from sora_fast.reference.rotary import angles
from sora_fast.testing.draw import Draw

from ..case import FORWARD, FULL, QUICK, PackCase, Provider
from ..providers import backends, compiled, compiled_eager, eager_norm, liger_missing, liger_ops
from . import shapes


@dataclass(frozen=True)
class Rotary(PackCase):
    """``learned``: frequencies per head with a gradient; ``fused``: q and k are views of one product (N, 3, H, E)."""

    heads: int
    head_dim: int
    norm: str
    axes: tuple[int, int, int] = (44, 42, 42)
    theta: float = 1e4
    pairing: str = "interleaved"
    learned: bool = False
    fused: bool = False

    def shape(self):
        return dict(tokens=self.tokens, heads=self.heads, head_dim=self.head_dim, samples=len(self.grids), norm=self.norm,
                    pairing=self.pairing, frequencies="learned" if self.learned else list(self.axes), fused=self.fused)

    def inputs(self, device, seed):
        draw = Draw(device, seed, self.dtype)
        if self.fused:
            q, k, _ = draw(self.tokens, 3, self.heads, self.head_dim).unbind(1)
        else:
            q, k = (draw(self.tokens, self.heads, self.head_dim) for _ in range(2))
        found = dict(q=q, k=k, coords=Pack(self.grids, device=device).coords, norm=self.norm, pairing=self.pairing)
        found |= {name: draw(self._normed) for name in self._affine()}
        if self.learned:
            return found | dict(freqs=draw(3, self.heads, self.head_dim // 2, dtype=torch.float32, scale=0.1))
        return found | dict(axes=self.axes, theta=self.theta)

    @property
    def _normed(self) -> int:
        return self.heads * self.head_dim if self.norm == "rms_all" else self.head_dim

    def _affine(self) -> tuple[str, ...]:
        return ("q_weight", "k_weight") + (("q_bias", "k_bias") if self.norm == "layer_head" else ())

    def directions(self):
        return {FORWARD: (), "backward": ("q", "k", *self._affine(), *(("freqs",) if self.learned else ()))}

    def least_bytes(self, direction):
        q = self.tokens * self.heads * self.head_dim * self.dtype.itemsize
        freqs = 4 * 3 * self.heads * self.head_dim // 2 if self.learned else 0
        coords = 4 * 3 * self.tokens
        weights = 2 * self._normed * self.dtype.itemsize
        biases = weights if self.norm == "layer_head" else 0
        if direction == FORWARD:
            return 4 * q + coords + weights + biases + freqs
        # dq, dk, q and k read, the gradients of q and k written. Statistics (8 bytes a head) are not counted: they follow
        # from q and k. Read again are coords, the weights and freqs; no gradient here needs the biases.
        return 6 * q + coords + 2 * weights + biases + 2 * freqs


def _cases():
    case = Rotary("qk_norm_rope", "", torch.bfloat16, FULL, (), 24, 128, "rms_head")
    hunyuan, wan = replace(case, axes=(16, 56, 56), theta=256.0, fused=True), replace(case, norm="rms_all")
    open_sora = replace(case, axes=(16, 56, 56), pairing="half")
    # short in float32, as in patches.py: 48 tokens to sum for a weight's gradient, where a norm per head has 905 * 6
    yield replace(wan, label="Wan 1.3B, small clip", dtype=torch.float32, suites=QUICK, grids=((2, 4, 6),), heads=12)
    yield replace(case, label="DiT-S, small pack", suites=QUICK, grids=shapes.MIXED_SMALL, heads=6, head_dim=64,
                  axes=(16, 24, 24))
    yield replace(open_sora, label="Open-Sora 2, 256px", grids=(shapes.OPEN_SORA_256,))
    yield replace(case, label="CogVideoX 5B, 480p", grids=(shapes.COGVIDEOX_480,), heads=48, head_dim=64, norm="layer_head",
                  axes=(16, 24, 24))
    yield replace(wan, label="Wan 1.3B, mixed pack 480p", grids=shapes.MIXED_480, heads=12)
    yield replace(case, label="Mochi, 480p, learned frequencies", grids=(shapes.MOCHI_480,), learned=True, fused=True)
    yield replace(wan, label="Wan 14B, 720p", grids=(shapes.WAN_720,), heads=40)
    yield replace(open_sora, label="Open-Sora 2, 768px", grids=(shapes.OPEN_SORA_768,))
    yield replace(hunyuan, label="Hunyuan, 720p", grids=(shapes.HUNYUAN_720,))


CASES = tuple(_cases())


# ------------------------------------------------------------------------------------------------------------ eager
def _tables(turn_NHP, pairing: str):
    """cos and sin of every entry, (N, 1 or H, E) float32, each angle where its pair's two entries are."""
    twice = (lambda t: t.repeat_interleave(2, dim=-1)) if pairing == "interleaved" else (lambda t: torch.cat([t, t], dim=-1))
    return tuple(twice(t.float()) for t in (turn_NHP.cos(), turn_NHP.sin()))


def _with_tables(inputs: dict) -> dict:
    """Adds ``tables``, which models make once a step, in float64; learned ones have a gradient and are made in the call."""
    if "freqs" in inputs:
        return inputs
    turn = angles(inputs["coords"], inputs["axes"], inputs["theta"], None, torch.float64)
    return inputs | dict(tables=_tables(turn, inputs["pairing"]))


def _quarter_turn(x, pairing: str):
    if pairing == "interleaved":
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-b, a], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def _eager(q, k, coords, *, norm, pairing, q_weight, k_weight, q_bias=None, k_bias=None, axes=None, theta=None, freqs=None,
           tables=None, eps=1e-6):
    """As diffusers does: norm in the input's dtype, then ``x * cos + quarter_turn(x) * sin`` in float32."""
    cos, sin = tables or _tables(angles(coords, axes, theta, freqs, torch.float32), pairing)
    outputs = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        # the gradient of freqs is float32, which shows where its numbers were rounded to 16 bits
        h = x if freqs is None else x.float()
        h = h.flatten(1) if norm == "rms_all" else h
        h = eager_norm(h, "layer" if norm == "layer_head" else "rms", weight, bias, eps).view(x.shape).float()
        outputs.append((h * cos + _quarter_turn(h, pairing) * sin).to(x.dtype))
    return tuple(outputs)


# ------------------------------------------------------------------------------------------------------------ Liger
def _liger_unavailable(case: Rotary, direction: str, device: torch.device) -> str:
    if case.norm != "rms_head":
        return f"Liger's norm is an RMS norm of each head, and this is {case.norm}."
    if case.pairing != "half" or case.learned:
        return "Liger turns pairs (i, i + R/2) by angles that are the same for all heads."
    if direction != FORWARD:
        return "Liger's backward turns the incoming gradient in place, which would spoil it for the next call."
    return liger_missing("LigerRMSNormFunction", device) or liger_missing("LigerRopeFunction", device)


def _liger(q, k, coords, *, q_weight, k_weight, tables, norm, pairing, axes, theta, eps=1e-6):
    # "gemma": the norm in float32. It gives fresh memory, so that the rope, which works in place, changes no input.
    # squeeze, not [0]: an index would copy the gradient on its way back, which Liger's users do not pay for.
    library = liger_ops()
    normed = (library.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)
              for x, weight in ((q, q_weight), (k, k_weight)))
    turned = library.LigerRopeFunction.apply(*(x_NHE[None].transpose(1, 2) for x_NHE in normed),
                                             *(table_N1E.squeeze(1)[None] for table_N1E in tables))
    return tuple(x.squeeze(0).transpose(0, 1) for x in turned)


def providers(op: str) -> list[Provider]:
    """Ours, the compiled definition, diffusers' composition, eager and compiled, and Liger's norm and rope."""
    return [*backends(op), compiled(op), Provider("eager", _eager, prepare=_with_tables),
            compiled_eager(op, _eager, _with_tables),
            Provider("liger", _liger, prepare=_with_tables, unavailable=_liger_unavailable)]
