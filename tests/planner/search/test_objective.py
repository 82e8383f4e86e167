"""Objectives: dollars and days over numbers of nodes, against a search of every number of nodes."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from typing import NamedTuple

import pytest

from planner.commands.shared.objective_text import objective_text
from planner.cost.evaluate import CostModel
from planner.cost.stage.peak_memory import MEMORY_ERROR
from planner.foundation.errors import InfeasibleError
from planner.foundation.units import DAY_S
from planner.hardware.cluster import ClusterSpec
from planner.job.engine_settings import Engine
from planner.job.objective import Goal, Minimise, Objective
from planner.job.problem import NO_OVERHEADS, JobOverheads, Limits, PlanningProblem
from planner.model.sublayer import Recompute
from planner.search.engine_search import solve_for_engine
from planner.search.solve import solve
from planner.search.solve_for import StepBounds, node_counts, part_of, run_bound_s, run_seconds, solve_for
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.plan import Plan, decode_plan, encode_plan
from planner.strategy.plan_check import check_plan
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages
from tests.planner import instances
from tests.planner.search.test_solver import EXACT

NODES = 4
COST = Minimise.COST
BUSY = JobOverheads(data_tokens_per_s=5e5, checkpoint_every=50, storage_bytes_per_s=1e9, device_spread=0.05)
STOPPED = JobOverheads(
    checkpoint_every="best",
    checkpoint_async=True,
    storage_bytes_per_s=1e6,
    failures_per_1000_node_days=2000.0,
    repair_s=3600.0,
    spares=1,
    preemptions_per_1000_node_days=500.0,
    ramp_up_s=1800.0,
    eval_every=10,
    eval_s=1.0,
)
"""Stopped every few hours, with a spare node, whose dollars weigh most where nodes are few."""
FEW = dataclasses.replace(EXACT, pins=parse_fixed_choices(("schedule=1f1b", "sequence_parallel=false")))
"""A smaller space, so that many numbers of nodes can be searched."""


def priced(seed: int, overheads: JobOverheads = NO_OVERHEADS) -> PlanningProblem:
    """A small problem on several nodes at a price, with tokens for the whole run.

    Its memory is what the leanest plan needs on a number of nodes that the seed draws, or ample; so on fewer
    nodes nothing fits, and on just as many everything is recomputed.
    """
    draw = random.Random(seed)
    spec = instances.model(layers=draw.randint(2, 3), hidden=128, vocab=draw.choice([256, 4096]))
    on = instances.cluster(
        nodes=NODES, per_node=2, inter_bytes_per_s=10 ** draw.uniform(8, 12), link_bytes_per_s=1e12
    )
    on = dataclasses.replace(on, name=f"{NODES}x2:device", price_usd_per_hour=8.0)
    base = instances.problem(of=spec, on=on, seq=2048, batch=12, limit_bytes=1 << 40)
    workload = dataclasses.replace(base.workload, tokens=10**10)
    problem = dataclasses.replace(base, workload=workload, overheads=overheads)
    fits = draw.choice([1, 2, 3, 4, None])
    if fits is None:
        return problem
    need = leanest_bytes(dataclasses.replace(problem, cluster=part_of(on, fits)))
    limit = int(need * draw.uniform(1.0, 1.1) * (1 + MEMORY_ERROR["datasheet"])) + 1
    return dataclasses.replace(problem, memory_limit_bytes=limit)


def leanest_bytes(problem: PlanningProblem) -> int:
    """The peak of a plan that shards and recomputes everything."""
    devices = problem.cluster.devices
    degrees = Degrees(dp_shard=devices, zero=Zero.PARAMETERS, num_micro_batches=12 // devices)
    stages = even_stages(problem.model.layers, 1, Recompute.FULL)
    return CostModel(problem).evaluate(Strategy(degrees=degrees, stages=stages)).estimate.peak_memory_bytes


class Alone(NamedTuple):
    """The best plan on a number of nodes."""

    nodes: int
    seconds: float
    usd: float


@functools.cache
def every_count(seed: int, overheads: JobOverheads = NO_OVERHEADS) -> list[Alone]:
    """What each number of nodes does, searched for itself; numbers without a plan are left out."""
    found, problem = [], priced(seed, overheads)
    for nodes in node_counts(problem.cluster, problem.workload.batch):
        part = dataclasses.replace(problem, cluster=part_of(problem.cluster, nodes))
        try:
            plan = solve(part, FEW)
        except InfeasibleError:
            continue
        usd = (plan.estimate.job or plan.estimate).cost_usd
        assert usd is not None
        found.append(Alone(nodes, run_seconds(plan), usd))
    return found


def of(plan: Plan) -> Objective:
    assert plan.objective is not None
    return plan.objective


SEEDS = (0, 1, 2, 6, 7, 9, 10, 14, 18, 22)
"""Instances in which one, two or three nodes are the cheapest, and in which some have no plan."""


@pytest.mark.parametrize("overheads", [NO_OVERHEADS, BUSY], ids=["silent", "busy"])
@pytest.mark.parametrize("seed", SEEDS)
def test_least_cost_equals_a_search_of_every_number_of_nodes(seed: int, overheads: JobOverheads) -> None:
    problem = priced(seed, overheads)
    each = every_count(seed, overheads)
    cheapest = min(each, key=lambda alone: (alone.usd, alone.nodes))
    plan = solve_for(problem, FEW, Goal(minimise=COST))
    objective = of(plan)
    assert objective.cost_usd == pytest.approx(cheapest.usd, rel=1e-9)
    assert objective.nodes + objective.nodes_unused == NODES
    assert plan.cluster.groups[0].nodes == objective.nodes
    assert plan.cluster.price_usd_per_hour == pytest.approx(8.0 * objective.nodes / NODES)
    assert objective.lower_bound <= cheapest.usd * (1 + 1e-9)
    whole = [alone.usd for alone in each if alone.nodes == NODES]
    assert all(objective.cost_usd is not None and objective.cost_usd <= usd * (1 + 1e-9) for usd in whole)


@pytest.mark.parametrize("seed", SEEDS[1:4])
def test_spare_nodes_are_paid_where_cost_is_least(seed: int) -> None:
    problem = priced(seed, STOPPED)
    cheapest = min(every_count(seed, STOPPED), key=lambda alone: (alone.usd, alone.nodes))
    found = of(solve_for(problem, FEW, Goal(minimise=COST)))
    assert found.cost_usd == pytest.approx(cheapest.usd, rel=1e-9)
    assert found.days is not None
    assert found.cost_usd == pytest.approx(8.0 / NODES * (found.nodes + STOPPED.spares) * 24 * found.days)


def test_cost_is_not_least_on_one_number_of_nodes_alone() -> None:
    """The instances decide differently, so that the tests above say something."""
    chosen = {of(solve_for(priced(seed), FEW, Goal(minimise=COST))).nodes for seed in SEEDS}
    assert len(chosen) >= 3, chosen


@pytest.mark.parametrize("seed", SEEDS[::3])
def test_deadline_and_budget_equal_a_search_of_every_number_of_nodes(seed: int) -> None:
    """Deadlines and budgets between those of all plans: the best of what meets them, or none."""
    problem, each = priced(seed), every_count(seed)
    deadlines = sorted({alone.seconds * 1.001 for alone in each} | {min(a.seconds for a in each) * 0.99})
    budgets = sorted({alone.usd * 1.001 for alone in each} | {min(a.usd for a in each) * 0.99})
    goals = [Goal(minimise=COST, deadline_s=limit) for limit in deadlines]
    goals += [Goal(minimise=Minimise.TIME, budget_usd=limit) for limit in budgets]
    goals += [Goal(minimise=COST, deadline_s=deadlines[-1], budget_usd=limit) for limit in budgets]
    goals += [Goal(minimise=COST, deadline_s=limit, budget_usd=budgets[1]) for limit in deadlines]
    for goal in goals:
        kept = [alone for alone in each if goal.meets(alone.seconds, alone.usd)]
        if not kept:
            with pytest.raises(InfeasibleError):
                solve_for(problem, FEW, goal)
            continue
        plan = solve_for(problem, FEW, goal)
        objective = of(plan)
        assert objective.days is not None and objective.cost_usd is not None
        assert goal.meets(objective.days * DAY_S, objective.cost_usd)
        if goal.minimise is COST:
            assert objective.cost_usd == pytest.approx(min(a.usd for a in kept), rel=1e-9)
        else:
            assert objective.days * DAY_S == pytest.approx(min(a.seconds for a in kept), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS[1::3])
def test_a_tighter_deadline_is_never_cheaper(seed: int) -> None:
    problem = priced(seed)
    free = of(solve_for(problem, FEW, Goal(minimise=COST)))
    assert free.days is not None and free.cost_usd is not None
    last = free.cost_usd
    for share in (1.0001, 0.9, 0.7, 0.5, 0.35, 0.2):
        try:
            goal = Goal(minimise=COST, deadline_s=share * free.days * DAY_S)
            cost_usd = of(solve_for(problem, FEW, goal)).cost_usd
        except InfeasibleError:
            last = math.inf
            continue
        assert cost_usd is not None and cost_usd >= last * (1 - 1e-9)
        last = cost_usd


@pytest.mark.parametrize("overheads", [NO_OVERHEADS, BUSY, STOPPED], ids=["silent", "busy", "stopped"])
def test_no_run_beats_its_bound(overheads: JobOverheads) -> None:
    """The bound of a part lies below what its best plan takes, stalls and failures included."""
    for seed in SEEDS[::2]:
        problem = priced(seed, overheads)
        bounds = StepBounds(FEW.pins)
        for nodes in node_counts(problem.cluster, problem.workload.batch):
            part = dataclasses.replace(problem, cluster=part_of(problem.cluster, nodes))
            bound_s = run_bound_s(part, bounds.of(part))
            try:
                plan = solve(part, FEW)
            except InfeasibleError:
                continue
            assert bound_s <= run_seconds(plan) * (1 + 1e-9)
            assert run_bound_s(part, plan.estimate.step_time_s) <= run_seconds(plan) * (1 + 1e-9)


def test_some_numbers_of_nodes_are_ruled_out_by_their_bound_alone() -> None:
    tried = [t for seed in SEEDS for t in of(solve_for(priced(seed), FEW, Goal(minimise=COST))).tried]
    assert {"solved", "ruled_out"} <= {str(each.status) for each in tried}
    for each in tried:
        assert (each.days is not None) == (each.status == "solved")


def test_an_impossible_deadline_names_the_fastest() -> None:
    problem = priced(SEEDS[0])
    fastest = min(every_count(SEEDS[0]), key=lambda alone: alone.seconds)
    with pytest.raises(InfeasibleError) as caught:
        solve_for(problem, FEW, Goal(minimise=COST, deadline_s=fastest.seconds / 2))
    said = str(caught.value)
    assert "--deadline" in said and "the fastest plan" in said and "(100.0%) too long" in said
    assert f"on {fastest.nodes} of {NODES} nodes" in said and "What would help" in said
    with pytest.raises(InfeasibleError, match="too long"):
        solve_for(problem, FEW, Goal(deadline_s=fastest.seconds / 2))


def test_an_impossible_budget_names_the_cheapest() -> None:
    problem = priced(SEEDS[0])
    cheapest = min(every_count(SEEDS[0]), key=lambda alone: alone.usd)
    with pytest.raises(InfeasibleError) as caught:
        solve_for(problem, FEW, Goal(budget_usd=cheapest.usd / 1.25))
    said = str(caught.value)
    assert "--budget" in said and "the cheapest plan" in said and "(25.0%) too much" in said
    assert f"on {cheapest.nodes} of {NODES} nodes" in said


def test_a_deadline_and_a_budget_that_exclude_each_other() -> None:
    """Each can be met: the message names the cheapest in time and the fastest within the budget."""
    for seed in SEEDS:
        problem, each = priced(seed), every_count(seed)
        fastest, cheapest = min(each, key=lambda a: a.seconds), min(each, key=lambda a: a.usd)
        if fastest.nodes == cheapest.nodes:
            continue
        goal = Goal(deadline_s=fastest.seconds * 1.0001, budget_usd=cheapest.usd * 1.0001)
        if any(goal.meets(alone.seconds, alone.usd) for alone in each):
            continue
        with pytest.raises(InfeasibleError) as caught:
            solve_for(problem, FEW, goal)
        said = str(caught.value)
        assert "the cheapest plan" in said and "the fastest plan" in said
        assert "above the budget" in said and "beyond the deadline" in said
        return
    pytest.fail("no instance has a fastest plan that is not the cheapest")


def test_nothing_fits_is_told_as_by_the_plain_search() -> None:
    problem = dataclasses.replace(priced(SEEDS[0]), memory_limit_bytes=1000)
    with pytest.raises(InfeasibleError, match="memory"):
        solve_for(problem, FEW, Goal(minimise=COST))


def test_on_the_whole_cluster_unless_dollars_count() -> None:
    """A deadline alone leaves no node unused; the plain goal is the plain search."""
    problem = priced(SEEDS[0])
    objective = of(solve_for(problem, FEW, Goal(deadline_s=1e12)))
    assert objective.nodes == NODES and objective.nodes_unused == 0 and len(objective.tried) == 1
    options = dataclasses.replace(FEW, reproducible=True)
    assert solve_for(problem, options, Goal()) == solve(problem, options)


def test_a_time_limit_is_told() -> None:
    """With no time at all there is a plan, its bound, and which numbers of nodes were not searched."""
    seen = set()
    for seed in SEEDS:
        options = dataclasses.replace(FEW, time_limit_s=1e-6)
        objective = of(solve_for(priced(seed), options, Goal(minimise=COST)))
        best = min(alone.usd for alone in every_count(seed))
        assert objective.lower_bound <= best * (1 + 1e-9)
        if objective.status == "time_limit":
            assert objective.gap > 0
            seen |= {str(each.status) for each in objective.tried}
        else:
            assert objective.cost_usd == pytest.approx(best, rel=1e-9)
    assert "not_searched" in seen
    with pytest.raises(InfeasibleError, match="longer --time-limit"):
        solve_for(priced(SEEDS[0]), options, Goal(minimise=COST, deadline_s=1.0))
    assert "time limit ended" in objective_text(dataclasses.replace(objective, status="time_limit"))


def test_the_objective_survives_plan_json_and_is_checked() -> None:
    plan = solve_for(priced(SEEDS[0], BUSY), FEW, Goal(minimise=COST, deadline_s=1e12, budget_usd=1e12))
    document = encode_plan(plan)
    assert document["objective"]["minimise"] == "cost"
    assert document["objective"]["nodes_unused"] == of(plan).nodes_unused
    assert decode_plan(document, source="plan") == plan
    assert all(check.holds for check in check_plan(plan))
    text = objective_text(plan.objective)
    assert "least cost" in text and f"{of(plan).nodes} of {NODES}" in text and "chosen" in text
    for change in (
        {"nodes": 9}, {"cost_usd": 1.0}, {"days": 1.0}, {"deadline_days": 1e-9}, {"budget_usd": 1e-9},
        {"lower_bound": 1e15}, {"nodes_unused": -1}, {"cost_usd": None},
    ):  # fmt: skip
        other = dataclasses.replace(plan, objective=dataclasses.replace(of(plan), **change))
        assert [c.name for c in check_plan(other) if not c.holds] == ["objective"], change


def test_numbers_of_nodes() -> None:
    """All up to 16; then divisors of the cluster and what leaves the pipeline at most eight nodes' worth."""
    assert node_counts(instances.cluster(nodes=5), 7) == [1, 2, 3, 4, 5]
    counts = node_counts(instances.cluster(nodes=130), 512)
    assert counts[:16] == list(range(1, 17)) and counts[-1] == 130
    assert {26, 32, 64, 65, 96, 128, 24, 56} <= set(counts)
    assert not {17, 22, 33, 99, 127} & set(counts)
    two = dataclasses.replace(instances.cluster(), groups=instances.cluster().groups * 2)
    assert node_counts(two, 8) == [2]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("4x8:h100@ndr400x8", "3x8:h100@ndr400x8"),
        ("4*aws/p5.48xlarge", "3*aws/p5.48xlarge"),
        ("mine.toml", "3 of 4 nodes of mine.toml"),
        ("72x2:gb200", "3 of 4 nodes of 72x2:gb200"),
    ],
)
def test_a_part_of_a_cluster(name: str, part: str) -> None:
    whole = dataclasses.replace(instances.cluster(nodes=4), name=name, price_usd_per_hour=40.0)
    three = part_of(whole, 3)
    assert three.name == part and three.devices == 12 and three.price_usd_per_hour == 30.0
    assert part_of(whole, 4) == whole
    assert part_of(dataclasses.replace(whole, price_usd_per_hour=None), 2).price_usd_per_hour is None
    assert isinstance(three, ClusterSpec)


