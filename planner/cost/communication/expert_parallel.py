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

Going forward the own runtime's ranks also tell each other, in small messages whose latency counts: how many
rows come to each expert (8 bytes each); with tokens that are gathered their experts and weights; and, where
sequences are in parts, how often each expert was chosen (4 bytes) for the loss that balances them.
"""

from __future__ import annotations

import math
from functools import partial

from planner.cost.communication.messages import Messages
from planner.foundation.frozen import frozen
from planner.job.engine_settings import Dispatch
from planner.model.feed_forward import Experts
from planner.model.spec import Block, Layer
from planner.profile.profile import Op
from planner.strategy.strategy import Degrees


def spreads_experts(layer: Layer, degrees: Degrees) -> bool:
    """Whether a layer's experts are shared out otherwise than its other weights."""
    own = isinstance(layer, Block) and isinstance(layer.mlp, Experts)
    return own and degrees.spreads_experts


def distinct_parts(count: int, topk: int, parts: int) -> float:
    """Of `count` experts in equal parts, the parts that `topk` different ones lie in on average."""
    elsewhere = count - count / parts
    misses = math.prod(max(0.0, elsewhere - i) / (count - i) for i in range(topk))
    return parts * (1.0 - misses)


@frozen
class ExpertPass:
    """Seconds that sharing out one block's experts shows for a micro-batch.

    `forward_s` is an all-to-all's part of a forward pass, whose results selective recomputation may keep, and
    `beside_s` all else of it.
    """

    forward_s: float = 0.0
    beside_s: float = 0.0
    backward_s: float = 0.0

    @property
    def both_s(self) -> float:
        return self.forward_s + self.beside_s + self.backward_s


def expert_pass(messages: Messages, experts: Experts, hidden: int) -> ExpertPass:
    """What dispatch, combine and gathering of one micro-batch show, and what ranks tell each other."""
    degrees, constants, size = messages.degrees, messages.constants, messages.value_bytes
    if not degrees.spreads_experts and degrees.cp == 1:
        return ExpertPass()
    values = messages.tokens / (degrees.tp if degrees.sequence_parallel else 1) * (experts.latent or hidden)
    gathered_s = _gathering_s(messages, experts, values * size)
    told = _telling(messages, experts) if messages.problem.engine_settings.own else ExpertPass()
    sent_s = 0.0
    if degrees.ep > 1:
        dispatched = messages.problem.engine_settings.dispatch_bytes or size
        sent_s = sum(_sending_s(messages, experts, values * each) for each in (dispatched, size))
        imbalance = 1.0 if messages.problem.engine_settings.balanced else constants.expert_imbalance
        shown = (
            constants.ep_overlapped
            if messages.problem.engine_settings.overlaps_dispatch
            else constants.ep_exposed
        )
        sent_s *= constants.ep_scale * imbalance * shown
    return ExpertPass(
        forward_s=sent_s + told.forward_s,
        beside_s=gathered_s + told.beside_s,
        backward_s=sent_s + gathered_s + told.backward_s,
    )


def _telling(messages: Messages, experts: Experts) -> ExpertPass:
    """What ranks of the own runtime tell each other to route a micro-batch's tokens."""
    degrees, tokens = messages.degrees, messages.tokens
    forward_s, beside_s, backward_s = 0.0, _balance_s(messages, experts), 0.0
    if degrees.ep > 1:
        forward_s = messages.seconds(Op.ALL_TO_ALL, 8.0 * experts.count, messages.ep_group())
    if degrees.expert_tp > 1 and degrees.sequence_parallel and degrees.spreads_experts:
        group, ranks = messages.expert_tp_group(), degrees.expert_tp
        if degrees.ep > 1:
            beside_s += messages.seconds(Op.ALL_GATHER, 8.0 * ranks * experts.count, group)
        else:
            chosen = ranks * tokens / degrees.tp * experts.topk
            beside_s += sum(messages.seconds(Op.ALL_GATHER, each * chosen, group) for each in (4.0, 8.0))
            backward_s += messages.seconds(Op.REDUCE_SCATTER, 4.0 * chosen, group)
    return ExpertPass(forward_s=forward_s, beside_s=beside_s, backward_s=backward_s)


def _balance_s(messages: Messages, experts: Experts) -> float:
    """What ranks with parts of the same sequences tell each other: counts for the loss that balances experts,
    and all choices where experts have a capacity."""
    degrees, routing, found_s = messages.degrees, experts.routing, 0.0
    sliced = degrees.sequence_parallel and degrees.spreads_experts
    sequences = messages.problem.workload.seq * degrees.micro_batch
    for ranks, seconds, held in (
        (degrees.tp * sliced, partial(messages.seconds, group=messages.tp_group()), degrees.cp),
        (degrees.cp, messages.cp_seconds, 1),
    ):
        if ranks > 1 and routing.aux_loss:
            found_s += seconds(Op.ALL_REDUCE, 4.0 * experts.count * degrees.micro_batch)
        if ranks > 1 and routing.capacity is not None:
            found_s += seconds(Op.ALL_GATHER, 8.0 * experts.topk * sequences / held)
    return found_s


def _gathering_s(messages: Messages, experts: Experts, row_bytes: float) -> float:
    """All-gather and reduce-scatter of the rows of a sharded expert."""
    degrees = messages.degrees
    if degrees.expert_tp == 1 or not degrees.sequence_parallel or not degrees.spreads_experts:
        return 0.0
    copies = experts.topk if degrees.ep > 1 else 1
    whole, group = degrees.expert_tp * copies * row_bytes, messages.expert_tp_group()
    both_s = sum(messages.seconds(op, whole, group) for op in (Op.ALL_GATHER, Op.REDUCE_SCATTER))
    return messages.constants.tp_scale * both_s


def _sending_s(messages: Messages, experts: Experts, row_bytes: float) -> float:
    """One all-to-all of a rank's tokens, `row_bytes` for all of them once."""
    group = messages.ep_group()
    if messages.problem.engine_settings.dispatch is Dispatch.ALL_TO_ALL:
        return messages.seconds(Op.ALL_TO_ALL, experts.topk * row_bytes, group)
    ranks = row_bytes * distinct_parts(experts.count, experts.topk, group.ranks)
    if not group.spans_nodes or group.nodes is None:
        return messages.seconds(Op.ALL_TO_ALL, ranks, group)
    nodes = row_bytes * distinct_parts(experts.count, experts.topk, group.nodes)
    inside = messages.part_in_node(group)
    between_s = messages.seconds(Op.ALL_TO_ALL, nodes, group)
    return max(between_s, messages.seconds(Op.ALL_TO_ALL, ranks, inside))
