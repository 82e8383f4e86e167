"""What was executed is read back from the running model and equals the plan; a deviation is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.foundation.decode import decode, encode
from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import build_table, print_table
from planner.strategy.strategy import Degrees, RecomputeCounts, Schedule, Stage, Zero
from runtime.check.executed_settings import Executed
from runtime.model.attention import Attention
from tests.plans import make_plan, tiny_llama
from tests.runtime.ranks import make_executor, on_ranks, train

LLAMA = tiny_llama()
MIXED = RecomputeCounts(none=1, selective=1, full=2)

PLANS: dict[str, Plan] = {
    "one-rank": make_plan(LLAMA, Degrees(micro_batch=2, num_micro_batches=3)),
    "tp2": make_plan(LLAMA, Degrees(tp=2, micro_batch=2)),
    "tp2-sp-pp2": make_plan(
        LLAMA, Degrees(tp=2, pp=2, micro_batch=1, num_micro_batches=2, sequence_parallel=True)
    ),
    "pp2-gpipe-uneven": make_plan(
        LLAMA,
        Degrees(pp=2, schedule=Schedule.GPIPE, num_micro_batches=3),
        (
            Stage(first=0, end=3, recompute=RecomputeCounts(none=1, full=2)),
            Stage(first=3, end=4, recompute=RecomputeCounts(none=0, selective=1)),
        ),
    ),
    "interleaved-zero2": make_plan(
        LLAMA,
        Degrees(
            pp=2,
            chunks=2,
            schedule=Schedule.INTERLEAVED,
            dp_shard=2,
            zero=Zero.GRADIENTS,
            num_micro_batches=4,
        ),
    ),
    "dp2-zero0": make_plan(LLAMA, Degrees(dp_replicate=2, num_micro_batches=2)),
    "dp2-zero1": make_plan(LLAMA, Degrees(dp_shard=2, zero=Zero.OPTIMIZER, num_micro_batches=2)),
    "dp2-zero2": make_plan(LLAMA, Degrees(dp_shard=2, zero=Zero.GRADIENTS, num_micro_batches=2)),
    "dp2-zero2-one-pass": make_plan(LLAMA, Degrees(dp_shard=2, zero=Zero.GRADIENTS)),
    "dp2-zero3-mixed": make_plan(
        LLAMA,
        Degrees(dp_shard=2, zero=Zero.PARAMETERS, num_micro_batches=2),
        (Stage(first=0, end=4, recompute=MIXED),),
    ),
    "hsdp": make_plan(LLAMA, Degrees(dp_replicate=2, dp_shard=2, zero=Zero.OPTIMIZER, num_micro_batches=2)),
    "tp2-dp2-zero3": make_plan(LLAMA, Degrees(tp=2, dp_shard=2, zero=Zero.PARAMETERS)),
}


def executed(plan: Plan) -> list[Executed]:
    """What each rank says that all of them executed."""

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        train(executor, 0, 1)
        return encode(executor.executed())

    return [decode(Executed, value, source="rank") for value in on_ranks(body, plan.strategy.degrees.world)]


@pytest.mark.parametrize("name", PLANS)
def test_executed_is_the_plan(name: str) -> None:
    plan = PLANS[name]
    for found in executed(plan):
        assert found.differences(plan) == ()
        assert found.strategy == plan.strategy
        assert found.schedule_table == plan.schedule_table


def test_any_other_plan_differs_from_what_was_executed() -> None:
    plan = PLANS["pp2-gpipe-uneven"]
    found = executed(plan)[0]
    degrees = plan.strategy.degrees
    others = [
        replace(degrees, tp=2),
        replace(degrees, zero=Zero.PARAMETERS),
        replace(degrees, micro_batch=2),
        replace(degrees, schedule=Schedule.ONE_F_ONE_B),
    ]
    for other in others:
        changed = replace(plan, strategy=replace(plan.strategy, degrees=other))
        assert len(found.differences(changed)) == 1
    even = make_plan(LLAMA, degrees)
    assert [line.split()[0] for line in found.differences(even)] == ["stages"]
    table = print_table(build_table(Schedule.ONE_F_ONE_B, 2, 1, 3))
    assert [line.split()[0] for line in found.differences(replace(plan, schedule_table=table))] == [
        "schedule"
    ]


def test_the_table_itself_is_executed_not_the_schedule_that_it_is_named_after() -> None:
    """1F1B's name over GPipe's table: the record shows GPipe."""
    degrees = Degrees(pp=2, schedule=Schedule.ONE_F_ONE_B, num_micro_batches=4)
    table = print_table(build_table(Schedule.GPIPE, 2, 1, 4))
    for found in executed(replace(make_plan(LLAMA, degrees), schedule_table=table)):
        assert found.schedule_table == table
        assert found.strategy.degrees.schedule is Schedule.GPIPE


def test_zero_is_read_from_what_fsdp_did() -> None:
    """A ZeRO 1 plan whose backward passes are told to reduce every time is read as ZeRO 2."""

    def body(rank: int) -> int:
        executor = make_executor(PLANS["dp2-zero1"])
        for module in executor.modules:
            module.zero = Zero.GRADIENTS
        train(executor, 0, 1)
        return int(executor.executed().strategy.degrees.zero)

    assert on_ranks(body, 2) == [2, 2]


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("one-rank", [3] * 4),
        ("pp2-gpipe-uneven", [6, 6, 3, 6]),
        ("dp2-zero3-mixed", [4, 4, 4, 2]),
        ("interleaved-zero2", [4] * 4),
    ],
)
def test_every_layer_runs_once_a_micro_batch_and_once_more_if_recomputed(name: str, calls: list[int]) -> None:
    """Counted from the first step on, so no extra pass to find shapes goes unseen."""
    plan = PLANS[name]

    def body(rank: int) -> dict[str, int]:
        executor = make_executor(plan)
        counts: dict[str, int] = {}
        for module in executor.modules:
            for index, layer in module.model.layers.items():
                attention = next(part for part in layer.modules() if isinstance(part, Attention))
                attention.register_forward_pre_hook(
                    lambda _module, _args, index=index: counts.update({index: counts.get(index, 0) + 1})
                )
        train(executor, 0, 1)
        return counts

    for counts in on_ranks(body, plan.strategy.degrees.world):
        assert counts == {index: calls[int(index)] for index in counts}
        assert counts


def test_gradient_sync_flags_of_each_stage() -> None:
    """ZeRO 1 reduces in the last backward only, 2 and 3 in each."""

    def body(rank: int) -> list[list[bool]]:
        found = []
        for name in ("dp2-zero1", "dp2-zero2", "dp2-zero3-mixed"):
            executor = make_executor(PLANS[name])
            train(executor, 0, 1)
            found.append(executor.pipeline.record.reduced)
        return found

    assert on_ranks(body, 2)[0] == [[False, True], [True, True], [True, True]]
