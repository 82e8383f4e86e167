"""What parallelism makes of blocks: what they sum over ranks, and what they send besides."""

from __future__ import annotations

from collections.abc import Sequence

from planner.cost.compute import LayerModel
from planner.cost.context import ContextCost, Exchanged
from planner.cost.experts import expert_pass_s, spreads_experts
from planner.cost.layer import LayerShape
from planner.cost.messages import Messages
from planner.cost.overlap import overlap_of
from planner.cost.passes import Unit
from planner.feed_forward import Experts
from planner.model import Block, Layer
from planner.stack import Selective, Stack
from planner.strategy import CpExchange, Degrees, Recompute
from planner.traced import TracedLayer


def summed_sublayers(layer: Layer, degrees: Degrees) -> int:
    """Sublayers of a block whose results tensor parallelism sums over its ranks.

    Experts that are shared out in their own way are not among them where each rank sends its own tokens,
    unless shared experts are beside.
    """
    if isinstance(layer, TracedLayer):
        return 0
    apart = isinstance(layer.mlp, Experts) and not layer.mlp.shared and spreads_experts(layer, degrees)
    apart = apart and degrees.sequence_parallel
    return layer.sublayers - apart


def summed_copies_s(units: Sequence[tuple[Unit, int]], messages: Messages) -> float:
    """Once a step, in the open: the fp32 gradients of key-value heads that neighbours have copies of."""
    params: dict[int, float] = {}
    for unit, count in units:
        for copies, copied in unit.copied:
            params[copies] = params.get(copies, 0.0) + count * copied / messages.degrees.weight_shards
    return sum(messages.over_copies_s(4.0 * each, copies) for copies, each in params.items())


def sent_again(option: Recompute, stack: Stack, exchange: CpExchange) -> tuple[bool, bool]:
    """Whether an option sends the exchange of attention, and that of experts, once more going back.

    Where element-wise results are computed again, so are the ones that are traded for heads; a ring's or
    gathered keys' result is kept as attention's.
    """
    if option is Recompute.NONE:
        return False, False
    if option is Recompute.FULL:
        return True, True
    traded = exchange is CpExchange.ALL_TO_ALL and stack.recomputes is Selective.ELEMENTWISE
    return traded or stack.recomputes is Selective.ATTENTION, stack.recomputes is Selective.MLP


def exchanged(layer: Layer, shape: LayerShape, messages: Messages, layers: LayerModel) -> Exchanged:
    """What a block's context-parallel exchange shows in either pass.

    What a rank does for it besides waiting is left out where the block's own cost has it already.
    """
    if shape.cp == 1 or not isinstance(layer, Block):
        return Exchanged()
    bandwidth, step_s = layers.rates.memory_bytes_per_s if layers.rates else None, messages.physics.cp_step_s
    if layers.exchange_measured(shape):
        bandwidth, step_s = None, 0.0
    overlap = overlap_of(layers.problem.profile)
    cost = ContextCost(shape, messages.cp_seconds, bandwidth, overlap)
    return cost.block(layer, layers.core_s(shape), step_s)


def experts_s(layer: Layer, messages: Messages) -> float:
    """What sending tokens to experts and back shows in one direction of a block."""
    if not spreads_experts(layer, messages.degrees):
        return 0.0
    assert isinstance(layer, Block) and isinstance(layer.mlp, Experts), "checked before"
    return expert_pass_s(messages, layer.mlp, layer.hidden)
