"""Checkpoints of every published size, whole (XL at 28 blocks takes 30 s and 6 GB), and of many graphs of Wan's VAE."""

import pytest
import test_checkpoints
import test_dit
import torch

pytestmark = pytest.mark.full


@pytest.mark.parametrize("preset, depth", [("S/2", 12), ("XL/4", 28), ("B/4", 1), ("L/8", 1)])
def test_an_official_state_dict_gives_the_official_output(preset, depth):
    test_checkpoints.test_an_official_state_dict_gives_the_official_output(preset, depth)


def test_the_formula_of_xl():
    test_dit.test_the_formula_and_the_names_are_the_official_ones("XL/2")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("sizes", [test_checkpoints.WAN, *test_checkpoints.OTHER_SIZES],
                         ids=lambda sizes: f"{sizes['base_dim']}x{sizes['dim_mult']}")
def test_a_saved_wan_vae_loads_agrees_and_comes_back(tmp_path, sizes, dtype, tolerance):
    test_checkpoints.test_a_saved_wan_vae_loads_agrees_and_comes_back(tmp_path, sizes, dtype, tolerance)
