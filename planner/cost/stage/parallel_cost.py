"""What parallelism makes of blocks: what they sum over ranks, and what they send besides."""

from __future__ import annotations

from collections.abc import Sequence

from planner.cost.communication.collectives import overlap_of
from planner.cost.communication.context_parallel import ContextCost, Exchanged
from planner.cost.communication.expert_parallel import ExpertPass, expert_pass, spreads_experts
from planner.cost.communication.messages import Messages
from planner.cost.layer import LayerShape, Unit
from planner.cost.stage.layer_cost import LayerModel
from planner.job.engine_settings import Selective, Stack
from planner.model.attention import CpExchange
from planner.model.feed_forward import Experts
from planner.model.spec import Block, Layer
from planner.model.sublayer import Recompute
from planner.model.traced_layer import TracedLayer
from planner.profile.profile import Op
from planner.strategy.strategy import Degrees


def tensor_exchanges(layer: Layer, degrees: Degrees, stack: Stack) -> tuple[int, int]:
    """How many inputs of a block's sublayers its tensor-parallel ranks need whole, and how many results they
    sum.

    Each sublayer's, but of those side by side one sum of their results and one input of both: in the own
    runtime where they read one norm's, else each norm's; elsewhere always, as is reported of such models
    (Falcon, arXiv 2311.16867). Experts that are shared out in their own way are not among them where each
    rank sends its own tokens, unless shared experts are beside.
    """
    if isinstance(layer, TracedLayer):
        return 0, 0
    if layer.parallel and not isinstance(layer.mlp, Experts):
        return layer.norms if stack.own else 1, 1
    apart = isinstance(layer.mlp, Experts) and not layer.mlp.shared and spreads_experts(layer, degrees)
    each = len(layer.mixers) + (layer.mlp is not None) - (apart and degrees.sequence_parallel)
    return each, each


def summed_copies_s(units: Sequence[tuple[Unit, int]], messages: Messages) -> float:
    """Once a step, in the open: the fp32 gradients of key-value heads that neighbours have copies of."""
    params: dict[int, float] = {}
    for unit, count in units:
        for copies, copied in unit.copied:
            params[copies] = params.get(copies, 0.0) + count * copied / messages.degrees.weight_shards
    return sum(messages.over_copies_s(4.0 * each, copies) for copies, each in params.items())


def tensor_s(layer: Layer, messages: Messages, option: Recompute) -> tuple[float, float]:
    """Seconds of a block's messages over tensor-parallel ranks, forward and backward.

    Where PyTorch's recomputing runs a block again, it stops at the last result that is needed.
    """
    degrees = messages.degrees
    gather, scatter = messages.over_tp(Op.ALL_GATHER, operands=True), messages.over_tp(Op.REDUCE_SCATTER)
    reduce = messages.over_tp(Op.ALL_REDUCE)
    reads, sums = tensor_exchanges(layer, degrees, messages.problem.stack)
    sp = degrees.sequence_parallel
    forward_s = reads * gather + sums * scatter if sp else sums * reduce
    backward_s = sums * gather + reads * scatter if sp else reads * reduce
    if not messages.problem.stack.stops_early:
        return forward_s, backward_s + forward_s * (option is Recompute.FULL)
    spared = sums > 0 and _last_sum_spared(layer, degrees)
    again_s = forward_s - (scatter if sp else reduce) * spared
    return forward_s, backward_s + again_s * (option is not Recompute.NONE)


def cp_sent_again(option: Recompute, stack: Stack, exchange: CpExchange) -> bool:
    """Whether an option sends the exchange of attention once more going back.

    Where element-wise results are computed again, so are the ones that are traded for heads, but in the own
    runtime, which keeps what an all-to-all gave; a ring's or gathered keys' result is kept as attention's.
    """
    if option is not Recompute.SELECTIVE:
        return option is Recompute.FULL
    traded = exchange is CpExchange.ALL_TO_ALL and stack.recomputes is Selective.ELEMENTWISE
    return (traded and not stack.own) or stack.recomputes is Selective.ATTENTION


def experts_sent_again(option: Recompute, stack: Stack, passing: ExpertPass) -> float:
    """Seconds of what an option sends once more of the exchange of experts going back.

    The own runtime's selective recomputation keeps what an all-to-all gave and nothing else of it.
    """
    whole = option is Recompute.FULL or (option is Recompute.SELECTIVE and stack.recomputes is Selective.MLP)
    beside = whole or (option is Recompute.SELECTIVE and stack.own)
    return passing.forward_s * whole + passing.beside_s * beside


def _last_sum_spared(layer: Layer, degrees: Degrees) -> bool:
    """Whether a block's last sum over tensor-parallel ranks is the last that it computes, so that nothing
    needs it once more going back: not where experts come after it, or a gate weighs it."""
    if isinstance(layer, TracedLayer) or not isinstance(layer.mlp, Experts):
        return True
    last = layer.mlp.shared is not None and not layer.mlp.shared_gate
    return last or not (degrees.spreads_experts and degrees.sequence_parallel)


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


def experts_pass(layer: Layer, messages: Messages) -> ExpertPass:
    """What sharing out a block's experts shows, if it has some."""
    if not isinstance(layer, Block) or not isinstance(layer.mlp, Experts):
        return ExpertPass()
    return expert_pass(messages, layer.mlp, layer.hidden)
