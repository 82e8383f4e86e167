"""Which pipeline ranks one rehearsal stands for, and how few micro-batches tell as much."""

from __future__ import annotations

import itertools

import pytest

from planner.strategy.equivalent_ranks import LEAST_MICRO_BATCHES, alike_ranks, shortened
from planner.strategy.schedule.schedules import parse_table
from planner.strategy.strategy import Degrees, RecomputeCounts, Schedule, Stage, even_stages
from tests.plans import make_plan, tiny_llama

CASES = [
    (schedule, pp, chunks, micro_batches)
    for schedule in Schedule
    for pp, chunks, micro_batches in itertools.product((2, 4), (1, 2, 3), (1, 2, 4, 12, 48))
    if chunks >= schedule.least_chunks
    and (chunks == 1 or schedule is Schedule.INTERLEAVED or chunks == schedule.least_chunks)
    and (schedule is not Schedule.INTERLEAVED or micro_batches % pp == 0)
    and (schedule is not Schedule.DUALPIPEV or micro_batches >= 2 * pp)
]


def plan_of(schedule: Schedule, pp: int, chunks: int, micro_batches: int):  # type: ignore[no-untyped-def]
    degrees = Degrees(pp=pp, chunks=chunks, schedule=schedule, num_micro_batches=micro_batches)
    return make_plan(tiny_llama(layers=2 * degrees.stages), degrees)


@pytest.mark.parametrize(("schedule", "pp", "chunks", "micro_batches"), CASES)
def test_a_shortened_plan_has_as_many_in_flight(
    schedule: Schedule, pp: int, chunks: int, micro_batches: int
) -> None:
    plan = plan_of(schedule, pp, chunks, micro_batches)
    short = shortened(plan)
    full, table = parse_table(plan.schedule_table), parse_table(short.schedule_table)
    assert [table.in_flight(r, 2) for r in range(pp)] == [full.in_flight(r, 2) for r in range(pp)]
    assert [_late(table, rank) for rank in range(pp)] == [_late(full, rank) for rank in range(pp)]
    count = short.strategy.degrees.num_micro_batches
    assert min(LEAST_MICRO_BATCHES, micro_batches) <= count <= micro_batches
    assert short.workload.batch == short.strategy.degrees.batch
    if schedule is not Schedule.GPIPE and micro_batches == 48:
        assert count < micro_batches
    if schedule is Schedule.GPIPE:
        assert count == micro_batches


def _late(table, rank: int) -> int:  # type: ignore[no-untyped-def]
    """The most micro-batches alive on a rank after its first backward pass."""
    alive, counts = 0, []
    for action in table[rank]:
        alive += action.kind.alive_change
        counts.append(alive)
    first = next(i for i, action in enumerate(table[rank]) if action.kind.alive_change < 0)
    return max(counts[first:])


def test_another_order_than_the_schedules_is_not_shortened() -> None:
    import dataclasses

    plan = plan_of(Schedule.ONE_F_ONE_B, 2, 1, 8)
    other = plan_of(Schedule.GPIPE, 2, 1, 8)
    assert shortened(dataclasses.replace(plan, schedule_table=other.schedule_table)).workload.batch == 8


def test_ranks_are_alike_that_differ_in_nothing_but_their_place() -> None:
    plan = plan_of(Schedule.GPIPE, 4, 1, 4)
    assert alike_ranks(plan) == [(0,), (1, 2), (3,)]
    assert alike_ranks(plan_of(Schedule.ONE_F_ONE_B, 4, 1, 8)) == [(0,), (1,), (2,), (3,)]


def test_ranks_that_differ_in_layers_or_recomputation_are_apart() -> None:
    degrees = Degrees(pp=4, schedule=Schedule.GPIPE, num_micro_batches=4)
    sizes = (0, 2, 5, 7, 8)
    stages = tuple(
        Stage(first=a, end=b, recompute=RecomputeCounts(none=b - a)) for a, b in itertools.pairwise(sizes)
    )
    assert alike_ranks(make_plan(tiny_llama(layers=8), degrees, stages)) == [(0,), (1,), (2,), (3,)]
    even = list(even_stages(8, 4))
    even[1] = Stage(first=2, end=4, recompute=RecomputeCounts(none=1, full=1))
    assert alike_ranks(make_plan(tiny_llama(layers=8), degrees, tuple(even))) == [(0,), (1,), (2,), (3,)]
