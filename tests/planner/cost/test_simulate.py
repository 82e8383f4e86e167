"""Replay: closed forms of all schedules, the longest path by networkx, shared cores."""

from __future__ import annotations

import dataclasses
import itertools
import random

import networkx
import pytest

from planner.cost.layer import Pass
from planner.cost.replay import SPLIT_RECOMPUTES, Sharing, kind_passes, replay, split_backward
from planner.cost.stage.stage import StageCost
from planner.search.bounds.layout_bounds import even_factor
from planner.strategy.schedule import longest_path
from planner.strategy.schedule.schedules import Action, ActionKind, Table, build_table, table_faults
from planner.strategy.strategy import Degrees, Schedule
from tests.planner.instances import cost
from tests.planner.strategy.test_schedule import SHAPES

F, B, INPUT, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.INPUT_GRAD, ActionKind.WEIGHT_GRAD


@pytest.mark.parametrize(("schedule", "pp", "chunks", "micro_batches"), SHAPES)
def test_even_stages_give_the_closed_form(
    schedule: Schedule, pp: int, chunks: int, micro_batches: int
) -> None:
    """Their passes are a forward and a backward of twice that, halves of it where it is split."""
    table = build_table(schedule, pp, chunks, micro_batches)
    step_s = replay(table, [cost(1.0, 2.0)] * (pp * chunks), 0.0, None, 1).step_time_s
    degrees = Degrees(pp=pp, chunks=chunks, schedule=schedule, num_micro_batches=micro_batches)
    assert step_s == pytest.approx(even_factor(degrees) * 3 * pp * chunks)


@pytest.mark.parametrize(("f", "b"), [(1.0, 2.0), (1.0, 1.0), (2.0, 3.0), (1.0, 4.0)])
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 2), (4, 4), (4, 9), (8, 16)])
def test_zb_h1_of_any_passes(pp: int, micro_batches: int, f: float, b: float) -> None:
    """Its bubble is (p - 1)(F + I - W) for any lengths of the passes, once there are p micro-batches."""
    stage = cost(f, b)
    inputs, weights = split_backward(stage)
    table = build_table(Schedule.ZB_H1, pp, 1, micro_batches)
    step_s = replay(table, [stage] * pp, 0.0, None, 1).step_time_s
    expected_s = (pp - 1) * (f + inputs.total_s - weights.total_s)
    assert step_s == pytest.approx(micro_batches * (f + b) + expected_s)


def random_table(draw: random.Random, ranks: int, stages: int, micro_batches: int) -> Table:
    """A table that can run: stages on random ranks, backwards split at random, in a random legal order."""
    home = [*range(ranks), *(draw.randrange(ranks) for _ in range(stages - ranks))]
    draw.shuffle(home)
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    waiting = [Action(0, F, mb) for mb in range(micro_batches)]
    while waiting:
        action = waiting.pop(draw.randrange(len(waiting)))
        rows[home[action.stage]].append(action)
        stage, kind, mb = action.stage, action.kind, action.micro_batch
        if kind is F and stage < stages - 1:
            waiting.append(Action(stage + 1, F, mb))
        elif kind is F:
            waiting.append(Action(stage, draw.choice([B, INPUT]), mb))
        elif kind is not W and stage:
            waiting.append(Action(stage - 1, draw.choice([B, INPUT]), mb))
        if kind is INPUT:
            waiting.append(Action(stage, W, mb))
    return Table.of([_paired(draw, tuple(row)) for row in rows])


def _paired(draw: random.Random, row: tuple[Action, ...]) -> tuple[Action, ...]:
    """Some of the forwards that a backward of another micro-batch follows, paired with it."""
    followers = {
        index
        for index, (a, b) in enumerate(itertools.pairwise(row))
        if a.kind is F and b.kind is B and a.stage != b.stage and draw.random() < 0.3
    }
    return tuple(a._replace(paired=index in followers) for index, a in enumerate(row))


