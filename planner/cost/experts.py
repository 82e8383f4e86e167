"""Expert parallelism: what ranks that share out the routed experts send for one micro-batch.

Before a mixture of experts each of tp ranks holds t / tp of the tokens that its group has (all t without
sequence parallelism). Every token goes to the ranks of its k experts and their results come back: an
all-to-all of dispatch and one of combine, and the same two going back. With h the width of an expert's input:

    all_to_all     a copy for every chosen expert                    k h values a token
    deduplicated   one for every rank and, between nodes, for every node with a chosen expert: of p equal
                   parts of E experts those are p (1 - C(E - E/p, k) / C(E, k)) on average
                   (DeepEP; DeepSeek-V3, arXiv 2412.19437, section 3.2.2)

The slowest rank sends and receives more than the mean by the imbalance of experts. Where an expert is in etp
shards its rows are gathered over etp ranks before and scattered after, k h values a token of all etp ranks;
with ep = 1 nothing is dispatched, and the tokens themselves are gathered.
"""

from __future__ import annotations

import math

from planner.cost.messages import Messages
from planner.feed_forward import Experts
from planner.model import Block, Layer
from planner.profile import Op
from planner.stack import Dispatch
from planner.strategy import Degrees


def spreads_experts(layer: Layer, degrees: Degrees) -> bool:
    """Whether a layer's experts are shared out otherwise than its other weights."""
    own = isinstance(layer, Block) and isinstance(layer.mlp, Experts)
    return own and degrees.spreads_experts


def distinct_parts(count: int, topk: int, parts: int) -> float:
    """Of `count` experts in equal parts, the parts that `topk` different ones lie in on average."""
    elsewhere = count - count / parts
    misses = math.prod(max(0.0, elsewhere - i) / (count - i) for i in range(topk))
    return parts * (1.0 - misses)


def expert_pass_s(messages: Messages, experts: Experts, hidden: int) -> float:
    """Seconds that dispatch, combine and gathering of one micro-batch show in one direction."""
    degrees, physics, size = messages.degrees, messages.physics, messages.value_bytes
    values = messages.tokens / (degrees.tp if degrees.sequence_parallel else 1) * (experts.latent or hidden)
    gathered_s = _gathering_s(messages, experts, values * size)
    if degrees.ep == 1:
        return gathered_s
    dispatched = messages.problem.stack.dispatch_bytes or size
    sent_s = sum(_sending_s(messages, experts, values * each) for each in (dispatched, size))
    imbalance = 1.0 if messages.problem.stack.balanced else physics.expert_imbalance
    shown = physics.ep_overlapped if messages.problem.stack.overlaps_dispatch else physics.ep_exposed
    return gathered_s + physics.ep_scale * imbalance * sent_s * shown


def _gathering_s(messages: Messages, experts: Experts, row_bytes: float) -> float:
    """All-gather and reduce-scatter of the rows of a sharded expert."""
    degrees = messages.degrees
    if degrees.expert_tp == 1 or not degrees.sequence_parallel:
        return 0.0
    copies = experts.topk if degrees.ep > 1 else 1
    whole, group = degrees.expert_tp * copies * row_bytes, messages.expert_tp_group()
    both_s = sum(messages.seconds(op, whole, group) for op in (Op.ALL_GATHER, Op.REDUCE_SCATTER))
    return messages.physics.tp_scale * both_s


def _sending_s(messages: Messages, experts: Experts, row_bytes: float) -> float:
    """One all-to-all of a rank's tokens, `row_bytes` for all of them once."""
    group = messages.ep_group()
    if messages.problem.stack.dispatch is Dispatch.ALL_TO_ALL:
        return messages.seconds(Op.ALL_TO_ALL, experts.topk * row_bytes, group)
    ranks = row_bytes * distinct_parts(experts.count, experts.topk, group.ranks)
    if not group.spans_nodes or group.nodes is None:
        return messages.seconds(Op.ALL_TO_ALL, ranks, group)
    nodes = row_bytes * distinct_parts(experts.count, experts.topk, group.nodes)
    inside = messages.part_in_node(group)
    between_s = messages.seconds(Op.ALL_TO_ALL, nodes, group)
    return max(between_s, messages.seconds(Op.ALL_TO_ALL, ranks, inside))
