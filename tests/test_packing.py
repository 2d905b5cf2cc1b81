"""The packer: every item once, no pack above the budget, no starvation, full packs, exact resume.

`assert_lawful` is the check; a packer that drops, one that overfills and one that repeats must fail it.
"""

import json
import math
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_fast.data import packing
from sora_fast.data.packing import Packer, pack_stream

BUDGET = 32_768


def drive(packer, sizes, first=0):
    """Packs of the positions first, first + 1, ... as an endless loader makes them, then the rest."""
    packs = []
    for key, tokens in enumerate(sizes[first:], first):
        packer.add(key, tokens)
        if packer.ready:
            packs.append(packer.next())
    return packs + list(packer.flush())


def assert_lawful(packs, sizes, budget):
    """Every position of `sizes` is in exactly one pack, and no pack is empty or above the budget."""
    assert sorted(key for pack in packs for key in pack) == list(range(len(sizes)))
    assert all(0 < sum(sizes[key] for key in pack) <= budget for pack in packs)


# ------------------------------------------------------------------------------------------------- invariants

CASES = st.integers(1, 60).flatmap(
    lambda budget: st.tuples(
        st.just(budget), st.lists(st.integers(1, budget), max_size=80), st.integers(1, 20)
    )
)


@settings(max_examples=200, deadline=None)
@given(CASES)
def test_every_item_once_and_no_pack_above_the_budget(case):
    budget, sizes, look_ahead = case
    packer = Packer(budget, look_ahead)
    packs = drive(packer, sizes)
    assert_lawful(packs, sizes, budget)
    assert packer.packs == len(packs) and packer.packed_tokens == sum(sizes) and len(packer) == 0
    assert packer.fill == (sum(sizes) / (len(packs) * budget) if packs else 0.0)


@settings(max_examples=200, deadline=None)
@given(CASES)
def test_no_item_starves(case):
    """Each pack begins with the oldest item: an item leaves within as many packs as items stood ahead."""
    budget, sizes, look_ahead = case
    packer, waiting, bound, made = Packer(budget, look_ahead), [], {}, 0
    for key, tokens in enumerate(sizes + [None] * len(sizes)):
        if tokens is not None:
            bound[key] = made + len(waiting) + 1
            packer.add(key, tokens)
            waiting.append(key)
        if packer.ready or (tokens is None and waiting):
            pack = packer.next()
            made += 1
            assert pack[0] == waiting[0]
            assert all(made <= bound[each] for each in pack)
            waiting = [each for each in waiting if each not in pack]
    assert not waiting


def test_an_awkward_item_is_not_passed_over_for_ever():
    """A size that never fits beside the others still leaves, though better fitting items keep coming."""
    packer = Packer(100, look_ahead=10)
    packer.add("awkward", 51)
    for number in range(1, 200):
        packer.add(number, 50)
        if packer.ready and "awkward" in packer.next():
            break
    assert number <= 10


@pytest.mark.parametrize("fault", ["drops", "overfills", "repeats"])
def test_a_wrong_packer_is_caught(fault):
    class Wrong(Packer):
        def next(self):
            pack = super().next()
            if fault == "overfills" and len(self):
                pack = pack + super().next()
            return {"drops": pack[:-1] or pack, "overfills": pack, "repeats": pack + pack[:1]}[fault]

    sizes = [random.Random(0).randint(1, 100) for _ in range(50)]
    assert_lawful(drive(Packer(100, 8), sizes), sizes, 100)
    with pytest.raises(AssertionError):
        assert_lawful(drive(Wrong(100, 8), sizes), sizes, 100)


# ----------------------------------------------------------------------------------------------------- errors


def test_an_item_above_the_budget_names_itself_its_tokens_the_budget_and_a_remedy():
    packer = Packer(1000)
    with pytest.raises(
        ValueError, match=r"'clips/long.mp4' has 1,001 tokens, the budget is 1,000.*max_tokens=1000"
    ):
        packer.add("clips/long.mp4", 1001)
    packer.add("clips/exact.mp4", 1000)
    assert packer.next() == ["clips/exact.mp4"]


def test_what_is_not_an_item_is_refused():
    with pytest.raises(ValueError, match="budget must be a whole number"):
        Packer(0)
    with pytest.raises(ValueError, match="look_ahead must be"):
        Packer(10, 2.5)
    packer = Packer(10)
    for tokens in (0, -3, 2.0, "4"):
        with pytest.raises(ValueError, match="tokens of item 'a'"):
            packer.add("a", tokens)
    with pytest.raises(TypeError, match="survives JSON"):
        packer.add(("a", 1), 4)
    with pytest.raises(IndexError, match="no item waits"):
        packer.next()
    assert len(packer) == 0 and not packer.ready and packer.fill == 0.0


# ----------------------------------------------------------------------------------------------------- resume


def test_resuming_mid_stream_loses_and_repeats_nothing_and_makes_the_same_packs():
    random_numbers = random.Random(5)
    sizes = [random_numbers.randint(1, 1000) for _ in range(600)]
    through = drive(Packer(1000, 50), sizes)
    for stop in (1, 49, 50, 51, 333, 600):
        before, packs = Packer(1000, 50), []
        for key in range(stop):
            before.add(key, sizes[key])
            if before.ready:
                packs.append(before.next())
        saved = json.loads(json.dumps(before.state_dict()))
        after = Packer(1000, 50)
        after.add("replaced by the state", 7)
        after.load_state_dict(saved)
        packs += drive(after, sizes, first=stop)
        assert packs == through
        assert_lawful(packs, sizes, 1000)
        assert after.packed_tokens == sum(sizes) and after.packs == len(through)


