"""Metamorphic laws of the whole search: inputs changed in ways whose effect on the best plan is known."""

from __future__ import annotations

import dataclasses
import random

import pytest

from planner.cost.constants import time_constants_of
from planner.foundation.errors import InfeasibleError
from planner.hardware.cluster import ClusterSpec, DeviceGroup, Link
from planner.job.engine_settings import Engine
from planner.job.problem import Limits, PlanningProblem
from planner.profile.profile import PROFILE_SCHEMA, Constant, Profile
from planner.search.solve import SolveOptions, solve
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.plan import Plan
from planner.strategy.strategy import Strategy
from tests.planner import instances

EXACT = SolveOptions(pins=FixedChoices(), gap_tolerance=0.0, rounds=10_000, nodes=None)
SEEDS = [0, 9, 13, 31, 40, 49]


def plan_of(of: PlanningProblem, pins: FixedChoices | None = None) -> Plan:
    return solve(of, dataclasses.replace(EXACT, pins=pins or FixedChoices()))


def solved_s(of: PlanningProblem) -> float:
    """The step time of the best plan, infinite where there is none."""
    try:
        return plan_of(of).estimate.step_time_s
    except InfeasibleError:
        return float("inf")


def on(of: PlanningProblem, cluster: ClusterSpec) -> PlanningProblem:
    return dataclasses.replace(of, cluster=cluster)


def same(first: Plan, second: Plan) -> bool:
    """Whether two plans choose the same and expect the same of it."""
    return first.strategy == second.strategy and first.estimate == second.estimate


# Names and lists


@pytest.mark.parametrize("seed", SEEDS)
def test_renamed_devices_and_links_change_nothing(seed: int) -> None:
    of = instances.random_problem(seed)
    cluster = of.cluster
    groups = tuple(
        dataclasses.replace(g, device=dataclasses.replace(g.device, name="new", title="New", vendor="Other"))
        for g in cluster.groups
    )
    renamed = dataclasses.replace(
        cluster,
        name="elsewhere",
        groups=groups,
        intra=dataclasses.replace(cluster.intra, name="a"),
        inter=dataclasses.replace(cluster.inter, name="b"),
    )
    assert same(plan_of(of), plan_of(on(of, renamed)))
    assert same(plan_of(of), plan_of(dataclasses.replace(of, model=dataclasses.replace(of.model, name="x"))))


def test_nodes_may_be_listed_one_by_one() -> None:
    """Two nodes in one group, or in a group each of the same device."""
    seen = set()
    for seed in (2, 5, 11, 12, 17, 19, 20, 23):
        of = instances.random_problem(seed)
        (group,) = of.cluster.groups
        if group.nodes == 1:
            continue
        one = dataclasses.replace(group, nodes=1)
        split = on(of, dataclasses.replace(of.cluster, groups=(one,) * group.nodes))
        found, again = solved_s(of), solved_s(split)
        assert found == again
        seen.add(found)
    assert len(seen - {float("inf")}) >= 2


def two_kinds(seed: int) -> PlanningProblem:
    """Two groups of one node of two, of devices that differ in speed and memory."""
    draw = random.Random(seed)
    base = instances.random_problem(seed, layers=3)
    slow = instances.device(flops=10 ** draw.uniform(10, 12), bandwidth=1e11, name="slow")
    fast = instances.device(flops=10 ** draw.uniform(12, 13), bandwidth=4e11, name="fast")
    groups = tuple(DeviceGroup(device=each, nodes=1, devices_per_node=2) for each in (slow, fast))
    limit = base.memory_limit_bytes
    cluster = dataclasses.replace(base.cluster, groups=groups)
    workload = dataclasses.replace(base.workload, batch=4)
    limits = (("slow", limit), ("fast", 2 * limit))
    return dataclasses.replace(base, cluster=cluster, workload=workload, device_limits_bytes=limits)


@pytest.mark.parametrize("seed", [0, 2, 4, 5])
def test_groups_of_a_mixed_cluster_may_be_listed_in_any_order(seed: int) -> None:
    """The best order of ranks is found whichever way the groups are listed."""
    of = two_kinds(seed)
    turned = on(of, dataclasses.replace(of.cluster, groups=of.cluster.groups[::-1]))
    first = solved_s(of)
    assert first < float("inf")
    assert first == pytest.approx(solved_s(turned), rel=1e-9)


# Units


