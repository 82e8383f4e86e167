"""Context parallelism: what ranks that share out a sequence send, and what of it attention hides.

With t tokens of a rank, c ranks, q, k, v and o the bytes a token of a rank's query, key, value and result,
and A and B what its attention takes forward and backward, both load-balanced: every rank has as many pairs of
tokens, each 1/c of them with the keys of one rank.

    ring        forward   c - 1 hops of t (k + v), each behind A / c
                backward  c - 1 hops of 2 t (k + v), keys, values and their gradients, each behind B / c, and
                          a last one that brings the gradients home, t (k + v), in the open
    gather      forward   all-gather of c t (k + v); backward the same, and a reduce-scatter as large
    all_to_all  forward   all-to-all of t q, t k, t v before attention and of t o behind it; backward the same

A hop that hides slows attention as `Overlap` says while both run. Behind each part of a ring the results so
far are corrected: an fp32 result read and written, a new one read. Windows of attention do not go round a
ring (Transformer Engine has them gathered). Heads that are fewer than ranks are copied for the all-to-all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from planner.cost.communication.collectives import Overlap
from planner.cost.layer import LayerCost, LayerShape
from planner.foundation.frozen import frozen, replaced
from planner.model.attention import Attention, CpExchange, LatentAttention, Reach
from planner.model.spec import Block, ModelSpec
from planner.model.sublayer import Recompute
from planner.profile.profile import LayerKind, Op

CORRECTION_BYTES = 10
"""Bytes moved for each value of attention's result behind a part of a ring: fp32 read and written, and a new
result of 2 bytes read."""

Mixer = Attention | LatentAttention


@frozen
class Widths:
    """Bytes a token of one rank's query, key, value and result."""

    query: float
    key: float
    value: float
    out: float

    @property
    def kv(self) -> float:
        return self.key + self.value


@frozen
class Exchanged:
    """Seconds that the exchange of one block shows in a forward and in a backward pass."""

    forward_s: float = 0.0
    backward_s: float = 0.0

    def __add__(self, other: Exchanged) -> Exchanged:
        return Exchanged(
            forward_s=self.forward_s + other.forward_s, backward_s=self.backward_s + other.backward_s
        )


def widths_of(mixer: Mixer, shape: LayerShape) -> Widths:
    """The widths of a mixer on one of tp ranks. Fewer key heads than ranks: each rank has a whole one."""
    size = shape.precision.compute_bytes
    if isinstance(mixer, LatentAttention):
        key, value = mixer.query_width, mixer.heads * mixer.value_dim
        heads, out = mixer.heads, mixer.heads * mixer.value_dim
    else:
        key, value, heads, out = mixer.kv_width, mixer.value_width, mixer.kv_heads, mixer.out_width
    shards = min(shape.tp, heads)
    return Widths(
        query=size * mixer.query_width / shape.tp,
        key=size * key / shards,
        value=size * value / shards,
        out=size * out / shape.tp,
    )


def exchange_of(mixer: Mixer, exchange: CpExchange) -> CpExchange:
    """How a mixer's keys and values are exchanged: a window of them does not go round."""
    windowed = mixer.span.reach in (Reach.WINDOW, Reach.CHUNK)
    return CpExchange.GATHER if windowed and exchange is CpExchange.RING else exchange


