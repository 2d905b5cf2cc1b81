"""Host tensors on a device, without a wait for what runs there."""

import torch

from .precision import holds_numbers


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``tensor`` on ``device``, as ``tensor.to(device)`` gives it; a copy from the host to a GPU does not wait for the GPU.

    ``Tensor.to`` waits for the current stream after such a copy, and a copy of more than a few KB that is not from pinned
    memory waits for it too. This one is pinned by PyTorch's allocator, which keeps it until the copy is done. Copies towards
    the host wait as ever: they would be read before they are there.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if holds_numbers(tensor) else tensor).to(device, non_blocking=True)
