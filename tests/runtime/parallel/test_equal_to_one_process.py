"""Sharded equals unsharded: in every layout, losses and gradient norms are those of one process.

A few layouts for each axis; `bench.matrix` runs many more, of every axis together.
"""

from __future__ import annotations

import pytest

from planner.model.sublayer import Recompute
from planner.strategy.plan import Plan
from planner.strategy.strategy import RecomputeCounts, Schedule, Stage, Zero
from tests.plans import batch8, make_plan, parallel, split, tiny_gpt2, tiny_llama
from tests.runtime.matrix import TOLERANCE
from tests.runtime.ranks import make_executor, on_ranks, single_process, train

STEPS = 5
GPIPE, ONE_F_ONE_B, INTERLEAVED = Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED
LLAMA, GPT2 = tiny_llama(), tiny_gpt2()
SIDE_BY_SIDE, TWO_NORMS = (parallel(GPT2, norms) for norms in (1, 2))
MIXED = RecomputeCounts(none=1, selective=1, full=2)


CASES: dict[str, Plan] = {
    "tp2-sp": make_plan(LLAMA, batch8(tp=2, micro_batch=4, sequence_parallel=True)),
    "tp4": make_plan(LLAMA, batch8(tp=4, micro_batch=4)),
    "pp2-interleaved": make_plan(LLAMA, batch8(pp=2, chunks=2, micro_batch=2, schedule=INTERLEAVED)),
    "pp2-uneven": make_plan(LLAMA, batch8(pp=2, micro_batch=2), split(3, 1)),
    "dp2-zero0": make_plan(LLAMA, batch8(dp_replicate=2, micro_batch=2)),
    "dp2-zero1": make_plan(LLAMA, batch8(dp_shard=2, micro_batch=2, zero=Zero(1))),
    "dp2-zero2": make_plan(LLAMA, batch8(dp_shard=2, micro_batch=2, zero=Zero(2))),
    "dp2-zero3": make_plan(LLAMA, batch8(dp_shard=2, micro_batch=2, zero=Zero(3))),
    "hsdp": make_plan(LLAMA, batch8(dp_replicate=2, dp_shard=2, micro_batch=1, zero=Zero(3))),
    "tp2-sp-dp2-zero2": make_plan(
        LLAMA, batch8(tp=2, dp_shard=2, micro_batch=2, zero=Zero(2), sequence_parallel=True)
    ),
    "pp2-dp2-zero3": make_plan(LLAMA, batch8(pp=2, dp_shard=2, micro_batch=1, zero=Zero(3))),
    "recompute-mixed": make_plan(
        LLAMA, batch8(dp_shard=2, micro_batch=2, zero=Zero(3)), (Stage(first=0, end=4, recompute=MIXED),)
    ),
    "recompute-pp2": make_plan(
        LLAMA, batch8(pp=2, micro_batch=2), split(3, 1, recompute=Recompute.SELECTIVE)
    ),
    "gpt2-tp2-sp-pp2": make_plan(GPT2, batch8(tp=2, pp=2, micro_batch=2, sequence_parallel=True)),
    "parallel-tp2": make_plan(SIDE_BY_SIDE, batch8(tp=2, micro_batch=2)),
    "parallel-tp2-sp": make_plan(
        SIDE_BY_SIDE, batch8(tp=2, micro_batch=2, sequence_parallel=True), split(4, recompute=Recompute.FULL)
    ),
    "parallel-two-norms-tp2-sp": make_plan(
        TWO_NORMS, batch8(tp=2, dp_shard=2, micro_batch=2, zero=Zero(1), sequence_parallel=True)
    ),
    "gpt2-pp2-dp2-zero2": make_plan(GPT2, batch8(pp=2, dp_shard=2, micro_batch=1, zero=Zero(2))),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradient_norms_are_those_of_one_process(name: str) -> None:
    plan = CASES[name]
    expected = [value for pair in single_process(plan, STEPS) for value in pair]
    for trajectory in on_ranks(
        lambda rank: train(make_executor(plan), 0, STEPS), plan.strategy.degrees.world
    ):
        assert [value for pair in trajectory for value in pair] == pytest.approx(expected, rel=TOLERANCE)