def test_a_state_taken_during_the_flush_is_exact():
    sizes = [3, 9, 4, 4, 8, 1, 2, 7, 7]
    through = drive(Packer(10, 100), sizes)
    packer = Packer(10, 100)
    for key, tokens in enumerate(sizes):
        packer.add(key, tokens)
    packs = [next(packer.flush())]
    again = Packer(10, 100)
    again.load_state_dict(json.loads(json.dumps(packer.state_dict())))
    assert packs + list(again.flush()) == through


def test_a_state_may_move_to_another_budget_but_not_below_an_item():
    packer = Packer(100)
    for key, tokens in enumerate((90, 60, 40)):
        packer.add(key, tokens)
    assert packer.next() == [0]
    wider, narrower = Packer(200), Packer(50)
    wider.load_state_dict(packer.state_dict())
    assert wider.next() == [1, 2] and wider.fill == 190 / 300
    narrower.add("kept", 5)
    with pytest.raises(ValueError, match="item 1 has 60 tokens, the budget is 50"):
        narrower.load_state_dict(packer.state_dict())
    assert narrower.next() == ["kept"]  # nothing changed
    for broken in ({}, {"waiting": [1], "packs": 0, "packed_tokens": 0, "capacity": 0}, None):
        with pytest.raises(ValueError, match="expected what Packer.state_dict"):
            narrower.load_state_dict(broken)


# ------------------------------------------------------------------------------------------------------- fill


def drawn(distribution, log, seed, count=10_000):
    """Token counts of images of 256 to 1024 pixels a side and clips of 1 to 10 s, 256 to 720 lines, 8 fps.

    16 pixels a token side, 4 frames a token after the first; clips above the budget are shortened to it.
    log: sides, lines and seconds are log-uniform instead of uniform.
    """
    source = random.Random(seed)

    def draw(low, high):
        return math.exp(source.uniform(math.log(low), math.log(high))) if log else source.uniform(low, high)

    sizes = []
    for _ in range(count):
        if distribution == "near the budget" and source.random() < 0.2:
            sizes.append(source.randint(9 * BUDGET // 10, BUDGET))
        elif source.random() < {"images": 1.0, "clips": 0.0}.get(distribution, 0.5):
            sizes.append((int(draw(256, 1024)) // 16) * (int(draw(256, 1024)) // 16))
        else:
            lines, aspect = draw(256, 720), source.choice([16 / 9, 4 / 3, 1.0, 2.35])
            frame_tokens = int(lines // 16) * int(lines * aspect // 16)
            sizes.append(frame_tokens * min(1 + int(draw(1, 10) * 8) // 4, BUDGET // frame_tokens))
    return sizes


@pytest.mark.parametrize("log", [False, True], ids=["uniform", "log-uniform"])
@pytest.mark.parametrize("distribution", ["mixed", "images", "clips", "near the budget"])
def test_ten_thousand_items_fill_95_percent_within_five_seconds(distribution, log):
    for seed in (0, 1, 2):
        sizes = drawn(distribution, log, seed)
        packer = Packer(BUDGET, look_ahead=1000)
        begun = time.process_time()
        packs = drive(packer, sizes)
        assert time.process_time() - begun < 5
        assert_lawful(packs, sizes, BUDGET)
        assert packer.fill == sum(sizes) / (len(packs) * BUDGET) >= 0.95, (seed, packer.fill)


def test_sizes_without_small_filler_still_pack_well():
    """Items of 0.15 to 0.4 budgets: largest-first alone reaches 94.7 %."""
    source = random.Random(0)
    packer = Packer(BUDGET)
    drive(packer, [source.randint(int(0.15 * BUDGET), int(0.4 * BUDGET)) for _ in range(10_000)])
    assert packer.fill >= 0.98


# ----------------------------------------------------------------------------------------------------- stream


def test_pack_stream_gives_the_items_and_reads_only_the_look_ahead():
    read = []

    def source():
        for number in range(100):
            read.append(number)
            yield {"name": number, "tokens": 1 + number % 9}

    packs = pack_stream(source(), lambda item: item["tokens"], 20, look_ahead=10)
    first = next(packs)
    assert len(read) == 10 and first[0]["name"] == 0
    everything = [item["name"] for pack in [first, *packs] for item in pack]
    assert sorted(everything) == list(range(100))
    assert list(pack_stream([], len, 20)) == []
    with pytest.raises(ValueError, match="item 1 has 30 tokens"):
        list(pack_stream(["a" * 3, "b" * 30], len, 20))


def test_the_packer_needs_the_standard_library_only():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('packing', {packing.__file__!r})\n"
        "module = sys.modules['packing'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "foreign = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(name for name in foreign - {'packing'} if not name.startswith('_')))\n"
    )
    isolated = [sys.executable, "-I", "-S", "-c", code]  # -S: no site-packages at all
    assert subprocess.run(isolated, capture_output=True, text=True, check=True).stdout.strip() == "[]"
