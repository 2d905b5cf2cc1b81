"""Host tensors on a device, without a wait for what runs there; and what is kept there, in no CUDA graph's memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from .precision import has_data


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``tensor`` on ``device``, as ``tensor.to(device)`` gives it; a copy from the host to a GPU does not wait for the GPU.

    ``Tensor.to`` waits for the current stream after such a copy, and a copy of more than a few KB that is not from pinned
    memory waits for it too. This one is pinned by PyTorch's allocator, which keeps it until the copy is done. Copies towards
    the host wait as ever: they would be read before they are there.
    """
    device = torch.device(device)
    if device.type != "cuda" or not tensor.is_cpu:
        return tensor.to(device)
    return (tensor.pin_memory() if has_data(tensor) else tensor).to(device, non_blocking=True)


def outside_pools(make: Callable[[], object]) -> object:
    """``make()``, from a thread of its own, so that what it allocates is in no CUDA graph's pool: for what is kept.

    Before torch.compile captures a graph ("reduce-overhead") it runs it once with the allocations of the current thread in
    the graph's pool (in older versions those of the current stream, and a new thread is on the default one), and later
    takes all memory there for its own.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
