"""Monotone laws of whole estimates and of the search: more work is never cheaper, more means never worse."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

import pytest

from planner.cost.evaluate import CostModel
from planner.cost.replay import replay
from planner.foundation.errors import InfeasibleError
from planner.hardware.cluster import ClusterSpec
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.model.sublayer import Recompute
from planner.model.workload import Workload
from planner.search.solve import SolveOptions, solve
from planner.search.space import shapes
from planner.strategy.estimate import Estimate
from planner.strategy.fixed_choices import FixedChoices, parse_fixed_choices
from planner.strategy.schedule.schedules import build_table
from planner.strategy.strategy import Degrees, Schedule, Strategy, even_stages
from tests.planner import instances
from tests.planner.instances import cost

PINS = ((), ("schedule=zb-h1",), ("schedule=zbv",), ("schedule=dualpipev",))
DUST = 1 + 1e-9
"""Sums of floats in another order."""


def estimate(problem: PlanningProblem, degrees: Degrees, recompute: Recompute) -> Estimate:
    stages = even_stages(problem.model.layers, degrees.stages, recompute)
    return CostModel(problem).evaluate(Strategy(degrees=degrees, stages=stages)).estimate


def some_problem(seed: int) -> PlanningProblem:
    """A random problem of up to eight layers with a batch that many pipelines can share out."""
    problem = instances.random_problem(seed, layers=8)
    return dataclasses.replace(problem, workload=dataclasses.replace(problem.workload, batch=8))


def some_shapes(problem: PlanningProblem, seed: int, each: int) -> list[tuple[Degrees, Recompute]]:
    """Legal shapes of every schedule, at random, with a recompute option."""
    draw, found = random.Random(seed), []
    for fixed in PINS:
        legal = [shape for shape in shapes(problem, parse_fixed_choices(fixed)) if isinstance(shape, Degrees)]
        draw.shuffle(legal)
        found += [(degrees, draw.choice(list(Recompute))) for degrees in legal[:each]]
    return found


def faster_clusters(on: ClusterSpec, factor: float) -> Iterator[tuple[str, ClusterSpec]]:
    """The cluster with one of its speeds `factor` times as high."""
    for key in ("intra", "inter"):
        link = getattr(on, key)
        for name, value in (
            ("bytes_per_s", link.bytes_per_s * factor),
            ("latency_s", link.latency_s / factor),
        ):
            yield (
                f"{key} {name}",
                dataclasses.replace(on, **{key: dataclasses.replace(link, **{name: value})}),
            )
    group = on.groups[0]
    device = group.device
    assert device.peak_bf16_flops and device.memory_bandwidth_bytes_per_s
    for name, value in (
        ("peak_bf16_flops", device.peak_bf16_flops * factor),
        ("memory_bandwidth_bytes_per_s", device.memory_bandwidth_bytes_per_s * factor),
    ):
        quick = dataclasses.replace(group, device=dataclasses.replace(device, **{name: value}))
        yield name, dataclasses.replace(on, groups=(quick,))


@pytest.mark.parametrize("seed", range(8))
def test_each_speed_alone_is_never_slower(seed: int) -> None:
    """Links, latencies, products, memory: one at a time, by a little and by much, under every schedule."""
    problem, gained = some_problem(seed), set()
    for degrees, recompute in some_shapes(problem, seed, 6):
        slow_s = estimate(problem, degrees, recompute).step_time_s
        for factor in (1.05, 3.0):
            for name, on in faster_clusters(problem.cluster, factor):
                quick = dataclasses.replace(problem, cluster=on)
                fast_s = estimate(quick, degrees, recompute).step_time_s
                assert fast_s <= slow_s * DUST, (name, factor, degrees.label())
                gained |= {name} if fast_s < slow_s else set()
    assert len(gained) >= 2, "what is made faster matters to some of the strategies"


@pytest.mark.parametrize(
    "cluster", ["2x8:h100-sxm-80gb@ndr400x8", "2x8:a100-sxm-80gb@hdr200x8", "2x8:mi300x"]
)
def test_each_speed_alone_is_never_slower_on_known_devices(cluster: str) -> None:
    """Where rates and curves are measured ones: faster products, memory and links between nodes."""
    on = parse_cluster(cluster, "test")
    problem = instances.problem(of=instances.model(hidden=1024, heads=16), on=on, seq=1024, batch=32)
    for degrees, recompute in some_shapes(problem, 1, 8):
        slow_s = estimate(problem, degrees, recompute).step_time_s
        for name, quick in faster_clusters(on, 1.3):
            if name != "intra bytes_per_s":  # a link that is stated is no longer the one that was measured
                fast_s = estimate(dataclasses.replace(problem, cluster=quick), degrees, recompute).step_time_s
                assert fast_s <= slow_s * DUST, (name, degrees.label())


@pytest.mark.parametrize("seed", range(10))
def test_more_work_is_never_cheaper(seed: int) -> None:
    """Longer sequences, more of them, larger micro-batches, wider or deeper models, larger vocabularies."""
    problem = some_problem(seed)
    spec, workload = problem.model, problem.workload
    for degrees, recompute in some_shapes(problem, seed, 6):
        twice = dataclasses.replace(problem, workload=dataclasses.replace(workload, batch=16))
        longer = dataclasses.replace(workload, seq=workload.seq + 8 * degrees.tp)
        wide = instances.model(layers=spec.layers, hidden=2 * spec.hidden, vocab=spec.vocab)
        deep = instances.model(layers=spec.layers + 1, hidden=spec.hidden, vocab=spec.vocab)
        words = instances.model(layers=spec.layers, hidden=spec.hidden, vocab=spec.vocab + 64)
        more = [
            (dataclasses.replace(problem, workload=longer), degrees),
            (twice, dataclasses.replace(degrees, num_micro_batches=2 * degrees.num_micro_batches)),
            (twice, dataclasses.replace(degrees, micro_batch=2 * degrees.micro_batch)),
            *((dataclasses.replace(problem, model=model), degrees) for model in (wide, deep, words)),
        ]
        least = estimate(problem, degrees, recompute)
        for case, (larger, shape) in enumerate(more):
            found = estimate(larger, shape, recompute)
            assert found.step_time_s * DUST >= least.step_time_s, (case, degrees.label())
            assert found.peak_memory_bytes + 16 >= least.peak_memory_bytes, (case, degrees.label())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("schedule", list(Schedule))
def test_another_micro_batch_costs_about_itself(schedule: Schedule, seed: int) -> None:
    """One more (of interleaved: p more) takes longer, by at most the slowest rank's passes and a sixth."""
    draw = random.Random(seed)
    pp = draw.choice([2, 3, 4, 8])
    chunks = draw.randint(2, 3) if schedule is Schedule.INTERLEAVED else schedule.least_chunks
    uneven, hop_s = draw.choice([0.0, 0.1, 1.0]), draw.choice([0.0, 0.2])
    costs = [
        cost(1 + uneven * draw.random(), 2 + 2 * uneven * draw.random(), 0.1) for _ in range(pp * chunks)
    ]
    step = pp if schedule is Schedule.INTERLEAVED else 1
    least = 2 * pp if schedule is Schedule.DUALPIPEV else step
    degrees = Degrees(pp=pp, chunks=chunks, schedule=schedule)
    work_s = [0.0] * pp
    for stage, each in enumerate(costs):
        work_s[degrees.pp_rank_of_stage(stage)] += each.forward.total_s + each.backward.total_s
    counts = range(least, least + 5 * pp * step, step)
    times = [replay(build_table(schedule, pp, chunks, m), costs, hop_s, None, 1).step_time_s for m in counts]
    for before_s, after_s in itertools.pairwise(times):
        assert 0 < after_s - before_s <= 7 / 6 * step * max(work_s) + 2 * hop_s


