"""DiT: a training step of one block on a pack of clips and images, and one of the whole model on images.

N tokens, S samples, L tokens of the longest sample, D width, H heads, E head dim.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
import torch.nn.functional as F

from sora_fast.diffusion import FlowMatching
from sora_fast.models import DiT, DiTConfig
from sora_fast.models.dit import PRESETS, DiTBlock
from sora_fast.nn import Residual, VarlenAttention
from sora_fast.pack import Pack
from sora_fast.testing.draw import Draw

from ..specs.shapes import MIXED_720, MIXED_IMAGES
from .case import INPUTS, ModelCase, ModelProvider, Tensors, anywhere, compile_unavailable, model, training_step

SMALL_GRIDS = ((3, 4, 6), (1, 5, 5), (1, 1, 1), (2, 4, 4))


def _layer_flops(config: DiTConfig, tokens: int, squares: int, rows: int) -> int:
    """Forward FLOPs of a block: ``squares`` is the sum of the samples' squared lengths, ``rows`` the modulation rows."""
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    return 2 * tokens * width * (4 * width + 2 * hidden) + 4 * squares * width + 2 * rows * width * 6 * width


def _reference_unavailable(case: "BlockCase | DiTCase", device: torch.device) -> str:
    """The reference keeps probabilities twice in float32, and works on three more tensors of the longest sample's scores."""
    lengths, heads, layers = case.lengths(), case.config.heads, case.layers()
    needed = heads * (8 * layers * sum(n * n for n in lengths) + 12 * max(lengths) ** 2)
    if device.type == "cuda" and needed > 0.9 * torch.cuda.get_device_properties(device).total_memory:
        return f"The reference's attention scores take {needed / 1e9:,.0f} GB, more than this GPU has."
    return ""


# ------------------------------------------------------------------------------------------------ one block
@dataclass(frozen=True)
class BlockCase(ModelCase):
    """Forward and backward of one adaLN-Zero block (no text) in ``dtype``, from a random gradient of its output."""

    config: DiTConfig
    grids: tuple[tuple[int, int, int], ...]

    def lengths(self) -> list[int]:
        return [prod(grid) for grid in self.grids]

    def layers(self) -> int:
        return 1

    def shape(self):
        config = self.config
        return dict(tokens=sum(self.lengths()), samples=len(self.grids), longest=max(self.lengths()), width=config.width,
                    heads=config.heads, hidden=int(config.width * config.mlp_ratio))

    def flops(self):
        lengths = self.lengths()
        return 3 * _layer_flops(self.config, sum(lengths), sum(n * n for n in lengths), len(lengths))

    def providers(self):
        # Traced, the reference's attention is one dense mask over the whole pack, and nobody's peer: the compiled
        # providers have the backend torch, whose attention is ragged and whose other ops are plain PyTorch to be fused.
        return [
            *(anywhere(name, partial(_block, backend=name)) for name in ("auto", "torch")),
            ModelProvider("reference", _reference_unavailable, partial(_block, backend="reference")),
            ModelProvider("compile", compile_unavailable, partial(_block, backend="torch", compiled=True)),
            anywhere("padded", _padded_block),
            ModelProvider("padded_compile", compile_unavailable, partial(_padded_block, compiled=True)),
        ]

    def small(self):
        return replace(self, grids=SMALL_GRIDS)

    def plain_step(self, device, dtype):
        return _block(self, device, backend="reference", wide=dtype)

    def scope(self):
        grids = ", ".join("x".join(map(str, grid)) for grid in SMALL_GRIDS)
        return (f"the output and the gradients of its input, its conditions and every parameter, on a pack of {grids} "
                f"tokens, the block and its weights unchanged, against the reference in float64")


def _block_inputs(case: BlockCase, device, wide=None) -> tuple[Pack, Tensors]:
    """The pack; x (N, D) and c (S, D), leaves with a gradient, and dy (N, D), the gradient of the output."""
    draw, pack = Draw(device, INPUTS, case.dtype), Pack(case.grids, device=device)
    sizes = dict(x=pack.num_tokens, c=pack.num_rows, dy=pack.num_tokens)
    tensors = {name: draw(rows, case.config.width).to(wide or case.dtype) for name, rows in sizes.items()}
    return pack, {name: t.requires_grad_(name != "dy") for name, t in tensors.items()}


