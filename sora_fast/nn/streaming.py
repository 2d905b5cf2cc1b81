"""What a streaming model remembers between chunks, kept outside the modules."""

from collections.abc import Iterator

import torch
from torch import nn


class StreamState:
    """The past of every streaming module of one stream, keyed by the module itself, never by call order.

    Modules hold no state: one model can run several streams at once, be compiled, and be checkpointed.

    >>> state = StreamState()
    >>> for chunk in clip.split(4, dim=2):
    ...     y = conv(chunk, state)
    """

    def __init__(self):
        self._slots: dict[nn.Module, object] = {}

    def get(self, module: nn.Module, default: object = None) -> object:
        return self._slots.get(module, default)

    def set(self, module: nn.Module, value: object) -> None:
        self._slots[module] = value

    def tensors(self) -> Iterator[torch.Tensor]:
        for value in self._slots.values():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, torch.Tensor):
                    yield part

    @property
    def nbytes(self) -> int:
        """Bytes held; constant once every cache is full."""
        return sum(t.numel() * t.element_size() for t in self.tensors())
