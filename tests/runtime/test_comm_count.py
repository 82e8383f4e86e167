"""What ranks send in a step is what the cost model charges for: operation, axis, bytes, how often."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from planner.cost.charged import Message, charged_messages
from planner.plan import Plan
from planner.profile import Op
from planner.strategy import Degrees, Recompute, Schedule, Stage, Zero
from runtime.comm_count import count_messages
from runtime.executor import Executor
from tests.plans import make_plan, split, tiny_llama
from tests.runtime.ranks import batch_of, make_executor, on_ranks, slice_of

LAYERS = 2
LLAMA = tiny_llama(layers=LAYERS)


def plan_of(stages: tuple[Stage, ...] | None = None, **degrees: Any) -> Plan:
    return make_plan(LLAMA, Degrees(num_micro_batches=2, **degrees), stages)


PLANS = {
    "tp2": plan_of(tp=2),
    "tp2-sp": plan_of(tp=2, sequence_parallel=True),
    "tp2-recompute": plan_of(split(2, recompute=Recompute.FULL), tp=2),
    "tp2-sp-recompute": plan_of(split(2, recompute=Recompute.FULL), tp=2, sequence_parallel=True),
    "pp2": plan_of(pp=2),
    "zero0": plan_of(dp_replicate=2),
    "zero1": plan_of(dp_shard=2, zero=Zero(1)),
    "zero2": plan_of(dp_shard=2, zero=Zero(2)),
    "zero3": plan_of(dp_shard=2, zero=Zero(3)),
    "hsdp": plan_of(dp_shard=2, dp_replicate=2, zero=Zero(3)),
    "pp2-tp2-sp": plan_of(pp=2, tp=2, sequence_parallel=True, schedule=Schedule.GPIPE),
    "tp2-zero2": plan_of(tp=2, dp_shard=2, zero=Zero(2)),
}


def beside(plan: Plan, *, last: bool) -> Counter[Message]:
    """What is sent and not charged for, since it is small: once a step, whatever the model's size.

    The loss and the squared gradient norm, 8 bytes each, over the world; and under sequence parallelism the
    gradients of norms, which each rank has of its slice, as one all-reduce over tp.
    """
    degrees = plan.strategy.degrees
    whole = [
        axis for axis in ("tp", "dp_shard", "dp_replicate", "pp") if getattr(degrees, axis) == degrees.world
    ]
    found = Counter({Message(Op.ALL_REDUCE, (*whole, "world")[0], 16): 1})
    if degrees.tp > 1 and degrees.sequence_parallel:
        norms = 2 * LAYERS // degrees.pp + last
        found[Message(Op.ALL_REDUCE, "tp", 4 * norms * LLAMA.hidden)] = 1
    return found


def sent(executor: Executor) -> list[list[Any]]:
    """The messages of a second step, as JSON: the first one also sets things up."""
    plan = executor.plan
    executor.step(slice_of(executor, batch_of(plan, 0)))
    counted = count_messages(
        lambda: executor.step(slice_of(executor, batch_of(plan, 1))), executor.meshes.world
    )
    return [[*message, count] for message, count in counted.items()]


def from_json(rows: list[list[Any]]) -> Counter[Message]:
    return Counter({Message(Op(op), axis, size): count for op, axis, size, count in rows})


@pytest.mark.parametrize("name", PLANS)
def test_what_is_sent_is_what_is_charged_for(name: str) -> None:
    plan = PLANS[name]
    degrees = plan.strategy.degrees
    charged = charged_messages(plan)
    ranks = on_ranks(lambda rank: sent(make_executor(plan)), degrees.world)
    for rank, rows in enumerate(ranks):
        stage = rank * degrees.pp // degrees.world
        expected = charged[stage] + beside(plan, last=stage == degrees.pp - 1)
        assert from_json(rows) == expected
