"""Features of clips by a function of the user's, for Frechet distances."""

from collections.abc import Callable

import torch


class Features:
    """Rows of features of the clips that are added.

    Args:
        function: from a clip, uint8 (T, H, W, 3) on the CPU, to D values (a tensor, an array or a list); with ``batch``,
            from clips of one size (B, T, H, W, 3), B at most ``batch``, to (B, D).
    """

    def __init__(self, function: Callable, batch: int = 0):
        self.function, self.batch = function, batch
        self._rows: list[torch.Tensor] = []
        self._waiting: dict[torch.Size, list[torch.Tensor]] = {}

    def add(self, clip: torch.Tensor) -> None:
        if not self.batch:
            self._call(clip, 1)
            return
        same = self._waiting.setdefault(clip.shape, [])
        same.append(clip)
        if len(same) == self.batch:
            self._call(torch.stack(self._waiting.pop(clip.shape)), self.batch)

    def values(self) -> torch.Tensor:
        """(N, D) float64 of all clips added so far, those of one size together."""
        for clips in self._waiting.values():
            self._call(torch.stack(clips), len(clips))
        self._waiting = {}
        return torch.cat(self._rows) if self._rows else torch.zeros(0, 0, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def _call(self, clips: torch.Tensor, count: int) -> None:
        found = self.function(clips)
        found = found if isinstance(found, torch.Tensor) else torch.as_tensor(found, device="cpu")
        found = found.detach().cpu().double()
        rows = found[None] if found.dim() == 1 and not self.batch else found
        width = self._rows[0].shape[1] if self._rows else None
        if rows.dim() != 2 or rows.shape[0] != count or (width is not None and rows.shape[1] != width):
            wanted = "D" if width is None else width
            raise ValueError(f"--features: expected {f'({count}, {wanted})' if self.batch else f'{wanted}'} values for "
                             f"{tuple(clips.shape)} uint8, got shape {tuple(found.shape)}; fix the function")
        self._rows.append(rows)


def sentence(got: int, real: int, width: int, distance: float) -> str:
    """The distance for people, with a warning where there are too few samples for it."""
    few = ""
    if min(got, real) < width:
        few = (f"; warning: with fewer samples than dimensions the distance depends mostly on how many there are: compare "
               f"runs of equal counts only, or give at least {width:,}")
    return f"Frechet distance {distance:.4g} ({got:,} and {real:,} samples of {width:,} dimensions){few}"
