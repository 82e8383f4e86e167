"""The least memory of a problem against brute force over every strategy, and against the solver."""

from __future__ import annotations

import dataclasses

import pytest

from planner.advice.what_if import with_limit
from planner.cost.evaluate import CostModel
from planner.foundation.errors import InfeasibleError
from planner.foundation.units import MIB
from planner.hardware.cluster import DeviceGroup
from planner.job.problem import PlanningProblem
from planner.model.sublayer import Recompute
from planner.search.least_memory import ShapeNeed, fitting, need_of, survey
from planner.search.solve import SolveOptions, solve
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Offload, Strategy, sized_stages
from tests.planner import instances
from tests.planner.brute_force import all_stages, legal_degrees


def least_by_force(problem: PlanningProblem) -> int:
    """The least memory limit at which some strategy is SAFE, all of them asked."""
    model, least = CostModel(problem), 1 << 60
    for degrees in legal_degrees(problem):
        first = next(all_stages(problem.model.layers, degrees.stages), None)
        if first is None or broken_rules(problem, Strategy(degrees=degrees, stages=first)):
            continue
        for stages in all_stages(problem.model.layers, degrees.stages):
            need = need_of(model, Strategy(degrees=degrees, stages=stages))
            assert need is not None
            least = min(least, need.limit_bytes)
    return least


def small(seed: int, *, mixed: bool = False) -> PlanningProblem:
    """A random problem whose strategies can all be asked, with communicators of no size to hide behind."""
    drawn = instances.random_problem(seed, layers=3, mixed=mixed)
    workload = dataclasses.replace(drawn.workload, batch=2, seq=4096)
    return dataclasses.replace(drawn, workload=workload)


@pytest.mark.parametrize("seed", range(8))
def test_the_least_need_equals_brute_force(seed: int) -> None:
    problem = small(seed)
    found = survey(problem, FixedChoices()).need
    assert found is not None and found.exact
    assert abs(found.limit_bytes - least_by_force(problem)) <= MIB


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", [4, 5, 11, 12])  # others have no such shape, or take long
def test_no_strategy_of_several_stages_a_rank_needs_less_than_their_bound(seed: int, mixed: bool) -> None:
    drawn = instances.random_problem(seed, layers=5, mixed=mixed)
    problem = dataclasses.replace(drawn, workload=dataclasses.replace(drawn.workload, seq=4096))
    model, asked = CostModel(problem), 0
    for degrees in legal_degrees(problem):
        if degrees.chunks == 1:
            continue
        each = [Strategy(degrees=degrees, stages=s) for s in all_stages(problem.model.layers, degrees.stages)]
        needs = [need.limit_bytes for strategy in each if (need := need_of(model, strategy)) is not None]
        if needs:
            asked += 1
            assert ShapeNeed(model, degrees, FixedChoices()).bound() <= min(needs)
    assert asked >= 2


def test_a_survey_that_time_ends_says_what_it_found_and_that_less_may_do() -> None:
    problem = instances.random_problem(0)
    whole, ended = survey(problem, FixedChoices()).need, survey(problem, FixedChoices(), lambda: True).need
    assert whole is not None and ended is not None
    assert whole.exact and not ended.exact
    assert ended.limit_bytes >= whole.limit_bytes
    at = with_limit(problem, ended.limit_bytes)
    assert CostModel(at).evaluate(ended.strategy).estimate.verdict is Verdict.SAFE


def two_limits(seed: int) -> PlanningProblem:
    """Two nodes of different devices, one with 300 MiB more than the other."""
    drawn = small(200 + seed)
    names = ("little", "much")
    groups = tuple(
        DeviceGroup(device=instances.device(name=name), nodes=1, devices_per_node=2) for name in names
    )
    cluster = dataclasses.replace(instances.cluster(), groups=groups)
    limits = (drawn.memory_limit_bytes, drawn.memory_limit_bytes + 300 * MIB)
    return dataclasses.replace(
        drawn, cluster=cluster, device_limits_bytes=tuple(zip(names, limits, strict=True))
    )


@pytest.mark.parametrize("seed", range(6))
def test_devices_of_each_kind_hold_what_they_have(seed: int) -> None:
    problem = two_limits(seed)
    found = survey(problem, FixedChoices()).need
    assert found is not None and found.exact and found.more_bytes in (0, 300 * MIB)
    assert abs(found.limit_bytes - least_by_force(problem)) <= MIB
    enough, less = (with_limit(problem, found.limit_bytes + more) for more in (0, -2 * MIB))
    assert fitting(enough, FixedChoices()) is not None and fitting(less, FixedChoices()) is None
    for asked, verdict in ((enough, Verdict.SAFE), (less, Verdict.RISKY)):
        assert CostModel(asked).evaluate(found.strategy).estimate.verdict is verdict


