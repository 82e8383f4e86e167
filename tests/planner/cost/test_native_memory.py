"""What the own runtime holds while a block runs back: ranks of plans for H100s, as traced on shapes alone.

Bytes are those of bench/results/*-rehearsal-traces.json, whose plans take too long to trace here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.rehearsal import H100, plan_of
from planner.cost.evaluate import CostModel
from planner.cost.stage.memory_timeline import StageMemory
from planner.foundation.units import GIB
from planner.strategy.equivalent_ranks import alike_ranks
from planner.strategy.schedule.table import InFlight
from planner.strategy.strategy import Zero

TRACES = sorted((Path(__file__).parents[3] / "bench" / "results").glob("*-rehearsal-traces.json"))[-1]
TRACED = {row["plan"]: row["gib"] for row in json.loads(TRACES.read_text())["rows"]}
CASES = [case for case in H100 if f"{case[0]} {case[1].split(':')[0]} {case[4]}" in TRACED]


def test_most_plans_are_traced() -> None:
    assert len(CASES) >= 15


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[4]}")
def test_predicted_ranks_hold_what_was_traced(case: tuple[str, str, int, int, str]) -> None:
    plan = plan_of(*case).plan
    traced = TRACED[f"{case[0]} {case[1].split(':')[0]} {case[4]}"]
    for kind, gib in zip(alike_ranks(plan), traced, strict=True):
        stages = plan.strategy.degrees.stages_of_pp_rank(kind[0])
        predicted = sum(plan.stage_estimates[stage].memory.allocated_bytes for stage in stages)
        assert predicted == pytest.approx(gib * GIB, rel=0.02), kind


def memory_of(pins: str, stage: int) -> StageMemory:
    asked = plan_of("llama-3-8b", "2x8:h100-sxm-80gb", 8192, 64, pins)
    model = CostModel(asked.problem)
    shape = model.layout(asked.plan.strategy.degrees)
    return StageMemory(shape, model.stage_costs(shape, asked.plan.strategy)[stage])


@pytest.mark.parametrize(("zero", "once"), [(Zero.OPTIMIZER, True), (Zero.GRADIENTS, False)])
def test_a_step_that_reduces_once_does_so_beside_nothing_else(zero: Zero, once: bool) -> None:
    held = memory_of(f"pp=2 dp=8 zero={int(zero)} micro_batch=1 schedule=1f1b recompute=full", 0)
    alone, beside = (held.transient_bytes(InFlight(alive=alive)) for alive in (1, 9))
    unit = held.stage.largest_block_params
    assert alone - beside == pytest.approx(once * 4 * (1 + 1 / 8) * unit, rel=0.1, abs=1)


def test_a_head_is_reduced_while_the_last_block_runs_back() -> None:
    """A stage of one block, which none is behind, and whose states and activations are all there."""
    held = memory_of("dp=16 zero=2 micro_batch=1 recompute=full", 0)
    head, unit = held.layout.head_unit.params, held.stage.largest_block_params
    assert head > 2 * unit
    beyond = held.transient_bytes(InFlight(alive=1)) + held.stage.saved_bytes
    assert beyond > 4 * head + held.stage.block_saved_bytes + held.stage.block_transient_bytes
