"""Refined predictions: measured times and bytes in place of modelled ones, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from planner.advice.apply_rehearsal import refine
from planner.strategy.estimate import Verdict
from planner.strategy.plan import decode_plan, encode_plan
from planner.strategy.rehearsal import RehearsalMode, is_refined_choice
from tests.planner.rehearsed_ranks import PINS, as_modelled, plan_of, problem, rehearsal_of


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
    carrying = dataclasses.replace(plan, rehearsal=rehearsal_of(asked, plan))
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
