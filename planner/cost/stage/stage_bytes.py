"""Bytes of a stage's layers: what they keep of a micro-batch, what a pass needs, the largest units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.cost.memory.zero_bubble_memory import most_waits, waiting_bytes
from planner.cost.passes import Unit
from planner.cost.seconds import larger, smaller
from planner.model.saved_tensors import Recompute
from planner.model.spec import Block
from planner.profile.profile import LayerKind

if TYPE_CHECKING:
    from planner.cost.stage.kind_layers import KindLayers
    from planner.cost.stage.stage import Chosen, ShapeModel


def stage_bytes(
    shape: ShapeModel, chosen: Sequence[Chosen], blocks: Counter[str], *, first: bool, last: bool
) -> dict[str, float]:
    """The bytes of a StageCost. Counts of `chosen` may be arrays, of many mixes at once."""
    each = [(shape.block(*choice), count) for choice, count in chosen]
    ends_of = [shape.layer(kind) for kind in [LayerKind.EMBEDDING] * first + [LayerKind.HEAD] * last]
    saved = sum(count * cost.saved_bytes for cost, count in each)
    widest = larger(*(cost.backward_transient_bytes * (count > 0) for cost, count in each))
    forward = larger(*(cost.forward_transient_bytes * (count > 0) for cost, count in each))
    largest = max((shape.block_units[key] for key in blocks), key=lambda unit: unit.params)
    ends = [shape.embedding_unit.params] * first + [shape.head_unit.params] * last
    return {
        "saved_bytes": saved + sum(cost.saved_bytes for cost in ends_of),
        "forward_transient_bytes": larger(forward, *(cost.forward_transient_bytes for cost in ends_of)),
        "backward_transient_bytes": larger(widest, *(cost.backward_transient_bytes for cost in ends_of)),
        "end_params": sum(ends) - shape.tied_params(first, last) * bool(ends),
        "largest_block_params": largest.params,
        "largest_apart_params": apart_params(shape, largest),
        "block_saved_bytes": saved,
        "block_transient_bytes": widest,
        "waiting_bytes": sum(count * shape.waiting_bytes[choice] for choice, count in chosen),
    }


def apart_params(shape: KindLayers | ShapeModel, unit: Unit) -> float:
    """Parameters of a block's experts where these are a unit of their own, reduced before the rest of it."""
    return unit.routed_trained if shape.degrees.spreads_experts else 0.0


def block_waiting_bytes(shape: KindLayers, key: str, option: Recompute) -> float:
    """What a block holds between its input and its weight gradients (planner.cost.memory.zero_bubble_memory).

    Nothing where it recomputes, where weights are frozen, or where the engine counts it as alive all the
    time; of a traced layer, which is none of the own runtime's, all that it may.
    """
    if option is not Recompute.NONE or shape.problem.workload.adapters is not None:
        return 0.0
    block = shape.classes[key]
    most = most_waits(shape.problem.stack, shape.degrees) * shape.block(key).saved_bytes
    if not isinstance(block, Block):
        return most
    return smaller(waiting_bytes(block, shape.shape_of(LayerKind.BLOCK, block=key)), most)
