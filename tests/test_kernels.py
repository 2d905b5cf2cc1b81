"""The Triton kernels of all families where no kernel runs: what takes them, how they would be launched, what is compiled
anew. tests/test_emulated_*.py run them, tests/test_aot.py compiles them.
"""

import importlib
import itertools
from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch

from sora_fast import explain, ops
from sora_fast.ops import FAMILIES

pytest.importorskip("triton")

import kernel_launches as calls  # noqa: E402
import triton  # noqa: E402
from kernel_checks import Guarded  # noqa: E402
from kernel_launches import CONFIGS, GPUS, HEURISTICS, config_of, launches  # noqa: E402

from sora_fast.kernels import attention, convolution, norm_convolution, normalization, patches, rotary  # noqa: E402
from sora_fast.kernels.arch import SHARED, capability, has_tma  # noqa: E402
from sora_fast.kernels.convolution_config import loads_by_tma  # noqa: E402
from sora_fast.kernels.launch import registers  # noqa: E402
from sora_fast.kernels.modulation_candidates import candidates as candidates_of_modulation  # noqa: E402
from sora_fast.kernels.modulation_config import backward_tile as modulation_backward_tile  # noqa: E402
from sora_fast.kernels.modulation_config import tile as modulation_tile  # noqa: E402
from sora_fast.kernels.normalization_config import tile as normalization_tile  # noqa: E402
from sora_fast.kernels.rotary_config import elements_of  # noqa: E402
from sora_fast.testing import aot  # noqa: E402
from sora_fast.testing.launches.convolution import padding, padding_share  # noqa: E402
from sora_fast.testing.launches.patches import embedding  # noqa: E402

OPS_OF = {family: importlib.import_module(f"sora_fast.ops.{family}").OPS for family in FAMILIES}
OPS = {op.name: op for family in OPS_OF.values() for op in family if "triton" in op.backends}
each_family = pytest.mark.parametrize("family", HEURISTICS)


# ---------------------------------------------------------------------------------------------------------- choice
COMMON = [
    ("cpu", torch.float32, {}, "TRITON_INTERPRET=1"), ("mps", torch.float32, {}, "on mps"),
    ("cuda:sm75", torch.float16, {}, "sm75"), ("cuda:sm90", torch.float64, {}, "float64"),
]
WIDE = dict(wide=torch.float64), "float64"
# (change of the op's example, sentence), bfloat16 on sm90
OWN = {
    "norm_modulate": [WIDE, (dict(width=8193), "8,193 columns")],
    "qk_norm_rope": [WIDE, (dict(moves=True), "coords.detach()"), (dict(heads=65), "65 heads of 128 are 16,384"),
                     (dict(key_heads=40, head_dim=129), "40 heads of 129 are 16,384")],
    "norm_act": [WIDE, (dict(channels=2049), "2,049")],
    "norm_act_conv3d": [(dict(norm="rms", wide=torch.float64), "float64"), (dict(norm="rms", in_channels=2049), "2,049")],
    "patch_embed": [(dict(run=65), "at most 64 elements along w, and these have 65")],
}
GOOD = {
    "qk_norm_rope": [dict(heads=40, key_heads=0)], "norm_act": [dict(norm="group", act=None), dict(channels=2048)],
    "varlen_attention": [dict(key_heads=3), dict(head_dim=72, causal=True), dict(window=(3, 0), return_lse=False)],
    "causal_conv3d": [dict(stride=(2, 2, 2)), dict(upsample=2, space_pad="reflect"), dict(in_channels=2049)],
    "patch_embed": [dict(run=64), dict(sizes_hidden=True)],
}


def _problem(op, device, dtype, change=()):
    example = OPS[op].example(device, torch.float16, True)
    wide = dict(wide=torch.float64 if dtype == torch.float64 else torch.float32) if hasattr(example, "wide") else {}
    return replace(example, dtype=dtype, **wide | dict(change))


