"""Schedules: every pass once, in order; known in-flight counts; text round trips; what is refused."""

from __future__ import annotations

import itertools
import random

import pytest

from planner.foundation.errors import InputError
from planner.strategy.schedule.schedules import (
    Action,
    ActionKind,
    Row,
    Table,
    build_table,
    fullest,
    in_flight,
    parse_action,
    parse_table,
    peak_in_flight,
    print_table,
    table_faults,
)
from planner.strategy.schedule.table import Flights, InFlight, total_count
from planner.strategy.strategy import Degrees, Schedule

F, B, INPUT, W = ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.INPUT_GRAD, ActionKind.WEIGHT_GRAD

SHAPES = [
    (schedule, pp, chunks, micro_batches)
    for schedule, pp, chunks, micro_batches in itertools.product(
        Schedule, (1, 2, 3, 4, 8), (1, 2, 3), (1, 2, 4, 6, 8, 16)
    )
    if (chunks == schedule.least_chunks or (schedule is Schedule.INTERLEAVED and chunks > 1))
    and (pp > 1 or chunks == 1)
    and (schedule is not Schedule.INTERLEAVED or micro_batches % pp == 0)
    and (schedule is not Schedule.DUALPIPEV or micro_batches >= 2 * pp)
]


@pytest.mark.parametrize(("schedule", "pp", "chunks", "micro_batches"), SHAPES)
def test_every_pass_once_and_in_order(schedule: Schedule, pp: int, chunks: int, micro_batches: int) -> None:
    """Each (stage, micro-batch) has F then B, or F, I, W; on its rank; the table prints and parses back."""
    table = build_table(schedule, pp, chunks, micro_batches)
    degrees = Degrees(pp=pp, chunks=chunks, schedule=schedule)
    assert table_faults(table, pp * chunks, micro_batches, degrees.pp_rank_of_stage) == []
    assert parse_table(print_table(table)) == table
    assert table.actions == sum(len(row) for row in table)
    kinds = {action.kind for row in table for action in row}
    assert schedule.splits_backward or kinds == {F, B}


def test_a_v_holds_both_ends_on_rank_0() -> None:
    """Under V placement rank r holds stages r and 2 pp - 1 - r; dealt round it holds r and r + pp."""
    v = Degrees(pp=4, chunks=2, schedule=Schedule.ZBV)
    assert [v.pp_rank_of_stage(s) for s in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    dealt = Degrees(pp=4, chunks=2, schedule=Schedule.INTERLEAVED)
    assert [dealt.pp_rank_of_stage(s) for s in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 4), (4, 8), (8, 3)])
def test_in_flight_counts(pp: int, micro_batches: int) -> None:
    """1F1B keeps min(m, p - i) micro-batches on stage i; GPipe all; ZB-H1 min(m, p) on every stage."""
    one = build_table(Schedule.ONE_F_ONE_B, pp, 1, micro_batches)
    assert [peak_in_flight(row)[i] for i, row in enumerate(one)] == [
        min(micro_batches, pp - i) for i in range(pp)
    ]
    gpipe = build_table(Schedule.GPIPE, pp, 1, micro_batches)
    assert [peak_in_flight(row)[i] for i, row in enumerate(gpipe)] == [micro_batches] * pp
    late = build_table(Schedule.ZB_H1, pp, 1, micro_batches)
    assert [peak_in_flight(row)[i] for i, row in enumerate(late)] == [min(micro_batches, pp)] * pp


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize(("schedule", "more"), [(Schedule.ZBV, 0), (Schedule.DUALPIPEV, 1)])
def test_in_flight_counts_of_a_v(schedule: Schedule, more: int, pp: int) -> None:
    """Both keep 2 p - r and r + 1 on a rank's stages, together 2 p (zbv) or 2 p + 1 (DualPipe's PP + 1)."""
    table = build_table(schedule, pp, 2, 2 * pp + 2)
    for rank, row in enumerate(table):
        assert peak_in_flight(row) == {rank: 2 * pp - rank, 2 * pp - 1 - rank: rank + 1}
        assert max(map(total_count, table.in_flight(rank, 0))) == 2 * pp + more


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_in_flight_counts_of_interleaved(pp: int, chunks: int, rounds: int) -> None:
    """Rank r keeps min(m v, 2 (p - 1 - r) + (v - 1) p + 1) micro-batches of its stages together."""
    table = build_table(Schedule.INTERLEAVED, pp, chunks, rounds * pp)
    for rank in range(pp):
        ahead = 2 * (pp - 1 - rank) + (chunks - 1) * pp
        together = max(map(total_count, table.in_flight(rank, 0)))
        assert together == min(rounds * pp * chunks, ahead + 1)


