"""The online packer: variable-length items in, packs of one token budget out.

First-fit-decreasing over a sliding window of `look_ahead` waiting items. A pack starts with the item that has
waited longest, then takes the largest waiting item that still fits, until nothing fits; where at most two
more can fit and the greedy choice would leave a gap worth mentioning, it takes the pair that fills the room
best. Two properties follow:

- No item starves: every pack removes the oldest item, so one that arrives behind `n` others leaves within `n
  + 1` packs, whatever arrives after it.
- Packs are full: with 1,000 items to choose from, images and clips half and half fill more than 99 % of a
  32,768 token budget, clips alone more than 96 % (tests/test_packing.py holds the distributions and the bar
  of 95 %). Where no choice can fill a pack, for example when every item is 0.34 to 0.6 of the budget, the
  mean size is the limit.

The state is plain JSON: a run that saves it between two packs and loads it later makes the same packs as one
that never stopped. Source: example packing as in NaViT (Dehghani et al. 2023, arXiv:2307.06304), with
look-ahead.
"""

from __future__ import annotations

import operator
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def _at_least_one(what: str, value: Any) -> int:
    """`value` as an int (numpy's and torch's whole numbers are taken too), ValueError unless it is >= 1."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, got {value!r}")
    return number


class Packer:
    """Collects `(key, tokens)` items and hands them out in packs of at most `budget` tokens.

    Args:
        budget: tokens a pack may hold.
        look_ahead: items that wait before `ready` turns true; more gives fuller packs and a longer queue.

    Keys are `str` or `int` (they travel through JSON) and may repeat, for example once per epoch.

    Raises:
        ValueError: an item above the budget or without tokens. TypeError: a key of another type.
    """

    def __init__(self, budget: int, look_ahead: int = 1000):
        self.budget = _at_least_one("Packer: budget", budget)
        self.look_ahead = _at_least_one("Packer: look_ahead", look_ahead)
        self.packs = 0  # packs handed out so far
        self.packed_tokens = 0  # tokens in them
        self._capacity = 0  # sum of their budgets: a resumed run may have another budget
        self._serial = 0
        self._waiting: dict[int, tuple[str | int, int]] = {}  # serial -> (key, tokens), oldest first
        # (tokens, -serial), ascending: of several items of one size the last is the oldest.
        self._by_size: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    @property
    def ready(self) -> bool:
        """Whether `look_ahead` items wait, so that `next()` has its full choice."""
        return len(self._waiting) >= self.look_ahead

    @property
    def fill(self) -> float:
        """Tokens packed / (packs * budget), every pack counted; 0.0 before the first pack."""
        return self.packed_tokens / self._capacity if self._capacity else 0.0

    def add(self, key: str | int, tokens: int) -> None:
        """Let an item of `tokens` tokens wait for a pack."""
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise TypeError(f"Packer.add: key must be a str or an int so that it survives JSON, got {key!r}")
        tokens = _at_least_one(f"Packer.add: the tokens of item {key!r}", tokens)
        if tokens > self.budget:
            raise ValueError(
                f"Packer.add: item {key!r} has {tokens:,} tokens, the budget is {self.budget:,} a pack; "
                f"shorten or shrink it (FitPolicy(max_tokens={self.budget}) does) or raise the budget"
            )
        self._waiting[self._serial] = (key, tokens)
        insort(self._by_size, (tokens, -self._serial))
        self._serial += 1

    def next(self) -> list[str | int]:
        """One pack of waiting items: their keys, the oldest first. IndexError when nothing waits.

        It may be called before `ready`; the pack then has fewer items to choose from.
        """
        if not self._waiting:
            raise IndexError("Packer.next: no item waits; add() some first, or stop when len(packer) is 0")
        oldest = next(iter(self._waiting))
        places = [bisect_right(self._by_size, (self._waiting[oldest][1], -oldest)) - 1]
        keys, room = [], self.budget
        while places:
            for place in places:
                tokens, negative_serial = self._by_size.pop(place)
                keys.append(self._waiting.pop(-negative_serial)[0])
                room -= tokens
            places = self._choose(room)
        self.packs += 1
        self.packed_tokens += self.budget - room
        self._capacity += self.budget
        return keys

    def _choose(self, room: int) -> list[int]:
        """Places in `_by_size`, in descending order, of what goes into `room` next; empty when nothing
        fits."""
        sizes = self._by_size
        large = bisect_right(sizes, (room, 0)) - 1
        if large < 1 or sum(tokens for tokens, _ in sizes[:3]) <= room:
            return (
                [large] if large >= 0 else []
            )  # one candidate, or three and more may fit: the largest goes in
        left = room - sizes[large][0]
        partner = min(bisect_right(sizes, (left, 0)), large) - 1
        left -= sizes[partner][0] if partner >= 0 else 0
        # The best pair spends small items, which later packs need as filler. So it is looked for only where
        # greedy leaves more than 1/128 of the budget: that lifts sizes of 0.15 to 0.4 budgets from 94.7 to
        # 98.9 % full and costs mixed sizes nothing, while always taking it cost sizes of 0.25 to 0.75 budgets
        # 4 points.
        if left * 128 <= self.budget:
            return [large]
        best = [large]
        low, high = 0, large
        while low < high:
            rest = room - sizes[low][0] - sizes[high][0]
            if rest < 0:
                high -= 1
            else:
                if rest < left:
                    best, left = [high, low], rest
                low += 1
        return best

    def flush(self) -> Iterator[list[str | int]]:
        """Packs until nothing waits, for the end of the data; each is taken when it is asked for."""
        while self._waiting:
            yield self.next()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next packs depend on, as JSON: the waiting items in order of arrival, and the
        counts."""
        return {
            "waiting": [list(item) for item in self._waiting.values()],
            "packs": self.packs,
            "packed_tokens": self.packed_tokens,
            "capacity": self._capacity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, replacing what waits here. `budget` and `look_ahead` stay this packer's
        own.

        ValueError, with nothing changed, when the state is not a packer's or an item is above this budget.
        """
        fresh = Packer(self.budget, self.look_ahead)
        try:
            waiting = [(key, tokens) for key, tokens in state["waiting"]]
            counts = [int(state[name]) for name in ("packs", "packed_tokens", "capacity")]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "Packer.load_state_dict: expected what Packer.state_dict() returned, with waiting, packs, "
                f"packed_tokens and capacity, got {type(state).__name__} ({error!r}); load the packer's entry"
            ) from None
        for key, tokens in waiting:
            fresh.add(key, tokens)
        fresh.packs, fresh.packed_tokens, fresh._capacity = counts
        self.__dict__.update(fresh.__dict__)


def pack_stream(
    items: Iterable[Any], tokens: Callable[[Any], int], budget: int, look_ahead: int = 1000
) -> Iterator[list[Any]]:
    """Packs of the items themselves, in one pass: reads `look_ahead` items ahead, ends with the last item.

    Every item comes out once. For training that resumes, drive a `Packer` and save its state.

    Args:
        items: of any type.
        tokens: a function that gives an item's tokens.
        budget: tokens a pack may hold.
        look_ahead: items read ahead.

    Raises:
        ValueError: an item above the budget, named by its position in the stream.
    """
    packer = Packer(budget, look_ahead)
    held: dict[int, Any] = {}
    for place, item in enumerate(items):
        packer.add(place, tokens(item))
        held[place] = item
        if packer.ready:
            yield [held.pop(key) for key in packer.next()]
    for pack in packer.flush():
        yield [held.pop(key) for key in pack]
