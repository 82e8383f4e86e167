"""Refined predictions: measured times and bytes in place of modelled ones, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from planner.catalog import load_model, profile_files
from planner.cluster_grammar import parse_cluster
from planner.commands.estimate import strategy_of
from planner.cost.evaluate import CostModel
from planner.cost.simulate import kind_passes
from planner.estimate import Verdict
from planner.plan import Plan, decode_plan, encode_plan
from planner.problem import PlanningProblem
from planner.profile import load_profile
from planner.rank_kinds import alike_ranks
from planner.refine import refine
from planner.rehearsal import (
    RankRehearsal,
    Rehearsal,
    RehearsalMode,
    RehearsedPass,
    RehearsedPlan,
    is_refined_choice,
)
from planner.rules import broken_rules
from planner.search.solve import make_plan
from planner.search.space import parse_pins
from planner.workload import Precision, Workload

PINS = (
    "dp=4 zero=0 micro_batch=2",
    "dp=4 zero=3 micro_batch=4",
    "tp=2 dp=2 zero=1 sequence_parallel=true micro_batch=2",
    "pp=2 dp=2 zero=1 micro_batch=2 schedule=1f1b",
    "pp=4 micro_batch=2 schedule=zb-h1 recompute=full",
    "pp=4 chunks=2 micro_batch=2 schedule=zbv",
    "pp=2 chunks=2 tp=2 micro_batch=4 schedule=interleaved",
)
CPU = next(path for path in profile_files() if path.name.startswith("cpu-"))


def problem(cluster: str = "local:4") -> PlanningProblem:
    local = cluster.startswith("local")
    return PlanningProblem(
        model=load_model("shardwise-demo"),
        workload=Workload(seq=256, batch=16, precision=Precision.FP32 if local else Precision.BF16),
        cluster=parse_cluster(cluster),
        profile=load_profile(CPU) if local else None,
        memory_limit_bytes=2**32,
    )


def plan_of(asked: PlanningProblem, pins: str) -> Plan:
    strategy = strategy_of(asked, parse_pins(tuple(pins.split())))
    assert not broken_rules(asked, strategy)
    return make_plan(asked, CostModel(asked).evaluate(strategy), None, {}, ())


def as_modelled(asked: PlanningProblem, plan: Plan, factor: float = 1.0) -> list[RankRehearsal]:
    """Rehearsed ranks that took what the model says, times a factor."""
    model, degrees = CostModel(asked), plan.strategy.degrees
    shape = model.shape(degrees)
    costs = model.stage_costs(shape, plan.strategy)
    table = model.table(degrees)
    found = []
    for alike in alike_ranks(plan):
        held = table.stages_of(alike[0])
        kinds = {(stage, kind) for stage, kind in table.counts(alike[0])}
        passes = tuple(
            RehearsedPass(
                stage=stage,
                kind=str(kind),
                seconds=factor * max(kind_passes(costs[stage])[kind].work_s - _added(kind, shape), 0.0),
                spread=0.0,
                samples=3,
            )
            for stage, kind in sorted(kinds)
        )
        found.append(
            RankRehearsal(
                rank=degrees.ranks_of_pp_rank(alike[0])[0],
                alike=alike,
                stages=tuple(held),
                passes=passes,
                update_s=factor * sum(costs[stage].optimizer_s for stage in held),
                allocated_bytes=sum(plan.stage_estimates[s].memory.allocated_bytes for s in held),
                start_bytes=0,
            )
        )
    return found


def _added(kind: object, shape: object) -> float:
    """What the schedule adds to a pass; once to a backward pass, however it is split."""
    return 0.0 if str(kind) == "W" else shape.action.work_s  # type: ignore[attr-defined]


@pytest.mark.parametrize("cluster", ["local:4", "1x4:h100-sxm-80gb"])
@pytest.mark.parametrize("pins", PINS)
def test_what_is_measured_as_modelled_changes_nothing(pins: str, cluster: str) -> None:
    asked = problem(cluster)
    plan = plan_of(asked, pins)
    refined = refine(asked, plan, as_modelled(asked, plan), RehearsalMode.PROCESSOR)
    assert refined.step_time_s == pytest.approx(plan.estimate.step_time_s, rel=2e-3)
    assert refined.breakdown.total_s == pytest.approx(refined.step_time_s)
    assert 0.0 < refined.measured_share <= 1.0
    low, high = refined.step_time_interval_s
    assert low < refined.step_time_s < high
    assert refined.peak_memory_bytes == pytest.approx(plan.estimate.peak_memory_bytes, rel=1e-3)
    assert refined.verdict is Verdict.SAFE


@pytest.mark.parametrize("pins", PINS)
def test_slower_passes_make_a_slower_step(pins: str) -> None:
    asked = problem()
    plan = plan_of(asked, pins)
    times = [
        refine(asked, plan, as_modelled(asked, plan, factor), RehearsalMode.PROCESSOR).step_time_s
        for factor in (0.5, 1.0, 2.0)
    ]
    assert times == sorted(times) and times[0] < times[1] < times[2]


def test_a_machine_that_runs_slower_beside_its_reference_is_told_from_a_slower_rank() -> None:
    asked = problem()
    plan = plan_of(asked, PINS[0])
    assert asked.profile is not None
    usual = sorted(s.reference_s for s in asked.profile.layers if s.reference_s)
    ranks = as_modelled(asked, plan, 2.0)
    slow = [dataclasses.replace(rank, reference_s=2 * usual[len(usual) // 2]) for rank in ranks]
    refined = refine(asked, plan, slow, RehearsalMode.PROCESSOR)
    assert refined.step_time_s == pytest.approx(plan.estimate.step_time_s, rel=0.02)


def test_ranks_that_were_not_rehearsed_keep_the_model() -> None:
    asked = problem()
    plan = plan_of(asked, "pp=4 micro_batch=2 schedule=1f1b")
    ranks = as_modelled(asked, plan, 10.0)
    one = refine(asked, plan, ranks[:1], RehearsalMode.PROCESSOR)
    every = refine(asked, plan, ranks, RehearsalMode.PROCESSOR)
    assert plan.estimate.step_time_s < one.step_time_s < every.step_time_s
    assert one.measured_share < every.measured_share


def test_memory_is_what_the_fullest_rank_took() -> None:
    asked = problem()
    plan = plan_of(asked, "pp=4 micro_batch=2 schedule=1f1b")
    ranks = as_modelled(asked, plan)
    ranks[2] = dataclasses.replace(ranks[2], allocated_bytes=3 * 2**30)
    refined = refine(asked, plan, ranks, RehearsalMode.PROCESSOR)
    assert refined.peak_memory_bytes >= 3 * 2**30 and refined.verdict is Verdict.SAFE
    ranks[2] = dataclasses.replace(ranks[2], allocated_bytes=2**32 - 2**20)
    assert refine(asked, plan, ranks, RehearsalMode.PROCESSOR).verdict is Verdict.RISKY
    ranks[2] = dataclasses.replace(ranks[2], allocated_bytes=None, ran_out="running a step")
    assert refine(asked, plan, ranks, RehearsalMode.PROCESSOR).verdict is Verdict.NO


def test_what_the_allocator_reserved_counts_where_it_is_known() -> None:
    asked = problem("1x4:h100-sxm-80gb")
    plan = plan_of(asked, "dp=4 zero=3 micro_batch=4")
    (rank,) = as_modelled(asked, plan)
    reserved = dataclasses.replace(rank, reserved_bytes=2 * 2**30)
    runtime = plan.stage_estimates[0].memory.runtime_bytes
    refined = refine(asked, plan, [reserved], RehearsalMode.DEVICE)
    assert refined.peak_memory_bytes == 2 * 2**30 + runtime


def test_shapes_alone_leave_the_time_as_it_was() -> None:
    asked = problem()
    plan = plan_of(asked, PINS[1])
    (rank,) = as_modelled(asked, plan)
    bare = dataclasses.replace(rank, passes=(), update_s=None)
    refined = refine(asked, plan, [bare], RehearsalMode.FAKE_TENSORS)
    assert refined.step_time_s == plan.estimate.step_time_s and refined.measured_share == 0.0


def test_a_plan_carries_its_rehearsal_through_json(tmp_path: Path) -> None:
    asked = problem()
    plan = plan_of(asked, PINS[3])
    ranks = tuple(as_modelled(asked, plan))
    refined = refine(asked, plan, ranks, RehearsalMode.PROCESSOR)
    rehearsal = Rehearsal(
        mode=RehearsalMode.PROCESSOR,
        device="a CPU",
        created="2026-11-26T00:00:00+00:00",
        versions={"torch": "2.13.0"},
        compiled=False,
        micro_batches=4,
        ranks=ranks,
        complete=True,
        refined=refined,
        others=(RehearsedPlan(label="tp2", predicted_step_time_s=1.0, refined=refined),),
    )
    carrying = dataclasses.replace(plan, rehearsal=rehearsal)
    assert decode_plan(encode_plan(carrying), source="a plan") == carrying
    assert "rehearsal" not in encode_plan(plan)


def test_a_plan_that_fits_more_surely_is_preferred_then_the_faster() -> None:
    asked = problem()
    plan = plan_of(asked, PINS[0])
    safe = refine(asked, plan, as_modelled(asked, plan), RehearsalMode.PROCESSOR)
    risky = dataclasses.replace(safe, verdict=Verdict.RISKY, step_time_s=safe.step_time_s / 2)
    faster = dataclasses.replace(safe, step_time_s=0.9 * safe.step_time_s)
    assert is_refined_choice(safe, risky) and not is_refined_choice(risky, safe)
    assert is_refined_choice(faster, safe) and not is_refined_choice(safe, safe)