def networkx_seconds(table: Table, costs: list[StageCost], hop_s: float) -> float | None:
    """The longest path of the graph of actions; None where the graph has a circle."""
    graph = networkx.DiGraph()
    rank_of = {stage: rank for rank in range(len(table)) for stage in table.stages_of(rank)}
    sent: dict[tuple[int, bool, int], Action] = {}
    for row in table:
        for index, action in enumerate(row):
            seconds = kind_passes(costs[action.stage])[action.kind].total_s
            graph.add_edge(("start", action), ("end", action), weight=seconds)
            if action.kind is not W:
                # A pair's messages leave together, at its end.
                sent[action.stage, action.kind is F, action.micro_batch] = row[index + action.paired]
        for before, after in itertools.pairwise(row):
            graph.add_edge(("end", before), ("start", after), weight=0.0)
    for row in table:
        for action in row:
            step = {F: -1, B: 1, INPUT: 1, W: 0}[action.kind]
            sender = sent.get((action.stage + step, action.kind is F, action.micro_batch))
            if step and sender is not None:
                weight = hop_s if rank_of[sender.stage] != rank_of[action.stage] else 0.0
                graph.add_edge(("end", sender), ("start", action), weight=weight)
    if not networkx.is_directed_acyclic_graph(graph):
        return None
    return float(networkx.dag_longest_path_length(graph))