def _block(case: BlockCase, device, *, backend: str, compiled: bool = False, wide=None) -> Callable[[], Tensors]:
    block = model(lambda: DiTBlock(case.config), device, case.dtype, wide)
    pack, given = _block_inputs(case, device, wide)
    run = torch.compile(block, dynamic=False) if compiled else block
    leaves = dict(block.named_parameters()) | {name: given[name] for name in "xc"}

    def forward():
        y = run(Residual(given["x"]), given["c"], pack).joined(pack.rows)
        return {"output": y}, y, given["dy"]
    return training_step(forward, leaves, backend)


# ------------------------------------------------------------------------------------------------ the same, padded
class _Padded(Pack):
    """The pack of a batch of S samples padded to L tokens each, with the coords (S L, 3) of those that there are.

    ``keys`` (S, 1, 1, L) says which tokens there are; ``places`` (N,) where the pack's tokens stand among the S L.
    """

    def __init__(self, pack: Pack):
        device, lengths = pack.device, pack.cu_seqlens.diff()
        super().__init__([(1, 1, pack.max_seqlen)] * pack.num_samples, device=device)
        self.shape = (pack.num_samples, pack.max_seqlen)
        there = torch.arange(pack.max_seqlen, device=device) < lengths[:, None]
        self.keys, self.places = there[:, None, None, :], there.flatten().nonzero().flatten()
        self.coords = self.pad(pack.coords)

    def pad(self, values: torch.Tensor) -> torch.Tensor:
        """(N, ...) -> (S L, ...), zeros where there is no token."""
        return values.new_zeros((prod(self.shape), *values.shape[1:])).index_copy(0, self.places, values)