@pytest.mark.parametrize("op", OPS)
def test_what_it_cannot_run(op):
    unsupported = OPS[op].backends["triton"].unsupported
    rows = COMMON + [("cuda:sm90", torch.bfloat16, change, sentence) for change, sentence in OWN.get(op, ())]
    for device, dtype, change, sentence in rows:
        (reason,) = unsupported(_problem(op, device, dtype, change))
        assert sentence in reason and reason.endswith(".")
    for change in ({}, *GOOD.get(op, ())):
        assert unsupported(_problem(op, "cuda:sm90", torch.bfloat16, change)) == []


def test_all_but_merging_and_sampling_have_kernels():
    """And the fused convolution's record covers both families: its kernels are those of norm_convolution and its imports."""
    everything = {op.name for family in OPS_OF.values() for op in family}
    assert everything - set(OPS) == {"merge_attention", "kl_sample"}
    assert OPS["norm_act_conv3d"].backends["triton"].kernel == norm_convolution.__name__.rpartition(".")[2]
    assert norm_convolution.normalization is normalization and norm_convolution.convolution is convolution


@pytest.mark.parametrize("op", OPS)
def test_the_interpreter_takes_cpu_tensors_only(op, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    unsupported = OPS[op].backends["triton"].unsupported
    assert unsupported(_problem(op, "cpu", torch.float32)) == []
    (reason,) = unsupported(_problem(op, "cuda:sm90", torch.float32))
    assert "CPU tensors and no others" in reason


def test_a_call_that_cannot_run_raises_its_reasons(monkeypatch):
    x, q, cu = torch.randn(2, 8), torch.randn(2, 2, 16), torch.tensor([0, 2], dtype=torch.int32)
    video, double = torch.randn(1, 4, 1, 2, 2), torch.randn(4, dtype=torch.float64)
    half = x.bfloat16()
    for op, call, words in (
            ("norm_modulate", dict(x=x, shift=None, scale=None), "TRITON_INTERPRET=1"),
            ("gate_residual", dict(x=half, y=half, gate=torch.randn(1, 8).double()), "float64"),
            ("qk_norm_rope", dict(q=q, k=q, coords=None), "TRITON_INTERPRET=1"),
            ("norm_act", dict(x=video, weight=double), "float64"),
            ("causal_conv3d", dict(x=video, weight=torch.randn(3, 4, 1, 1, 1)), "TRITON_INTERPRET=1"),
            ("norm_act_conv3d", dict(x=video, weight=torch.randn(3, 4, 1, 1, 1), norm_weight=double), "float64"),
            ("varlen_attention_forward", dict(q=q.double(), k=q.double(), v=q.double(), cu_seqlens_q=cu, cu_seqlens_k=cu),
             "float64"),
            ("patch_embed", dict(latents=video, weight=torch.randn(4, 4, 1, 2, 2)), "TRITON_INTERPRET=1"),
            ("unpatchify", dict(tokens=torch.randn(1, 80).double(), grids=[(1, 1, 1)], patch=(1, 1, 80), channels=1),
             "float64.*at most 64 elements along w, and these have 80")):
        with pytest.raises(NotImplementedError, match=f"{op}.*{words}"):
            getattr(ops, op)(**call, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotImplementedError, match=r"qk_norm_rope.*coords\.detach\(\)"):
        ops.qk_norm_rope(q, q, torch.zeros(2, 3, requires_grad=True), axes=(2, 2, 4), backend="triton")


@each_family
def test_explain_shows_kernel_and_config(family):
    lines = explain(family, every=True, device="cuda:sm90", assume_validated=True).splitlines()
    taken = [line for line in lines if " * " in line and " triton " in line]
    assert len(taken) == sum(op.name in OPS for op in OPS_OF[family])
    config = {"modulation": "warps=4", "normalization": "warps=4, pixels=", "rotary": "warps=", "attention": "block_m=128",
              "patches": "block_n=", "convolution": "tma=True"}[family]
    assert all(config in line and "the heuristic" in line for line in taken)
    without = explain(family, every=True, device="cuda:sm90")
    assert " * " in without and not any(" triton " in line for line in without.splitlines() if " * " in line)


# --------------------------------------------------------------------------------------------------------- configs
def powers(*sizes):
    return all(size >= 1 and size & (size - 1) == 0 for size in sizes)


def _fits_patches(kernel, launch, config, gpu):
    """Tiles that tl.dot takes, whole rows of a patch, and what a stage needs within the shared memory of the GPU."""
    if kernel == "permute":
        numbers = config.block_n * config.block_r * config.block_c * triton.next_power_of_2(launch.run)
        return powers(config.block_n, config.block_r, config.block_c) and numbers <= 8192
    tiles = config.block_n * config.block_d + max(config.block_n, config.block_d) * config.block_k
    both = config.block_k * (config.block_n + config.block_d) if kernel == "embed" else tiles
    sizes = config.block_n, config.block_d, config.block_k
    return (powers(*sizes) and min(sizes) >= 16 and config.block_k >= launch.run and config.warps in (4, 8)
            and config.stages >= 1 and both * config.stages * launch.dtype.itemsize <= SHARED[capability(gpu)])


def _fits_modulation(kernel, launch, config, gpu):
    """No more than 48 elements a thread, 32 backward, and a backward that the registers of an SM can hold."""
    elements = prod((modulation_tile if kernel == "forward" else modulation_backward_tile)(launch.width))
    if kernel == "forward":
        return powers(config.warps, config.tokens) and config.tokens * elements <= 48 * 32 * config.warps
    return powers(config.warps) and elements <= 32 * 32 * config.warps and 1 <= config.programs * config.warps <= 24


def _fits_rotary(kernel, launch, config, gpu):
    most = 64 if kernel == "forward" else 32
    numbers = config.tokens * elements_of(launch.heads, launch.head_dim)
    return (powers(config.warps, config.tokens) and numbers <= most * 32 * config.warps and config.warps <= 16
            and (kernel == "forward" or 1 <= config.programs * config.warps <= 32))


def _fits_normalization(kernel, launch, config, gpu):
    """64 elements a thread at most, 32 where sums are held besides, and registers for those."""
    sums = kernel == "backward" or launch.norm == "group"
    block = prod(normalization_tile(launch.channels, launch.norm))
    return (powers(config.warps, config.pixels) and config.warps <= 16 and 1 <= config.programs * config.warps <= 32
            and config.pixels * block <= 32 * config.warps * (32 if sums else 64)
            and (not sums or registers(config.warps, config.programs, 8) >= 128))


def _fits_attention(kernel, launch, config, gpu):
    """What the workspace of the backward can hold, TMA only where there is one."""
    return (powers(config.block_m, config.block_n, config.warps) and 16 <= config.block_n <= 128
            and attention.PAD % config.block_m == 0 and config.stages >= 1 and (has_tma(gpu) or not config.tma))


def _fits_convolution(kernel, launch, config, gpu):
    """Powers of two that a product takes, and sums within the registers."""
    if kernel == "wgrad":
        sizes = config.out_channels, config.in_channels, config.pixels
        sums = (config.out_channels + config.extra_out) * (config.in_channels + config.extra_in) * config.taps
        return (powers(*sizes, config.warps) and min(sizes) >= 16 and sums <= 32 * config.warps * 192
                and all(extra == 0 or powers(extra) for extra in (config.extra_in, config.extra_out))
                and (loads_by_tma(launch, gpu) if config.tma else config.extra_out == 0 and config.taps == 1))
    return (powers(config.pixels, config.channels, config.block_k, config.warps) and config.block_k >= 16
            and (config.channels + config.extra) * config.pixels <= 32 * config.warps * 192
            and (config.extra == 0 or config.tma and powers(config.extra)) and config.tma == loads_by_tma(launch, gpu))


FITS = {"patches": _fits_patches, "modulation": _fits_modulation, "rotary": _fits_rotary,
        "normalization": _fits_normalization, "attention": _fits_attention, "convolution": _fits_convolution}


@each_family
def test_heuristics_fit_every_shape(family):
    seen = 0
    for kernel, launch in launches(family):
        for gpu in GPUS:
            config = HEURISTICS[family][kernel](launch, gpu)
            assert FITS[family](kernel, launch, config, gpu), (kernel, launch, gpu, config)
            seen += 1
    assert seen > 100


def test_a_config_that_does_not_fit_is_seen():
    """Four times the elements that a thread may hold, and a tile that is no power of two."""
    kernel, launch = next(iter(launches("normalization")))
    launch = replace(launch, channels=2048, norm="group")
    config = HEURISTICS["normalization"]["forward"](launch, "sm90")
    for wrong in (replace(config, pixels=config.pixels * 4), replace(config, pixels=3)):
        assert not _fits_normalization("forward", launch, wrong, "sm90")


EXAMPLES = {family: CONFIGS[family].Launch(*facts) for family, facts in {
    "patches": (32768, 1536, 32, 2, torch.bfloat16),
    "modulation": (1536, 32768, torch.float32, torch.bfloat16, "layer", False),
    "rotary": (12, 12, 128, 32768, torch.bfloat16, "rms_all", True, "fixed", "interleaved"),
    "normalization": (384, 2**20, "group", "silu", torch.bfloat16, torch.bfloat16),
    "attention": (128, torch.bfloat16, 1, False),
    "convolution": (96, 96, (3, 3, 3), (1, 1, 1), 1, "zeros", torch.bfloat16),
}.items()}
OF_PERMUTE = replace(EXAMPLES["patches"], width=16, rows=4)


@pytest.mark.parametrize("tokens", (128, 32768))
def test_candidates_of_modulation_fit(tokens):
    """Powers of two, two beside the heuristic, at most 48 elements per thread, and backwards that fit an SM."""
    for width, kernel in itertools.product((1, 64, 384, 1152, 1536, 3072, 5120, 8192), HEURISTICS["modulation"]):
        launch = replace(EXAMPLES["modulation"], width=width, tokens=tokens)
        found = set(candidates_of_modulation(kernel, launch, "sm90"))
        assert len(found - {HEURISTICS["modulation"][kernel](launch, "sm90")}) >= 2
        for config in found:
            elements = prod((modulation_tile if kernel == "forward" else modulation_backward_tile)(width))
            share = elements * (config.tokens if kernel == "forward" else 1) / (32 * config.warps)
            assert powers(config.warps, config.tokens) and share <= 48 and config.warps <= 16, (width, config)
            assert kernel == "forward" or config.warps * config.programs <= 32


@each_family
def test_candidates(family):
    """None twice, the heuristic's kind, and the heuristic among them where nothing depends on what they leave out."""
    module = importlib.import_module(f"sora_fast.kernels.{family}_candidates")
    for kernel, heuristic in HEURISTICS[family].items():
        launch = OF_PERMUTE if kernel == "permute" else EXAMPLES[family]
        found, best = list(module.candidates(kernel, launch, "sm90")), heuristic(launch, "sm90")
        assert 4 < len(found) == len(set(found)) <= 200 and all(type(config) is type(best) for config in found)
        if family in ("patches", "rotary", "attention"):
            assert best in found
        for config in found:
            assert powers(config.warps) and config.warps <= 16 and getattr(config, "stages", 1) >= 1
            assert family != "attention" or attention.PAD % config.block_m == 0


# ------------------------------------------------------------------------------------------------ keys and grids
SIZES = [(1, 1), (15, 2), (16, 64), (17, 1), (48, 3), (2**27 + 1, 16), (2**31 + 1, 2)]
SPANS = [(1, 15, 1), (15, 1, 2), (16, 16, 64), (17, 2**31 + 1, 1), (2**31 + 1, 48, 2), (480, 17, 16)]
VIDEOS = [(1, 1, 1, 1), (2, 3, 5, 3), (1, 16, 16, 16), (16, 1, 15, 1), (17, 4, 64, 16), (1, 2, 2**15, 2**15 + 1)]
CACHES = [((1, 1, 3, 3), 1, 2), ((2, 1, 16, 16), 2, 2), ((1, 3, 5, 7), 16, 17), ((1, 1, 1, 1), 15, 3)]


def _uploaded(start):
    """Grids and cu_seqlens are parts of one upload: the second begins anywhere."""
    table = torch.empty(64, dtype=torch.int32)[start:]
    latents, weight, config = torch.empty(32 * 16), torch.empty(8, 4, 1, 2, 2), patches.GemmConfig(32, 16, 16, 4, 1)
    patches.embed(latents, weight, None, table[:6].view(2, 3), table[6:9], config=config)


# Each entry: calls that differ in sizes alone, which share one compilation of every kernel.
KEYS = {
    "patches": [partial(calls.call_patches, *size) for size in SIZES],
    **{f"unpatchify, back {back}": [partial(calls.cut_patches, *size, ways=(back,)) for size in SIZES] for back in (0, 1)},
    "places of grids": [partial(_uploaded, start) for start in (0, 1, 2, 4)],
    "modulation": [partial(calls.call_modulation, *size) for size in SIZES],
    "modulation without rows": [partial(calls.call_modulation, tokens, 1, rows=False) for tokens, _ in SIZES],
    "rotary": [partial(calls.call_rotary, tokens) for tokens, _ in SIZES],
    "rotary, learned": [partial(calls.call_rotary, tokens, False, "learned", False) for tokens, _ in SIZES],
    "norm": [partial(calls.call_normalization, video, "rms") for video in VIDEOS],
    "attention": [partial(calls.call_attention, *span) for span in SPANS],
    "causal": [partial(calls.call_attention, *span, causal=True) for span in SPANS],
    "windows": [partial(calls.call_attention, 300, 300, 2, window=window) for window in ((0, 1), (15, 16), (1, 2**31 + 1))],
    # strides and head counts neither, as long as rows start at multiples of 16 bytes
    "heads": [partial(calls.call_attention, 300, 300, 2, heads, heads, pitch=pitch)
              for heads, pitch in ((1, 16), (3, 144), (16, 2**32))],
    **{f"convolution {op}": list(calls.calls_of_convolution(op)) for op in ("forward", "dgrad", "wgrad")},
}


@pytest.mark.parametrize("label", KEYS)
def test_sizes_are_no_compile_keys(label):
    assert aot.cache_violations(KEYS[label]) == []


def test_group_norms_and_caches_are_no_compile_keys():
    """A group norm's backward is launched twice with other tensors, and a cache makes another kernel: each by itself."""
    only_x = dict(wanted=(True, False, False))
    groups = [aot.launches(partial(calls.call_normalization, video, "group", **only_x)) for video in VIDEOS]
    cached = [aot.launches(partial(calls.call_normalization, size, "rms", *cache))[:1] for size, *cache in CACHES]
    for found in (groups, cached):
        assert all(len(each) == len(found[0]) for each in found)
        for same in zip(*found, strict=True):
            assert len(aot.specialization_keys(same[0].fn, [(launch.args, launch.kwargs) for launch in same])) == 1


def test_no_grid_is_too_large():
    """Only the first axis of a grid may have more than 65,535 programs."""
    large = [partial(calls.call_patches, 2**31 + 1, 2), partial(calls.cut_patches, 2**31 + 1, 2),
             partial(calls.call_modulation, 2**31 + 1, 2), partial(calls.call_rotary, 2**31 + 1),
             *(partial(calls.call_normalization, (70000, 2, 256, 256), norm, 1, 2) for norm in ("rms", "group"))]
    for call in large:
        found = aot.launches(call)
        assert found and max(launch.grid[0] for launch in found) > 65535
        for launch in found:
            assert 1 <= launch.grid[0] < 2**31 and all(size <= 65535 for size in launch.grid[1:])


# ---------------------------------------------------------------------------------------------- a family's own
@pytest.mark.parametrize("units, tiles, resident", ((30_000, 9, 132), (30_000, 27, 132), (5000, 81, 132), (7, 9, 132),
                                                    (1, 1, 4), (2**33, 36, 264)))
def test_pieces_of_wgrad_fill_the_gpu(units, tiles, resident):
    """All units are in one piece each, and no wave of programs is left for a few of them."""
    splits, run = convolution._split_k(units, tiles, resident)
    assert (splits - 1) * run < units <= splits * run
    waves = triton.cdiv(splits * tiles, resident)
    assert splits == units or splits * tiles > 0.9 * waves * resident


def test_what_a_norm_launches():
    """One launch writes y and the cache; a group norm adds two for its statistics and two to its backward."""
    def names(*call, **more):
        found = aot.launches(partial(calls.call_normalization, (2, 1, 4, 4), *call, **more))
        return [launch.fn.__name__ for launch in found]

    assert names("rms", 2, 2) == ["forward_kernel", "backward_kernel"]
    statistics = ["stats_kernel", "merge_stats_kernel", "forward_kernel", "backward_kernel"]
    assert names("group", 2, 2) == [*statistics, "reduce_sums_kernel", "backward_kernel"]
    assert names("group", wanted=(False, True, False)) == statistics
    assert names("rms", wanted=(False, False, False)) == ["forward_kernel"]
    # a frame of 60 x 104 with 384 channels: several programs for each of 132 SMs
    config = config_of("normalization", "forward", 384, 8192, "rms", "silu", torch.bfloat16, torch.bfloat16)
    assert 60 * 104 / config.pixels > 4 * 132


def test_fixed_frequencies_are_rounded_once_and_kept():
    made = rotary.frequencies((4, 0, 6), (1e4, 3.0, 256.0), torch.device("cpu"))
    assert made.shape == (3, 5) and made.dtype == torch.float32
    want = [1, 1e4**-0.5, 1, 256 ** (-1 / 3), 256 ** (-2 / 3)]
    assert torch.equal(made.sum(0), torch.tensor(want, dtype=torch.float64).float())
    assert not made[0, 2:].any() and not made[1].any() and not made[2, :2].any()
    assert rotary.frequencies((4, 0, 6), (1e4, 3.0, 256.0), torch.device("cpu")) is made


@pytest.mark.parametrize("shape, view, unit", [
    ((9, 3, 4, 128), lambda t: t[:, 1], 16), ((9, 4, 72), lambda t: t, 8), ((4, 9, 44), lambda t: t.transpose(0, 1), 4),
    ((9, 4, 129), lambda t: t[..., 1:], 1), ((1, 1, 24), lambda t: t, 8)])
def test_the_unit_of_strides(shape, view, unit):
    """What strides are multiples of, up to 16; no copy but of heads whose numbers are apart."""
    given = view(torch.zeros(shape))
    taken, token, head, found = rotary._strided(given)
    assert found == unit and taken.data_ptr() == given.data_ptr()
    for axis, stride in enumerate((token, head)):
        assert stride * unit == (given.stride(axis) if given.shape[axis] > 1 else 0)
    apart = torch.zeros(*given.shape, 2)[..., 0]
    assert rotary._strided(apart)[0].is_contiguous()


@pytest.mark.parametrize("split", (True, False))
def test_chunks_hold_a_head(split):
    for head_dim in range(16, 257, 8):
        one, two = attention.chunks(head_dim, split)
        assert powers(one) and one >= 16 and (two == 0 or powers(two) and two >= 16)
        assert head_dim <= one + two and (not split or two < one)
        assert not split or head_dim > one - 8 or two == 0
    assert [attention.chunks(e, True) for e in (40, 64, 72, 80, 96, 128)] == [
        (32, 16), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0)]


