"""Problems that an engine must run, degrees and stages: what tests of its rules are made of."""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.job.engine_settings import Engine
from planner.job.problem import Limits, PlanningProblem
from planner.model.attention import Attention, AttentionSpan, Reach
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.workload import AdapterModules, Adapters, Method
from planner.strategy.strategy import (
    Degrees,
    RecomputeCounts,
    Stage,
    Zero,
)
from tests.planner import instances

N, T, M, D = Engine.NATIVE, Engine.TORCHTITAN, Engine.MEGATRON, Engine.DEEPSPEED


def held(engine: Engine | None, problem: PlanningProblem | None = None, **workload: Any) -> PlanningProblem:
    """A problem on two nodes of four devices that an engine must run."""
    base = problem or instances.problem(on=instances.cluster(nodes=2))
    changed = dataclasses.replace(base.workload, **workload)
    return dataclasses.replace(base, workload=changed, limits=Limits(engine=engine))


def grouped() -> PlanningProblem:
    """The same with two key-value heads in every layer."""
    mixer = Attention(heads=4, kv_heads=2, head_dim=16)
    spec = instances.model(blocks=[dataclasses.replace(instances.dense_block(64), mixer=mixer)] * 4)
    return instances.problem(of=spec, on=instances.cluster(nodes=2))


def experts() -> PlanningProblem:
    """The same with eight experts in every layer."""
    mlp = Mlp(width=128, gated=True, activation=Activation.SILU)
    block = dataclasses.replace(instances.dense_block(64), mlp=Experts(count=8, topk=2, expert=mlp))
    spec = instances.model(blocks=[block] * 4)
    return instances.problem(of=spec, on=instances.cluster(nodes=2))


LORA: dict[str, Any] = {"method": Method.LORA, "adapters": Adapters(rank=8, modules=AdapterModules.ALL)}
PP2 = Degrees(pp=2, dp_shard=4, zero=Zero.OPTIMIZER)
TP2 = Degrees(tp=2, dp_replicate=4)
TWO_NODES = instances.cluster(nodes=2)
ZERO3 = Degrees(dp_shard=8, zero=Zero.PARAMETERS)
PP3 = Degrees(pp=2, dp_shard=4, zero=Zero.PARAMETERS)
TIED = dataclasses.replace(instances.model(), tied_embeddings=True)


def windowed() -> PlanningProblem:
    """The same with windows of 64 keys in every layer."""
    block = instances.dense_block(64)
    assert isinstance(block.mixer, Attention)
    mixer = dataclasses.replace(block.mixer, span=AttentionSpan(reach=Reach.WINDOW, size=64))
    spec = instances.model(blocks=[dataclasses.replace(block, mixer=mixer)] * 4)
    return held(N, instances.problem(of=spec, on=TWO_NODES))


def uneven(*counts: tuple[int, int, int]) -> tuple[Stage, ...]:
    """Stages with so many blocks that recompute nothing, selectively, in full."""
    stages, first = [], 0
    for none, selective, full in counts:
        each = RecomputeCounts(none=none, selective=selective, full=full)
        stages.append(Stage(first=first, end=first + each.layers, recompute=each))
        first += each.layers
    return tuple(stages)
