"""norm_modulate, gate_residual and gate_residual_norm_modulate at the models' sizes.

N tokens, D width, S samples, R modulation rows, n tokens of each sample where all have the same number.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from sora_fast.pack import Pack
from sora_fast.testing.draw import Draw

from ..case import FORWARD, FULL, QUICK, PackCase, Provider
from ..providers import backends, compiled, compiled_eager, eager_norm, liger_missing, liger_ops
from . import shapes

OPS = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
TABLES = {"norm_modulate": ("shift", "scale"), "gate_residual": ("gate",),
          "gate_residual_norm_modulate": ("gate", "shift", "scale")}


@dataclass(frozen=True)
class Modulation(PackCase):
    """``dtype`` is y's, and x's unless ``stream`` says otherwise; ``tables`` the modulation's, dtype where it is None.

    ``per``: one modulation row per "sample" or per "frame". ``shifted``: False for models that only scale.
    """

    width: int
    norm: str = "layer"
    affine: bool = False
    shifted: bool = True
    per: str = "sample"
    stream: torch.dtype | None = None
    tables: torch.dtype | None = None

    @property
    def rows(self) -> int:
        return sum(t for t, _, _ in self.grids) if self.per == "frame" else len(self.grids)

    @property
    def batch(self) -> bool:
        """Whether the tokens are so many equal shares, one per modulation row."""
        return len({h * w * (1 if self.per == "frame" else t) for t, h, w in self.grids}) == 1

    def shape(self):
        name = lambda dtype: str(dtype or self.dtype).removeprefix("torch.")
        sizes = dict(tokens=self.tokens, width=self.width, samples=len(self.grids), rows=self.rows,
                     stream=name(self.stream), modulation=name(self.tables))
        return sizes if self.op == "gate_residual" else sizes | dict(norm=self.norm, affine=self.affine)

    def inputs(self, device, seed):
        draw = Draw(device, seed, self.dtype)
        rows = Pack(self.grids, modulation=self.per, device=device).rows
        # six parts of one product, as adaLN makes them: every table is a strided view
        shift, scale, gate = draw(self.rows, 6 * self.width, dtype=self.tables, scale=0.5).chunk(6, dim=-1)[:3]
        found = dict(x=draw(self.tokens, self.width, dtype=self.stream), rows=rows)
        if self.op != "norm_modulate":
            found |= dict(y=draw(self.tokens, self.width), gate=gate)
        if self.op != "gate_residual":
            found |= dict(shift=shift if self.shifted else None, scale=scale, norm=self.norm)
            if self.affine:
                found |= dict(weight=draw(self.width), bias=draw(self.width))
        return found

    def _tables(self) -> tuple[str, ...]:
        return tuple(name for name in TABLES[self.op] if self.shifted or name != "shift")

    def directions(self):
        branch = () if self.op == "norm_modulate" else ("y",)
        affine = ("weight", "bias") if self.affine and self.op != "gate_residual" else ()
        return {FORWARD: (), "backward": ("x", *branch, *self._tables(), *affine)}

    def least_bytes(self, direction):
        y = self.tokens * self.width * self.dtype.itemsize
        x = self.tokens * self.width * (self.stream or self.dtype).itemsize
        table = self.rows * self.width * (self.tables or self.dtype).itemsize
        affine = 2 * self.width * self.dtype.itemsize if self.affine else 0
        rows = 4 * self.tokens
        shared = len(self._tables()) * table + affine
        if direction == FORWARD:
            # x, or x and y, read; the output, or x_new and h, written
            whole = {"norm_modulate": 2 * x, "gate_residual": 2 * x + y, "gate_residual_norm_modulate": 2 * x + 2 * y}
            return whole[self.op] + rows + shared
        # gate_residual: dout and y read, dy written; dx is dout itself. gate_residual_norm_modulate: dx_new, dh, x_new and
        # y read, dx and dy written: the gate's gradient needs y, the norm's x_new, which y does not give without x.
        whole = {"norm_modulate": 3 * x, "gate_residual": x + 2 * y, "gate_residual_norm_modulate": 3 * x + 3 * y}
        # Statistics (8 bytes a token) are not counted: they follow from x. Tables are read again, shift is not needed.
        again = {"norm_modulate": 1, "gate_residual": 1, "gate_residual_norm_modulate": 2}[self.op] * table + affine
        return whole[self.op] + rows + again + shared


def _cases():
    case = Modulation("norm_modulate", "", torch.bfloat16, FULL, (), 0)
    wan = replace(case, tables=torch.float32)  # Wan keeps modulation in float32
    yield replace(case, label="DiT-B, small pack", dtype=torch.float32, suites=QUICK, grids=shapes.MIXED_SMALL, width=768)
    yield replace(wan, label="Mochi, small clip", suites=QUICK, grids=((3, 4, 6),), width=768, norm="rms", shifted=False)
    yield replace(case, label="DiT-S/2, one image 256px", grids=(shapes.DIT_256,), width=384)
    yield replace(case, label="DiT-XL/2, 64 images 256px", grids=(shapes.DIT_256,) * 64, width=1152)
    yield replace(case, label="DiT-B/2, mixed pack 256px", grids=shapes.MIXED_256, width=768)
    yield replace(case, label="CogVideoX 5B, 480p", grids=(shapes.COGVIDEOX_480,), width=3072, affine=True)
    yield replace(wan, label="Wan2.2 5B, 720p, row per frame", grids=(shapes.WAN22_720,), width=3072, per="frame")
    yield replace(wan, label="Wan 1.3B, mixed pack 480p", grids=shapes.MIXED_480, width=1536)
    yield replace(case, label="Mochi, 480p", grids=(shapes.MOCHI_480,), width=3072, norm="rms", shifted=False)

    case, wan = replace(case, op="gate_residual"), replace(wan, op="gate_residual", stream=torch.float32)
    yield replace(case, label="DiT-B, small pack", dtype=torch.float32, suites=QUICK, grids=shapes.MIXED_SMALL, width=768)
    yield replace(case, label="DiT-L/2, 16 images 512px", grids=(shapes.DIT_512,) * 16, width=1024)
    yield replace(wan, label="Wan 14B, 480p, float32 stream", grids=(shapes.WAN_480,), width=5120)
    yield replace(case, label="Hunyuan, 720p", grids=(shapes.HUNYUAN_720,), width=3072)

    case, wan = (replace(each, op="gate_residual_norm_modulate") for each in (case, wan))
    yield replace(case, label="DiT-B, small pack", dtype=torch.float32, suites=QUICK, grids=shapes.MIXED_SMALL, width=768)
    yield replace(wan, label="Wan 1.3B, small clip, float32 stream", suites=QUICK, grids=((2, 6, 6),), width=1536,
                  per="frame")
    yield replace(case, label="DiT-XL/2, 64 images 256px", grids=(shapes.DIT_256,) * 64, width=1152)
    yield replace(case, label="DiT-B/2, mixed pack 256px", grids=shapes.MIXED_256, width=768)
    yield replace(wan, label="Wan 1.3B, mixed pack 480p, float32 stream", grids=shapes.MIXED_480, width=1536)
    yield replace(wan, label="Wan 14B, 720p, float32 stream", grids=(shapes.WAN_720,), width=5120)
    yield replace(case, label="Hunyuan, 720p", grids=(shapes.HUNYUAN_720,), width=3072)


CASES = tuple(_cases())


# ------------------------------------------------------------------------------------------------------------ eager
def _see_batch(inputs: dict) -> dict:
    """Adds ``batch``: R where every modulation row has the same number of tokens, else 0."""
    table = next(inputs[name] for name in ("gate", "scale") if name in inputs)
    lengths = torch.bincount(inputs["rows"].long(), minlength=table.shape[0])
    return inputs | dict(batch=table.shape[0] if bool((lengths == lengths[0]).all()) else 0)


def _spread(table, rows, batch, dtype):
    """A table's rows where the tokens are: (R, 1, D) beside a batch (R, n, D), (N, D) beside a ragged pack."""
    if batch:
        return table[:, None].to(dtype)
    # gathered in float32, because a gradient summed in 16 bits breaks the error rule (at 1,200 tokens of one row)
    return table.float().index_select(0, rows).to(dtype)


