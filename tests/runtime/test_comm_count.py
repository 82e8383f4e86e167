"""What ranks send in a step is what the cost model charges for: operation, axis, bytes, how often."""

from __future__ import annotations

from typing import Any

import pytest

from planner.model import ModelSpec
from planner.plan import Plan
from planner.strategy import CpExchange, Degrees, Recompute, Schedule, Stage, Zero
from tests.plans import make_plan, split, tiny_llama
from tests.runtime.messages import expected_messages, sent_messages

LLAMA = tiny_llama(layers=2)


def plan_of(stages: tuple[Stage, ...] | None = None, *, model: ModelSpec = LLAMA, **degrees: Any) -> Plan:
    return make_plan(model, Degrees(num_micro_batches=2, **degrees), stages)


PLANS = {
    "tp2": plan_of(tp=2),
    "tp2-sp": plan_of(tp=2, sequence_parallel=True),
    "tp2-recompute": plan_of(split(2, recompute=Recompute.FULL), tp=2),
    "tp2-sp-recompute": plan_of(split(2, recompute=Recompute.FULL), tp=2, sequence_parallel=True),
    "tp4-copied-heads": plan_of(tp=4, model=tiny_llama(layers=2, kv_heads=2)),
    "tp2-sp-zero2-one-head": plan_of(
        tp=2, dp_shard=2, zero=Zero(2), sequence_parallel=True, model=tiny_llama(layers=2, kv_heads=1)
    ),
    "tp2-67-tokens": plan_of(tp=2, model=tiny_llama(layers=2, vocab=67)),
    "pp2": plan_of(pp=2),
    "zero0": plan_of(dp_replicate=2),
    "zero1": plan_of(dp_shard=2, zero=Zero(1)),
    "zero2": plan_of(dp_shard=2, zero=Zero(2)),
    "zero3": plan_of(dp_shard=2, zero=Zero(3)),
    "hsdp": plan_of(dp_shard=2, dp_replicate=2, zero=Zero(3)),
    "pp2-tp2-sp": plan_of(pp=2, tp=2, sequence_parallel=True, schedule=Schedule.GPIPE),
    "cp2": plan_of(cp=2, cp_exchange=CpExchange.ALL_TO_ALL),
    "cp2-zero3": plan_of(cp=2, dp_shard=2, zero=Zero(3), cp_exchange=CpExchange.GATHER),
    "tp2-zero2": plan_of(tp=2, dp_shard=2, zero=Zero(2)),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_sent_is_what_is_charged_for(name: str) -> None:
    plan = PLANS[name]
    for found, expected in zip(sent_messages(plan), expected_messages(plan), strict=True):
        assert found == expected