EXACT = SolveOptions(pins=FixedChoices(), gap_tolerance=0.0, rounds=10_000, nodes=None)


def solved_s(problem: PlanningProblem, options: SolveOptions = EXACT) -> float:
    """The step time of the best plan, infinite where there is none."""
    try:
        return solve(problem, options).estimate.step_time_s
    except InfeasibleError:
        return float("inf")


@pytest.mark.parametrize("seed", [3, 7, 8, 21, 34])
def test_more_memory_and_faster_clusters_never_make_a_plan_worse(seed: int) -> None:
    """Of the whole search: no plan is lost with more memory, none is slower on a faster cluster."""
    problem = instances.random_problem(seed)
    last = float("inf")
    for factor in (0.6, 1.0, 1.5, 3.0):
        limit = int(problem.memory_limit_bytes * factor)
        step_s = solved_s(dataclasses.replace(problem, memory_limit_bytes=limit))
        assert step_s <= last * DUST, "more memory"
        last = step_s
    assert last < float("inf")
    here = solved_s(problem)
    for name, on in faster_clusters(problem.cluster, 2.0):
        assert solved_s(dataclasses.replace(problem, cluster=on)) <= here * DUST, name


@pytest.mark.parametrize("seed", [2, 9, 10])
def test_every_pin_is_never_faster(seed: int) -> None:
    """A larger space is never worse: no pin of any one choice beats the free search."""
    problem = instances.random_problem(seed)
    free_s = solved_s(problem)
    assert free_s < float("inf")
    fixes = [f"tp={n}" for n in (1, 2)] + [f"pp={n}" for n in (1, 2)] + [f"zero={n}" for n in range(4)]
    fixes += ["micro_batch=1", "recompute=none", "recompute=full", "schedule=gpipe", "schedule=1f1b"]
    pinned = [
        solved_s(problem, dataclasses.replace(EXACT, pins=parse_fixed_choices((fix,)))) for fix in fixes
    ]
    assert all(each >= free_s / DUST for each in pinned)
    assert min(pinned) == pytest.approx(free_s, rel=1e-9), "some choice of each kind is the best plan's"


def test_a_longer_training_costs_in_proportion() -> None:
    """Days and dollars are the tokens over the tokens a second."""
    problem = dataclasses.replace(
        some_problem(0), cluster=dataclasses.replace(some_problem(0).cluster, price_usd_per_hour=3.0)
    )
    results = []
    for tokens in (10**9, 3 * 10**9):
        workload: Workload = dataclasses.replace(problem.workload, tokens=tokens)
        degrees = Degrees(
            dp_replicate=problem.cluster.devices, num_micro_batches=8 // problem.cluster.devices
        )
        results.append(estimate(dataclasses.replace(problem, workload=workload), degrees, Recompute.NONE))
    for name in ("days", "cost_usd"):
        assert getattr(results[1], name) == pytest.approx(3 * getattr(results[0], name), rel=1e-9)
    assert results[0].step_time_s == results[1].step_time_s
