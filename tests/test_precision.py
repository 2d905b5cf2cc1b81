"""PyTorch's switches for TF32, old and new: they can always be read, and are put back."""

import pytest
import torch

from sora_fast import precision
from sora_fast.environment import environment
from sora_fast.ops import convolution

OLD = {"cudnn": lambda: torch.backends.cudnn.allow_tf32, "cublas": lambda: torch.backends.cuda.matmul.allow_tf32,
       "products": torch.get_float32_matmul_precision}


def _set(where: str, value):
    module, _, name = where.rpartition(".")
    setattr(torch.backends if module == "" else eval(f"torch.backends.{module}"), name, value)


# How a user has set them, and whether products and convolutions of float32 are then of TF32.
SETTINGS = {
    "PyTorch's own": (lambda: None, False, True),
    "old, on": (lambda: _set("cuda.matmul.allow_tf32", True), True, True),
    "old, off": (lambda: _set("cudnn.allow_tf32", False), False, False),
    "old, medium": (lambda: torch.set_float32_matmul_precision("medium"), True, True),
    "new, products": (lambda: _set("cuda.matmul.fp32_precision", "tf32"), True, True),
    "new, convolutions": (lambda: _set("cudnn.conv.fp32_precision", "ieee"), False, False),
    "both": (lambda: (_set("cudnn.allow_tf32", False), _set("cudnn.conv.fp32_precision", "tf32")), False, True)}


def set_as_pytorch_does():
    """As in a new process: a benchmark in this one may have left float32 to be kept."""
    torch.set_float32_matmul_precision("highest")
    for switch in precision._switches():
        switch.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


def state():
    new = [switch.fp32_precision for switch in precision._switches()]
    return new, {name: precision._readable(read) for name, read in OLD.items()}


@pytest.mark.parametrize("choose, products, convolutions", SETTINGS.values(), ids=SETTINGS)
def test_switches_are_read_and_put_back(choose, products, convolutions):
    with precision.switches_restored():
        set_as_pytorch_does()
        choose()
        before, old = state()
        assert (precision.tf32_products(), precision.tf32_convolutions()) == (products, convolutions)
        assert environment(torch.device("cpu"))["tf32"] is (products or convolutions)
        assert convolution._cudnn()[1] is convolutions
        with precision.float32_kept():
            assert state() == (["ieee"] * len(before), dict(cudnn=False, cublas=False, products="highest"))
        after, old_after = state()
        assert after == before and all(old_after[name] == value for name, value in old.items() if value is not None)


def test_a_cudnn_that_pytorch_refuses_is_none(monkeypatch):
    def version():
        raise RuntimeError("cuDNN version incompatibility")

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    assert environment(torch.device("cpu"))["cudnn"] is None and convolution._cudnn()[0] == 0
