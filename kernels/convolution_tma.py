"""The causal 3-D convolution of convolution.py by TMA (sm_90 and later), an implicit GEMM.

B batch, T frames, H height, W width; Cin, Cout channels; KT, KH, KW kernel. Stride 1, zeros around space. One kernel is the
forward and the gradient of what is convolved, dgrad: both sum weights times a shifted neighbourhood.

A program owns a box of TH x TW pixels of one frame. For each tap TMA copies the box beside it, one instruction of one thread
and no address for the others to work out, and what lies outside of the frame arrives as 0, which is the padding. (The idea
of CUTLASS' implicit GEMM convolutions with TMA, here with plain instead of im2col copies: a causal kernel chooses its frame
itself, out of the clip or the cache.)

Operands are swapped, A = weights (M = channels), B = pixels (N), as then wgmma reads both from shared memory. The other way
Triton brings pixels into registers first, since a box of five axes is no operand A that it can pass on.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .convolution_config import box_sides
from .convolution_indexing import aliased_frames, input_frame, locate_box, next_box, output_for_tap
from .convolution_settings import ConvSettings
from .integers import cdiv
from .launch import MAXNREG, on


# ------------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _weights(weight, tap, channel, k, TRANSPOSED: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """(C channels made, BLOCK_K channels summed) of one tap."""
    if TRANSPOSED:
        return weight.load([tap, k, channel]).reshape(BLOCK_K, C).T
    else:
        return weight.load([tap, channel, k]).reshape(C, BLOCK_K)


@triton.jit
def _epilogue(acc_CP, bias, added, added_at, added_rows, out, out_at, row, column, first_channel, height, width,
            CHANNELS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, C: tl.constexpr):
    """Add bias and, in the first ``added_rows`` rows, ``added``, and store; frames begin at ``added_at`` and ``out_at``."""
    channel = first_channel + tl.arange(0, C)
    pixel = tl.arange(0, TH * TW)
    h, w = row + pixel // TW, column + pixel % TW
    at = (h.to(tl.int64) * width + w)[:, None] * CHANNELS + channel[None, :]
    in_bounds = ((h < height) & (w < width))[:, None] & (channel < CHANNELS)[None, :]
    if bias is not None:
        acc_CP += tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[:, None]
    out_PC = acc_CP.T
    if added is not None:
        out_PC += tl.load(added + added_at + at, mask=in_bounds & (h < added_rows)[:, None], other=0.0).to(tl.float32)
    tl.store(out + out_at + at, out_PC.to(out.dtype.element_ty), mask=in_bounds)


# Coordinates of TMA are of 32 bits, and so are sizes here; addresses are of 64.
@triton.jit(do_not_specialize=["first", "frames", "cached", "out_frames", "height", "width", "phase", "before", "top",
                               "left", "keep"])
def tma_kernel(source, cache, weight0, weight1, bias, added, out, out_cache, first: tl.int32, frames: tl.int32,
               cached: tl.int32, out_frames: tl.int32, height: tl.int32, width: tl.int32, phase: tl.int32, before: tl.int32,
               top: tl.int32, left: tl.int32, keep: tl.int32, MADE: tl.constexpr, SUMMED: tl.constexpr, KT: tl.constexpr,
               KH: tl.constexpr, KW: tl.constexpr, TRANSPOSED: tl.constexpr, REPLICATE: tl.constexpr, C0: tl.constexpr,
               C1: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK_K: tl.constexpr):
    """A box of one frame of ``out``, or where the frame is below 0 of ``out_cache``; C0 + C1 channels of it.

    ``source``, ``cache`` (B, T, H, W, SUMMED) and the weights (taps, Cout, Cin) are descriptors. ``height`` and ``width``
    are out's. ``added``: for the last ``keep`` frames.

    Boxes of all frames come before the next channels: programs that run at the same time read the same weights.
    """
    CHUNKS: tl.constexpr = (SUMMED + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = KH * KW * CHUNKS
    end = frames if TRANSPOSED else out_frames
    boxes = tl.num_programs(0) // ((MADE + C0 + C1 - 1) // (C0 + C1))
    channel = tl.program_id(0) // boxes * (C0 + C1)
    block = tl.program_id(0) % boxes
    columns, rows = tl.cdiv(width, TW), tl.cdiv(height, TH)
    column, row = block % columns * TW, block // columns % rows * TH
    block = block // columns // rows
    sample, frame = block // (end - first), block % (end - first) + first

    seen_from, seen_count = frame, 1
    if TRANSPOSED:
        seen_from, seen_count = aliased_frames(frame, frames, cached, out_frames, phase, before, KT, 1, REPLICATE)
    acc0 = tl.zeros([C0, TH * TW], tl.float32)
    acc1 = tl.zeros([C1 if C1 else 16, TH * TW], tl.float32)
    for place in range(seen_from, seen_from + seen_count):
        # [lo, hi): the time taps behind which something stands. One loop over them, their pixels and channels: a loop for
        # each would fill the pipeline of loads again.
        if TRANSPOSED:
            _, base = output_for_tap(place, 0, out_frames, phase, before, 1)
            lo, hi = tl.maximum(base - out_frames + 1, 0), tl.minimum(base + 1, KT)
        else:
            base = input_frame(place, 0, phase, before, 1)
            lo, hi = tl.maximum(-cached - base, 0), tl.minimum(frames - base, KT)
            if REPLICATE:
                lo, hi = 0, KT
        for step in range(lo * STEPS, hi * STEPS):
            tap, k = step // CHUNKS, step % CHUNKS * BLOCK_K
            kt, kh, kw = tap // (KH * KW), tap // KW % KH, tap % KW
            if TRANSPOSED:
                x = source.load([sample, base - kt, row + top - kh, column + left - kw, k])
            else:
                seen = base + kt
                if REPLICATE:
                    seen = tl.minimum(tl.maximum(seen, -cached), frames - 1)
                clip = source
                if cache is not None:
                    if seen < 0:  # chooses an address; with a load in each branch, loads would wait for MMAs
                        clip = cache
                        seen += cached
                x = clip.load([sample, seen, row + kh - top, column + kw - left, k])
            x_KP = x.reshape(TH * TW, BLOCK_K).T
            acc0 = tl.dot(_weights(weight0, tap, channel, k, TRANSPOSED, C0, BLOCK_K), x_KP, acc0, input_precision="ieee")
            if C1:
                w_CK = _weights(weight1, tap, channel + C0, k, TRANSPOSED, C1, BLOCK_K)
                acc1 = tl.dot(w_CK, x_KP, acc1, input_precision="ieee")

    size = height.to(tl.int64) * width * MADE
    added_at = (sample * keep + frame - (end - keep)) * size
    added_rows = tl.where(frame >= end - keep, height, 0)
    out_at = (sample * end + frame) * size
    if out_cache is not None:
        if frame < 0:
            out = out_cache
            out_at = (frame - first - sample * first) * size
    if C1:  # first, as the other's registers are the more: with both beside ``added`` there would be too few
        _epilogue(acc1, bias, added, added_at, added_rows, out, out_at, row, column, channel + C0, height, width, MADE, TH,
                  TW, C1)
    _epilogue(acc0, bias, added, added_at, added_rows, out, out_at, row, column, channel, height, width, MADE, TH, TW, C0)


@triton.jit
def _store_sums(acc_OI, sums, o, i, rows, CIN: tl.constexpr, STRIDE: tl.constexpr):
    """The first ``rows`` output channels, STRIDE from one to the next, from ``o`` on, input channels from ``i`` on."""
    out_channel, channel = o + tl.arange(0, acc_OI.shape[0]), i + tl.arange(0, acc_OI.shape[1])
    tl.store(sums + out_channel.to(tl.int64)[:, None] * STRIDE + channel[None, :], acc_OI,
             mask=(out_channel < rows)[:, None] & (channel < CIN)[None, :])


@triton.jit(do_not_specialize=["frames", "cached", "out_frames", "height", "width", "phase", "before", "top", "left",
                               "units", "run"])
def wgrad_tma_kernel(dy, x0, x1, cache0, cache1, sums, frames: tl.int32, cached: tl.int32, out_frames: tl.int32,
                     height: tl.int32, width: tl.int32, phase: tl.int32, before: tl.int32, top: tl.int32, left: tl.int32,
                     units: tl.int64, run: tl.int64, CIN: tl.constexpr, COUT: tl.constexpr, KT: tl.constexpr,
                     KH: tl.constexpr, KW: tl.constexpr, REPLICATE: tl.constexpr, NTAPS: tl.constexpr, O0: tl.constexpr,
                     O1: tl.constexpr, I0: tl.constexpr, I1: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """sums (splits, COUT, KT, KH, KW, CIN): NTAPS taps of a row, O0 + O1 output, I0 + I1 input channels, one split's pixels.

    Units, splits and order as in wgrad_kernel; ``height`` and ``width`` are dy's. x and cache, (B, T, H, W, CIN), are
    descriptors of blocks of I0 and of I1 channels.

    One box of dy is multiplied by the boxes of x that the taps see: at full rate, 128 x 128 channels take 64 bytes a clock
    from L2 for one tap, 43 for three. dy comes by pointers, as a box of five axes is no operand A in shared memory.
    """
    TAPS: tl.constexpr = KT * KH * KW
    PARTS: tl.constexpr = (KW + NTAPS - 1) // NTAPS  # of a row of taps
    tiles_i: tl.constexpr = (CIN + I0 + I1 - 1) // (I0 + I1)
    tiles_o: tl.constexpr = (COUT + O0 + O1 - 1) // (O0 + O1)
    program = tl.program_id(0)
    kt, kh, first_kw = program // (KH * PARTS) % KT, program // PARTS % KH, program % PARTS * NTAPS
    tile = program // (KT * KH * PARTS) % (tiles_i * tiles_o)
    split = (program // (KT * KH * PARTS * tiles_i * tiles_o)).to(tl.int64)
    o, i = tile // tiles_i * (O0 + O1), tile % tiles_i * (I0 + I1)
    h, w = tl.arange(0, TH * TW) // TW, tl.arange(0, TH * TW) % TW
    at_P = (h.to(tl.int64) * width + w) * COUT
    out_channel0 = o + tl.arange(0, O0)
    at_PO = at_P[:, None] + out_channel0[None, :]
    if O1:
        out_channel1 = o + O0 + tl.arange(0, O1)
        at_PR = at_P[:, None] + out_channel1[None, :]
    sample, output, row, column = locate_box(split * run, out_frames, height, width, TH, TW)

    accs = ()  # of a tap (O0, I0), (O0, I1), (O1, I0), (O1, I1), then of the next one
    for _ in tl.static_range(NTAPS):
        accs += (tl.zeros([O0, I0], tl.float32),)
        if I1:
            accs += (tl.zeros([O0, I1], tl.float32),)
        if O1:
            accs += (tl.zeros([O1, I0], tl.float32),)
            if I1:
                accs += (tl.zeros([O1, I1], tl.float32),)
    for _ in range(tl.minimum(run, units - split * run)):
        in_bounds = (h < height - row) & (w < width - column)
        box = dy + (((sample.to(tl.int64) * out_frames + output) * height + row) * width + column) * COUT
        dy_PO = tl.load(box + at_PO, mask=in_bounds[:, None] & (out_channel0 < COUT)[None, :], other=0.0)
        if O1:
            dy_PR = tl.load(box + at_PR, mask=in_bounds[:, None] & (out_channel1 < COUT)[None, :], other=0.0)
        seen = input_frame(output, kt, phase, before, 1)
        if REPLICATE:
            seen = tl.minimum(tl.maximum(seen, -cached), frames - 1)
        clip0, clip1 = x0, x1
        if cache0 is not None:
            in_cache = seen < 0
            seen = tl.where(in_cache, seen + cached, seen)
            if in_cache:
                clip0, clip1 = cache0, cache1
        summed = ()
        for number in tl.static_range(NTAPS):
            from_w = column + first_kw + number - left
            x_PI = clip0.load([sample, seen, row + kh - top, from_w, i]).reshape(TH * TW, I0)
            summed += (tl.dot(dy_PO.T, x_PI, accs[len(summed)], input_precision="ieee"),)
            if I1:
                x_PJ = clip1.load([sample, seen, row + kh - top, from_w, i + I0]).reshape(TH * TW, I1)
                summed += (tl.dot(dy_PO.T, x_PJ, accs[len(summed)], input_precision="ieee"),)
            if O1:
                summed += (tl.dot(dy_PR.T, x_PI, accs[len(summed)], input_precision="ieee"),)
                if I1:
                    summed += (tl.dot(dy_PR.T, x_PJ, accs[len(summed)], input_precision="ieee"),)
        accs = summed
        sample, output, row, column = next_box(sample, output, row, column, out_frames, height, width, TH, TW)

    EACH: tl.constexpr = len(accs) // NTAPS
    for number in tl.static_range(NTAPS):
        kw = first_kw + number
        rows = tl.where(kw < KW, COUT, 0)
        tap_sums = sums + (split * (COUT * TAPS) + (kt * KH + kh) * KW + kw) * CIN
        _store_sums(accs[number * EACH], tap_sums, o, i, rows, CIN, TAPS * CIN)
        if I1:
            _store_sums(accs[number * EACH + 1], tap_sums, o, i + I0, rows, CIN, TAPS * CIN)
        if O1:
            _store_sums(accs[number * EACH + EACH // 2], tap_sums, o + O0, i, rows, CIN, TAPS * CIN)
            if I1:
                _store_sums(accs[number * EACH + 3], tap_sums, o + O0, i + I0, rows, CIN, TAPS * CIN)


# ------------------------------------------------------------------------------------------------------------- launch
def can_load(settings: ConvSettings, weight, source) -> bool:
    """Whether TMA can load ``source`` and ``weight`` as the convolution needs them; addresses are multiples of 16 bytes.

    The interpreter takes float32 too; a GPU transposes operands of 16 bits alone.
    """
    plain = settings.stride == (1, 1, 1) and settings.upsample == 1 and settings.pads_with_zeros
    return (plain and weight.shape[0] % 8 == weight.shape[1] % 8 == 0
            and (source.dtype.itemsize == 2 or source.device.type == "cpu"))


def _frames(tensor, pixels: int, block: int):
    """Descriptor of a (B, C, T, H, W) tensor in channels_last_3d memory, whatever strides of axes of size 1 say.

    Of boxes of ``pixels`` by ``block`` channels; None for none.
    """
    if tensor is None or not block:
        return None
    if tensor.numel() == 0:  # nothing of it is read, but a descriptor needs an address
        tensor = tensor.new_empty(1, tensor.shape[1], 1, 1, 1)
    batch, channels, frames, height, width = tensor.shape
    row = width * channels
    return TensorDescriptor(tensor, [batch, frames, height, width, channels],
                            [frames * height * row, height * row, row, channels, 1],
                            [1, 1, *box_sides(pixels), block])


def conv_tma(source, cache, weight, bias, added, out, out_cache, settings: ConvSettings, *, frames: int, out_frames: int,
             config, cached: int = 0, keep: int = 0, transposed: bool = False) -> None:
    """Write ``out``, and of a ``transposed`` convolution ``out_cache``. No workspace, no atomics; sums are rounded once.

    Forward: source x (B, Cin, T, H, W), cache (B, Cin, c, H, W) or None, bias (Cout,) or None, out y (B, Cout, out_frames,
    H', W'), added, the residual, like y or None. ``transposed``: source dY, out dX, out_cache (B, Cin, cached, H, W) the
    cache's or, where nobody asks, None; added (B, Cin, keep, H, W) or None goes to the last ``keep`` frames of cache and
    clip. What only the other one takes is None.

    weight (Cout, Cin, KT, KH, KW). ``frames`` of the clip, ``out_frames`` frames of y. All tensors are of one dtype, in
    channels_last_3d memory, and such as ``can_load`` says.
    """
    cout, cin, kt, kh, kw = weight.shape
    taps, made, summed = kt * kh * kw, *((cin, cout) if transposed else (cout, cin))
    batch, _, _, height, width = out.shape
    high, wide = box_sides(config.pixels)
    if not transposed:
        keep, cached = out_frames, 0 if cache is None else cache.shape[2]
    first = -cached if out_cache is not None else 0
    boxes = batch * (out.shape[2] - first) * cdiv(height, high) * cdiv(width, wide)
    if boxes == 0:
        return

    def weights(channels):
        block = [1, config.block_k, channels] if transposed else [1, channels, config.block_k]
        return TensorDescriptor(weight, [taps, cout, cin], [cin, taps * cin, 1], block) if channels else None

    left, _, top, _ = settings.padding
    with on(out.device):
        tma_kernel[(boxes * cdiv(made, config.channels + config.extra),)](
            *(_frames(clip, config.pixels, config.block_k) for clip in (source, cache)), weights(config.channels),
            weights(config.extra), bias, added, out, out_cache if first else None, first, frames, cached, out_frames, height,
            width, settings.phase, kt - 1 - settings.lookahead, top, left, keep, MADE=made, SUMMED=summed, KT=kt, KH=kh,
            KW=kw, TRANSPOSED=transposed, REPLICATE=settings.time_pad == "replicate", C0=config.channels, C1=config.extra,
            TH=high, TW=wide, BLOCK_K=config.block_k, num_warps=config.warps, num_stages=config.stages, maxnreg=MAXNREG)


def wgrad_tma(dy, x, cache, sums, settings: ConvSettings, *, units: int, run: int, programs: int, config) -> None:
    """Write ``sums`` (splits, Cout, KT, KH, KW, Cin), float32: ``run`` of ``units`` boxes of pixels to a split.

    dy (B, Cout, T', H', W'), x and cache as in ``conv_tma``.
    """
    out_frames, height, width = dy.shape[2:]
    kt, kh, kw = settings.kernel
    high, wide = box_sides(config.pixels)
    parts = (config.in_channels, config.extra_in)
    left, _, top, _ = settings.padding
    with on(dy.device):
        wgrad_tma_kernel[(programs,)](
            dy, *(_frames(clip, config.pixels, part) for clip in (x, cache) for part in parts), sums, x.shape[2],
            0 if cache is None else cache.shape[2], out_frames, height, width, settings.phase, kt - 1 - settings.lookahead,
            top, left, units, run, CIN=x.shape[1], COUT=dy.shape[1], KT=kt, KH=kh, KW=kw,
            REPLICATE=settings.time_pad == "replicate", NTAPS=config.taps, O0=config.out_channels, O1=config.extra_out,
            I0=config.in_channels, I1=config.extra_in, TH=high, TW=wide, num_warps=config.warps, num_stages=config.stages,
            maxnreg=MAXNREG)
