"""Processes that search beside each other: order, what is sent, and what happens when one dies or is late."""

from __future__ import annotations

import os
import time

import pytest

from planner.foundation.decode import to_json
from planner.search import solve as solving
from planner.search.layout_search import Budget, Found, ShapeResult
from planner.search.solve import SolveOptions
from planner.search.worker_pool import AHEAD, Crew, Task, TaskKind, processes_for
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.strategy import Degrees, RecomputeCounts, Schedule, Stage, Strategy
from tests.planner.catalog_problems import problem

BUDGET = Budget(None, float("inf"), 3, None, 0.005)
HERE = os.getpid()
DEGREES = Degrees(pp=2, schedule=Schedule.ONE_F_ONE_B, num_micro_batches=4)


def tasks(count: int) -> list[Task]:
    return [Task(TaskKind.BEST, number, BUDGET) for number in range(count)]


def result_of(task: Task) -> ShapeResult:
    """A result that tells of its task; an odd one's processes take longer."""
    time.sleep(0.01 * (task.number % 2))
    stages = (
        Stage(first=0, end=1, recompute=RecomputeCounts(none=0, full=1)),
        Stage(first=1, end=3, recompute=RecomputeCounts(none=1, selective=1)),
    )
    found = Found(Strategy(degrees=DEGREES, stages=stages), 0.1 * task.number) if task.number % 3 else None
    return ShapeResult(found, float("inf") if task.number == 4 else 0.1 + task.number, task.number)


def taken(crew: Crew, asked: list[Task]) -> list[ShapeResult]:
    """All results, some taken while others are still given."""
    results = []
    for number, task in enumerate(asked):
        crew.add(task)
        if number >= 4:
            results.append(crew.take(asked[number - 4]))
    return [*results, *(crew.take(task) for task in asked[-4:])]


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_come_in_the_order_of_their_tasks(processes: int) -> None:
    crew = Crew(result_of, processes, lambda: False, lambda: False)
    try:
        assert taken(crew, tasks(13)) == [result_of(task) for task in tasks(13)]
    finally:
        crew.close()


def test_tasks_of_a_process_that_dies_are_done_here() -> None:
    def dying(task: Task) -> ShapeResult:
        if task.number in (2, 5) and os.getpid() != HERE:
            os._exit(9)
        return result_of(task)

    crew = Crew(dying, 2, lambda: False, lambda: False)
    try:
        assert taken(crew, tasks(9)) == [result_of(task) for task in tasks(9)]
    finally:
        crew.close()


@pytest.mark.parametrize("dies", ["at once", "after the first"])
def test_a_process_that_dies_with_two_tasks_loses_neither(dies: str) -> None:
    """Nor does their order change, nor is a task of another process done twice."""
    begun, lost = "at once", []

    def dying(task: Task) -> ShapeResult:
        if os.getpid() != HERE and task.number == (0 if dies == begun else 2):
            os._exit(9)
        if os.getpid() == HERE:
            lost.append(task.number)
        return result_of(task)

    crew = Crew(dying, 1, lambda: False, lambda: False)
    try:
        for task in tasks(6):
            crew.add(task)
        (given,) = crew._given.values()
        assert [task.number for task in given] == [0, 1]
        assert [crew.take(task) for task in tasks(6)] == [result_of(task) for task in tasks(6)]
        assert not crew._given and not crew._waiting and not crew._results
        assert lost == list(range(0 if dies == begun else 2, 6))
    finally:
        crew.close()


def test_tasks_of_a_process_that_dies_go_to_another_in_their_order() -> None:
    """Those that were given to it come before all that wait."""
    seen = []

    def dying(task: Task) -> ShapeResult:
        if task.number == 0 and os.getpid() != HERE:
            time.sleep(0.1)
            os._exit(9)
        return result_of(task)

    crew = Crew(dying, 2, lambda: False, lambda: False)
    try:
        for task in tasks(8):
            crew.add(task)
        first, second = ([task.number for task in given] for given in crew._given.values())
        assert (first, second) == ([0, 2], [1, 3])
        crew._lose(next(iter(crew._given)))
        seen = [task.number for task in crew._waiting]
        assert seen == [0, 2, 4, 5, 6, 7]
        assert [crew.take(task) for task in tasks(8)] == [result_of(task) for task in tasks(8)]
    finally:
        crew.close()


@pytest.mark.parametrize("processes", [1, 3])
def test_a_process_has_one_task_to_go_on_with(processes: int) -> None:
    """And no more, so that the others have something to do."""
    crew = Crew(result_of, processes, lambda: False, lambda: False)
    try:
        most = 0
        for task in tasks(12):
            crew.add(task)
            most = max(most, *(len(given) for given in crew._given.values()))
        results = []
        for task in tasks(12):
            results.append(crew.take(task))
            most = max(most, *(len(given) for given in crew._given.values()))
        assert most == AHEAD == 2
        assert results == [result_of(task) for task in tasks(12)]
    finally:
        crew.close()


def test_what_goes_wrong_in_a_process_is_raised_here() -> None:
    def failing(task: Task) -> ShapeResult:
        if task.number == 3:
            raise RuntimeError("a fault")
        return result_of(task)

    crew = Crew(failing, 2, lambda: False, lambda: False)
    try:
        with pytest.raises(RuntimeError, match="a fault"):
            taken(crew, tasks(6))
    finally:
        crew.close()


@pytest.mark.parametrize("processes", [0, 2])
def test_nothing_is_begun_once_time_expired(processes: int) -> None:
    crew = Crew(result_of, processes, lambda: True, lambda: False)
    try:
        assert taken(crew, tasks(6)) == [ShapeResult(None, 0.0, 0)] * 6
    finally:
        crew.close()


def test_a_process_that_overruns_is_ended() -> None:
    def endless(task: Task) -> ShapeResult:
        while True:
            time.sleep(1)

    crew = Crew(endless, 2, lambda: False, lambda: True)
    begun = list(crew._processes)
    assert taken(crew, tasks(2)) == [ShapeResult(None, 0.0, 0)] * 2
    assert not any(process.is_alive() for process in begun)


def test_a_plan_does_not_depend_on_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    of = problem("llama-2-7b", "1x8:a100-sxm-40gb", seq=4096, batch=64)
    options = SolveOptions(pins=FixedChoices(), reproducible=True)
    texts = []
    for processes in (0, 2, 3):
        monkeypatch.setattr(solving, "processes_for", lambda _, many=processes: many)
        texts.append(to_json(solving.solve(of, options)))
    assert texts[0] == texts[1] == texts[2]


def test_small_spaces_are_searched_here() -> None:
    assert processes_for(3) == 0


def test_tasks_of_one_kin_go_to_one_process() -> None:
    """While neither waits; one that has nothing to do takes what another cannot begin."""

    def where(task: Task) -> ShapeResult:
        time.sleep(0.01)
        return ShapeResult(None, float(os.getpid()), 0)

    crew, each = Crew(where, 2, lambda: False, lambda: False, lambda task: task.number // 10), tasks(28)
    try:
        pairs = [taken(crew, [each[number], each[10 + number]]) for number in range(6)]
        first, second = (set(results) for results in zip(*pairs, strict=True))
        assert len(first) == len(second) == 1 and first != second
        alone = {result.bound_s for result in taken(crew, each[20:])}
        assert len(alone) == 2
    finally:
        crew.close()
