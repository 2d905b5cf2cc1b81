"""The way back through padding and upsampling, in PyTorch alone: what repeats a pixel adds its gradient to that pixel's."""

from .convolution_settings import ConvSettings


def folded(wide, settings: ConvSettings, height_axis: int, padding: tuple[int, int, int, int] | None = None):
    """Gradients of frames, of those of the frames upsampled and padded, ``wide``, which is modified in place.

    Width is the axis after ``height_axis``; ``padding``: left, right, top, bottom, where they are not the settings'.
    """
    left, right, top, bottom = settings.padding if padding is None else padding
    for axis, low, high in ((height_axis, top, bottom), (height_axis + 1, left, right)):
        size = wide.shape[axis] - low - high
        before, wide, after = wide.split((low, size, high), axis)
        if settings.space_pad == "replicate" and low + high:
            wide.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
            wide.narrow(axis, size - 1, 1).add_(after.sum(axis, keepdim=True))
        elif settings.space_pad == "reflect":
            wide.narrow(axis, 1 if low else 0, low).add_(before.flip(axis))
            wide.narrow(axis, size - 1 - high if high else 0, high).add_(after.flip(axis))
    u = settings.upsample
    if u > 1:
        for axis in (height_axis + 1, height_axis):  # not sum, which on a CPU takes ten times as long along such axes
            first, *others = wide.unflatten(axis, (wide.shape[axis] // u, u)).unbind(axis + 1)
            wide = sum(others, start=first)
    return wide