def _eager_norm_modulate(x, shift, scale, rows, *, batch, norm, weight=None, bias=None, eps=1e-6):
    """DiT's ``modulate(norm(x), shift, scale)`` in x's dtype; with float32 modulation in float32, as in Wan."""
    dtype = torch.promote_types(x.dtype, scale.dtype)
    spread = partial(_spread, rows=rows, batch=batch, dtype=dtype)
    h = eager_norm(x.to(dtype), norm, weight, bias, eps)
    h = h.unflatten(0, (batch, -1)) if batch else h
    h = h * (1 + spread(scale)) if shift is None else h * (1 + spread(scale)) + spread(shift)
    return h.reshape(x.shape).to(x.dtype)


def _eager_gate_residual(x, y, gate, rows, *, batch):
    """``x + gate * y`` in the widest dtype of the three."""
    shaped = (lambda t: t.unflatten(0, (batch, -1))) if batch else (lambda t: t)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), gate.dtype)
    return (shaped(x) + _spread(gate, rows, batch, dtype) * shaped(y)).reshape(x.shape).to(x.dtype)


def _eager_gate_residual_norm_modulate(x, y, gate, shift, scale, rows, *, batch, **options):
    x_new = _eager_gate_residual(x, y, gate, rows, batch=batch)
    return x_new, _eager_norm_modulate(x_new, shift, scale, rows, batch=batch, **options).to(y.dtype)


EAGER = dict(zip(OPS, (_eager_norm_modulate, _eager_gate_residual, _eager_gate_residual_norm_modulate), strict=True))


def _ragged(case: Modulation) -> str:
    # The batched form sums a table's gradient over n; the gather of the definition gives it by atomic additions.
    return "" if case.batch else "It is for samples of one length; on this ragged pack it is the gather that compile has."


# ------------------------------------------------------------------------------------------------------------ Liger
def _liger_unavailable(case: Modulation, direction: str, device: torch.device) -> str:
    if case.norm != "rms":
        return "Liger modulates an RMS norm only, and this is a layer norm."
    if case.affine:
        return "Liger's modulated norm has no bias."
    if not case.batch:
        return "Liger divides the tokens into equal shares, one per modulation row, and this pack is ragged."
    return liger_missing("LigerModulatedRMSNormFunction", device)


def _liger(x, shift, scale, rows, *, norm, eps=1e-6):
    # "gemma": the norm in float32; in_place would write dx over the incoming gradient, which the next call needs
    return liger_ops().LigerModulatedRMSNormFunction.apply(x, None, scale, shift, eps, 0.0, "gemma", False)


def providers(op: str) -> list[Provider]:
    """Ours, the compiled definition, the models' composition, eager and compiled, and Liger's modulated norm."""
    peers = [Provider("eager", EAGER[op], prepare=_see_batch), compiled_eager(op, EAGER[op], _see_batch, _ragged)]
    if op == "norm_modulate":
        peers.append(Provider("liger", _liger, unavailable=_liger_unavailable))
    return [*backends(op), compiled(op), *peers]
