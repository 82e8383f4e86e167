"""What a search finds is SAFE by its own estimate: recipes, and mixes of a rank's stages, know its memory."""

from __future__ import annotations

import pytest

from planner.search.solve import SolveOptions, Solver
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.rules import broken_rules
from tests.planner.catalog_problems import problem, solved

PROBLEMS = {
    "V of one class": ("llama-2-70b", "8x8:a100-sxm-80gb", 4096, 256, ("schedule=zbv", "tp=4", "zero=1")),
    "pairs": ("llama-2-70b", "8x8:a100-sxm-80gb", 4096, 256, ("schedule=dualpipev", "tp=4", "zero=1")),
    "interleaved": ("llama-2-70b", "8x8:a100-sxm-80gb", 4096, 256, ("schedule=interleaved", "zero=1")),
    "several classes": ("deepseek-v3", "64x8:h800-sxm-80gb", 4096, 1920, ("chunks=2", "ep=8", "tp=1")),
    "one stage a rank": ("llama-2-70b", "8x8:a100-sxm-40gb", 4096, 256, ("schedule=1f1b",)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_that_is_found_is_safe(name: str) -> None:
    *asked, pins = PROBLEMS[name]
    solver = Solver(problem(*asked), SolveOptions(pins=parse_fixed_choices(pins), reproducible=True))
    plan = solver.solve()
    verdicts = [solver.model.evaluate(found.strategy).estimate.verdict for found in solver.found]
    assert len(verdicts) >= 3 and set(verdicts) == {Verdict.SAFE}
    assert plan.estimate.step_time_s == min(found.step_time_s for found in solver.found)


def test_a_plan_is_found_where_only_a_cut_far_from_the_even_one_fits() -> None:
    """Two layer classes, and a node of little memory that holds one layer of 46. The search itself looks near
    the even cut; what is known of others is a bound over all shapes."""
    of = problem("gemma-2-27b", "8x2:a100-sxm-80gb+2x2:a100-sxm-40gb", 131072, 16)
    plan = solved(of, "pp=5", "tp=2")
    assert plan.estimate.verdict is Verdict.SAFE and not broken_rules(of, plan.strategy)
    assert min(stage.layers for stage in plan.strategy.stages) < 46 // 5 - 46 // 10
    assert plan.solver is not None and plan.solver.status == "gap"
    assert 0 < plan.solver.lower_bound_s < plan.estimate.step_time_s
