"""The bound of many shapes at once lies below the bound of each."""

from __future__ import annotations

from statistics import median

import pytest

from planner.cost.evaluate import CostModel
from planner.search.bounds.layout_bounds import step_bound_s
from planner.search.bounds.quick_bounds import space_bounds_s
from planner.search.candidates import Modeller, Rejections
from planner.search.space import space_of
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.strategy import Schedule
from tests.planner import catalog_problems, instances


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("fixed", [(), ("cp=2",), *((f"schedule={schedule}",) for schedule in Schedule)])
def test_quick_bounds_lie_below_the_bounds(fixed: tuple[str, ...], mixed: bool) -> None:
    """Of every legal shape of random problems; and they tell shapes apart."""
    pins, compared = parse_fixed_choices(fixed), 0
    for seed in range(12):
        problem = instances.random_problem(seed, layers=8, mixed=mixed)
        model = CostModel(problem)
        space = space_of(problem, pins)
        legal = list(space.shapes())
        if not legal:
            continue
        quick = space_bounds_s(model, space, FixedChoices().recomputes)[0].tolist()
        for degrees, bound_s in zip(legal, quick, strict=True):
            exact_s = step_bound_s(model, model.layout(degrees), FixedChoices().recomputes)
            assert 0 < bound_s <= exact_s * (1 + 1e-9), degrees.label()
        # Without data parallelism all that is missing is the optimizer.
        alone = [
            b / step_bound_s(model, model.layout(d), FixedChoices().recomputes)
            for d, b in zip(legal, quick, strict=True)
            if d.dp == 1
        ]
        assert max(alone, default=1.0) > 0.5
        compared += len(legal)
    assert compared >= 4


@pytest.mark.parametrize("fixed", [("ep=2",), ("cp=2", "ep=2")])
def test_quick_bounds_of_experts_lie_below_the_bounds(fixed: tuple[str, ...]) -> None:
    """Where experts are spread over data ranks, with and without context parallelism."""
    compared = 0
    for seed in range(1, 60, 2):
        problem = instances.random_problem(seed, layers=8, mixed=True)
        model = CostModel(problem)
        space = space_of(problem, parse_fixed_choices(fixed))
        legal = list(space.shapes())
        if not legal:
            continue
        quick = space_bounds_s(model, space, FixedChoices().recomputes)[0].tolist()
        for degrees, bound_s in zip(legal, quick, strict=True):
            exact_s = step_bound_s(model, model.layout(degrees), FixedChoices().recomputes)
            assert 0 < bound_s <= exact_s * (1 + 1e-9), degrees.label()
        compared += len(legal)
    assert compared >= 4


@pytest.mark.parametrize(
    "cluster",
    [
        "1x8:a100-sxm-80gb+1x8:h100-sxm-80gb",
        "3x4:a100-sxm-40gb+1x4:h100-sxm-80gb",
        "2x4:h100-sxm-80gb+1x4:a100-sxm-80gb+1x4:a100-sxm-40gb",
    ],
)
def test_quick_bounds_of_mixed_clusters_lie_below_the_bounds(cluster: str) -> None:
    """Where pipeline ranks lie on different devices, in either order, or straddle them: and near them."""
    problem = catalog_problems.problem("llama-3.2-1b", cluster, 2048, 64)
    model, pins = CostModel(problem), FixedChoices()
    space, modeller = space_of(problem, pins), Modeller(model, pins, Rejections())
    quick = space_bounds_s(model, space, pins.recomputes)[0].tolist()
    legal = list(space.shapes())
    exact = [modeller.base(degrees).bound.of(degrees) for degrees in legal]
    shares = [bound_s / exact_s for bound_s, exact_s in zip(quick, exact, strict=True)]
    assert 0 < min(shares) <= max(shares) <= 1 + 1e-9
    apart = [share for share, d in zip(shares, legal, strict=True) if d.pp == 2 and d.num_micro_batches > 8]
    assert len(apart) > 10
    assert median(apart) > 0.85
