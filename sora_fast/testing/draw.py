"""Random tensors, reproducible: for the cases of the tests and of the benchmarks."""

import torch


class Draw:
    """Normal numbers, the same for the same seed: ``draw(3, 4)``, ``draw(3, dtype=torch.float32, scale=0.1)``.

    Args:
        device: of the tensors; on "emulated:sm90" they are CPU tensors, for a GPU's cases.
        dtype: of the tensors. They are drawn in a wider one first, so that every dtype gets the same numbers, rounded.
        alike: drawn in float64 on the host: the same on every device. Else in float32 on the device, where large ones are
            made in no time.
    """

    def __init__(self, device: torch.device | str, seed: int, dtype: torch.dtype, *, alike: bool = False):
        emulated = str(device).startswith("emulated:")
        self.device, self.dtype, self.wide = "cpu" if emulated else device, dtype, torch.float64 if alike else torch.float32
        hollow = torch.device(self.device).type == "meta"  # no numbers: shapes are all there is to see, a GPU's
        self.on_gpu = emulated or hollow or torch.device(device).type == "cuda"
        self.generator = None if hollow else torch.Generator("cpu" if alike else self.device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, mean: int = 0) -> torch.Tensor:
        if self.generator is None:
            return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        numbers = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=self.wide)
        numbers = (numbers * scale if scale != 1.0 else numbers).to(self.device, dtype or self.dtype)
        return mean + numbers if mean else numbers
