"""What third-party video autoencoders share: convolutions with a cache of past frames, and clips processed in chunks.

B batch, C channels, T frames, H height, W width; t, h, w of the latents.
"""

from collections.abc import Callable

import torch
from torch import nn

from .. import ops
from ..models.vae_stream import CapturedStream, can_capture, cuda_graph, free_bytes
from ..nn import StreamState
from ..nn.streaming import renew

_MAX_CACHES = 64  # more than any encoder has causal convolutions (Wan 2.1: 33)
# The most latent frames per chunk on a GPU; see models/vae_stream.py.
LONGEST_CHUNK = 4


class WholeClip(StreamState):
    """The state of a clip that is passed whole: every layer starts at its first frame and stores nothing.

    Such a call has no side effects, so torch.utils.checkpoint can recompute it and torch.compile can trace it.
    """

    def set(self, module: nn.Module, value: object) -> None:
        pass


def convolve(conv: nn.Module, x, state: StreamState | None, *, weight=None, phase: int = 0, norm=None, **settings):
    """``conv`` over x (B, C, T, H, W), after ``norm`` (keywords of ops.norm_act_conv3d) if given.

    ``settings`` are ops.causal_conv3d's; ``phase`` is in frames of the stream. The past frames of ``conv`` are in ``state``;
    without a state, or with WholeClip, x is the whole clip.
    """
    op = ops.causal_conv3d if norm is None else ops.norm_act_conv3d
    weight = conv.weight if weight is None else weight
    settings |= norm or {}
    settings.setdefault("stride", conv.stride)
    if state is None or isinstance(state, WholeClip) or weight.shape[2] == 1 and phase == 0:
        return op(x, weight, conv.bias, phase=phase, **settings)
    past, phase = state.get(conv, (None, phase))
    y, cache = op(x, weight, conv.bias, cache=past, phase=phase, return_cache=True, **settings)
    state.set(conv, (renew(past, cache), phase + y.shape[2] * settings["stride"][0] - x.shape[2]))
    return y


def with_own_caches(key: nn.Module, forward: Callable, x, state: StreamState | None, **arguments):
    """Call one of diffusers' forwards with a positional list of caches for this module alone, kept in ``state``."""
    if state is None:
        return forward(x, **arguments)
    if isinstance(state, WholeClip):  # diffusers processes the first frame as a chunk, which it recognises by empty caches
        caches, parts = [None] * _MAX_CACHES, []
        for place, chunk in enumerate((x[:, :, :1], x[:, :, 1:])):
            if chunk.shape[2]:
                first = dict(first_chunk=place == 0) if "first_chunk" in arguments else {}
                parts.append(forward(chunk, feat_cache=caches, feat_idx=[0], **(arguments | first)))
        return torch.cat(parts, dim=2)
    caches = list(state.get(key, (None,) * _MAX_CACHES))
    y = forward(x, feat_cache=caches, feat_idx=[0], **arguments)
    state.set(key, tuple(caches))
    return y


def process_in_chunks(module: nn.Module, clip, step: Callable, first: int, size: int, frames: int,
                      bytes_per_frame: int) -> torch.Tensor:
    """Apply ``step(chunk, state)`` to ``clip``, chunk by chunk, into one tensor; memory: one chunk and the result.

    Args:
        first, size: frames of the first chunk, and frames per latent frame after it.
        frames: of the result. bytes_per_frame: peak bytes per latent frame in a chunk, for a GPU.
    """
    latent_frames = 1
    if clip.device.type == "cuda":
        latent_frames = max(1, min(LONGEST_CHUNK, free_bytes(clip.device) // 2 // max(1, bytes_per_frame)))
    state, done, out = StreamState(), 0, None
    plain = lambda chunk: step(chunk, state)
    run = CapturedStream(plain, state, cuda_graph) if can_capture(clip.device) else plain
    progress = module.__dict__.get("_sora_fast_progress")
    tell = None if progress is None else progress.tell
    for chunk in (clip[:, :, :first], *clip[:, :, first:].split(size * latent_frames, dim=2)):
        if chunk.shape[2] == 0:
            continue
        chunk_out = run(chunk)
        out = chunk_out.new_empty((*chunk_out.shape[:2], frames, *chunk_out.shape[3:])) if out is None else out
        out[:, :, done : done + chunk_out.shape[2]] = chunk_out
        done += chunk_out.shape[2]
        if tell is not None:
            tell(done, frames)
    return out
