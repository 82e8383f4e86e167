"""The solver against brute force, and the laws that its certificate must keep."""

from __future__ import annotations

import dataclasses

import pytest

from planner.foundation.errors import InfeasibleError
from planner.job.engine_settings import Engine
from planner.job.problem import Limits
from planner.model.sublayer import Recompute
from planner.search.solve import SolveOptions, solve
from planner.search.space import shapes
from planner.strategy.engines.engine_rules import ENGINE_SCHEDULES
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.plan import decode_plan, encode_plan
from planner.strategy.rules import broken_rules
from planner.strategy.schedule.makespan_paths import makespan_bound
from planner.strategy.schedule.schedules import build_table
from planner.strategy.strategy import Degrees, Schedule
from tests.planner import instances
from tests.planner.brute_force import EXACT, FAMILIES, brute_force, compare
from tests.planner.instances import cost


def check_block(family: str, seeds: range) -> None:
    """The solver's plans are as fast as the best of all, or both find none; several are feasible."""
    compared = {seed: compare(FAMILIES[family](seed)) for seed in seeds}
    assert {seed: each.fault for seed, each in compared.items() if each.fault} == {}
    assert sum(each.best_s is not None for each in compared.values()) >= len(seeds) // 4


@pytest.mark.parametrize("block", range(5))
def test_solver_equals_brute_force(block: int) -> None:
    """100 random instances over all degrees, schedules, splits and recipes; bench/brute_force.py: more."""
    check_block("plain", range(20 * block, 20 * block + 20))


@pytest.mark.parametrize("block", range(2))
def test_solver_equals_brute_force_over_several_layer_classes(block: int) -> None:
    """40 random models of two classes of layers in any order: experts, latents, states, windows."""
    check_block("layer classes", range(1000 + 20 * block, 1020 + 20 * block))


@pytest.mark.parametrize("block", range(3))
def test_solver_equals_brute_force_over_experts_and_long_sequences(block: int) -> None:
    """30 random models of experts: expert and context parallelism, and how they exchange."""
    check_block("experts", range(10 * block, 10 * block + 10))


@pytest.mark.parametrize("block", range(3))
def test_solver_equals_brute_force_over_two_kinds_of_devices(block: int) -> None:
    """60 random clusters of two kinds: all splits, orders and limits."""
    check_block("two kinds", range(20 * block, 20 * block + 20))


@pytest.mark.parametrize("pinned", [Schedule.ZB_H1, Schedule.ZBV, Schedule.DUALPIPEV])
def test_solver_equals_brute_force_where_a_schedule_is_pinned(pinned: Schedule) -> None:
    """Of schedules that split backward passes, with more layers and micro-batches, without recomputation."""
    options = dataclasses.replace(
        EXACT, pins=parse_fixed_choices((f"schedule={pinned}", "recompute=none", "pp=2"))
    )
    feasible = 0
    for seed in range(30):
        drawn = instances.random_problem(seed, layers=6)
        problem = dataclasses.replace(drawn, workload=dataclasses.replace(drawn.workload, batch=8))
        if problem.cluster.devices % 2:
            continue
        best = brute_force(problem, lambda d: d.pp == 2 and d.schedule is pinned, (Recompute.NONE,))
        if best is None:
            with pytest.raises(InfeasibleError):
                solve(problem, options)
            continue
        plan = solve(problem, options)
        assert plan.solver is not None and plan.strategy.degrees.schedule is pinned
        assert plan.estimate.step_time_s == pytest.approx(best, rel=1e-6)
        assert plan.solver.lower_bound_s <= best * (1 + 1e-9)
        feasible += 1
    assert feasible >= 5


def test_every_schedule_is_searched_and_trained() -> None:
    """Without a pin the search is over all schedules; so it is for `plan train`, which runs them."""
    for engine in (None, Engine.NATIVE):
        found = set()
        for seed in range(200):
            problem = dataclasses.replace(instances.random_problem(seed), limits=Limits(engine=engine))
            found |= {
                shape.schedule for shape in shapes(problem, FixedChoices()) if isinstance(shape, Degrees)
            }
            if engine is None or seed >= 20:
                continue
            try:
                chosen = solve(problem, EXACT)
            except InfeasibleError:
                continue
            for strategy in (chosen.strategy, *(other.strategy for other in chosen.alternatives)):
                assert strategy.degrees.schedule in ENGINE_SCHEDULES[Engine.NATIVE]
        assert found == set(Schedule)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_paths_never_exceed_the_replay(schedule: Schedule) -> None:
    """Any bounding path is at most the makespan of the replay, for uneven stages too."""
    import random

    from planner.cost.replay import replay

    draw = random.Random(1)
    for _ in range(200):
        pp = draw.randint(2, 5)
        chunks = draw.randint(2, 3) if schedule is Schedule.INTERLEAVED else schedule.least_chunks
        rounds = draw.randint(2 if schedule is Schedule.DUALPIPEV else 1, 3)
        micro_batches = pp * rounds if chunks > 1 else draw.randint(1, 9)
        degrees = Degrees(pp=pp, chunks=chunks, schedule=schedule, num_micro_batches=micro_batches)
        forward = [draw.uniform(0.1, 2) for _ in range(degrees.stages)]
        backward = [draw.uniform(0.1, 4) for _ in range(degrees.stages)]
        hop_s = draw.choice([0.0, 0.2])
        costs = [cost(f, b) for f, b in zip(forward, backward, strict=True)]
        table = build_table(schedule, pp, chunks, micro_batches)
        step_s = replay(table, costs, hop_s, None, 1).step_time_s
        assert makespan_bound(degrees, forward, backward, hop_s) <= step_s * (1 + 1e-12)


