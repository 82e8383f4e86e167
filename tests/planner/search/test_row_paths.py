"""Paths along rows: no path exceeds the replay, some equal it, and they count what their row does."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from planner.cost.replay import kind_passes, replay
from planner.search.bounds.makespan_cuts import RowPaths, row_paths
from planner.strategy.schedule.longest_path import action_order
from planner.strategy.schedule.schedules import build_table
from planner.strategy.schedule.table import KINDS, PAIRED, Action, ActionKind, Table
from planner.strategy.strategy import Degrees, Schedule
from tests.planner.instances import cost

BACKS = (ActionKind.BACKWARD, ActionKind.INPUT_GRAD)


def drawn_degrees(draw: random.Random, schedule: Schedule) -> Degrees:
    """A small pipeline."""
    pp = draw.randint(2, 4)
    chunks = draw.randint(2, 3) if schedule is Schedule.INTERLEAVED else schedule.least_chunks
    rounds = draw.randint(2 if schedule is Schedule.DUALPIPEV else 1, 3)
    micro_batches = pp * rounds if chunks > 1 else draw.randint(1, 9)
    return Degrees(pp=pp, chunks=chunks, schedule=schedule, num_micro_batches=micro_batches)


def table_of(degrees: Degrees) -> Table:
    return build_table(degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches)


def lengths_s(degrees: Degrees, each_s: np.ndarray, hop_s: float) -> np.ndarray:  # type: ignore[type-arg]
    """The length of every path, stages' actions taking each_s [stage, kind]."""
    found = row_paths(degrees)
    return found.seconds(each_s[:, :, None]).sum(axis=(1, 2)) + found.hops * hop_s


@pytest.mark.parametrize("schedule", list(Schedule))
def test_no_path_along_a_row_exceeds_the_replay(schedule: Schedule) -> None:
    """Of uneven stages, with messages; and often one is nearly as long."""
    draw, near = random.Random(1), 0
    for _ in range(120):
        degrees = drawn_degrees(draw, schedule)
        costs = [cost(draw.uniform(0.1, 2), draw.uniform(0.1, 4)) for _ in range(degrees.stages)]
        each_s = np.array([[kind_passes(own)[kind].total_s for kind in KINDS] for own in costs])
        hop_s = draw.choice([0.0, 0.2])
        step_s = replay(table_of(degrees), costs, hop_s, None, 1).step_time_s
        longest_s = lengths_s(degrees, each_s, hop_s).max()
        assert longest_s <= step_s * (1 + 1e-12), degrees
        near += longest_s > 0.85 * step_s
    assert near > 30, near


@pytest.mark.parametrize("schedule", list(Schedule))
def test_no_path_exceeds_the_replay_where_kinds_have_any_times(schedule: Schedule) -> None:
    """A pass back and its parts, and a forward that is paired, need not have to do with each other."""
    draw = random.Random(2)
    for _ in range(120):
        degrees = drawn_degrees(draw, schedule)
        each_s = np.array([[draw.uniform(0.1, 3) for _ in KINDS] for _ in range(degrees.stages)])
        hop_s = draw.choice([0.0, 0.2])
        order = action_order(table_of(degrees))
        _, ends_s = order.durations(each_s.ravel().tolist()).ends_s([0.0] * degrees.pp, hop_s)
        assert lengths_s(degrees, each_s, hop_s).max() <= max(ends_s) * (1 + 1e-12), degrees
        found = row_paths(degrees)  # a path's last rank is where its row ends
        each = found.seconds(each_s[:, :, None]).sum(axis=(1, 2)) + found.hops * hop_s
        assert (each <= np.asarray(ends_s)[found.last] * (1 + 1e-12)).all(), degrees


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_of_even_interleaved_stages_one_path_is_the_longest(chunks: int) -> None:
    draw = random.Random(3)
    for _ in range(60):
        pp = draw.randint(2, 5)
        degrees = Degrees(
            pp=pp, chunks=chunks, schedule=Schedule.INTERLEAVED, num_micro_batches=pp * draw.randint(1, 4)
        )
        even = cost(draw.uniform(0.1, 2), draw.uniform(0.1, 4))
        each_s = np.array([[kind_passes(even)[kind].total_s for kind in KINDS]] * degrees.stages)
        step_s = replay(table_of(degrees), [even] * degrees.stages, 0.0, None, 1).step_time_s
        assert lengths_s(degrees, each_s, 0.0).max() == pytest.approx(step_s, rel=1e-12), degrees


class Counted(NamedTuple):
    """One path, counted action by action."""

    own: dict[tuple[int, int], int]
    whole: tuple[bool, ...]
    last: int
    hops: int


def counted(degrees: Degrees, rank: int, entered: int, left: int | None) -> Counted | None:
    """The path that enters a row at the first forward of one stage and leaves it behind the last pass back
    of another (None: goes on to its end); None where that lies before."""
    table = table_of(degrees)
    row: tuple[Action, ...] = table[rank]
    ranks = [degrees.pp_rank_of_stage(s) for s in range(degrees.stages)]
    forth = [sum(a != b for a, b in pairwise(ranks[: n + 1])) for n in range(len(ranks))]
    begin = next(n for n, a in enumerate(row) if a.stage == entered and a.kind is ActionKind.FORWARD)
    ends = [n for n, a in enumerate(row) if left in (None, a.stage) and (left is None or a.kind in BACKS)]
    if ends[-1] < begin:
        return None
    own: dict[tuple[int, int], int] = {}
    for action in row[begin : ends[-1] + 1]:
        kind = PAIRED if action.paired else KINDS.index(action.kind)
        own[action.stage, kind] = own.get((action.stage, kind), 0) + 1
    micro_batch = row[ends[-1]].micro_batch
    backs = {(a.stage, a.micro_batch): a.kind for one in table for a in one if a.kind in BACKS}
    whole = tuple(backs[s, micro_batch] is ActionKind.BACKWARD for s in range(degrees.stages))
    hops = forth[entered] + (0 if left is None else forth[left])
    return Counted(own, whole, rank if left is None else 0, hops)


def as_counted(paths: RowPaths, number: int, left: int | None) -> Counted:
    """A path of the arrays; what it does not leave it needs no pass back for."""
    own = {
        (int(stage), kind): int(n)
        for stage, kinds in zip(paths.stages[number], paths.own[number], strict=True)
        for kind, n in enumerate(kinds)
        if n
    }
    assert int(paths.left[number]) == (left or 0)
    return Counted(
        own, tuple(map(bool, paths.whole[number])), int(paths.last[number]), int(paths.hops[number])
    )


@pytest.mark.parametrize("schedule", list(Schedule))
def test_paths_count_what_is_done_between_where_they_enter_and_leave(schedule: Schedule) -> None:
    """All pairs of a row's stages, and no others."""
    draw = random.Random(4)
    for _ in range(12):
        degrees = drawn_degrees(draw, schedule)
        paths, number = row_paths(degrees), 0
        for rank in range(degrees.pp):
            stages = [s for s in range(degrees.stages) if degrees.pp_rank_of_stage(s) == rank]
            for entered in stages:
                for left in (*stages, None):
                    expected = counted(degrees, rank, entered, left)
                    if expected is None:
                        continue
                    found = as_counted(paths, number, left)
                    assert (int(paths.ranks[number]), int(paths.entered[number])) == (rank, entered)
                    assert found == expected, (degrees, rank, entered, left)
                    number += 1
        assert number == len(paths.ranks)
