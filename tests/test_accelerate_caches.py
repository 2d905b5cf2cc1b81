"""Step caches of diffusers on accelerated transformers: what the plain model gives with the same cache.

A cache decides per step what is computed and what is taken from before, so a model is called on several steps that differ
little; that the cache saves something shows in its results, which are not those without it.
"""

import copy
from contextlib import nullcontext

import accelerate_checks as checks
import pytest
import torch
from test_accelerate_transformers import inputs_of, make

import sora_fast
from sora_fast.integrations import swapping

diffusers = pytest.importorskip("diffusers")
hooks = pytest.importorskip("diffusers.hooks")

STEPS = 4
CLOCK = dict(now=0)  # the timestep that caches are told


def _now():
    return CLOCK["now"]


def _skip(model):
    return hooks.apply_layer_skip(model, hooks.LayerSkipConfig(indices=[0], fqn="auto"))


def _enable(config):
    return lambda model: model.enable_cache(copy.deepcopy(config))


CACHES = {
    "first block": _enable(hooks.FirstBlockCacheConfig(threshold=0.5)),
    "mag": _enable(hooks.MagCacheConfig(threshold=1.0, retention_ratio=0.25, num_inference_steps=STEPS,
                                        mag_ratios=[1.0] * STEPS)),
    "sea": _enable(hooks.SeaCacheConfig(threshold=5.0, residual_order=0,
                                        raw_vision_callback=lambda model, args, kwargs: list(kwargs["hidden_states"]))),
    "taylor": _enable(hooks.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1,
                                                  taylor_factors_dtype=torch.float64,
                                                  cache_identifiers=[r".*blocks\.\d+\.(attn|attn1|attn2)"])),
    "pyramid": _enable(hooks.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2,
                                                             cross_attention_block_skip_range=3,
                                                             current_timestep_callback=_now)),
    "faster": _enable(hooks.FasterCacheConfig(is_guidance_distilled=True, current_timestep_callback=_now,
                                              spatial_attention_block_identifiers=("blocks", "transformer_blocks"))),
    "layer skip": _skip,
}
# DiT's class has no enable_cache; the other pairs are in test_accelerate_matrix.py
CASES = [("first block", "wan"), ("sea", "wan"), ("first block", "hunyuan"), ("mag", "cogvideox"), ("layer skip", "dit")]


def steps(model, name, dtype):
    """Outputs of steps that differ little, as one tensor in float64."""
    found = []
    for step in range(STEPS):
        CLOCK["now"] = 800 - 200 * step  # the first is one of those that FasterCache computes
        given = inputs_of(name)
        change = checks.draw(*given["hidden_states"].shape, seed=50 + step)
        given["hidden_states"] = given["hidden_states"] + 0.01 * change
        given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
        where = dict(step_index=step, sigma=1 - (step + 1) / (STEPS + 1), num_inference_steps=STEPS)
        context = model.cache_context("cond", **where) if hasattr(model, "cache_context") else nullcontext()
        with torch.no_grad(), context:
            found.append(model(return_dict=False, **given)[0].double())
    return torch.stack(found)


def assert_same(got, plain, wide):
    checks.assert_as_right(dict(output=got), dict(output=plain), dict(output=wide), 1e-6)


def with_cache(model, cache, first=None):
    """A copy of ``model`` with the cache; ``first``: whether it comes before ``accelerate``, None: not accelerated."""
    model = copy.deepcopy(model)
    if first is False:
        assert sora_fast.accelerate(model).swapped
    CACHES[cache](model)
    if first:
        assert sora_fast.accelerate(model).swapped
    return model


@pytest.mark.parametrize("cache, name", CASES)
def test_a_cache_gives_what_it_gives_on_the_plain_model(cache, name):
    model = make(name)
    without = steps(model, name, torch.float32)
    plain = steps(with_cache(model, cache), name, torch.float32)
    wide = steps(with_cache(model.double(), cache), name, torch.float64)
    model.float()
    assert (plain - without).abs().max() > 1e-3 * without.abs().max()  # the cache left something out
    for first in (False, True):
        assert_same(steps(with_cache(model, cache, first), name, torch.float32), plain, wide)


def test_every_swapped_block_that_diffusers_knows_is_known():
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()
    known = [cls for cls in TransformerBlockRegistry._registry if not issubclass(cls, swapping.Fast)]
    blocks = [cls for cls in known if f"{cls.__module__}.{cls.__qualname__}" in swapping.SWAPS]
    assert len(blocks) >= 5
    for cls in blocks:
        made = swapping.fast_class(cls, swapping.SWAPS[f"{cls.__module__}.{cls.__qualname__}"])
        ours, theirs = TransformerBlockRegistry.get(made), TransformerBlockRegistry.get(cls)
        assert ours is not theirs and theirs._cls is cls
        for field in ("return_hidden_states_index", "return_encoder_hidden_states_index", "hidden_states_argument_name"):
            assert getattr(ours, field) == getattr(theirs, field)


def test_a_cache_that_goes_leaves_nothing_behind():
    """Taken off, a hook leaves a bound forward on the block: that of the class it had, which would hide the next one's."""
    name = "wan"
    model = make(name)
    plain = steps(model, name, torch.float32)
    wide = steps(copy.deepcopy(model).double(), name, torch.float64)
    for order in ("cache first", "accelerate first"):
        fast = copy.deepcopy(model)
        if order == "accelerate first":
            assert "blocks.0" in {row.name for row in sora_fast.accelerate(fast).swapped}
        CACHES["first block"](fast)
        if order == "cache first":
            assert "its forward was replaced" in {row.name: row.note for row in sora_fast.accelerate(fast).left}["blocks.0"]
        fast.disable_cache()
        assert "blocks.0" in {row.name for row in sora_fast.accelerate(fast).swapped}
        assert all(block.forward.__func__ is type(block).forward for block in fast.blocks)
        assert_same(steps(fast, name, torch.float32), plain, wide)
        sora_fast.restore(fast)
        assert torch.equal(steps(fast, name, torch.float32), plain)
