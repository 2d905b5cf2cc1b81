"""Uploads of host grids: copied once, asynchronously, from pinned memory."""

import functools
from dataclasses import dataclass
from functools import partial

import torch

from .. import checks
from ..to_device import outside_pools, to_device


@dataclass(frozen=True)
class _Uploaded:
    """``grids`` (S, 3) and ``cu_seqlens`` (S + 1,), int32 on a device; ``event``: recorded after the copy (CUDA)."""

    grids: torch.Tensor
    cu_seqlens: torch.Tensor
    stream: object
    event: object


# Uploads that CUDA graphs read, kept for ever since graphs may live that long: 16 bytes per sample.
_captured: dict[int, _Uploaded] = {}


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a backward may save it later
def _upload(grids: tuple, device: torch.device) -> _Uploaded:
    """Copied once, from pinned memory, so that the host does not wait."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("grids: expected grids that were used once before a CUDA graph is captured, got new ones; "
                           "make the call once before the capture, or pass a Pack")
    lengths = torch.tensor(grids, dtype=torch.int64, device="cpu").reshape(-1, 3).prod(1)
    ends = [0, *lengths.cumsum(0).tolist()]
    if ends[-1] > 2**31 - 1:
        raise checks.error("grids", "at most 2,147,483,647 tokens in the samples of a call on backend 'triton'",
                           f"{ends[-1]:,}", "make several calls")
    table = torch.tensor([*(n for grid in grids for n in grid), *ends], dtype=torch.int32, device="cpu")
    stream = event = None
    if device.type == "cuda":
        table, stream, event = outside_pools(partial(_copied, table, device))
    return _Uploaded(table[: 3 * len(grids)].view(-1, 3), table[3 * len(grids) :], stream, event)


def _copied(table: torch.Tensor, device: torch.device) -> tuple:
    """``table`` on ``device``, the stream that copies it, and the event of its arrival."""
    with torch.cuda.device(device):
        table = to_device(table, device)
        stream = torch.cuda.current_stream()
        return table, stream, stream.record_event()


def uploaded_grids(grids: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Host triples on ``device``, from a cache; never waits for the device."""
    if device.type != "cuda":
        found = _upload(grids, device)
        return found.grids, found.cu_seqlens
    with torch.cuda.device(device):
        found = _upload(grids, device)
        stream = torch.cuda.current_stream()
        if torch.cuda.is_current_stream_capturing():
            _captured[id(found)] = found  # the upload has completed: a capture starts with a synchronisation
        elif stream != found.stream:
            stream.wait_event(found.event)
            found.grids.record_stream(stream)  # both are views of one allocation
    return found.grids, found.cu_seqlens