def test_an_engine_is_kept_on_every_number_of_nodes() -> None:
    """Least cost among plans that DeepSpeed can run equals the cheapest of each number of nodes."""
    problem = dataclasses.replace(priced(7), limits=Limits(engine=Engine.DEEPSPEED))
    plan = solve_for(problem, FEW, Goal(minimise=COST))
    assert plan.engine is Engine.DEEPSPEED
    each = []
    for nodes in node_counts(problem.cluster, problem.workload.batch):
        part = dataclasses.replace(problem, cluster=part_of(problem.cluster, nodes))
        try:
            each.append(
                (part.cluster.price_usd_per_hour or 0.0) * run_seconds(solve_for_engine(part, FEW)) / 3600
            )
        except InfeasibleError:
            continue
    assert len(each) >= 2 and of(plan).cost_usd == pytest.approx(min(each), rel=1e-9)
    used = dataclasses.replace(problem, cluster=plan.cluster)
    assert not broken_rules(used, plan.strategy)


def test_pins_hold_on_every_number_of_nodes() -> None:
    """A pinned dp is legal on one number of nodes only: the others have no plan."""
    problem = dataclasses.replace(priced(SEEDS[0]), memory_limit_bytes=1 << 40)
    options = dataclasses.replace(EXACT, pins=parse_fixed_choices(("dp=4", "tp=1", "pp=1")))
    objective = of(solve_for(problem, options, Goal(minimise=COST)))
    assert objective.nodes == 2
    assert {each.nodes: str(each.status) for each in objective.tried} == {
        1: "infeasible", 2: "solved", 3: "infeasible", 4: "infeasible",
    }  # fmt: skip
