"""Bytes of one device at its worst moment of a step, by tenant.

States (weights, gradients, optimizer) are planner.cost.states', moments planner.cost.moments'. Activations:
the worst weighted count of micro-batches in flight, over the row of the schedule. Transient: what the worst
moment holds besides. Allocator: what it reserves beyond tensors, pools and a slack (reserved_bytes).
Runtime: communicators. The driver's own context lies outside the memory that a program can allocate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.cost.moments import peak_bytes, reserved_bytes, resident
from planner.cost.stage import ShapeModel
from planner.cost.stage_cost import StageCost
from planner.estimate import MemoryBreakdown
from planner.stack import Engine


def resident_bytes(shape: ShapeModel, stage: StageCost) -> float:
    """Weights, gradients and optimizer state of a stage."""
    return resident(shape, stage).total


def transient_bytes(shape: ShapeModel, stage: StageCost, alive: float) -> float:
    """What is reserved at worst beyond states and `alive` micro-batches' activations, before the slack.

    Below 0 where not all of them exist at that moment.
    """
    kept = resident_bytes(shape, stage) + alive * stage.saved_bytes
    return reserved_bytes(shape, stage, alive) - kept


def idle_apart(shape: ShapeModel) -> bool:
    """Whether a stage with nothing in flight needs nothing for a pass: what it would need depends on that."""
    return shape.problem.stack.engine in (Engine.NATIVE, Engine.TORCHTITAN)


def rank_memory(
    shape: ShapeModel, vectors: Sequence[dict[int, int]], held: dict[int, StageCost]
) -> dict[int, MemoryBreakdown]:
    """Memory by stage of one pipeline rank; their sum is the rank's peak.

    `vectors` are the in-flight counts of the rank's row, `held` its stages. Transients and runtime are
    counted once, with the stage that has the larger transient at the worst of these moments. Where that
    depends on what is in flight, as the moments of FSDP2's engines and offloaded activations do, a stage with
    nothing in flight runs no pass.
    """
    idle = idle_apart(shape) or any(stage.hosted for stage in held.values())
    each = (
        _divided(shape, vector, held, [index for index in held if not idle or vector.get(index, 0)])
        for vector in vectors
    )
    return max(each, key=lambda parts: sum(part.total_bytes for part in parts.values()))


def host_bytes(vectors: Sequence[dict[int, int]], held: dict[int, StageCost]) -> float:
    """What one device of a pipeline rank has in host memory: states, and the most activations in flight."""
    hosted = {index: stage.hosted for index, stage in held.items() if stage.hosted is not None}
    states = sum(stage.state_bytes for stage in hosted.values())
    kept = (sum(v.get(index, 0) * stage.saved_bytes for index, stage in hosted.items()) for v in vectors)
    return states + max(kept)


def _divided(
    shape: ShapeModel, alive: dict[int, int], held: dict[int, StageCost], running: Sequence[int]
) -> dict[int, MemoryBreakdown]:
    """The rank's tenants by stage, `alive` micro-batches of each in flight, one of `running` in a pass."""
    kept = {index: resident(shape, stage) for index, stage in held.items()}
    beyond = {index: transient_bytes(shape, stage, alive.get(index, 0)) for index, stage in held.items()}
    widest = max(running, key=lambda index: beyond[index])
    reserved = beyond[widest] + sum(
        kept[index].total + alive.get(index, 0) * stage.saved_bytes for index, stage in held.items()
    )
    live = alive.get(widest, 0)
    pools = reserved_bytes(shape, held[widest], live) - peak_bytes(shape, held[widest], live)
    transient = beyond[widest] - pools  # below 0: gradients that do not exist yet at the worst moment
    parts = {
        index: MemoryBreakdown(
            weights_bytes=round(kept[index].weights),
            grads_bytes=round(kept[index].grads + (min(transient, 0.0) if index == widest else 0.0)),
            optimizer_bytes=round(kept[index].optimizer),
            activations_bytes=round(alive.get(index, 0) * stage.saved_bytes),
            transient_bytes=round(max(transient, 0.0)) if index == widest else 0,
        )
        for index, stage in held.items()
    }
    allocator = round(pools + (shape.memory.allocator_slack - 1) * reserved)
    runtime = dataclasses.replace(parts[widest], allocator_bytes=allocator, runtime_bytes=shape.runtime_bytes)
    return {**parts, widest: runtime}
