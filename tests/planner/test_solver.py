"""The solver against brute force, and the laws that its certificate must keep."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest

from planner.cost import constants
from planner.cost.evaluate import CostModel, stage_memory
from planner.cost.schedule import build_table
from planner.cost.verdict import band
from planner.errors import InfeasibleError
from planner.execution import EXECUTED_SCHEDULES
from planner.plan import decode_plan, encode_plan
from planner.problem import PlanningProblem
from planner.rules import broken_rules
from planner.search.bounds import memory_bound_bytes, step_bound_s
from planner.search.paths import makespan_bound
from planner.search.solve import SolveOptions, solve
from planner.search.space import Pins, parse_pins, shapes
from planner.strategy import Degrees, Recompute, RecomputeCounts, Schedule, Stage, Strategy, Zero

from . import instances
from .instances import cost

EXACT = SolveOptions(pins=Pins(), gap_tolerance=0.0, rounds=10_000, nodes=None)


BY_DEFAULT = (
    (Schedule.GPIPE, 1),
    (Schedule.ONE_F_ONE_B, 1),
    *((Schedule.INTERLEAVED, chunks) for chunks in (2, 3, 4)),
)
"""Schedules, with their stages a rank, that a search without pins looks at."""


def all_degrees(
    problem: PlanningProblem, schedules: tuple[tuple[Schedule, int], ...] = BY_DEFAULT
) -> Iterator[Degrees]:
    """Every combination of small degrees, legal or not, made without the planner's own generator."""
    devices, batch = problem.cluster.devices, problem.workload.batch
    upto = range(1, devices + 1)
    for tp, pp, replicate, shard in itertools.product(upto, upto, upto, upto):
        if tp * pp * replicate * shard != devices:
            continue
        per_node = problem.cluster.devices_per_node
        hybrid = replicate > 1 and shard > 1
        if hybrid and shard != per_node // tp:
            continue
        for zero, sequence_parallel, micro_batch in itertools.product(
            Zero, (False, True), range(1, batch + 1)
        ):
            if batch % (replicate * shard * micro_batch):
                continue
            for schedule, chunks in schedules:
                if pp == 1 and schedule is not Schedule.ONE_F_ONE_B:
                    continue
                yield Degrees(
                    tp=tp,
                    pp=pp,
                    chunks=chunks,
                    schedule=schedule,
                    dp_replicate=replicate,
                    dp_shard=shard,
                    zero=zero,
                    micro_batch=micro_batch,
                    num_micro_batches=batch // (replicate * shard * micro_batch),
                    sequence_parallel=sequence_parallel,
                )


def all_stages(layers: int, stages: int) -> Iterator[tuple[Stage, ...]]:
    """Every cut of `layers` into `stages`, with every mix of recompute options on each."""
    for cut in itertools.combinations(range(1, layers), stages - 1):
        bounds = [0, *cut, layers]
        options = [
            [
                Stage(first=a, end=b, recompute=RecomputeCounts(none=b - a - s - f, selective=s, full=f))
                for f in range(b - a + 1)
                for s in range(b - a - f + 1)
            ]
            for a, b in itertools.pairwise(bounds)
        ]
        yield from itertools.product(*options)


def brute_force(
    problem: PlanningProblem,
    schedules: tuple[tuple[Schedule, int], ...] = BY_DEFAULT,
    options: tuple[Recompute, ...] = tuple(Recompute),
    pp: int | None = None,
) -> float | None:
    """The least replayed step time of all strategies that keep the rules and are judged SAFE."""
    model = CostModel(problem)
    best: float | None = None
    for degrees in all_degrees(problem, schedules):
        cuts = all_stages(problem.model.layers, degrees.stages)
        first = next(iter(cuts), None)
        if (
            first is None
            or pp not in (None, degrees.pp)
            or broken_rules(problem, Strategy(degrees=degrees, stages=first))
        ):
            continue
        shape = model.shape(degrees)
        table = build_table(degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches)
        limit = problem.memory_limit_bytes / (1 + band(constants.MEMORY_ERROR, model.coverage(shape)))
        bound_s = step_bound_s(model, shape, options, limit)
        for stages in all_stages(problem.model.layers, degrees.stages):
            if any(set(stage.recompute.options()) - set(options) for stage in stages):
                continue
            costs = model.stage_costs(shape, Strategy(degrees=degrees, stages=stages))
            peak_bytes = stage_memory(shape, table, costs)[1]
            assert memory_bound_bytes(shape) <= peak_bytes + 16
            if peak_bytes > limit:
                continue
            step_s = model.replay(shape, table, costs).step_time_s
            assert bound_s <= step_s * (1 + 1e-9), degrees.label()
            if best is None or step_s < best:
                best = step_s
    return best