@pytest.mark.parametrize("seed", range(4))
def test_it_does_over_several_layer_classes(seed: int) -> None:
    problem = small(100 + seed, mixed=True)
    found = survey(problem, FixedChoices()).need
    assert found is not None and found.exact
    assert abs(found.limit_bytes - least_by_force(problem)) <= MIB


@pytest.mark.parametrize("seed", range(8))
def test_the_solver_finds_a_plan_at_that_limit_and_none_below(seed: int) -> None:
    problem = instances.random_problem(seed)
    found = survey(problem, FixedChoices()).need
    assert found is not None
    exact = SolveOptions(pins=FixedChoices(), gap_tolerance=0.0, rounds=100, nodes=None)
    at = dataclasses.replace(problem, memory_limit_bytes=found.limit_bytes)
    assert solve(at, exact).estimate.verdict is Verdict.SAFE
    with pytest.raises(InfeasibleError):
        solve(dataclasses.replace(problem, memory_limit_bytes=found.limit_bytes - 3 * MIB), exact)


def test_fitting_agrees_with_the_survey() -> None:
    """A strategy that fits is found if and only if the least need is within the limit."""
    both = set()
    for seed in range(60):
        problem = instances.random_problem(seed)
        need, found = survey(problem, FixedChoices()).need, fitting(problem, FixedChoices())
        fits = need is not None and need.limit_bytes <= problem.memory_limit_bytes
        assert (found is not None) == fits
        if found is not None:
            assert CostModel(problem).evaluate(found.strategy).estimate.verdict is Verdict.SAFE
        both.add(fits)
    assert both == {True, False}


def test_it_keeps_pins_and_never_needs_less_for_them() -> None:
    problem = instances.random_problem(3)
    free = survey(problem, FixedChoices()).need
    assert free is not None
    for fix in ("recompute=none", "zero=0", "tp=1", "schedule=gpipe", "schedule=interleaved"):
        pinned = survey(problem, parse_fixed_choices((fix,))).need
        if pinned is None:
            continue
        assert pinned.limit_bytes >= free.limit_bytes
        counts = [stage.recompute for stage in pinned.strategy.stages]
        if fix == "recompute=none":
            assert all(count.none == count.layers for count in counts)


def test_counts_of_shapes_and_rules_add_up() -> None:
    problem = instances.problem(batch=3)
    found = survey(problem, FixedChoices())
    assert found.shapes == found.legal + sum(found.rejected.values())
    assert set(found.nearest) == set(found.rejected)


def test_offloaded_state_is_not_on_the_device() -> None:
    device = dataclasses.replace(instances.device(), host_link_bytes_per_s=1e10)
    problem = instances.problem(
        of=instances.model(hidden=256, layers=8, vocab=4096), on=instances.cluster(of=device)
    )
    kept = survey(problem, FixedChoices(zero=0, tp=1)).need
    gone = survey(problem, FixedChoices(zero=0, tp=1, offload=Offload.OPTIMIZER)).need
    assert kept is not None and gone is not None
    assert gone.memory.optimizer_bytes < kept.memory.optimizer_bytes
    assert gone.limit_bytes < kept.limit_bytes
    assert gone.strategy.offloads == (Offload.OPTIMIZER,)


def test_stages_cover_the_layers_evenly_where_nothing_else_weighs() -> None:
    """Sixteen equal layers over four stages: the fullest is least where early stages hold fewer."""
    problem = instances.problem(of=instances.model(layers=16, hidden=128), seq=4096, batch=16)
    need = survey(problem, parse_fixed_choices(("pp=4", "recompute=none", "micro_batch=1"))).need
    assert need is not None
    sizes = [stage.layers for stage in need.strategy.stages]
    assert sum(sizes) == 16 and sizes[0] <= sizes[-1]
    model = CostModel(problem)
    for a, b in ((0, 3), (3, 0)):
        moved = [size + (s == a) - (s == b) for s, size in enumerate(sizes)]
        strategy = Strategy(degrees=need.strategy.degrees, stages=sized_stages(moved, Recompute.NONE))
        worse = need_of(model, strategy)
        assert worse is not None and worse.memory.total_bytes >= need.memory.total_bytes