def random_costs(draw: random.Random, stages: int) -> list[StageCost]:
    return [cost(draw.uniform(0.1, 2), draw.uniform(0.1, 4), draw.choice([0.0, 0.2])) for _ in range(stages)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("schedule", list(Schedule))
def test_replay_is_the_longest_path(schedule: Schedule, seed: int) -> None:
    """The replay equals the longest path of the graph of actions, built and solved by networkx."""
    draw = random.Random(seed)
    pp = draw.choice([2, 3, 4, 5, 13])
    chunks = draw.randint(2, 3) if schedule is Schedule.INTERLEAVED else schedule.least_chunks
    micro_batches = pp * draw.randint(2, 3)
    costs, hop_s = random_costs(draw, pp * chunks), draw.choice([0.0, 0.3])
    table = build_table(schedule, pp, chunks, micro_batches)
    step_s = replay(table, costs, hop_s, None, 1).step_time_s
    assert step_s == pytest.approx(networkx_seconds(table, costs, hop_s), rel=1e-12)


@pytest.mark.parametrize("wide", [1, 100])
@pytest.mark.parametrize("seed", range(60))
def test_replay_of_custom_tables_is_the_longest_path(
    seed: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So do random tables, ordered by waves or by a loop; those that wait for themselves are refused."""
    monkeypatch.setattr(longest_path, "WIDE", wide)
    monkeypatch.setattr(longest_path, "WIDE_WAVE", 0)
    draw = random.Random(seed)
    ranks = draw.choice([1, 2, 3, 5, 14])
    stages, micro_batches = ranks + draw.randint(0, 4), draw.randint(1, 6)
    table = random_table(draw, ranks, stages, micro_batches)
    assert table_faults(table, stages, micro_batches) == []
    costs, hop_s = random_costs(draw, stages), draw.choice([0.0, 0.3])
    expected_s = networkx_seconds(table, costs, hop_s)
    if expected_s is None:
        with pytest.raises(ValueError, match="waits for itself"):
            replay(table, costs, hop_s, None, 1)
        return
    found = replay(table, costs, hop_s, None, 1)
    assert found.step_time_s == pytest.approx(expected_s, rel=1e-12)
    # On shared cores with a core for every rank, event by event, it is the same.
    alone = replay(table, costs, hop_s, Sharing([], ranks), 1)
    assert alone.step_time_s == pytest.approx(expected_s, rel=1e-9)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_both_orders_of_a_table_give_the_same_times(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows run as far as they go or waves of all, times place by place or by waves: the same, bit for bit."""
    pp, chunks = 6, schedule.least_chunks
    costs = random_costs(random.Random(7), pp * chunks)
    ends = []
    for wide, wide_wave in ((1, 0), (1, 100), (100, 0)):
        monkeypatch.setattr(longest_path, "WIDE", wide)
        monkeypatch.setattr(longest_path, "WIDE_WAVE", wide_wave)
        found = replay(build_table(schedule, pp, chunks, 24), costs, 0.1, None, 1)
        ends.append([found.times.spans(rank) for rank in range(pp)])
    assert ends[0] == ends[1] == ends[2]


def test_the_two_halves_of_a_backward_add_up() -> None:
    """I + W = B without recomputation; W has no messages; recomputation is charged for every walk."""
    plain = dataclasses.replace(
        cost(1.0, 2.0, 0.2), backward=Pass(compute_s=2.0, host_s=0.2, tp_s=0.2, dp_s=0.3)
    )
    inputs, weights = split_backward(plain)
    assert inputs + weights == plain.backward
    assert weights.fixed_s == 0.0 and weights.compute_s == 1.0
    again = dataclasses.replace(plain, backward=plain.backward + Pass(recompute_s=0.5))
    inputs, weights = split_backward(again)
    assert inputs.recompute_s + weights.recompute_s == pytest.approx(0.5 * SPLIT_RECOMPUTES)


def test_shared_cores_conserve_work() -> None:
    """On shared cores the step takes at least the work over the cores, at most the work one by one."""
    table = build_table(Schedule.ONE_F_ONE_B, 4, 1, 4)
    costs = [cost(1.0, 2.0)] * 4
    work_s = 4 * 4 * 3.0
    alone = replay(table, costs, 0.0, None, 1).step_time_s
    shared = replay(table, costs, 0.0, Sharing([], 2), 1).step_time_s
    assert max(alone, work_s / 2) <= shared * (1 + 1e-12)
    assert shared <= work_s
    plenty = replay(table, costs, 0.0, Sharing([], 4), 1).step_time_s
    assert plenty == pytest.approx(alone)


def test_shared_cores_slow_work_not_messages() -> None:
    """Two ranks on one core take twice the work and once the messages."""
    table = build_table(Schedule.ONE_F_ONE_B, 1, 1, 3)
    step_s = replay(table, [cost(1.0, 2.0, 0.5)], 0.0, Sharing([], 1), 2).step_time_s
    assert step_s == pytest.approx(3 * (2 * 3.0 + 2 * 0.5))


def test_slowdown_is_interpolated_and_extended() -> None:
    """Measured points hold exactly; between them it is linear, beyond them proportional."""
    sharing = Sharing([(1, 1.0), (2, 1.1), (4, 2.3)], 2)
    assert [sharing.slowdown(n) for n in (1, 2, 4)] == [1.0, 1.1, 2.3]
    assert sharing.slowdown(3) == pytest.approx(1.7)
    assert sharing.slowdown(8) == pytest.approx(4.6)
    assert sharing.best_throughput(4) == pytest.approx(2 / 1.1)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_shared_cores_slow_every_schedule(schedule: Schedule) -> None:
    """Work of all ranks on one core takes at least the sum of the work."""
    pp, chunks = 3, schedule.least_chunks
    table = build_table(schedule, pp, chunks, 6)
    costs = [cost(1.0, 2.0)] * (pp * chunks)
    work_s = 3.0 * 6 * pp * chunks
    assert replay(table, costs, 0.0, Sharing([], 1), 1).step_time_s == pytest.approx(work_s)
    alone = replay(table, costs, 0.1, None, 1).step_time_s
    assert replay(table, costs, 0.1, Sharing([], pp), 1).step_time_s == pytest.approx(alone)


def test_a_table_that_waits_for_itself_is_refused() -> None:
    """A backward before its forward on the next stage never becomes ready."""
    rows = ((Action(0, B, 0), Action(0, F, 0)), (Action(1, F, 0), Action(1, B, 0)))
    broken = Table.of(rows)
    assert table_faults(broken, 2, 1)
    for sharing in (None, Sharing([], 2)):
        with pytest.raises(ValueError, match="waits for itself"):
            replay(broken, [cost(1, 1)] * 2, 0.0, sharing, 1)


def test_events_are_made_of_the_same_replay() -> None:
    """Events cover every action once, in order, and end at the step time."""
    table = build_table(Schedule.DUALPIPEV, 2, 2, 5)
    found = replay(table, [cost(1.0, 2.0)] * 4, 0.1, None, 1)
    events = found.events
    assert len(events) == found.event_count == table.actions + 2
    for rank, row in enumerate(table):
        passes = [event for event in found.rank_events(rank) if event.kind in ("forward", "backward")]
        assert [event.name for event in passes] == [str(action) for action in row]
    assert max(event.start_s + event.duration_s for event in events) == pytest.approx(found.step_time_s)