@pytest.mark.parametrize(("schedule", "pp", "chunks", "micro_batches"), SHAPES)
def test_fullest_moments_hold_every_peak(
    schedule: Schedule, pp: int, chunks: int, micro_batches: int
) -> None:
    """The in-flight vectors have each stage's peak, and no moment of a row exceeds all of them."""
    table = build_table(schedule, pp, chunks, micro_batches)
    for rank, row in enumerate(table):
        vectors = table.in_flight(rank, 0)
        peaks = {stage: max(v[stage].alive for v in vectors) for stage in table.stages_of(rank)}
        assert peaks == peak_in_flight(row)
        alive = dict.fromkeys(peaks, 0)
        for action in row:
            alive[action.stage] += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
            assert any(all(v[stage].alive >= count for stage, count in alive.items()) for v in vectors)


@pytest.mark.parametrize(("schedule", "pp", "chunks", "micro_batches"), SHAPES)
@pytest.mark.parametrize("waits", [1, 2])
def test_fullest_moments_with_what_waits_apart(
    schedule: Schedule, pp: int, chunks: int, micro_batches: int, waits: int
) -> None:
    """Whatever a micro-batch keeps and leaves waiting, up to `waits` times as much, no moment of a row holds
    more than the fullest; nor once gradients of all stages are there."""
    table, draw = build_table(schedule, pp, chunks, micro_batches), random.Random(pp * micro_batches)
    for rank, row in enumerate(table):
        vectors, stages = table.in_flight(rank, waits), table.stages_of(rank)
        moments = _moments(row, stages)
        for _ in range(5):
            kept = {stage: draw.random() for stage in stages}
            left = {stage: draw.choice([0.0, draw.random(), 1.0]) * waits * kept[stage] for stage in stages}

            def held(each: dict[int, InFlight], kept: dict[int, float], left: dict[int, float]) -> float:
                return sum(own.alive * kept[s] + own.waiting * left[s] for s, own in each.items())

            most = [max(held(each, kept, left) for each in some) for some in (moments, vectors)]
            assert most[0] == pytest.approx(most[1])
            begun = [each for each in moments if all(own.begun for own in each.values())]
            if begun:
                later = max(held(each, kept, left) for each in _with_gradients(vectors))
                assert later == pytest.approx(max(held(each, kept, left) for each in begun))


@pytest.mark.parametrize("pp", range(1, 17))
@pytest.mark.parametrize("schedule", Schedule)
def test_what_is_in_flight_by_schedule_is_what_its_table_has(schedule: Schedule, pp: int) -> None:
    """Short tables tell of long ones: all moments of all ranks in the same order, and the fullest of them."""
    for chunks in (1, 2, 3) if schedule is Schedule.INTERLEAVED else (schedule.least_chunks,):
        for micro_batches, waits in itertools.product(_around_short_tables(schedule, pp, chunks), range(4)):
            table = build_table(schedule, pp, chunks, micro_batches)
            flights = tuple(table.in_flight(rank, waits) for rank in range(pp))
            found = in_flight(schedule, pp, chunks, micro_batches, waits)
            assert found == flights
            assert [list(map(list, row)) for row in found] == [list(map(list, row)) for row in flights]
            most = [max(_with_gradients(row), key=total_count) for row in flights]
            held = [(own.alive, own.waiting) for vector in most for own in vector.values()]
            told = fullest(schedule, pp, chunks, micro_batches, waits)
            assert sorted(zip(*told, strict=True)) == sorted(held)


def _with_gradients(flights: Flights) -> Flights:
    """The moments at which all stages have gradients; all moments of a step that has a single micro-batch."""
    return tuple(each for each in flights if all(own.begun for own in each.values())) or flights


