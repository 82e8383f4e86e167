"""The scout: its plans are SAFE, legal, as fast as their estimate says, and near those of a search."""

from __future__ import annotations

import dataclasses
from functools import cache
from statistics import median

import pytest

from planner.cost.evaluate import CostModel
from planner.foundation.errors import InfeasibleError
from planner.hardware.cluster import ClusterSpec
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.search.greedy_plan import Scout, Scouted, Shared
from planner.search.least_memory import fitting, survey
from planner.search.solve import SolveOptions, solve
from planner.search.space import space_of
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees
from tests.planner.catalog_problems import problem as catalog_problem
from tests.planner.instances import expert_problem, random_problem

WORST, SECOND, MIDDLE = 1.5, 1.35, 1.05
"""Step times over those of a search: of any problem below, of all but one, and of half. Measured: 1.45, where
ZeRO 2 in a pipeline, which is no usual choice, spares recomputing; 1.28; 1.02."""
MORE_MEMORY = 1.15
"""Memory at which the scout has a plan, over the least of any strategy. Measured: 1.1 at most."""

CATALOG = (
    ("gpt2", "1x4:h100", 512, 16),
    ("tinyllama-1.1b", "1x8:h100", 2048, 32),
    ("tinyllama-1.1b", "1x4:a100-sxm-40gb", 8192, 8),
    ("tinyllama-1.1b", "2x4:a100-sxm-40gb", 32768, 8),
)


@cache
def problems() -> list[PlanningProblem]:
    """Small random problems, dense, of several kinds of blocks and of experts; then known models."""
    return [
        *(random_problem(seed) for seed in range(14)),
        *(random_problem(seed, mixed=True) for seed in range(14, 20)),
        *(expert_problem(seed) for seed in range(14)),
        *(catalog_problem(*case) for case in CATALOG),
    ]


def scouted(of: PlanningProblem) -> Scouted | None:
    return Scout(of, Shared(FixedChoices())).plan(of.cluster)


@cache
def plans() -> list[tuple[PlanningProblem, Scouted]]:
    """The problems that the scout has a plan for."""
    return [(of, found) for of in problems() if (found := scouted(of)) is not None]


def test_most_problems_have_a_plan() -> None:
    assert len(plans()) >= 30


def test_a_plan_is_safe_and_keeps_all_rules() -> None:
    for of, found in plans():
        evaluation = found.evaluation
        assert evaluation.estimate.verdict is Verdict.SAFE
        assert evaluation.estimate.peak_memory_bytes < of.memory_limit_bytes
        assert not broken_rules(of, evaluation.strategy)
        assert evaluation.strategy.degrees.world == of.cluster.devices


def test_its_estimate_is_that_of_the_cost_model() -> None:
    for of, found in plans():
        model = CostModel(of)
        again = model.evaluate(found.evaluation.strategy)
        assert again.estimate == found.evaluation.estimate
        assert found.job == model.job(again)


def test_no_plan_of_a_search_takes_less_than_the_bound_allows_for_usual_choices() -> None:
    for of, found in plans():
        assert 0 < found.bound_s <= found.evaluation.estimate.step_time_s, of


def test_step_times_are_near_those_of_a_search() -> None:
    """No search is slower than a scout by more than its gap, and no scout much slower than a search."""
    gap = 0.01
    over = []
    for of, found in plans():
        plan = solve(of, SolveOptions(pins=FixedChoices(), gap_tolerance=gap, reproducible=True))
        over.append(found.evaluation.estimate.step_time_s / plan.estimate.step_time_s)
    assert len(over) >= 30
    assert min(over) >= 1 - 1e-9
    over.sort()
    assert over[-1] <= WORST and over[-2] <= SECOND and median(over) <= MIDDLE, over


def usual(of: PlanningProblem, degrees: Degrees) -> bool:
    """Whether degrees are among the usual ones."""
    space = space_of(of, FixedChoices(), usual=True)
    return any(
        dataclasses.replace(base, schedule=schedule, chunks=chunks) == degrees
        for base, pipes in zip(space.bases, space.pipes, strict=True)
        for schedule, chunks in pipes
    )


def test_where_nothing_fits_no_strategy_does_or_only_an_unusual_one() -> None:
    left = [of for of in problems() if scouted(of) is None]
    assert len(left) >= 6
    for of in left:
        scout = Scout(of, Shared(FixedChoices()))
        assert scout.plan(of.cluster) is None
        assert scout.why_not[of.cluster.name]
        need = fitting(of, FixedChoices())
        if need is not None:
            with_more = dataclasses.replace(of, memory_limit_bytes=round(need.limit_bytes * MORE_MEMORY))
            assert not usual(of, need.strategy.degrees) or scouted(with_more) is not None, of


@pytest.mark.parametrize("number", range(0, 34, 2))
def test_a_plan_is_found_at_little_more_memory_than_any_strategy_needs(number: int) -> None:
    of = problems()[number]
    need = survey(of, FixedChoices()).need
    assert need is not None
    little = dataclasses.replace(of, memory_limit_bytes=need.limit_bytes // 2)
    assert scouted(little) is None and fitting(little, FixedChoices()) is None
    enough = dataclasses.replace(of, memory_limit_bytes=round(need.limit_bytes * MORE_MEMORY))
    assert scouted(enough) is not None


def test_nothing_fits_where_even_a_search_finds_nothing() -> None:
    of = catalog_problem("llama-3-70b", "1x8:a100-sxm-40gb", 4096, 64)
    scout = Scout(of, Shared(FixedChoices()))
    assert scout.plan(of.cluster) is None
    assert "weights, gradients and optimizer state take at least" in scout.why_not[of.cluster.name]
    with pytest.raises(InfeasibleError):
        solve(of, SolveOptions(pins=FixedChoices(), time_limit_s=5))


def clusters(texts: list[str]) -> list[ClusterSpec]:
    return [parse_cluster(text) for text in texts]


@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x7b"])
def test_a_plan_does_not_depend_on_what_was_planned_before(model: str) -> None:
    """Other numbers of nodes and other networks, planned before, change nothing."""
    shared = Shared(FixedChoices())
    fresh: dict[str, Scouted | None] = {}
    texts = [f"{nodes}x8:h100@{network}" for network in ("ndr400x8", "eth100x1") for nodes in (2, 4, 16)]
    for text, cluster in zip(texts, clusters(texts), strict=True):
        of = catalog_problem(model, text, 4096, 256)
        fresh[text] = Scout(of, Shared(FixedChoices())).plan(cluster)
    assert any(fresh.values())
    for order in (texts, texts[::-1]):
        scouts: dict[str, Scout] = {}
        for text, cluster in zip(order, clusters(order), strict=True):
            network = text.partition("@")[2]
            if network not in scouts:
                scouts[network] = Scout(catalog_problem(model, text, 4096, 256), shared)
            found, alone = scouts[network].plan(cluster), fresh[text]
            assert (found is None) == (alone is None), text
            if found is not None and alone is not None:
                assert found.evaluation.strategy == alone.evaluation.strategy, text
                assert found.evaluation.estimate == alone.evaluation.estimate
                assert (found.job, found.bound_s) == (alone.job, alone.bound_s)
                assert found.evaluation.estimate.verdict is Verdict.SAFE
