"""What ranks send in a step is what the cost model charges for: operation, axis, bytes, how often."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.model.attention import CpExchange
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Schedule, Stage, Zero
from tests.plans import make_plan, parallel, split, tiny_deepseek_experts, tiny_gpt2, tiny_llama, tiny_mixtral
from tests.runtime.messages import expected_messages, sent_messages


def changed(model: ModelSpec, **changes: Any) -> ModelSpec:
    """A model of one class of blocks with these changed."""
    (segment,) = model.segments
    return replace(model, segments=(replace(segment, block=replace(segment.block, **changes)),))


def shared_experts() -> ModelSpec:
    """DeepSeek's experts: shared ones beside, a loss and a bias that balance; no gate, whose one row FSDP
    pads to the number of its ranks."""
    model = tiny_deepseek_experts(layers=2)
    return changed(model, mlp=replace(model.block(0).mlp, shared_gate=False))


LLAMA, MIXTRAL, DEEPSEEK = tiny_llama(layers=2), tiny_mixtral(layers=2), shared_experts()
FEW_KEYS = changed(LLAMA, mixer=replace(LLAMA.block(0).mixer, kv_heads=2))
GATED = tiny_deepseek_experts(layers=2)
SIDE_BY_SIDE = {norms: parallel(tiny_gpt2(layers=2), norms) for norms in (1, 2)}
FULL, SELECTIVE = (split(2, recompute=option) for option in (Recompute.FULL, Recompute.SELECTIVE))
RING, GATHER, ALL_TO_ALL = CpExchange.RING, CpExchange.GATHER, CpExchange.ALL_TO_ALL


def plan_of(stages: tuple[Stage, ...] | None = None, of: ModelSpec = LLAMA, **degrees: Any) -> Plan:
    return make_plan(of, Degrees(num_micro_batches=2, **degrees), stages)


PLANS = {
    "tp2": plan_of(tp=2),
    "tp2-sp": plan_of(tp=2, sequence_parallel=True),
    "tp2-recompute": plan_of(split(2, recompute=Recompute.FULL), tp=2),
    "tp2-sp-recompute": plan_of(split(2, recompute=Recompute.FULL), tp=2, sequence_parallel=True),
    "tp4-copied-heads": plan_of(tp=4, of=tiny_llama(layers=2, kv_heads=2)),
    "tp2-sp-zero2-one-head": plan_of(
        tp=2, dp_shard=2, zero=Zero(2), sequence_parallel=True, of=tiny_llama(layers=2, kv_heads=1)
    ),
    "tp2-67-tokens": plan_of(tp=2, of=tiny_llama(layers=2, vocab=67)),
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
    # Context parallelism: rings, gathered keys, and heads for sequence.
    "cp4-ring": plan_of(cp=4, cp_exchange=RING),
    "cp2-ring-tp2-sp": plan_of(cp=2, cp_exchange=RING, tp=2, sequence_parallel=True),
    "cp2-ring-recompute": plan_of(FULL, cp=2, cp_exchange=RING),
    "cp2-ring-selective": plan_of(SELECTIVE, cp=2, cp_exchange=RING),
    "cp2-pp2-gather": plan_of(cp=2, cp_exchange=GATHER, pp=2, zero=Zero(1)),
    "cp2-all-to-all-recompute": plan_of(FULL, cp=2, cp_exchange=ALL_TO_ALL),
    "cp4-all-to-all-few-keys": plan_of(SELECTIVE, FEW_KEYS, cp=4, cp_exchange=ALL_TO_ALL),
    "cp4-ring-few-keys-bf16": make_plan(
        FEW_KEYS, Degrees(num_micro_batches=2, cp=4, cp_exchange=RING), precision=Precision.BF16
    ),
    # Sublayers side by side.
    "parallel-tp2": plan_of(of=SIDE_BY_SIDE[1], tp=2),
    "parallel-tp2-sp-recompute": plan_of(FULL, SIDE_BY_SIDE[1], tp=2, sequence_parallel=True),
    "parallel-two-norms-tp2": plan_of(FULL, SIDE_BY_SIDE[2], tp=2),
    "parallel-two-norms-tp2-sp": plan_of(of=SIDE_BY_SIDE[2], tp=2, sequence_parallel=True),
    # Experts split as all else is; over dp, over tp, over both; each in as many shards, or in fewer.
    "experts-dp2": plan_of(of=MIXTRAL, dp_replicate=2),
    "experts-tp2": plan_of(of=DEEPSEEK, tp=2),
    "experts-tp2-sp": plan_of(of=MIXTRAL, tp=2, sequence_parallel=True),
    "ep2-over-dp": plan_of(of=DEEPSEEK, ep=2, dp_shard=2, zero=Zero(1)),
    "ep2-over-dp-recompute": plan_of(FULL, MIXTRAL, ep=2, dp_shard=2, zero=Zero(3)),
    "ep2-of-dp4-zero2": plan_of(of=MIXTRAL, ep=2, dp_shard=4, zero=Zero(2)),
    "ep2-hsdp": plan_of(of=DEEPSEEK, ep=2, dp_shard=2, dp_replicate=2, zero=Zero(3)),
    "ep2-pp2": plan_of(of=MIXTRAL, ep=2, dp_shard=2, pp=2, zero=Zero(2)),
    "ep2-over-tp": plan_of(of=DEEPSEEK, ep=2, etp=1, tp=2, sequence_parallel=True),
    "ep2-over-tp-selective": plan_of(SELECTIVE, MIXTRAL, ep=2, etp=1, tp=2, sequence_parallel=True),
    "ep2-over-tp-gated": plan_of(FULL, GATED, ep=2, etp=1, tp=2, sequence_parallel=True),
    "ep2-etp2": plan_of(of=DEEPSEEK, ep=2, etp=2, tp=2, dp_shard=2, zero=Zero(1)),
    "ep2-etp2-sp": plan_of(of=MIXTRAL, ep=2, etp=2, tp=2, dp_shard=2, sequence_parallel=True, zero=Zero(1)),
    "ep2-etp2-sp-selective": plan_of(
        SELECTIVE, DEEPSEEK, ep=2, etp=2, tp=2, dp_shard=2, sequence_parallel=True, zero=Zero(1)
    ),
    "ep1-etp2-of-tp4": plan_of(of=DEEPSEEK, ep=1, etp=2, tp=4, sequence_parallel=True),
    "ep1-etp1-of-tp2": plan_of(of=MIXTRAL, ep=1, etp=1, tp=2, sequence_parallel=True),
    "ep2-over-cp": plan_of(of=DEEPSEEK, ep=2, cp=2, cp_exchange=RING, zero=Zero(1)),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_sent_is_what_is_charged_for(name: str) -> None:
    plan = PLANS[name]
    for found, expected in zip(sent_messages(plan), expected_messages(plan), strict=True):
        assert found == expected
