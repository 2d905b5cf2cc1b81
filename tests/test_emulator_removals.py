"""The committed table of removed synchronisation (emulator_removals.md): whole, and true of drawn rows."""

import re

import emulator_removals as removals
import pytest

pytestmark = [pytest.mark.full, pytest.mark.ci]
pytest.importorskip("triton")

TABLE = removals.TABLE.read_text() if removals.TABLE.exists() else ""
FORWARD = "attention forward, E = 128"
DRAWN = ("wgmma.wait_group #1", "mbarrier.try_wait #1", "fence.proxy.async #0", "wgmma.fence #0", "bar.sync #4")


def rows(name):
    part = TABLE.partition(f"## {name}\n")[2].partition("\n## ")[0]
    return {label: text for label, text in re.findall(r"\| ([\w.]+ #\d+) \| [^|]* \| (.*) \|", part)}


@pytest.mark.parametrize("name", removals.TARGETS)
def test_every_place_is_caught_covered_or_argued(name):
    found = rows(name)
    assert found and not [label for label, text in found.items() if not text or "NO ARGUMENT" in text]


def test_drawn_rows():
    """Every place of the kernel as it is compiled now has a row, and drawn ones are caught as it says."""
    seen = {}

    def judge(name, subject):
        every = removals.places(subject.ptx)
        seen["labels"] = {place.label for place in every}
        drawn = [place for place in every if place.label in DRAWN]
        return [(place, subject.verdict(removals.without(subject.ptx, [place]))) for place in drawn]

    found = {place.label: text for place, text in removals.study(FORWARD, judge)}
    expected = rows(FORWARD)
    assert seen["labels"] == set(expected)
    assert set(found) == set(DRAWN) and all(found.values())
    assert {label: text.split("; ")[0] for label, text in found.items()} == {
        label: expected[label].split("; ")[0] for label in DRAWN
    }
