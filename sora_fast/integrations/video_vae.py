"""What the streaming autoencoders of other people have in common here: convolutions with their past, clips in chunks.

B batch, C channels, T frames, H height, W width; t, h, w of the latents.
"""

from collections.abc import Callable

import torch
from torch import nn

from .. import ops
from ..models.vae_stream import CapturedStream, can_capture, cuda_graph, free_bytes
from ..nn import StreamState
from ..nn.streaming import renew

_SLOTS = 64  # more than any encoder has convolutions with a past (Wan 2.1: 33)
# Latent frames of a chunk on a GPU at most; see models/vae_stream.py.
LONGEST_CHUNK = 4


class Whole(StreamState):
    """The state of a clip that is passed whole: every layer sees its first frame, and nothing is remembered.

    Nothing outside the modules changes then, so such a call can be recomputed by torch.utils.checkpoint and traced.
    """

    def set(self, module: nn.Module, value: object) -> None:
        pass


def convolve(conv: nn.Module, x, state: StreamState | None, *, weight=None, phase: int = 0, norm=None, **settings):
    """``conv`` over x (B, C, T, H, W), after ``norm`` (keywords of ops.norm_act_conv3d) where given.

    ``settings`` are ops.causal_conv3d's; ``phase`` counts in frames of the stream. The past of ``conv`` is in ``state``;
    without one, or with a Whole, x is the clip.
    """
    op = ops.causal_conv3d if norm is None else ops.norm_act_conv3d
    weight = conv.weight if weight is None else weight
    settings |= norm or {}
    settings.setdefault("stride", conv.stride)
    if state is None or isinstance(state, Whole) or weight.shape[2] == 1 and phase == 0:
        return op(x, weight, conv.bias, phase=phase, **settings)
    past, phase = state.get(conv, (None, phase))
    y, cache = op(x, weight, conv.bias, cache=past, phase=phase, return_cache=True, **settings)
    state.set(conv, (renew(past, cache), phase + y.shape[2] * settings["stride"][0] - x.shape[2]))
    return y


def own_slots(key: nn.Module, forward: Callable, x, state: StreamState | None, **arguments):
    """A forward of diffusers' own, with a positional list of caches that is this module's alone, kept in ``state``."""
    if state is None:
        return forward(x, **arguments)
    if isinstance(state, Whole):  # it takes the first frame as a chunk of its own, and knows it by its empty caches
        slots, parts = [None] * _SLOTS, []
        for place, part in enumerate((x[:, :, :1], x[:, :, 1:])):
            if part.shape[2]:
                first = dict(first_chunk=place == 0) if "first_chunk" in arguments else {}
                parts.append(forward(part, feat_cache=slots, feat_idx=[0], **(arguments | first)))
        return torch.cat(parts, dim=2)
    slots = list(state.get(key, (None,) * _SLOTS))
    y = forward(x, feat_cache=slots, feat_idx=[0], **arguments)
    state.set(key, tuple(slots))
    return y


def in_chunks(module: nn.Module, clip, step: Callable, first: int, size: int, frames: int, per_frame: int) -> torch.Tensor:
    """``step(chunk, state)`` over ``clip`` in time, written into one tensor: memory of one chunk and of the result.

    Args:
        first, size: frames of the first chunk, and of a latent frame's worth of clip later.
        frames: of the result. per_frame: bytes that one more latent frame in a chunk takes at the peak, for a GPU.
    """
    latent_frames = 1
    if clip.device.type == "cuda":
        latent_frames = max(1, min(LONGEST_CHUNK, free_bytes(clip.device) // 2 // max(1, per_frame)))
    state, done, out = StreamState(), 0, None
    plain = lambda chunk: step(chunk, state)
    run = CapturedStream(plain, state, cuda_graph) if can_capture(clip.device) else plain
    progress = module.__dict__.get("_sora_fast_progress")
    tell = None if progress is None else progress.tell
    for chunk in (clip[:, :, :first], *clip[:, :, first:].split(size * latent_frames, dim=2)):
        if chunk.shape[2] == 0:
            continue
        part = run(chunk)
        out = part.new_empty((*part.shape[:2], frames, *part.shape[3:])) if out is None else out
        out[:, :, done : done + part.shape[2]] = part
        done += part.shape[2]
        if tell is not None:
            tell(done, frames)
    return out
