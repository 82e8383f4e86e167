"""A critical path is as long as its replay, and no longer than any other replay of the same table."""

from __future__ import annotations

import random

import numpy as np
import pytest

from planner.cost.replay import CriticalPath, critical_path, kind_passes, replay
from planner.cost.stage.stage import StageCost
from planner.strategy.schedule.longest_path import action_order, many_row_ends_s
from planner.strategy.schedule.schedules import build_table
from planner.strategy.schedule.table import KINDS, Table
from planner.strategy.strategy import Schedule
from tests.planner.instances import cost

DUST = 1 + 1e-9


def random_table(schedule: Schedule, draw: random.Random) -> Table:
    pp = draw.randint(2, 5) if draw.random() < 0.9 else 13  # 13: rows enough to be worked out in waves
    chunks = draw.randint(2, 3) if schedule is Schedule.INTERLEAVED else schedule.least_chunks
    rounds = draw.randint(2 if schedule is Schedule.DUALPIPEV else 1, 3)
    return build_table(schedule, pp, chunks, pp * rounds if chunks > 1 else draw.randint(1, 9))


def random_costs(table: Table, draw: random.Random) -> tuple[StageCost, ...]:
    """Uneven stages, that also gather and reduce."""
    import dataclasses

    return tuple(
        dataclasses.replace(
            cost(draw.uniform(0.1, 2), draw.uniform(0.1, 4), draw.uniform(0, 0.3)),
            unshard_s=draw.uniform(0, 2),
            reduce_s=draw.uniform(0, 2),
        )
        for _ in range(table.stages)
    )


def kind_s(costs: tuple[StageCost, ...]) -> np.ndarray:
    """Seconds of each stage's actions: [stage, kind]."""
    return np.asarray([[kind_passes(each)[kind].total_s for kind in KINDS] for each in costs])


def rank_sums(table: Table, costs: tuple[StageCost, ...], name: str) -> list[float]:
    return [sum(getattr(costs[s], name) for s in table.stages_of(rank)) for rank in range(len(table))]


def length_s(path: CriticalPath, table: Table, costs: tuple[StageCost, ...], hop_s: float) -> float:
    passes_s = float((path.counts * kind_s(costs)).sum())
    begin_s = rank_sums(table, costs, "unshard_s")[path.first_rank]
    return begin_s + passes_s + path.hops * hop_s + rank_sums(table, costs, "reduce_s")[path.last_rank]


def end_s(table: Table, costs: tuple[StageCost, ...], hop_s: float) -> float:
    """When the last rank has reduced its gradients."""
    done = replay(table, costs, hop_s, None, 1)
    return max(done.times.end_s(rank) + done.reduce_s[rank] for rank in range(len(table)))


@pytest.mark.parametrize("schedule", list(Schedule))
def test_its_length_is_the_replay_and_a_lower_bound_of_others(schedule: Schedule) -> None:
    draw = random.Random(f"paths {schedule}")
    tight = 0
    for _ in range(25):
        table, hop_s = random_table(schedule, draw), draw.choice([0.0, 0.2, 2.0])
        costs = random_costs(table, draw)
        path = critical_path(replay(table, costs, hop_s, None, 1), hop_s)
        own_s = end_s(table, costs, hop_s)
        assert length_s(path, table, costs, hop_s) == pytest.approx(own_s, rel=1e-9)
        for _ in range(8):
            other, other_hop_s = random_costs(table, draw), draw.choice([0.0, 0.2, 2.0])
            bound_s, other_s = length_s(path, table, other, other_hop_s), end_s(table, other, other_hop_s)
            assert bound_s <= other_s * DUST
            tight += bound_s > 0.8 * other_s
    assert tight > 20, "paths that bound nothing would pass too"


@pytest.mark.parametrize("schedule", list(Schedule))
def test_many_replays_at_once_equal_each(schedule: Schedule) -> None:
    draw = random.Random(f"many {schedule}")
    for _ in range(10):
        table, hop_s = random_table(schedule, draw), draw.choice([0.0, 0.2])
        each = [random_costs(table, draw) for _ in range(7)]
        cells = np.stack([kind_s(costs).ravel() for costs in each], axis=1)
        begins = np.asarray([rank_sums(table, costs, "unshard_s") for costs in each]).T
        found = many_row_ends_s(action_order(table), cells, begins, hop_s)
        for number, costs in enumerate(each):
            done = replay(table, costs, hop_s, None, 1)
            wanted = [done.times.end_s(rank) for rank in range(len(table))]
            assert found[:, number].tolist() == pytest.approx(wanted, rel=1e-12)