def timed(of: PlanningProblem, factor: float) -> PlanningProblem:
    """The problem where devices, links and the host are `factor` times as fast."""

    def quick(link: Link) -> Link:
        rate = link.bytes_per_s
        return dataclasses.replace(
            link, latency_s=link.latency_s / factor, bytes_per_s=None if rate is None else rate * factor
        )

    groups = tuple(
        dataclasses.replace(
            g,
            device=instances.device(
                flops=(g.device.peak_bf16_flops or 0) * factor,
                bandwidth=(g.device.memory_bandwidth_bytes_per_s or 0) * factor,
            ),
        )
        for g in of.cluster.groups
    )
    cluster = dataclasses.replace(
        of.cluster, groups=groups, intra=quick(of.cluster.intra), inter=quick(of.cluster.inter)
    )
    usual = time_constants_of(None, of.engine_settings)
    seconds = {n: getattr(usual, n) / factor for n in usual.__dataclass_fields__ if n.endswith("_s")}
    profile = Profile(
        schema_version=PROFILE_SCHEMA, name="host", device="device", device_title="", backend="", created="",
        versions={}, devices_per_node=8, slots_per_node=None, layers=(), comms=(), contention=(),
        constants=tuple(Constant(name=name, value=value, origin="test") for name, value in seconds.items()),
    )  # fmt: skip
    return dataclasses.replace(of, cluster=cluster, profile=profile)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_all_speeds_times_k_is_the_same_plan_in_time_over_k(seed: int, factor: float) -> None:
    of = timed(instances.random_problem(seed), 1.0)
    slow, fast = plan_of(of), plan_of(timed(of, factor))
    assert factor * fast.estimate.step_time_s == pytest.approx(slow.estimate.step_time_s, rel=1e-9)
    assert fast.strategy == slow.strategy


# Options


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dominated_choice_changes_nothing(seed: int) -> None:
    """What an engine or a limit forbids besides the best plan's own choices was not what made it best."""
    of = instances.random_problem(seed)
    best = plan_of(of)
    held = dataclasses.replace(of, limits=Limits(max_tp=best.strategy.degrees.tp))
    assert plan_of(held).estimate == best.estimate
    assert solved_s(of) <= solved_s(dataclasses.replace(of, limits=Limits(engine=Engine.NATIVE))) * (1 + 1e-9)


def pinned(strategy: Strategy) -> FixedChoices:
    """Pins of every degree of a strategy."""
    d = strategy.degrees
    texts = [f"{key}={getattr(d, key)}" for key in ("tp", "pp", "chunks", "dp", "cp", "ep", "micro_batch")]
    texts += [f"zero={int(d.zero)}", f"sequence_parallel={d.sequence_parallel}"]
    return parse_fixed_choices((*texts, *([f"schedule={d.schedule}"] if d.pp > 1 else [])))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_chosen_plan_pinned_is_the_plan(seed: int) -> None:
    of = instances.random_problem(seed)
    best = plan_of(of)
    again = plan_of(of, pinned(best.strategy))
    assert again.estimate.step_time_s == pytest.approx(best.estimate.step_time_s, rel=1e-9)
    assert again.strategy.degrees == best.strategy.degrees
    assert again.solver is not None and again.solver.status == "optimal"


@pytest.mark.parametrize("seed", SEEDS)
def test_more_memory_is_never_worse(seed: int) -> None:
    of, last = instances.random_problem(seed), float("inf")
    for share in (0.5, 0.8, 1.0, 1.3, 2.0, 8.0):
        step_s = solved_s(dataclasses.replace(of, memory_limit_bytes=int(of.memory_limit_bytes * share)))
        assert step_s <= last * (1 + 1e-9), share
        last = step_s
    assert last < float("inf")


@pytest.mark.parametrize("seed", SEEDS)
def test_more_work_for_the_search_is_never_worse(seed: int) -> None:
    """Every limit of work gives a plan and a bound that the exact answer lies between."""
    of = instances.random_problem(seed)
    exact_s = solved_s(of)
    for rounds, nodes, gap in ((1, 1, 0.1), (2, 5, 0.01), (100, 20, 0.0)):
        plan = solve(of, dataclasses.replace(EXACT, rounds=rounds, nodes=nodes, gap_tolerance=gap))
        assert plan.solver is not None
        assert plan.solver.lower_bound_s <= exact_s * (1 + 1e-9)
        assert plan.estimate.step_time_s >= exact_s * (1 - 1e-9)
        if plan.solver.status == "optimal":
            assert plan.estimate.step_time_s <= exact_s / (1 - gap) * (1 + 1e-6)


@pytest.mark.parametrize("limit_s", [None, 0.1, 5.0])
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zb-h1", "zbv"])
def test_what_is_pinned_is_the_plans(schedule: str, limit_s: float | None) -> None:
    """However short the time, and whatever is faster: here a backward that is split runs forward twice."""
    on_four = instances.cluster(per_node=4, of=instances.device(flops=1e13, bandwidth=1e12))
    of = instances.problem(of=instances.model(layers=8), on=on_four, batch=8)
    pins = parse_fixed_choices(("pp=4", "micro_batch=1", "recompute=full", f"schedule={schedule}"))
    plan = solve(of, SolveOptions(pins=pins, time_limit_s=limit_s))
    assert plan.strategy.degrees.schedule == schedule
    others = (plan.strategy, *(other.strategy for other in plan.alternatives))
    for strategy in others:
        assert strategy.degrees.schedule == schedule and strategy.degrees.pp == 4
        assert all(stage.recompute.full == stage.layers for stage in strategy.stages)
