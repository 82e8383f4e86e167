"""Bytes of one device at its worst moment of a step, by tenant.

For a stage with P parameters on this device (after tensor parallelism), n shards, c compute bytes:

    tenant     ZeRO 0        ZeRO 1            ZeRO 2            ZeRO 3
    weights    4P + cP*      4P/n + cP         4P/n + cP         4P/n
    grads      4P            4P**              4P/n              4P/n
    optimizer  sP            sP/n              sP/n              sP/n

s is the optimizer's state per parameter (8 for AdamW); masters, gradients and state are fp32. (*) The copy
that replication keeps; one device in fp32 needs none. (**) With one micro-batch, gradients of ZeRO 1 are
reduced unit by unit and 4P/n stays. Source: ZeRO (arXiv 1910.02054), adapted to what FSDP2 keeps.

Activations: the worst weighted count of micro-batches in flight, over the row of the schedule.
Transient: the largest pass in flight, and one unit's gathered weights and gradient buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.cost.schedule import ActionKind, Row
from planner.cost.stage import ShapeModel, StageCost
from planner.estimate import MemoryBreakdown
from planner.strategy import Zero


def weights_bytes(shape: ShapeModel, params: float) -> float:
    """Bytes that parameters take all through forward and backward."""
    degrees, size = shape.degrees, shape.problem.workload.precision.compute_bytes
    match degrees.zero:
        case Zero.NONE:
            return (4 + (size if size < 4 or degrees.dp > 1 else 0)) * params
        case Zero.OPTIMIZER | Zero.GRADIENTS:
            return 4 * params / degrees.dp_shard + size * params
        case Zero.PARAMETERS:
            return 4 * params / degrees.dp_shard


def grads_bytes(shape: ShapeModel, params: float) -> float:
    """Bytes that gradients take at the end of the backward pass."""
    degrees = shape.degrees
    whole = degrees.zero is Zero.NONE or (degrees.zero is Zero.OPTIMIZER and degrees.num_micro_batches > 1)
    return 4 * params if whole else 4 * params / degrees.dp_shard


def optimizer_bytes(shape: ShapeModel, params: float) -> float:
    """Bytes of the optimizer's state."""
    return shape.problem.workload.optimizer.state_bytes * params / shape.degrees.dp_shard


def unit_buffer_bytes(shape: ShapeModel, stage: StageCost) -> float:
    """One unit's gathered weights (ZeRO 3) and the two ends of its gradient reduction."""
    degrees, size = shape.degrees, shape.problem.workload.precision.compute_bytes
    if degrees.dp == 1:
        return 0.0
    reduce = 4 * stage.largest_unit_params * (1 + 1 / degrees.dp_shard)
    gathered = 2 * size * stage.largest_unit_params if degrees.zero is Zero.PARAMETERS else 0.0
    return reduce + gathered


def transient_bytes(shape: ShapeModel, stage: StageCost) -> float:
    """What lives for a moment while the stage runs a pass."""
    passing = max(stage.forward_transient_bytes, stage.backward_transient_bytes)
    return passing + unit_buffer_bytes(shape, stage)


def in_flight_vectors(row: Row) -> list[dict[int, int]]:
    """The counts of live micro-batches by stage at each local maximum of a row, dominated ones left out."""
    alive: dict[int, int] = {}
    peaks: list[dict[int, int]] = []
    for index, action in enumerate(row):
        if action.kind is ActionKind.FORWARD:
            alive[action.stage] = alive.get(action.stage, 0) + 1
            following = row[index + 1] if index + 1 < len(row) else None
            if following is None or following.kind is ActionKind.BACKWARD:
                peaks.append(dict(alive))
        else:
            alive[action.stage] -= 1
    unique = [dict(items) for items in {tuple(sorted(peak.items())) for peak in peaks}]
    return [p for p in unique if not any(q != p and _dominates(q, p) for q in unique)]


def _dominates(a: dict[int, int], b: dict[int, int]) -> bool:
    return all(a.get(stage, 0) >= count for stage, count in b.items())


def rank_memory(
    shape: ShapeModel, vectors: Sequence[dict[int, int]], held: dict[int, StageCost]
) -> dict[int, MemoryBreakdown]:
    """Memory by stage of one pipeline rank; their sum is the rank's peak.

    `vectors` are the in-flight counts of the rank's row, `held` its stages. Transients and runtime are
    counted once, with the stage that has the larger transient.
    """
    worst = max(vectors, key=lambda v: sum(count * held[s].saved_bytes for s, count in v.items()))
    widest = max(held, key=lambda s: transient_bytes(shape, held[s]))
    return {
        index: MemoryBreakdown(
            weights_bytes=round(weights_bytes(shape, stage.params)),
            grads_bytes=round(grads_bytes(shape, stage.params)),
            optimizer_bytes=round(optimizer_bytes(shape, stage.params)),
            activations_bytes=round(worst.get(index, 0) * stage.saved_bytes),
            transient_bytes=round(transient_bytes(shape, stage)) if index == widest else 0,
            runtime_bytes=shape.runtime_bytes if index == widest else 0,
        )
        for index, stage in held.items()
    }
