"""Bytes of one device at its worst moment of a step, by tenant.

States (weights, gradients, optimizer) are planner.cost.states', moments planner.cost.moments'. Activations:
what micro-batches in flight keep at the worst moment of the schedule's row (planner.cost.flight). Transient:
what that moment holds besides. Allocator: what it reserves beyond tensors, pools and a slack
(reserved_bytes). Runtime: communicators. The driver's own context lies outside the memory that a program can
allocate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.cost.flight import Flights, InFlight
from planner.cost.moments import peak_bytes, reserved_bytes, resident
from planner.cost.stage import ShapeModel
from planner.cost.stage_cost import StageCost
from planner.estimate import MemoryBreakdown
from planner.stack import Engine


def resident_bytes(shape: ShapeModel, stage: StageCost) -> float:
    """Weights, gradients and optimizer state of a stage."""
    return resident(shape, stage).total


def late_bytes(shape: ShapeModel, stage: StageCost) -> float:
    """Gradients of a stage that do not exist before its first pass back: FSDP2's."""
    return resident(shape, stage).grads if idle_apart(shape) else 0.0


def held_bytes(shape: ShapeModel, stage: StageCost, flight: InFlight) -> float:
    """The states of a stage that exist, and what micro-batches in flight keep."""
    late = 0.0 if flight.begun else late_bytes(shape, stage)
    return resident_bytes(shape, stage) - late + flight.kept_bytes(stage)


def transient_bytes(shape: ShapeModel, stage: StageCost, flight: InFlight) -> float:
    """What is reserved at worst beyond what is held (held_bytes), before the slack.

    Below 0 where not all of it exists at that moment.
    """
    return reserved_bytes(shape, stage, flight) - held_bytes(shape, stage, flight)


def idle_apart(shape: ShapeModel) -> bool:
    """Whether a stage with nothing in flight needs nothing for a pass: what it would need depends on that."""
    return shape.problem.stack.engine in (Engine.NATIVE, Engine.TORCHTITAN)


def rank_memory(
    shape: ShapeModel, vectors: Flights, held: dict[int, StageCost]
) -> dict[int, MemoryBreakdown]:
    """Memory by stage of one pipeline rank; their sum is the rank's peak.

    `vectors` are what is in flight at the fullest moments of the rank's row, `held` its stages. Transients
    and runtime are counted once, with the stage that has the larger transient at the worst of these moments.
    Where that depends on what is in flight, as the moments of FSDP2's engines and offloaded activations do, a
    stage with nothing in flight runs no pass.
    """
    idle = idle_apart(shape) or any(stage.hosted for stage in held.values())
    each = (
        _divided(shape, vector, held, [index for index in held if not idle or vector[index].alive])
        for vector in vectors
    )
    return max(each, key=lambda parts: sum(part.total_bytes for part in parts.values()))


def host_bytes(vectors: Flights, held: dict[int, StageCost]) -> float:
    """What one device of a pipeline rank has in host memory: states, and the most activations in flight."""
    hosted = {index: stage.hosted for index, stage in held.items() if stage.hosted is not None}
    states = sum(stage.state_bytes for stage in hosted.values())
    kept = (sum(v[index].alive * stage.saved_bytes for index, stage in hosted.items()) for v in vectors)
    return states + max(kept)


def _divided(
    shape: ShapeModel, flight: dict[int, InFlight], held: dict[int, StageCost], running: Sequence[int]
) -> dict[int, MemoryBreakdown]:
    """The rank's tenants by stage with what is in flight of each, one of `running` in a pass."""
    kept = {index: resident(shape, stage) for index, stage in held.items()}
    beyond = {index: transient_bytes(shape, stage, flight[index]) for index, stage in held.items()}
    widest = max(running, key=lambda index: beyond[index])
    standing = (held_bytes(shape, stage, flight[index]) for index, stage in held.items())
    reserved = beyond[widest] + sum(standing)
    most = held[widest], flight[widest]
    pools = reserved_bytes(shape, *most) - peak_bytes(shape, *most)
    late = {index: late_bytes(shape, stage) * (not flight[index].begun) for index, stage in held.items()}
    # Below 0: gradients that do not exist yet at the worst moment.
    transient = beyond[widest] - pools - late[widest]
    late[widest] = max(-transient, 0.0)
    parts = {
        index: MemoryBreakdown(
            weights_bytes=round(kept[index].weights),
            grads_bytes=round(kept[index].grads - late[index]),
            optimizer_bytes=round(kept[index].optimizer),
            activations_bytes=round(flight[index].kept_bytes(stage)),
            transient_bytes=round(max(transient, 0.0)) if index == widest else 0,
        )
        for index, stage in held.items()
    }
    allocator = round(pools + (shape.memory.allocator_slack - 1) * reserved)
    runtime = dataclasses.replace(parts[widest], allocator_bytes=allocator, runtime_bytes=shape.runtime_bytes)
    return {**parts, widest: runtime}
