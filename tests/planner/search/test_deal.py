"""Deals of blocks by moves: they fit, none is slower than the even one, and some fit where that does not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from planner.search.programme.partition import Dealer
from planner.search.programme.stages import StageSpace
from tests.planner import instances
from tests.planner.brute_force import all_cuts
from tests.planner.rank_samples import best_of, bounds_of, spaces
from tests.planner.small_shapes import held_fits, tightened, with_limits

ANY = float("inf")
DUST = 1e-9
PIPES = ("zbv", "dualpipev", "interleaved")


def of_classes(seed: int, layers: int = 6) -> Iterator[StageSpace]:
    """Shapes of a random model of several layer classes, two stages a rank on two ranks."""
    problem = instances.random_problem(seed, layers=layers, mixed=True)
    problem = dataclasses.replace(problem, workload=dataclasses.replace(problem.workload, seq=4096))
    fix = (f"schedule={PIPES[seed % len(PIPES)]}", "pp=2", "chunks=2")
    for space in itertools.islice(spaces(problem, fix), 3):
        if not space.one_class:
            yield space


def even_of(space: StageSpace) -> tuple[int, ...]:
    """Blocks of each stage of the even split."""
    return tuple(b - a for a, b in itertools.pairwise(space.even))


def near_cuts(space: StageSpace) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every cut whose boundaries lie near the even ones."""
    for cut in all_cuts(space.layers, space.degrees.stages):
        if all(end in near for (_, end), near in zip(cut, space.near[1:], strict=True)):
            yield cut


def test_cuts_of_several_classes_are_bounded_and_moves_come_near_the_best_of_all() -> None:
    compared, nearest, moved = 0, 0, 0
    for seed, share in itertools.product(range(16), (0.2, 3.0)):
        for each in of_classes(seed, layers=5):
            space = with_limits(each, [max(tightened(each, share).limits_bytes)] * each.degrees.pp)
            best_s = min(best_of(space, cut) for cut in near_cuts(space))
            bound_s = max(bounds_of(space).relaxation.near(ANY, rounds).bound_s for rounds in (0, 3))
            found = Dealer(space).best(even_of(space), ANY)
            if found is None:
                continue
            columns, step_s = found
            assert held_fits(space, columns)
            assert bound_s <= min(best_s, step_s) * (1 + DUST), (seed, share)
            even = Dealer(space).columns(even_of(space))
            even_s = ANY if even is None else space.replay(even).step_time_s
            assert step_s <= even_s * (1 + DUST), (seed, share)
            compared, nearest = compared + 1, nearest + (step_s < 1.02 * best_s)
            moved += tuple(column.layers for column in columns) != even_of(space)
    assert compared > 20 and nearest > 0.8 * compared and moved >= 4, (compared, nearest, moved)


def needs_of(space: StageSpace) -> list[float]:
    """What each rank needs at least for the even split."""
    dealer, deal = Dealer(space), even_of(space)
    return [limit + dealer.over_bytes(rank, deal) for rank, limit in enumerate(space.limits_bytes)]


def test_a_deal_is_found_where_the_even_one_does_not_fit() -> None:
    """The fuller rank needs more than there is, the other less."""
    found = 0
    for space in (space for seed in range(24) for space in of_classes(seed, layers=8)):
        needs, deal = needs_of(space), even_of(space)
        if max(needs) < min(needs) * (1 + DUST):
            continue
        short = with_limits(space, [0.1 * min(needs) + 0.9 * max(needs)] * 2)
        assert Dealer(short).columns(deal) is None
        other = Dealer(short).best(deal, 0.0)
        if other is None:
            continue
        found += 1
        columns, _ = other
        held = [sum(columns[s].layers for s in stages) for stages in short.stages_of]
        fullest = needs.index(max(needs))
        assert held_fits(short, columns) and sum(held) == short.layers
        assert held[fullest] < sum(deal[s] for s in short.stages_of[fullest])
    assert found >= 4


def test_nothing_is_dealt_where_no_rank_has_room() -> None:
    for space in (space for seed in range(9) for space in of_classes(seed)):
        short = with_limits(space, [min(needs_of(space)) * (1 - DUST)] * 2)
        assert Dealer(short).best(even_of(space), 0.0) is None