def _around_short_tables(schedule: Schedule, pp: int, chunks: int) -> list[int]:
    """Counts of micro-batches from one on, about where tables begin to repeat, and far beyond."""
    if schedule is Schedule.INTERLEAVED:
        return [rounds * pp for rounds in (1, 2, 3, 4, 5, 7)]
    steady = pp * chunks
    counts = {1, 2, pp - 1, pp, *range(steady - 1, steady + 5), 3 * steady + 5}
    return sorted(count for count in counts if count >= (2 * pp if schedule is Schedule.DUALPIPEV else 1))


def _moments(row: Row, stages: list[int]) -> list[dict[int, InFlight]]:
    """What is in flight during each forward of a row and as each pass back begins."""
    now = {stage: InFlight(begun=False) for stage in stages}
    found = []
    for action in row:
        own = now[action.stage]
        if action.kind is ActionKind.FORWARD:
            now[action.stage] = own._replace(alive=own.alive + 1)
            found.append(dict(now))
        elif action.kind is ActionKind.WEIGHT_GRAD:
            now[action.stage] = own._replace(waiting=own.waiting - 1)
        else:
            found.append(dict(now))
            split = action.kind is ActionKind.INPUT_GRAD
            now[action.stage] = InFlight(own.alive - 1, own.waiting + split, begun=True)
    return found


def test_pairs_print_as_one_and_parse_back() -> None:
    """An overlapped forward and backward are two actions and one text, as torch writes it."""
    rows = (("0F0", "0F1", "(0F2;0B0)OVERLAP_F_B", "0B1", "0I2", "0W2"),)
    table = parse_table(rows)
    assert [str(action) for action in table[0]] == ["0F0", "0F1", "0F2", "0B0", "0B1", "0I2", "0W2"]
    assert [action.paired for action in table[0]] == [False, False, True] + [False] * 4
    assert print_table(table) == rows
    assert table != parse_table((("0F0", "0F1", "0F2", "0B0", "0B1", "0I2", "0W2"),))
    assert table_faults(table, 1, 3) == []


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([(0, F, 0), (0, W, 0), (0, INPUT, 0)], "out of order"),
        ([(0, F, 0), (0, B, 0), (0, W, 0)], "out of order"),
        ([(0, F, 0), (0, INPUT, 0)], "without forward and backward: 0/0"),
        ([(0, INPUT, 0), (0, F, 0), (0, W, 0)], "out of order"),
        ([(0, F, 0), (0, F, 0), (0, B, 0)], "repeated"),
        ([(0, F, 0, True), (0, INPUT, 0), (0, W, 0)], "paired with no backward"),
        ([(0, F, 0), (0, B, 0), (1, F, 0), (1, B, 0)], "does not hold that stage"),
    ],
)
def test_faults_of_custom_tables(row: list[tuple[int, ActionKind, int]], fault: str) -> None:
    """Split backwards need their I before their W, pairs their backward, stages their place."""
    table = Table.of([tuple(Action(*action) for action in row)])
    assert any(fault in found for found in table_faults(table, 1, 1))


def test_a_stage_may_be_on_any_rank_but_on_one() -> None:
    """Custom tables place stages freely; without a given placement only a stage in two rows is at fault."""
    turned = parse_table((("1F0", "1B0"), ("0F0", "0B0")))
    assert table_faults(turned, 2, 1) == []
    assert table_faults(turned, 2, 1, Degrees(pp=2).pp_rank_of_stage)
    torn = parse_table((("0F0",), ("0B0",)))
    assert any("does not hold" in fault for fault in table_faults(torn, 1, 1))


@pytest.mark.parametrize(
    ("schedule", "chunks", "micro_batches"),
    [
        (Schedule.ONE_F_ONE_B, 2, 4),
        (Schedule.ZBV, 1, 4),
        (Schedule.DUALPIPEV, 2, 7),
        (Schedule.INTERLEAVED, 2, 6),
        (Schedule.GPIPE, 1, 0),
    ],
)
def test_shapes_that_a_schedule_does_not_have(schedule: Schedule, chunks: int, micro_batches: int) -> None:
    with pytest.raises(ValueError, match=r"chunks|stages|micro-batches"):
        build_table(schedule, 4, chunks, micro_batches)


@pytest.mark.parametrize("text", ["", "F0", "1X2", "1F", "-1F0", "1F0 ", "9999999F0", "(0F0;0B0)", "1W"])
def test_wrong_actions_are_refused(text: str) -> None:
    """Anything but stage, kind, micro-batch is refused with an example."""
    with pytest.raises(InputError, match="2F0"):
        parse_action(text)