def copies_of_heads(mixer: Mixer, shape: LayerShape) -> float:
    """How often an all-to-all sends a tensor-parallel rank's key and value heads.

    Where cp does not divide them, as often as gives every rank whole ones, as many each.
    """
    own = max(1, mixer.kv_heads // shape.tp)
    return math.lcm(own, shape.cp) / own


Seconds = Callable[[Op, float], float]
"""Seconds of a communication of so many bytes over the context-parallel group, all ranks taking part."""


class ContextCost:
    """The exchange of a block's mixers. `seconds` is scaled by its constant already."""

    def __init__(
        self, shape: LayerShape, seconds: Seconds, memory_bytes_per_s: float | None, overlap: Overlap
    ) -> None:
        self.shape, self.seconds, self.memory_bytes_per_s = shape, seconds, memory_bytes_per_s
        self.overlap = overlap

    def block(self, block: Block, core_s: tuple[float, float], step_s: float) -> Exchanged:
        """Seconds that a block's exchange shows; `core_s` is its attention's, `step_s` each hop's own."""
        mixers = [m for m in block.mixers if isinstance(m, (Attention, LatentAttention))]
        if self.shape.cp == 1 or not mixers:
            return Exchanged()
        part = (core_s[0] / len(mixers), core_s[1] / len(mixers))
        return sum((self._mixer(mixer, part, step_s) for mixer in mixers), Exchanged())

    def _mixer(self, mixer: Mixer, core_s: tuple[float, float], step_s: float) -> Exchanged:
        widths, tokens = widths_of(mixer, self.shape), self.shape.tokens
        match exchange_of(mixer, self.shape.cp_exchange):
            case CpExchange.RING:
                return self._ring(widths, tokens, core_s, step_s)
            case CpExchange.GATHER:
                whole = self.shape.cp * tokens * widths.kv
                gather_s = self.seconds(Op.ALL_GATHER, whole) + step_s
                scatter_s = self.seconds(Op.REDUCE_SCATTER, whole) + step_s
                return Exchanged(forward_s=gather_s, backward_s=gather_s + scatter_s)
            case CpExchange.ALL_TO_ALL:
                copies = copies_of_heads(mixer, self.shape)
                each = (widths.query, copies * widths.key, copies * widths.value, widths.out)
                sent_s = sum(self.seconds(Op.ALL_TO_ALL, tokens * width) + step_s for width in each)
                return Exchanged(forward_s=sent_s, backward_s=sent_s)

    def _ring(self, widths: Widths, tokens: float, core_s: tuple[float, float], step_s: float) -> Exchanged:
        ranks = self.shape.cp
        forward_s, backward_s = core_s
        hop_s = self.seconds(Op.P2P, tokens * widths.kv)
        double_s = self.seconds(Op.P2P, 2 * tokens * widths.kv)
        correction = CORRECTION_BYTES * tokens * widths.out / self.shape.precision.compute_bytes
        corrected_s = correction / self.memory_bytes_per_s if self.memory_bytes_per_s else 0.0
        ahead = (ranks - 1) * (self.overlap.shown_s(hop_s, forward_s / ranks) + step_s + corrected_s)
        back = (ranks - 1) * (self.overlap.shown_s(double_s, backward_s / ranks) + step_s) + hop_s
        return Exchanged(forward_s=ahead, backward_s=back)


def with_context_buffers(cost: LayerCost, model: ModelSpec, shape: LayerShape) -> LayerCost:
    """A block's cost with the buffers of its exchange, which live for a moment in either pass.

    Without recomputation `traded_bytes` are kept besides.
    """
    if shape.cp == 1 or shape.kind is not LayerKind.BLOCK:
        return cost
    block = model.classes()[shape.block] if shape.block else model.segments[0].block
    if not isinstance(block, Block):
        return cost
    mixers = [m for m in block.mixers if isinstance(m, (Attention, LatentAttention))]
    each = [_buffer_bytes(mixer, shape) for mixer in mixers]
    traded = traded_bytes(block, shape) if shape.recompute is Recompute.NONE else 0.0
    return replaced(
        cost,
        saved_bytes=cost.saved_bytes + traded,
        forward_transient_bytes=cost.forward_transient_bytes + max((f for f, _ in each), default=0.0),
        backward_transient_bytes=cost.backward_transient_bytes + max((b for _, b in each), default=0.0),
    )


def traded_bytes(block: Block, shape: LayerShape) -> float:
    """What an all-to-all adds to what a block keeps: attention's result as it was before it was traded back,
    and copies of key and value heads."""
    if shape.cp == 1 or shape.cp_exchange is not CpExchange.ALL_TO_ALL:
        return 0.0
    kept = 0.0
    for mixer in block.mixers:
        if isinstance(mixer, (Attention, LatentAttention)):
            widths, copies = widths_of(mixer, shape), copies_of_heads(mixer, shape)
            kept += shape.tokens * (widths.out + (copies - 1) * widths.kv)
    return kept


def both_sides_bytes(block: Block, shape: LayerShape) -> float:
    """What an all-to-all adds where its results are kept beside what it was given: queries, keys, values."""
    if shape.cp == 1 or shape.cp_exchange is not CpExchange.ALL_TO_ALL:
        return 0.0
    mixers = [m for m in block.mixers if isinstance(m, (Attention, LatentAttention))]
    widths = [widths_of(mixer, shape) for mixer in mixers]
    return shape.tokens * sum(own.query + own.kv for own in widths)


def _buffer_bytes(mixer: Mixer, shape: LayerShape) -> tuple[float, float]:
    """Forward: a ring's next keys and values and its fp32 result; all gathered ones; traded copies.

    Backward: a ring's keys, values and their gradients, own and next; all gathered with gradients; copies.
    """
    widths, tokens = widths_of(mixer, shape), shape.tokens
    match exchange_of(mixer, shape.cp_exchange):
        case CpExchange.RING:
            result = 4 * tokens * widths.out / shape.precision.compute_bytes
            return 2 * tokens * widths.kv + result, 4 * tokens * widths.kv
        case CpExchange.GATHER:
            whole = shape.cp * tokens * widths.kv
            return whole, 2 * whole
        case CpExchange.ALL_TO_ALL:
            copies = copies_of_heads(mixer, shape) * widths.kv
            traded = tokens * (widths.query + copies + widths.out)
            return traded, 2 * traded
