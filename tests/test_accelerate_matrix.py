"""Accelerated models of every class beside the originals: sizes, batches, lengths, dtypes, tiles and slices."""

import accelerate_checks as checks
import pytest
import test_accelerate_caches as caches
import test_accelerate_other_vaes as others
import test_accelerate_transformers as transformers
import test_accelerate_wan_vae as wan
import torch
from accelerate_checks import draw

pytestmark = pytest.mark.full

grads = pytest.mark.parametrize("grads", [True, False], ids=["training", "inference"])


@grads
@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("name", wan.CONFIGS)
def test_wan_vaes(name, frames, grads):
    wan.test_it_is_as_right_as_the_original(name, frames, grads)


@pytest.mark.parametrize("name", ["2.2", "qwen"])
def test_wan_vaes_in_bfloat16(name):
    wan.test_it_is_as_right_in_bfloat16(name)


@grads
@pytest.mark.parametrize("name, frames", [*((name, frames) for name in ("hunyuan", "cogvideox") for frames in (1, 5, 9, 17)),
                                          *(("hunyuan without attention", frames) for frames in (1, 5))])
def test_other_vaes(name, frames, grads):
    others.test_it_is_as_right_as_the_original(name, frames, grads)


@pytest.mark.parametrize("batch, frames", [(1, 1), (2, 1)])
@pytest.mark.parametrize("name", transformers.MODELS)
def test_transformers(name, batch, frames):
    transformers.test_it_is_as_right_as_the_original(name, batch, frames)


@pytest.mark.parametrize("name", [name for name in transformers.MODELS if name not in ("wan", "dit")])
def test_transformers_in_bfloat16(name):
    transformers.test_it_is_as_right_in_bfloat16(name)


@pytest.mark.parametrize("cache, name", [(cache, name) for cache in caches.CACHES for name in ("wan", "hunyuan", "cogvideox")
                                         if (cache, name) not in caches.CASES])
def test_step_caches_of_diffusers(cache, name):
    caches.test_a_cache_gives_what_it_gives_on_the_plain_model(cache, name)


@pytest.mark.parametrize("name", ["2.1", "2.2", "qwen"])
def test_slicing_tiling_and_odd_lengths_of_wan_vaes(name):
    """Clips that are no 1 + 4 k frames lose what diffusers drops; tiles overlap and blend as there."""
    vae = wan.make(name)
    checks.assert_accelerates(vae, wan.encode, dict(video=draw(1, 3, 7, 32, 16)), grads=False)
    vae.enable_slicing()
    checks.assert_accelerates(vae, wan.encode, dict(video=draw(3, 3, 5, 16, 16)))
    vae.disable_slicing()
    f = vae.spatial_compression_ratio
    vae.enable_tiling(4 * f, 4 * f, 3 * f, 3 * f)
    for grads in (True, False):
        checks.assert_accelerates(vae, wan.encode, dict(video=draw(1, 3, 5, 6 * f, 5 * f)), grads=grads)
        checks.assert_accelerates(vae, wan.decode, dict(z=draw(1, 4, 2, 6, 5)), grads=grads)


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox"])
def test_slicing_and_tiling_of_other_vaes(name):
    vae = others.make(name)
    vae.enable_slicing()
    checks.assert_accelerates(vae, others.encode, dict(video=draw(3, 3, 5, 16, 16)))
    vae.disable_slicing()
    if name == "hunyuan":
        vae.enable_tiling(32, 32, 16, 24, 24, 12)
    else:
        vae.enable_tiling(32, 32, 0.25, 0.25)
    checks.assert_accelerates(vae, others.encode, dict(video=draw(1, 3, 5, 48, 40)), grads=False)
    checks.assert_accelerates(vae, others.decode, dict(z=draw(1, 4, 2, 6, 5)), grads=False)


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox"])
def test_other_vaes_in_bfloat16(name):
    vae = others.make(name)
    clips = [dict(video=draw(1, 3, 5, 32, 32, seed=n)) for n in range(6)]
    checks.assert_accelerates(vae, others.encode, clips, torch.bfloat16)
    checks.assert_accelerates(vae, others.decode, [dict(z=draw(1, 4, 2, 4, 4, seed=n)) for n in range(6)], torch.bfloat16)
