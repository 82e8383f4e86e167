"""Schedules: every pass once, in order; known in-flight counts and bubbles; text round trips."""

from __future__ import annotations

import itertools

import networkx
import pytest

from planner.cost.schedule import (
    Action,
    ActionKind,
    build_table,
    parse_action,
    parse_table,
    peak_in_flight,
    print_table,
    table_faults,
)
from planner.cost.simulate import Sharing, replay
from planner.cost.stage import Pass, StageCost
from planner.errors import InputError
from planner.strategy import Schedule

SHAPES = [
    (schedule, pp, chunks, micro_batches)
    for schedule, pp, chunks, micro_batches in itertools.product(
        Schedule, (1, 2, 3, 4, 8), (1, 2, 3), (1, 2, 4, 6, 8, 16)
    )
    if (chunks > 1) == (schedule is Schedule.INTERLEAVED)
    and (schedule is not Schedule.INTERLEAVED or (pp > 1 and micro_batches % pp == 0))
]


def cost(forward_s: float, backward_s: float, fixed_s: float = 0.0) -> StageCost:
    """A stage that only takes time."""
    return StageCost(
        forward=Pass(compute_s=forward_s, tp_s=fixed_s),
        backward=Pass(compute_s=backward_s, tp_s=fixed_s),
        unshard_s=0.0,
        reduce_s=0.0,
        optimizer_s=0.0,
        params=0.0,
        largest_unit_params=0.0,
        saved_bytes=0.0,
        forward_transient_bytes=0.0,
        backward_transient_bytes=0.0,
    )


@pytest.mark.parametrize(("schedule", "pp", "chunks", "micro_batches"), SHAPES)
def test_every_pass_once_and_in_order(schedule: Schedule, pp: int, chunks: int, micro_batches: int) -> None:
    """Each (stage, micro-batch) has one forward, then one backward; the table prints and parses back."""
    table = build_table(schedule, pp, chunks, micro_batches)
    assert table_faults(table, pp * chunks, micro_batches) == []
    assert parse_table(print_table(table)) == table


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 4), (4, 8), (8, 3)])
def test_in_flight_counts(pp: int, micro_batches: int) -> None:
    """1F1B keeps min(m, p - i) micro-batches on stage i; GPipe keeps all."""
    one = build_table(Schedule.ONE_F_ONE_B, pp, 1, micro_batches)
    assert [peak_in_flight(row)[i] for i, row in enumerate(one)] == [
        min(micro_batches, pp - i) for i in range(pp)
    ]
    gpipe = build_table(Schedule.GPIPE, pp, 1, micro_batches)
    assert [peak_in_flight(row)[i] for i, row in enumerate(gpipe)] == [micro_batches] * pp


@pytest.mark.parametrize(("schedule", "pp", "chunks", "micro_batches"), SHAPES)
def test_even_stages_give_the_closed_form(
    schedule: Schedule, pp: int, chunks: int, micro_batches: int
) -> None:
    """Even stages take m + p - 1 slots (GPipe, 1F1B), or m v + p - 1 slots of a chunk (interleaved)."""
    table = build_table(schedule, pp, chunks, micro_batches)
    step_s = replay(table, [cost(1.0, 2.0)] * (pp * chunks), 0.0, None, 1).step_time_s
    assert step_s == pytest.approx(3.0 * (micro_batches * chunks + pp - 1))


@pytest.mark.parametrize("seed", range(20))
def test_replay_is_the_longest_path(seed: int) -> None:
    """The replay equals the longest path of the graph of actions, built and solved by networkx."""
    import random

    draw = random.Random(seed)
    schedule = draw.choice(list(Schedule))
    pp = draw.randint(2, 5)
    chunks = draw.randint(2, 3) if schedule is Schedule.INTERLEAVED else 1
    micro_batches = pp * draw.randint(1, 3)
    costs = [cost(draw.uniform(0.1, 2), draw.uniform(0.1, 4)) for _ in range(pp * chunks)]
    hop_s = draw.choice([0.0, 0.3])
    table = build_table(schedule, pp, chunks, micro_batches)
    graph = networkx.DiGraph()

    def seconds(action: Action) -> float:
        stage = costs[action.stage]
        return (stage.forward if action.kind is ActionKind.FORWARD else stage.backward).total_s

    for row in table:
        for action in row:
            graph.add_edge(("start", action), ("end", action), weight=seconds(action))
        for before, after in itertools.pairwise(row):
            graph.add_edge(("end", before), ("start", after), weight=0.0)
    for stage in range(pp * chunks - 1):
        for mb in range(micro_batches):
            down = [Action(s, ActionKind.FORWARD, mb) for s in (stage, stage + 1)]
            up = [Action(s, ActionKind.BACKWARD, mb) for s in (stage + 1, stage)]
            for sender, receiver in (down, up):
                graph.add_edge(("end", sender), ("start", receiver), weight=hop_s)
    longest = networkx.dag_longest_path_length(graph)
    assert replay(table, costs, hop_s, None, 1).step_time_s == pytest.approx(longest)


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


def test_a_table_that_waits_for_itself_is_refused() -> None:
    """A backward before its forward on the next stage never becomes ready."""
    table = (
        (Action(0, ActionKind.FORWARD, 0), Action(0, ActionKind.BACKWARD, 0)),
        (Action(1, ActionKind.BACKWARD, 0), Action(1, ActionKind.FORWARD, 0)),
    )
    assert table_faults(table, 2, 1)
    broken = ((Action(0, ActionKind.BACKWARD, 0), Action(0, ActionKind.FORWARD, 0)), table[1][::-1])
    with pytest.raises(ValueError, match="waits for itself"):
        replay(broken, [cost(1, 1)] * 2, 0.0, None, 1)


@pytest.mark.parametrize("text", ["", "F0", "1X2", "1F", "-1F0", "1F0 ", "9999999F0"])
def test_wrong_actions_are_refused(text: str) -> None:
    """Anything but stage, kind, micro-batch is refused with an example."""
    with pytest.raises(InputError, match="2F0"):
        parse_action(text)
