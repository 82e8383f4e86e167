"""Shapes come in order of their bound, and none is modelled before its quick bound's turn."""

from __future__ import annotations

import dataclasses
import random
from itertools import islice
from typing import Any, cast

import numpy as np
import pytest

from planner.hardware.cluster_text import parse_cluster
from planner.search import solve as solver
from planner.search.candidates import Candidate, Frontier
from planner.search.layout_search import ShapeSearch
from planner.search.solve import SolveOptions, solve
from planner.strategy.fixed_choices import FixedChoices
from tests.planner import instances

SEARCH = cast(ShapeSearch, None)


@pytest.mark.parametrize("seed", range(50))
def test_the_order_is_that_of_all_bounds(seed: int) -> None:
    """Random bounds above random quick bounds, many of them equal, some shapes impossible."""
    draw = random.Random(seed)
    numbers = draw.sample(range(100), 40)
    quick = {number: float(draw.randint(0, 9)) for number in numbers}
    bounds = {number: q + draw.choice([0.0, 0.0, 1.0, 5.0]) for number, q in quick.items()}
    possible = {number: draw.random() < 0.8 for number in numbers}
    modelled: list[int] = []

    def model(number: int) -> Candidate | None:
        modelled.append(number)
        return Candidate(bounds[number], number, SEARCH) if possible[number] else None

    frontier = Frontier(np.asarray(list(quick.values())), np.asarray(numbers), model)
    wanted = sorted((bound_s, number) for number, bound_s in bounds.items() if possible[number])
    taken = [(c.bound_s, c.order) for c in islice(frontier, 5)]
    assert taken == wanted[:5]
    assert all(quick[number] <= taken[-1][0] for number in modelled), "only those that might come before"
    left = [number for number in numbers if number not in modelled]
    coming = [bounds[n] for n in modelled if possible[n] and (bounds[n], n) not in taken]
    next_s = min([*coming, *(quick[number] for number in left)], default=float("inf"))
    assert frontier.next_bound_s == pytest.approx(next_s, rel=1e-8)
    least = taken[-1][0] + 1
    assert frontier.count_unmodelled(least) == sum(quick[number] * (1 - 1e-9) >= least for number in left)
    assert [(c.bound_s, c.order) for c in frontier] == wanted, "again from the first"
    assert sorted(modelled) == sorted(numbers), "each once"
    assert frontier.next_bound_s == float("inf") and frontier.count_unmodelled(0.0) == 0


def test_most_shapes_are_never_modelled_and_the_plan_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ruled out by their quick bound; with bounds of 0 all are modelled, and the plan and its bound stay."""
    problem = instances.problem(
        of=instances.model(layers=8, hidden=1024, heads=16),
        on=parse_cluster("2x4:h100-sxm-80gb", "test"),
        seq=2048,
        batch=64,
        limit_bytes=1 << 36,
    )
    options = SolveOptions(pins=FixedChoices(), reproducible=True, rounds=1)
    plan = solve(problem, options)
    assert plan.solver is not None
    assert plan.rejected["step_time_bound"] > plan.solver.shapes / 2
    assert plan.solver.pruned == sum(plan.rejected.values()) < plan.solver.shapes
    real = solver.space_bounds_s

    def none(*arguments: Any) -> Any:
        quick_s, rows, places = real(*arguments)
        return np.zeros_like(quick_s), rows, places

    monkeypatch.setattr(solver, "space_bounds_s", none)
    every = solve(problem, options)
    assert every.solver is not None and "step_time_bound" not in every.rejected
    assert every.estimate.step_time_s == plan.estimate.step_time_s
    assert every.solver.lower_bound_s == plan.solver.lower_bound_s
    certificate = dataclasses.replace(every.solver, pruned=plan.solver.pruned)
    same = dataclasses.replace(every, rejected=plan.rejected, solver=certificate)
    assert dataclasses.replace(same, alternatives=plan.alternatives) == plan
