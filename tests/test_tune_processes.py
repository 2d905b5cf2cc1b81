"""Two tuners at once lose nothing."""

import pytest
from test_tune import in_a_process, kept, plant, room  # noqa: F401, a fixture, room

from sora_fast.benchmarks import rows

pytestmark = pytest.mark.full


def test_two_processes_at_once_lose_nothing(room):  # noqa: F811
    plant(room / "kernels", [(2.0,)])
    both = [in_a_process(room, first, 5, others=2) for first in (0, 3)]
    assert [each.wait(timeout=120) for each in both] == [0, 0]
    assert set(kept(room, "many")) == {f"{first}, {place}" for first in (0, 3) for place in range(100)}
    keys = {f"{kernel}: width={8 + place}" for kernel in ("forward", "backward") for place in range(8)}
    assert set(kept(room)) == keys and {row["key"] for row in rows.read(room / "tune.jsonl")} == keys
    assert all(entry["config"] == dict(ms=2.0, fault="") for entry in kept(room).values())
