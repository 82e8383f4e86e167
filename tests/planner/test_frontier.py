"""Shapes come in order of their bound, and none is modelled before its quick bound's turn."""

from __future__ import annotations

import dataclasses
import random
from itertools import islice
from typing import cast

import numpy as np
import pytest

from planner.cluster_grammar import parse_cluster
from planner.search import solve as solver
from planner.search.frontier import Candidate, Frontier, Legal
from planner.search.shape_search import ShapeSearch
from planner.search.solve import SolveOptions, solve
from planner.search.space import Pins
from planner.strategy import Degrees

from . import instances

SEARCH = cast(ShapeSearch, None)


@pytest.mark.parametrize("seed", range(50))
def test_the_order_is_that_of_all_bounds(seed: int) -> None:
    """Random bounds above random quick bounds, many of them equal, some shapes impossible."""
    draw = random.Random(seed)
    quick = [float(draw.randint(0, 9)) for _ in range(40)]
    bounds = [q + draw.choice([0.0, 0.0, 1.0, 5.0]) for q in quick]
    possible = [draw.random() < 0.8 for _ in quick]
    modelled: list[int] = []

    def model(shape: Legal) -> Candidate | None:
        modelled.append(shape.order)
        return Candidate(bounds[shape.order], shape.order, SEARCH) if possible[shape.order] else None

    frontier = Frontier((Legal(q, i, Degrees()) for i, q in enumerate(quick)), model)
    wanted = sorted((b, i) for i, b in enumerate(bounds) if possible[i])
    taken = [(c.bound_s, c.order) for c in islice(frontier, 5)]
    assert taken == wanted[:5]
    assert all(quick[i] <= taken[-1][0] for i in modelled), "only those that might have come before"
    least = taken[-1][0] + 1
    left = sum(q >= least for i, q in enumerate(quick) if i not in modelled)
    assert frontier.count_unmodelled(least) == left
    assert [(c.bound_s, c.order) for c in frontier] == wanted, "again from the first"
    assert sorted(modelled) == list(range(40)), "each once"


def test_most_shapes_are_never_modelled_and_the_plan_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ruled out by their quick bound; with bounds of 0 all are modelled, and nothing else differs."""
    problem = instances.problem(
        of=instances.model(layers=16, hidden=1024, heads=16),
        on=parse_cluster("4x8:h100-sxm-80gb", "test"),
        seq=2048,
        batch=256,
        limit_bytes=1 << 36,
    )
    options = SolveOptions(pins=Pins(), reproducible=True, rounds=1)
    plan = solve(problem, options)
    assert plan.solver is not None
    assert plan.rejected["step_time_bound"] > plan.solver.shapes / 2
    assert plan.solver.pruned == sum(plan.rejected.values()) < plan.solver.shapes
    monkeypatch.setattr(solver, "quick_bounds_s", lambda model, legal, options: np.zeros(len(legal)))
    every = solve(problem, options)
    assert every.solver is not None and "step_time_bound" not in every.rejected
    certificate = dataclasses.replace(every.solver, pruned=plan.solver.pruned)
    assert dataclasses.replace(every, rejected=plan.rejected, solver=certificate) == plan