@pytest.mark.parametrize("samples", (0, 1, 2, 64))
def test_grids_of_attention(samples):
    """One axis, as many programs as tiles there can be: no more than a tile a sample beyond those that are full."""
    found = {}
    for launch in aot.launches(partial(calls.call_attention, 1000, 777, samples, 4, 2)):
        assert len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31
        found.setdefault(launch.fn.__name__, []).append((launch.grid[0], launch.kwargs))
    assert [grid for grid, _ in found["schedule_kernel"]] == [samples + 2] * 3
    for name, rows, block, heads in (("forward_kernel", 1000, "BLOCK_M", 4), ("dq_kernel", 1000, "BLOCK_M", 4),
                                     ("dkdv_kernel", 777, "BLOCK_N", 2)):
        ((grid, options),) = found[name]
        assert grid == heads * (triton.cdiv(rows, options[block]) + samples)


def test_the_capacity_is_enough_and_no_more():
    """Against every way to cut few rows: the tiles of samples and tail never exceed it, and some cut meets it."""
    for rows, samples, block in ((7, 2, 3), (9, 3, 4), (5, 1, 1), (0, 2, 4)):
        most = 0
        cuts = [[]]
        for _ in range(samples):
            cuts = [[*cut, end] for cut in cuts for end in range(cut[-1] if cut else 0, rows + 1)]
        for cut in cuts:
            ends = [0, *cut, rows]
            most = max(most, sum(-(-(b - a) // block) for a, b in zip(ends, ends[1:], strict=False)))
        assert most <= attention.capacity(rows, samples, block) <= most + samples


def test_workspace_of_attention(monkeypatch):
    """Outputs, tables of tiles, and two float32 a query and head: nothing grows with samples times their length."""
    queries, keys, samples, heads = 100_000, 90_000, 64, 8
    noted = Guarded()
    monkeypatch.setattr(attention, "torch", noted)
    assert aot.launches(lambda: calls.call_attention(queries, keys, samples, heads, 2, 128))
    tables = lambda rows: [4 * (triton.cdiv(rows, 128) + samples), 4 * (samples + 1)]
    padded = attention.PAD * (triton.cdiv(queries, attention.PAD) + samples + 1)
    forward = [2 * queries * heads * 128, 4 * queries * heads, *tables(queries)]  # out, lse
    backward = [2 * queries * heads * 128, 2 * keys * 2 * 128, 2 * keys * 2 * 128, 2 * 4 * heads * padded, *tables(queries),
                *tables(keys)]  # dq, dk, dv, rows of lse and delta
    assert [(t.numel() - 128) * t.element_size() for t in noted.buffers] == forward + backward


def test_tma_is_used_where_rows_are_aligned_and_there_is_one():
    def flags(**options):
        found = aot.launches(partial(calls.call_attention, 64, 64, 1, head_dim=128, **options))
        return {launch.kwargs["TMA"] for launch in found if launch.fn.__name__ == "dkdv_kernel"}

    assert flags() == {True} and flags(pitch=260) == {False} and flags(gpu="sm80") == {False}
    launch = EXAMPLES["convolution"]
    assert [loads_by_tma(launch, gpu) for gpu in GPUS] == [False, False, False, True, True, True, True]
    for change in (dict(in_channels=12), dict(out_channels=3), dict(stride=(1, 2, 2)), dict(upsample=2),
                   dict(space_pad="reflect"), dict(dtype=torch.float32)):
        assert not loads_by_tma(replace(launch, **change), "sm90")
    assert loads_by_tma(replace(launch, kernel=(3, 1, 1), space_pad="reflect"), "sm90")


@pytest.mark.parametrize("gpu", GPUS)
def test_work_on_padding_of_a_convolution(gpu):
    """Of K and N together: none at 128, 192, 256 and 384 channels, at most a quarter at 96 and 160. Where TMA loads, wgrad
    has three taps of 128 x 128 in one tile: its bytes from L2 weigh more than its MMAs on zeros."""
    by_tma = gpu.startswith(("sm90", "sm10"))
    share = lambda channels: padding(channels, channels, torch.bfloat16, gpu, {})
    assert [share(channels) for channels in (128, 192, 256, 384, 512, 640, 768, 1024)] == [0] * 8
    assert 0 < share(96) <= (padding_share(96, 96, 128, 128) if by_tma else 0.25) and 0 < share(160) <= 0.25
    assert padding_share(96, 96, 128, 64) == 1 - 96 * 96 / (128 * 128)


def test_products_of_float32_are_no_tf32_unless_allowed():
    """What says TF32 in its machine code is refused by tests/test_aot.py, in any case of aot_cases."""
    def products():
        found = aot.launches(partial(embedding, 16, (1, 2, 2), 64, torch.float32, "sm90"))
        return {launch.kwargs["PRECISION"] for launch in found}

    assert products() == {"tf32x3"}
    torch.backends.cuda.matmul.allow_tf32 = True
    assert products() == {"tf32"}
    case = aot.cases_of("plain", partial(embedding, 16, (1, 2, 2), 64, torch.float32, "sm90"), {})[0]
    assert any("got TF32" in sentence for sentence in aot.check_all([case], (80,))[1])


def test_a_row_is_as_long_as_the_kernels_say():
    from sora_fast.ops.patches_triton import LONGEST_RUN

    assert LONGEST_RUN == CONFIGS["patches"].LONGEST_RUN