def test_a_larger_space_is_never_worse() -> None:
    """Pinning any choice cannot make the plan faster; pinning the chosen one changes nothing."""
    problem = instances.random_problem(9)
    free = solve(problem, EXACT)
    chosen = free.strategy.degrees
    for fix in ("zero=1", "tp=1", "micro_batch=1", "recompute=full", "schedule=gpipe"):
        try:
            pinned = solve(problem, dataclasses.replace(EXACT, pins=parse_fixed_choices((fix,))))
        except InfeasibleError:
            continue
        assert pinned.estimate.step_time_s >= free.estimate.step_time_s * (1 - 1e-9)
    same = solve(
        problem, dataclasses.replace(EXACT, pins=parse_fixed_choices((f"tp={chosen.tp}", f"pp={chosen.pp}")))
    )
    assert same.estimate.step_time_s == pytest.approx(free.estimate.step_time_s, rel=1e-9)


def test_more_memory_never_hurts() -> None:
    """More memory never makes a feasible plan infeasible or slower."""
    problem = instances.random_problem(12)
    last = float("inf")
    for factor in (0.5, 1.0, 2.0, 4.0, 64.0):
        roomy = dataclasses.replace(problem, memory_limit_bytes=int(problem.memory_limit_bytes * factor))
        try:
            step_s = solve(roomy, EXACT).estimate.step_time_s
        except InfeasibleError:
            assert last == float("inf")
            continue
        assert step_s <= last * (1 + 1e-9)
        last = step_s
    assert last < float("inf")


def test_reproducible_plans_are_byte_identical() -> None:
    """The same inputs give the same plan, to the byte, without a clock in it."""
    problem = instances.random_problem(10)
    options = dataclasses.replace(EXACT, reproducible=True)
    first, second = encode_plan(solve(problem, options)), encode_plan(solve(problem, options))
    assert repr(first) == repr(second)
    assert first["solver"]["wall_s"] == 0.0


def test_a_plan_survives_its_file() -> None:
    """decode(encode(plan)) is the plan."""
    plan = solve(instances.random_problem(5), EXACT)
    assert decode_plan(encode_plan(plan), source="plan") == plan


def test_infeasible_says_what_binds() -> None:
    """A model that fits nowhere is refused with the rule, the numbers and what would help."""
    problem = instances.problem(limit_bytes=1000)
    with pytest.raises(InfeasibleError) as caught:
        solve(problem, EXACT)
    assert caught.value.exit_code == 3
    assert "memory" in str(caught.value)
    assert "What would help" in str(caught.value)


def test_a_time_limit_returns_a_legal_plan_with_its_gap() -> None:
    """An instant time limit still gives a plan that keeps the rules, and an honest gap."""
    problem = instances.problem(of=instances.model(layers=12), on=instances.cluster(nodes=2), batch=32)
    plan = solve(problem, dataclasses.replace(EXACT, time_limit_s=1e-6))
    assert plan.solver is not None
    assert plan.solver.lower_bound_s <= plan.solver.objective_s
    assert not broken_rules(problem, plan.strategy)
    exact = solve(problem, SolveOptions(pins=FixedChoices(), gap_tolerance=0.0))
    assert exact.solver is not None
    assert plan.solver.lower_bound_s <= exact.estimate.step_time_s * (1 + 1e-9)


@pytest.mark.parametrize(("family", "seed"), [("layer classes", 145)])
def test_solver_equals_brute_force_where_it_once_did_not(family: str, seed: int) -> None:
    """A stage that has room recomputes for another stage of its rank that has none."""
    problem = FAMILIES[family](seed)
    roomier = dataclasses.replace(problem, memory_limit_bytes=round(1.02 * problem.memory_limit_bytes))
    compared = compare(roomier)
    assert not compared.fault and compared.best_s is not None


@pytest.mark.parametrize("seed", range(12))
def test_a_search_that_gives_up_ends_without_a_plan_or_with_a_legal_one(seed: int) -> None:
    problem = instances.two_kinds(seed)
    options = SolveOptions(pins=FixedChoices(), time_limit_s=1e-9, gives_up=True)
    try:
        plan = solve(problem, options)
    except InfeasibleError:
        return
    assert broken_rules(problem, plan.strategy) == [] and plan.estimate.verdict is Verdict.SAFE
    assert plan.solver is not None and plan.solver.lower_bound_s <= plan.estimate.step_time_s