def check_seed(seed: int, *, mixed: bool = False) -> bool:
    """The solver's plan is as fast as the best of all, or both find none. Whether there is one."""
    problem = instances.random_problem(seed, mixed=mixed)
    best = brute_force(problem)
    if best is None:
        with pytest.raises(InfeasibleError):
            solve(problem, EXACT)
        return False
    plan = solve(problem, EXACT)
    assert plan.solver is not None
    assert plan.estimate.step_time_s == pytest.approx(best, rel=1e-6)
    assert plan.solver.lower_bound_s <= best * (1 + 1e-9)
    assert plan.solver.status == "optimal"
    return True


@pytest.mark.parametrize("block", range(10))
def test_solver_equals_brute_force(block: int) -> None:
    """200 random instances, ten blocks of twenty, in each of which several are feasible."""
    feasible = [check_seed(seed) for seed in range(20 * block, 20 * block + 20)]
    assert sum(feasible) >= 5


@pytest.mark.parametrize("block", range(5))
def test_solver_equals_brute_force_over_several_layer_classes(block: int) -> None:
    """100 random models of two classes of layers in any order: experts, latents, states, windows."""
    feasible = [check_seed(seed, mixed=True) for seed in range(1000 + 20 * block, 1020 + 20 * block)]
    assert sum(feasible) >= 5


@pytest.mark.parametrize("pinned", [Schedule.ZB_H1, Schedule.ZBV, Schedule.DUALPIPEV])
def test_solver_equals_brute_force_where_a_schedule_is_pinned(pinned: Schedule) -> None:
    """Schedules that no search chooses by itself, without recomputation; feasible in several instances."""
    options = dataclasses.replace(EXACT, pins=parse_pins((f"schedule={pinned}", "recompute=none", "pp=2")))
    feasible = 0
    for seed in range(30):
        drawn = instances.random_problem(seed, layers=6)
        problem = dataclasses.replace(drawn, workload=dataclasses.replace(drawn.workload, batch=8))
        if problem.cluster.devices % 2:
            continue
        best = brute_force(problem, ((pinned, pinned.least_chunks),), (Recompute.NONE,), pp=2)
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


def test_a_schedule_that_cannot_be_trained_is_never_chosen_unasked() -> None:
    """Without a pin the search is over the schedules that the runtime executes."""
    problems = [instances.random_problem(seed) for seed in range(20)]
    legal = [degrees for problem in problems for degrees in shapes(problem, Pins())]
    found = {degrees.schedule for degrees in legal if isinstance(degrees, Degrees)}
    assert found == set(EXECUTED_SCHEDULES)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_paths_never_exceed_the_replay(schedule: Schedule) -> None:
    """Any bounding path is at most the makespan of the replay, for uneven stages too."""
    import random

    from planner.cost.simulate import replay

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
            pinned = solve(problem, dataclasses.replace(EXACT, pins=parse_pins((fix,))))
        except InfeasibleError:
            continue
        assert pinned.estimate.step_time_s >= free.estimate.step_time_s * (1 - 1e-9)
    same = solve(problem, dataclasses.replace(EXACT, pins=parse_pins((f"tp={chosen.tp}", f"pp={chosen.pp}"))))
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
    exact = solve(problem, SolveOptions(pins=Pins(), gap_tolerance=0.0))
    assert exact.solver is not None
    assert plan.solver.lower_bound_s <= exact.estimate.step_time_s * (1 + 1e-9)
