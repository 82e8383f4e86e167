"""How much of a shape's time rests on which origin: measured, interpolated, fitted, datasheet."""

from __future__ import annotations

from collections import defaultdict

from planner.cost.communication.collectives import CommCost
from planner.cost.stage.parallel_cost import tensor_exchanges
from planner.cost.stage.stage import ShapeModel
from planner.profile.profile import LayerKind, Op


def origins_s(shape: ShapeModel) -> dict[str, float]:
    """Seconds of one micro-batch by origin: the layers of the model and their communication."""
    seconds: defaultdict[str, float] = defaultdict(float)
    blocks = {key: shape.count(key, 0, shape.problem.model.layers) for key in shape.classes}
    counted = [(shape.block(key), count) for key, count in blocks.items()]
    counted += [(shape.layer(LayerKind.EMBEDDING), 1), (shape.layer(LayerKind.HEAD), 1)]
    for cost, count in counted:
        seconds[cost.origin] += count * (cost.forward_s + cost.backward_s)
    for key, count in blocks.items():
        cp = shape.kind.exchanged(key)
        spread_s = cp.forward_s + cp.backward_s + shape.kind.experts(key).both_s
        if spread_s > 0:
            seconds[shape.messages.spread_origin()] += count * spread_s
    for message, times in _messages(shape, blocks):
        seconds[message.origin] += times * message.seconds
    return seconds


def _messages(shape: ShapeModel, blocks: dict[str, int]) -> list[tuple[CommCost, float]]:
    """Those over tensor-parallel and data ranks, with how often a micro-batch has them."""
    degrees, own = shape.degrees, shape.messages
    found: list[tuple[CommCost, float]] = []
    if degrees.tp > 1:
        op = Op.ALL_GATHER if degrees.sequence_parallel else Op.ALL_REDUCE
        stack = shape.problem.stack
        sums = sum(sum(tensor_exchanges(shape.classes[key], degrees, stack)) * n for key, n in blocks.items())
        found.append((own.comm(op, own.hidden_bytes(), own.tp_group()), float(sums)))
    if degrees.replicas > 1:
        group = own.shard_group() if degrees.weight_shards > 1 else own.replicate_group()
        for key, count in blocks.items():
            message = own.comm(Op.ALL_REDUCE, 4.0 * shape.block_units[key].trained, group)
            found.append((message, count / degrees.num_micro_batches))
    return found
