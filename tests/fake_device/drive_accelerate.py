"""diffusers' models on the fake device, accelerated: as right as the original, and no wait in our layers."""

import pytest
import torch

from sora_fast import accelerate
from sora_fast.integrations.comparison import compare, open_model

from . import waits

pytest.importorskip("diffusers", reason="the train extra is not installed")
# what asks, and what brings results to the host
ASKING = ("sora_fast/integrations/comparison.py", "sora_fast/integrations/recipes.py")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", ("AutoencoderKLWan", "WanTransformer3DModel"))
def test_an_accelerated_model(name, dtype):
    model = open_model(name)
    with waits.seen() as found:
        compared = compare(model, dtype=dtype, device="cuda")
    assert compared.passed, str(compared)
    hidden = {str(wait) for wait in found if wait.file not in ASKING}
    assert not hidden, "\n".join(hidden)


def test_a_model_that_is_on_the_device():
    """accelerate() itself, and what restore() leaves, on cuda:0."""
    model = open_model("AutoencoderKLWan").to("cuda").eval()
    report = accelerate(model)
    assert report.rows and all(p.is_cuda for p in model.parameters())
    z = torch.randn(1, model.config.z_dim, 2, 4, 4, device="cuda")
    with torch.no_grad(), waits.none():
        assert model.decode(z).sample.is_cuda
