"""The state of a streaming model between chunks, kept outside the modules."""

from collections.abc import Iterator

import torch
from torch import nn


class StreamState:
    """The caches of all streaming modules of one stream, keyed by the module itself, never by call order.

    Modules hold no state: one model can run several streams at once, be compiled, and be checkpointed.

    Raises nothing.

    >>> conv, clip, state = CausalConv3d(3, 8, 3), torch.randn(1, 3, 9, 16, 16), StreamState()
    >>> for chunk in clip.split(4, dim=2):
    ...     y = conv(chunk, state)
    """

    def __init__(self):
        self._slots: dict[nn.Module, object] = {}

    def get(self, module: nn.Module, default: object = None) -> object:
        """What ``module`` remembers, a tensor, a number or a tuple of them; ``default`` before its first chunk."""
        return self._slots.get(module, default)

    def set(self, module: nn.Module, value: object) -> None:
        """``module`` remembers ``value`` for the next chunk."""
        self._slots[module] = value

    def copy(self) -> "StreamState":
        """A stream of its own that goes on from here; ``torch.utils.checkpoint`` needs one for each of its runs.

        >>> def step(x, past):
        ...     state = past.copy()
        ...     return decoder(x, state), state
        >>> y, state = checkpoint(step, x, state, use_reentrant=False)
        """
        other = StreamState()
        own = lambda value: value.clone() if isinstance(value, torch.Tensor) else value
        for module, value in self._slots.items():
            other._slots[module] = tuple(map(own, value)) if isinstance(value, tuple) else own(value)
        return other

    def held(self) -> dict[nn.Module, object]:
        """What ``put_back`` takes, to undo what a step set; of the tensors themselves, not of what they hold."""
        return dict(self._slots)

    def put_back(self, held: dict[nn.Module, object]) -> None:
        """Remember ``held``, of a moment before, and nothing else."""
        self._slots = dict(held)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that is remembered."""
        for value in self._slots.values():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, torch.Tensor):
                    yield part

    def layout(self) -> tuple:
        """Shape and address of every tensor, and every number: the same before and after a chunk that changes contents only.

        Such a chunk can be replayed as a CUDA graph.
        """
        described = lambda part: (part.data_ptr(), part.shape, part.dtype) if isinstance(part, torch.Tensor) else part
        return tuple((id(module), *map(described, value if isinstance(value, tuple) else (value,)))
                     for module, value in self._slots.items())

    @property
    def nbytes(self) -> int:
        """Bytes held; constant once every cache is full."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def renew(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """``new``, in the memory of ``old`` if it fits and no gradient can need ``old``.

    A long stream then makes no lasting allocations. (Caches that move with every chunk fragment the heap: a CPU process
    that decodes 257 frames grew by 6 % over 17 frames.)
    """
    if (old is None or old.shape != new.shape or old.dtype != new.dtype or old.device != new.device
            or torch.is_grad_enabled() or old.requires_grad or torch.compiler.is_compiling()
            or old.is_inference() != torch.is_inference_mode_enabled()):
        return new
    return old.copy_(new)


def starts(module: nn.Module, x, state: StreamState | None) -> bool:
    """Whether x holds the first frame of the clip for ``module``."""
    if state is None:
        return True
    if x.shape[2] == 0 or state.get(module) is not None:
        return False
    state.set(module, True)
    return True
