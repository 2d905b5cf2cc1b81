"""Inflation: a video model that starts as an image model. (ViViT, arXiv 2103.15691, section 3.4.)

D width, C channels; a patch of (ph, pw) pixels becomes a tubelet of (frames, ph, pw).
"""

from dataclasses import replace

import torch

from .dit import DiT
from .mae import MAE

# Where each model embeds its patches, and the layer that outputs a patch's elements, in (pt, ph, pw, C) order.
_PARTS = {DiT: ("x_embedder.proj.weight", "final_layer.linear"),
          MAE: ("encoder.x_embedder.proj.weight", "decoder_pred")}


def inflate_patches(weight, frames: int, how: str = "filter"):
    """The weight (D, C, frames, ph, pw) of a tubelet embedding from an image's (D, C, ph, pw) or (D, C, 1, ph, pw).

    Args:
        how: ``"filter"`` (equation 8): 1 / frames of the image's weight on every frame, so that a tubelet of equal frames
            gives the frame's token; ``"central"`` (equation 9): the image's weight on frame ``frames // 2`` and 0 on the
            others, so that any tubelet gives that frame's token.

    Raises:
        ValueError: a weight of another shape, an unknown ``how``, frames below 1.
    """
    _check(how, frames)
    if weight.dim() == 5 and weight.shape[2] == 1:
        weight = weight.squeeze(2)
    if weight.dim() != 4:
        raise ValueError(f"inflate_patches: expected a weight (D, C, ph, pw) or (D, C, 1, ph, pw), got "
                         f"{tuple(weight.shape)}; pass that of an image's patch embedding")
    if how == "filter":
        return (weight / frames)[:, :, None].repeat(1, 1, frames, 1, 1)
    inflated = weight.new_zeros((*weight.shape[:2], frames, *weight.shape[2:]))
    inflated[:, :, frames // 2] = weight
    return inflated


@torch.no_grad()
def inflate(model: DiT | MAE, frames: int, how: str = "filter") -> DiT | MAE:
    """A new model with patches of ``frames`` frames from an image model with patches of one.

    The layer that outputs a patch's elements gives each frame the same. Where positions have no time axis
    (``positions`` without 0, no RoPE along t), a clip of equal frames gives the image model's output in every frame
    ("filter"), and any clip of ``frames`` frames gives that of its frame ``frames // 2`` ("central").
    ``how`` as in ``inflate_patches``.

    Raises:
        TypeError: another model. ValueError: patches of more than one frame, an unknown ``how``.
    """
    _check(how, frames)
    kind = next((kind for kind in _PARTS if isinstance(model, kind)), None)
    if kind is None:
        raise TypeError(f"inflate: expected a DiT or a MAE, got {type(model).__name__}; inflate its embedding with "
                        f"inflate_patches")
    if model.config.patch[0] != 1:
        raise ValueError(f"inflate: expected a model with patches of one frame, got patch {model.config.patch}; pass an "
                         f"image model")
    embedding, head = _PARTS[kind]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state[embedding] = inflate_patches(state[embedding], frames, how)
    for name in (f"{head}.weight", f"{head}.bias"):
        state[name] = state[name].repeat(frames, *[1] * (state[name].dim() - 1))
    with torch.device("meta"):
        inflated = type(model)(replace(model.config, patch=(frames, *model.config.patch[1:])))
    inflated.load_state_dict(state, assign=True)
    return inflated.train(model.training)


def _check(how: str, frames: int) -> None:
    if how not in ("filter", "central"):
        raise ValueError(f"inflate: expected how to be 'filter' or 'central', got {how!r}; choose one of them")
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise ValueError(f"inflate: expected frames to be an int of 1 or more, got {frames!r}; pass the frames of a tubelet")
