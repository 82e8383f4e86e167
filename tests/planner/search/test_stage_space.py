"""What stages of a shape may hold: splits, narrowed limits, floors of ranks, sizes, replays of deals."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from planner.search.layout_search import ShapeSearch, even_bound_s, even_floor_s
from planner.search.programme.partition import splits
from planner.search.programme.stages import Sizes, StageSpace, narrowed
from tests.planner import instances
from tests.planner.brute_force import all_cuts
from tests.planner.rank_samples import best_of, bounds_of, fits, own_s, spaces, used_bytes, ways_of


def random_limits(draw: random.Random, parts: int) -> list[tuple[int, int]]:
    lows = [draw.randint(0, 2) for _ in range(parts)]
    return [(low, low + draw.randint(0, 3)) for low in lows]


@pytest.mark.parametrize("seed", range(30))
def test_narrowed_limits_leave_out_what_is_in_no_split_and_no_more(seed: int) -> None:
    draw = random.Random(seed)
    limits, total = random_limits(draw, draw.randint(1, 4)), draw.randint(1, 12)
    ways = [way for way in itertools.product(*(range(a, b + 1) for a, b in limits)) if sum(way) == total]
    found = narrowed(limits, total)
    assert (found is None) == (not ways)
    if found is not None:
        assert found == tuple((min(sizes), max(sizes)) for sizes in zip(*ways, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_splits_are_all_ways_within_the_limits_of_stages_and_ranks(seed: int) -> None:
    draw = random.Random(seed)
    pp, chunks = draw.randint(1, 3), draw.randint(1, 2)
    rank_of = [stage % pp for stage in range(pp * chunks)]
    stages, ranks = random_limits(draw, pp * chunks), random_limits(draw, pp)
    ranks = [(low, high + draw.randint(0, 6)) for low, high in ranks]
    total = draw.randint(pp, 12)
    ways = [
        way
        for way in itertools.product(*(range(a, b + 1) for a, b in stages))
        if sum(way) == total
        and all(
            ranks[r][0] <= sum(n for n, own in zip(way, rank_of, strict=True) if own == r) <= ranks[r][1]
            for r in range(pp)
        )
    ]
    sizes = Sizes(tuple(stages), tuple(ranks))
    found = splits(sizes, total, rank_of, 10_000)
    assert found is not None and sorted(found) == sorted(ways) and len(set(found)) == len(found)
    assert len(ways) < 2 or splits(sizes, total, rank_of, len(ways) - 1) is None


@pytest.mark.parametrize("fix", ["schedule=zbv", "schedule=interleaved", "schedule=dualpipev"])
def test_the_floor_of_a_rank_lies_below_all_its_mixes(fix: str) -> None:
    """With memory between what its thriftiest and its fastest mix need; and it knows what memory forces."""
    draw, compared, forced, exact = random.Random(fix), 0, 0, 0
    in_parts = near = 0
    for seed in range(50):
        drawn = instances.random_problem(seed, layers=6)
        workload = dataclasses.replace(drawn.workload, batch=4, seq=2048)
        problem = dataclasses.replace(drawn, workload=workload, memory_limit_bytes=1 << 45)
        if problem.model.layers < 5 or problem.cluster.devices % 2:
            continue
        for roomy in itertools.islice(spaces(problem, (fix, "pp=2", "chunks=2")), 2):
            for rank, blocks in itertools.product(range(2), (2, 3, 4)):
                ways = ways_of(roomy, rank, blocks)
                if not ways:
                    continue
                used = [used_bytes(roomy, rank, held) for held in ways]
                limit = min(used) + draw.random() * (max(used) - min(used))
                space = StageSpace(roomy.model, roomy.shape, [limit] * 2, roomy.books)
                best = min(own_s(space, rank, held) for held in ways if fits(space, rank, held))
                floors = space.floors[rank].least_by_first_s(rank, blocks, range(1, blocks))
                floor = min(floors.values()) + space.held_s[rank]
                assert floor <= best * (1 + 1e-9), (seed, rank, blocks)
                least = (
                    min(bounds_of(space).ranks.ways(rank, blocks).values()) / space.degrees.num_micro_batches
                )
                assert floor <= least * (1 + 1e-9)
                assert least == pytest.approx(best), (seed, rank, blocks)
                parts_s = bounds_of(space).ranks.parts.least_s(blocks)[rank, blocks] + space.held_s[rank]
                assert parts_s <= best * (1 + 1e-9), (seed, rank, blocks)
                assert bounds_of(space).ranks.parts_s(blocks)[rank, blocks] <= parts_s
                asked = bounds_of(StageSpace(roomy.model, roomy.shape, [limit] * 2, roomy.books)).ranks
                assert asked.done(rank, blocks, best * (1 + 1e-6)), (seed, rank, blocks)
                assert not asked.done(rank, blocks, best * (1 - 1e-6)), (seed, rank, blocks)
                free_s = blocks * min(space.floors[rank].block_s.values()) + space.held_s[rank]
                compared += 1
                forced += free_s * (1 + 1e-9) < floor
                in_parts += free_s * (1 + 1e-9) < parts_s
                near += parts_s > 0.9 * best
                exact += floor > best * (1 - 1e-9)
    assert compared > 40 and forced > compared / 4 and exact > compared / 8, (compared, forced, exact)
    assert in_parts > compared / 4 and near > compared / 4, (compared, in_parts, near)


def test_sizes_never_leave_out_the_best_split() -> None:
    """Of every shape: the fastest of its mixes lies within the sizes that may beat a little more than it."""
    compared = cut = 0
    for seed in range(30):
        problem = instances.random_problem(seed, layers=5)
        for space in itertools.islice(spaces(problem), 8):
            best_s, best = float("inf"), ()
            for spans in all_cuts(space.layers, space.degrees.stages):
                found = best_of(space, spans)
                if found < best_s:
                    best_s, best = found, tuple(b - a for a, b in spans)
            if not best:
                continue
            sizes = bounds_of(space).sizes(best_s * (1 + 1e-6))
            assert sizes is not None, (seed, space.degrees.label())
            assert all(low <= n <= high for n, (low, high) in zip(best, sizes.stages, strict=True))
            held = [sum(best[s] for s in stages) for stages in space.stages_of]
            assert all(low <= n <= high for n, (low, high) in zip(held, sizes.ranks, strict=True))
            compared += 1
            free = bounds_of(space).sizes(float("inf"))
            cut += free is not None and free != sizes
    assert compared > 30 and cut > 10, (compared, cut)


def test_a_dealers_step_times_are_those_of_the_replay() -> None:
    """And its deals fit: what it hands out is SAFE by its own estimate."""
    compared = 0
    for seed in range(40):
        problem = instances.random_problem(seed, layers=6)
        for space in itertools.islice(spaces(problem), 8):
            search = ShapeSearch(space)
            if not search.dealable:
                continue
            ways = [tuple(b - a for a, b in cut) for cut in all_cuts(space.layers, space.degrees.stages)]
            deals = [columns for way in ways[:6] if (columns := search.dealer.columns(way)) is not None]
            if not deals:
                continue
            for step_s, columns in zip(search.dealer.steps_s(deals), deals, strict=True):
                assert step_s == pytest.approx(space.replay(columns).step_time_s, rel=1e-12)
                found = search._found(columns, step_s)
                estimate = space.model.evaluate(found.strategy).estimate
                assert estimate.step_time_s == pytest.approx(step_s, rel=1e-12)
                compared += 1
    assert compared > 100


def test_the_bound_of_an_even_split_lies_below_its_recipes() -> None:
    """Of models of several layer classes, with two and three stages a rank: below what the search deals."""
    compared, near, few = 0, 0, list[float]()
    fixes = ("schedule=interleaved", "schedule=zbv", "schedule=dualpipev")
    for seed, fix in itertools.product(range(40), fixes):
        drawn = instances.random_problem(seed, layers=6, mixed=True)
        chunks = "chunks=3" if seed % 2 and fix == "schedule=interleaved" else "chunks=2"
        problem = dataclasses.replace(drawn, workload=dataclasses.replace(drawn.workload, batch=4))
        for space in itertools.islice(spaces(problem, (fix, "pp=2", chunks)), 3):
            found = ShapeSearch(space).greedy()
            bound_s = even_bound_s(space)
            if found is not None:
                assert bound_s <= found.step_time_s * (1 + 1e-9), (seed, space.degrees.label())
                floor_s, few_s = even_floor_s(space), even_floor_s(space, 0.0)
                assert few_s <= floor_s * (1 + 1e-9) <= found.step_time_s * (1 + 2e-9), space.degrees.label()
                few.append(few_s / floor_s)
                assert even_bound_s(space, bound_s / 2) <= bound_s * (1 + 1e-9)
                compared += 1
                near += bound_s > 0.8 * found.step_time_s
    assert compared > 20 and near > compared / 4, (compared, near)
    assert sum(few) > 0.8 * len(few)
