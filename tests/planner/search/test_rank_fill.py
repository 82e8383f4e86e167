"""Whether ranks can hold all blocks in time: against every combination of their ways."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from planner.search.bounds.rank_bounds import Way, can_hold


def holds(layers: int, ranks: list[list[Way]], within_s: float) -> bool:
    """By trying all."""
    for chosen in itertools.product(*ranks):
        entered = list(itertools.accumulate((way.enter_s for way in chosen), initial=0.0))
        if sum(way.blocks for way in chosen) == layers and all(
            before + way.own_s <= within_s for before, way in zip(entered, chosen, strict=False)
        ):
            return True
    return False


@pytest.mark.parametrize("seed", range(60))
def test_it_is_what_trying_all_ways_finds(seed: int) -> None:
    draw = random.Random(seed)
    ranks = [
        [
            Way(blocks, blocks * draw.uniform(0.8, 1.2), draw.uniform(0, 0.5))
            for blocks in sorted(draw.choices(range(1, 6), k=draw.randint(1, 4)))
        ]
        for _ in range(draw.randint(1, 4))
    ]
    layers = draw.randint(1, 14)
    most = [max(way.blocks for way in ways) for ways in ranks]
    for within_s in (1.0, 2.5, 3.5, 5.0, 8.0):
        assert can_hold(layers, most, ranks, within_s) == holds(layers, ranks, within_s)


def test_a_later_rank_is_entered_after_those_before_it() -> None:
    """Two ranks of two blocks each: the second begins when the first's forward is done."""
    ranks = [[Way(2, 2.0, 0.7)], [Way(2, 2.0, 0.7)]]
    assert can_hold(4, [2, 2], ranks, 2.7) and not can_hold(4, [2, 2], ranks, 2.69)
    assert not can_hold(3, [2, 2], ranks, 9.0)


def test_ranks_behind_one_that_cannot_be_done_in_time_are_not_asked() -> None:
    asked = []

    def ways() -> Iterator[list[Way]]:
        for rank in range(3):
            asked.append(rank)
            yield [Way(2, 2.0 + rank, 0.0)]

    assert not can_hold(6, [2, 2, 2], ways(), 2.5)
    assert asked == [0, 1]
