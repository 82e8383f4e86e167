"""What a search finds is SAFE by its own estimate: recipes, and mixes of a rank's stages, know its memory."""

from __future__ import annotations

import pytest

from planner.estimate import Verdict
from planner.search.solve import SolveOptions, Solver
from planner.search.space import parse_pins

from .catalog_problems import problem

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
    solver = Solver(problem(*asked), SolveOptions(pins=parse_pins(pins), reproducible=True))
    plan = solver.solve()
    verdicts = [solver.model.evaluate(found.strategy).estimate.verdict for found in solver.found]
    assert len(verdicts) >= 3 and set(verdicts) == {Verdict.SAFE}
    assert plan.estimate.step_time_s == min(found.step_time_s for found in solver.found)