class _PaddedAttention(VarlenAttention):
    """Dense attention of a padded batch, keys past a sample's end masked: what code without ragged attention does."""

    def forward(self, x, padded, context=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = self._norm_rope(q, k, padded, True)
        q_SHLE, k_SHLE, v_SHLE = (t.unflatten(0, padded.shape).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q_SHLE, k_SHLE, v_SHLE, attn_mask=padded.keys)
        return self.proj(out.transpose(1, 2).flatten(2).flatten(0, 1))


def _padded_block(case: BlockCase, device, *, compiled: bool = False) -> Callable[[], Tensors]:
    """The inputs lie padded; the step takes its results out of the padding (under 1 % of it)."""
    block = model(lambda: DiTBlock(case.config), device, case.dtype)
    block.attn.__class__ = _PaddedAttention
    pack, given = _block_inputs(case, device)
    padded = _Padded(pack)
    x, dy = (padded.pad(given[name].detach()) for name in ("x", "dy"))
    run = torch.compile(block, dynamic=False) if compiled else block
    leaves = dict(block.named_parameters()) | {"x": x.requires_grad_(), "c": given["c"]}

    def forward():
        y = run(Residual(x), given["c"], padded).joined(padded.rows)
        return {"output": y}, y, dy
    step = training_step(forward, leaves, "torch")
    return lambda: {name: t[padded.places] if name in ("output", "d x") else t for name, t in step().items()}


# ------------------------------------------------------------------------------------------------ the whole model
@dataclass(frozen=True)
class DiTCase(ModelCase):
    """A step of flow matching (velocity) on ``batch`` latents of one size, AdamW included.

    ``dtype`` is that of torch.autocast; weights, their gradients and the optimizer's state are float32, as in training.
    """

    config: DiTConfig
    batch: int
    size: tuple[int, int, int]

    @property
    def grid(self) -> tuple[int, int, int]:
        return tuple(n // p for n, p in zip(self.size, self.config.patch, strict=True))

    def lengths(self) -> list[int]:
        return [prod(self.grid)] * self.batch

    def layers(self) -> int:
        return self.config.depth

    def shape(self):
        config = self.config
        return dict(tokens=sum(self.lengths()), samples=self.batch, longest=prod(self.grid), width=config.width,
                    heads=config.heads, depth=config.depth)

    def flops(self):
        """Backwards cost twice their forward, once where the input (latents, timestep features) has no gradient."""
        config, tokens, rows = self.config, sum(self.lengths()), self.batch
        width, patch = config.width, prod(config.patch)
        blocks = config.depth * _layer_flops(config, tokens, tokens * prod(self.grid), rows)
        ends = 2 * rows * width * (width + 2 * width) + 2 * tokens * width * patch * config.out_channels
        starts = 2 * tokens * width * patch * config.in_channels + 2 * rows * width * 256  # 256 timestep features
        return 3 * (blocks + ends) + 2 * starts

    def providers(self):
        return [
            *(anywhere(name, partial(_dit, backend=name)) for name in ("auto", "torch")),
            ModelProvider("reference", _reference_unavailable, partial(_dit, backend="reference")),
            ModelProvider("compile", compile_unavailable, partial(_dit, backend="torch", compiled=True)),
        ]

    def small(self):
        return replace(self, batch=3, size=tuple(4 * p if place else p for place, p in enumerate(self.config.patch)))

    def plain_step(self, device, dtype):
        return _dit(self, device, backend="reference", wide=dtype)

    def scope(self):
        small = self.small()
        return (f"the prediction and the gradient of every parameter for {small.batch} latents of "
                f"{'x'.join(map(str, small.size))}, the model and its weights unchanged, against the reference in float64; "
                f"the update is torch.optim's own and is not compared")


def _dit(case: DiTCase, device, *, backend: str, compiled: bool = False, wide=None) -> Callable[[], Tensors]:
    dtype, draw = wide or torch.float32, Draw(device, INPUTS, torch.float32)
    dit = model(lambda: DiT(case.config), device, torch.float32, wide)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    run = torch.compile(dit, dynamic=False) if compiled else dit
    leaves = dict(dit.named_parameters())
    pack, objective = Pack([case.grid] * case.batch, device=device), FlowMatching("velocity", shift=1.0)
    numbers = case.config.in_channels * prod(case.size)
    x0, noise = (draw(case.batch * numbers).to(dtype) for _ in range(2))
    counts = torch.full((case.batch,), numbers, device=device)
    timesteps = torch.linspace(50.0, 950.0, case.batch, device=device, dtype=dtype)
    labels = torch.arange(case.batch, device=device) % case.config.classes

    def forward():
        with nullcontext() if wide else torch.autocast(device.type, case.dtype):
            predicted = run(objective.add_noise(x0, noise, timesteps, counts), timesteps, pack, labels=labels)
            return {"prediction": predicted}, objective.loss(predicted, x0, noise, timesteps, counts), None
    differentiated = training_step(forward, leaves, backend)

    def step():
        result = differentiated()
        optimizer.step()
        return result
    return step


# ------------------------------------------------------------------------------------------------ cases
def _config(width: int, heads: int, hidden: int, axes) -> DiTConfig:
    return DiTConfig(width=width, heads=heads, mlp_ratio=hidden / width, qk_norm=axes is not None, rope_axes=axes,
                     rope_theta=1e4)


_TINY = _config(64, 2, 160, (8, 12, 12))
_TINY_DIT = replace(PRESETS["S/2"], width=64, depth=2, heads=2, classes=5, learn_sigma=False)

CASES = [
    BlockCase("dit_block_training_step", "Wan 2.1 1.3B's width, mixed pack", torch.bfloat16, ("model",),
              _config(1536, 12, 8960, (44, 42, 42)), MIXED_720),
    BlockCase("dit_block_training_step", "Wan 2.1 14B's width, mixed pack", torch.bfloat16, ("model",),
              _config(5120, 40, 13824, (44, 42, 42)), MIXED_720),
    BlockCase("dit_block_training_step", "DiT-XL/2, mixed pack", torch.bfloat16, ("model",),
              _config(1152, 16, 4608, None), MIXED_IMAGES),
    BlockCase("dit_block_training_step", "width 64, mixed pack", torch.bfloat16, ("quick",),
              _TINY, ((3, 6, 8), (1, 8, 8), (1, 5, 7), (1, 1, 1))),
    DiTCase("dit_training_step", "DiT-XL/2, 64 images of 256 tokens, autocast", torch.bfloat16, ("model",),
            replace(PRESETS["XL/2"], learn_sigma=False), 64, (1, 32, 32)),
    DiTCase("dit_training_step", "width 64, 4 images of 16 tokens, autocast", torch.bfloat16, ("quick",),
            _TINY_DIT, 4, (1, 8, 8)),
]
