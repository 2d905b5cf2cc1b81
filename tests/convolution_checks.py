"""Convolutions of small integers, which every right implementation gives to the bit, output by output."""

import itertools

import torch


def brute(x, weight, bias, *, stride, padding, time_pad, space_pad, cache, phase, lookahead, upsample,
          residual):
    """Output by output in Python's integers."""
    batch, _, frames = x.shape[:3]
    height, width = (upsample * size for size in x.shape[3:])
    kt, kh, kw = weight.shape[2:]
    left, right, top, bottom = padding
    seen = x if cache is None else torch.cat([cache, x], 2)
    past = seen.shape[2] - frames

    def coordinate(at, size):
        if 0 <= at < size:
            return at
        if space_pad == "zeros":
            return None
        if space_pad == "replicate":
            return min(max(at, 0), size - 1)
        return -at if at < 0 else 2 * (size - 1) - at

    def pixel(b, t, h, w):
        t += past
        if not 0 <= t < seen.shape[2]:
            if time_pad == "zeros":
                return 0
            t = min(max(t, 0), seen.shape[2] - 1)
        h, w = coordinate(h, height), coordinate(w, width)
        return 0 if h is None or w is None else seen[b, :, t, h // upsample, w // upsample]

    at_t = range(phase, frames, stride[0])
    at_h = range(-top, height + bottom - kh + 1, stride[1])
    at_w = range(-left, width + right - kw + 1, stride[2])
    y = torch.zeros(batch, weight.shape[0], len(at_t), len(at_h), len(at_w), dtype=x.dtype)
    for b, (i, t), (j, h), (k, w) in itertools.product(range(batch), enumerate(at_t), enumerate(at_h),
                                                      enumerate(at_w)):
        for dt, dh, dw in itertools.product(range(kt), range(kh), range(kw)):
            frame = t - (kt - 1 - lookahead) + dt
            y[b, :, i, j, k] += (weight[:, :, dt, dh, dw] * pixel(b, frame, h + dh, w + dw)).sum(1)
        y[b, :, i, j, k] += 0 if bias is None else bias
    return y if residual is None else y + residual


EXACT = [
    dict(),
    dict(cache=2, residual=True),
    dict(cache=1, time_pad="replicate", space_pad="reflect"),
    dict(cache=2, time_pad="replicate", space_pad="replicate", padding=(2, 0, 1, 2)),
    dict(stride=(2, 1, 2), phase=1),
    dict(stride=(2, 2, 1), phase=2, cache=1, padding=(0, 1, 0, 1)),
    dict(stride=3, phase=3, time_pad="replicate"),
    dict(phase=4), dict(phase=9, cache=2),
    dict(lookahead=1), dict(lookahead=2, time_pad="replicate", stride=(2, 1, 1)),
    dict(frames=1), dict(frames=1, time_pad="replicate", cache=1), dict(frames=0, cache=2), dict(frames=0),
    dict(kernel=(1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 0, 1)),
    dict(kernel=(3, 1, 1)), dict(kernel=(1, 1, 1), residual=True), dict(kernel=(2, 2, 4), padding=(1, 2, 0, 1)),
    dict(batch=0), dict(cache=0),
    dict(upsample=2, cache=2, residual=True), dict(upsample=2, kernel=(1, 3, 3)), dict(upsample=3, kernel=(1, 1, 1)),
    dict(upsample=2, cache=1, time_pad="replicate", space_pad="reflect", stride=(1, 2, 3), padding=(7, 0, 1, 2)),
    dict(upsample=2, space_pad="replicate", phase=1, frames=5, stride=(2, 1, 1), lookahead=1),
    dict(upsample=2, frames=1, residual=True), dict(upsample=2, frames=0, cache=2), dict(upsample=2, phase=9),
    dict(upsample=2, batch=0),
]


def integers(setting):
    """Arguments of causal_conv3d for a ``setting`` as in EXACT, which may say ``channels`` too, and what comes out."""
    setting = dict(setting)
    draw = lambda *shape: torch.randint(-3, 4, shape).float()
    inputs, outputs = setting.pop("channels", (2, 3))
    batch, frames = setting.pop("batch", 2), setting.pop("frames", 4)
    kernel, cache, residual = setting.pop("kernel", (3, 3, 3)), setting.pop("cache", None), setting.pop("residual", 0)
    x, weight, bias = draw(batch, inputs, frames, 4, 5), draw(outputs, inputs, *kernel), draw(outputs)
    cache = None if cache is None else draw(batch, inputs, cache, 4, 5)
    stride = setting.get("stride", 1)
    full = dict(stride=(stride,) * 3 if isinstance(stride, int) else stride, time_pad="zeros", space_pad="zeros",
                padding=(kernel[2] // 2,) * 2 + (kernel[1] // 2,) * 2, phase=0, lookahead=0, upsample=1)
    full |= {name: value for name, value in setting.items() if name != "stride"}
    want = brute(x, weight, bias, cache=cache, residual=None, **full)
    residual = draw(*want.shape) if residual else None
    want = want if residual is None else want + residual
    return dict(x=x, weight=weight, bias=bias, cache=cache, residual=residual, **setting), want
