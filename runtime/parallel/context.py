"""Context parallelism: which tokens of a sequence a rank of the cp axis holds, and how it meets the others.

Shapes: B micro-batch, S positions of this rank, N heads, D head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.model.attention import CpExchange
from planner.strategy.strategy import Degrees
from runtime.model.attention_core import Core
from runtime.model.block import Block
from runtime.model.rotary import Rotary
from runtime.parallel.context_attention import gathered_attention, ring_attention
from runtime.parallel.context_messages import heads_for_sequence, sequence_for_heads
from runtime.parallel.meshes import Meshes


def apply_context_parallel(part: nn.Module, seq: int, degrees: Degrees, meshes: Meshes) -> None:
    """Lets a block's attention meet the keys of other ranks, and rotary tables speak of this rank's tokens.

    Everything else of a block treats tokens one by one. `seq` is the length of whole sequences.
    """
    if degrees.cp == 1:
        return
    if isinstance(part, Rotary):
        part.hold(held_positions(seq, degrees, meshes.cp.get_local_rank()))
    elif isinstance(part, Block):
        core = part.attention.core
        assert isinstance(core, Core), core
        part.attention.core = make_core(core, degrees.cp_exchange, meshes.cp.get_group())


def held_positions(seq: int, degrees: Degrees, cp_rank: int) -> Tensor:
    """Positions [S] of the tokens that a rank of the cp axis holds, in the order in which they lie there.

    Slices r and 2 cp - 1 - r of the sequence, so that causal attention is balanced; slice r alone where ranks
    trade the sequence for heads, since then each attends over all of it.
    """
    positions = torch.arange(seq)
    if degrees.cp_exchange is CpExchange.ALL_TO_ALL:
        return positions.chunk(degrees.cp)[cp_rank]
    slices = positions.chunk(2 * degrees.cp)
    return torch.cat((slices[cp_rank], slices[2 * degrees.cp - 1 - cp_rank])) if degrees.cp > 1 else positions


def hidden_positions(seq: int, degrees: Degrees, meshes: Meshes) -> Tensor:
    """Positions of the hidden states that this rank holds between blocks: with sequence parallelism, the
    slice of its cp rank's tokens that its place on the tp axis says."""
    held = held_positions(seq, degrees, meshes.cp.get_local_rank())
    return held.chunk(degrees.tp)[meshes.tp.get_local_rank()] if degrees.sequence_parallel else held


class ContextCore(nn.Module):
    """Attention over a sequence that the ranks of a group share out: q [B, S, N, D], k and v of as
    many heads or fewer. `begins` are of the whole sequence, as every rank knows them."""

    exchange: CpExchange

    def __init__(self, group: dist.ProcessGroup, scale: float | None) -> None:
        super().__init__()
        self.group, self.ranks, self.scale = group, dist.get_world_size(group), scale


class RingCore(ContextCore):
    """Keys and values go round."""

    exchange = CpExchange.RING

    def forward(self, q_bsnd: Tensor, k: Tensor, v: Tensor, begins: Tensor | None = None) -> Tensor:
        out: Tensor = ring_attention(q_bsnd, k, v, begins, self.group.group_name, self.scale)[0]
        return out


class GatherCore(ContextCore):
    """Keys and values of all ranks are gathered."""

    exchange = CpExchange.GATHER

    def forward(self, q_bsnd: Tensor, k: Tensor, v: Tensor, begins: Tensor | None = None) -> Tensor:
        out: Tensor = gathered_attention(q_bsnd, k, v, begins, self.group.group_name, self.scale)[0]
        return out


class AllToAllCore(ContextCore):
    """Ranks trade their part of the sequence for a part of the heads, attend by `core`, and trade back.

    Heads of keys that ranks cannot share out evenly are copied first, as often as it takes.
    """

    exchange = CpExchange.ALL_TO_ALL

    def __init__(self, core: Core, group: dist.ProcessGroup) -> None:
        super().__init__(group, core.scale)
        self.core = core

    def forward(self, q_bsnd: Tensor, k: Tensor, v: Tensor, begins: Tensor | None = None) -> Tensor:
        copies = math.lcm(k.shape[2], self.ranks) // k.shape[2]
        if copies > 1:
            k, v = (t.repeat_interleave(copies, dim=2) for t in (k, v))
        traded = [sequence_for_heads(t, self.group) for t in (q_bsnd, k, v)]
        return heads_for_sequence(self.core(*traded, begins), self.group)


def make_core(core: Core, exchange: CpExchange, group: dist.ProcessGroup) -> ContextCore:
    """What takes the place of `core` where the ranks of `group` share out each sequence."""
    match exchange:
        case CpExchange.RING:
            return RingCore(group, core.scale)
        case CpExchange.GATHER:
            return GatherCore(group, core.scale)
        case CpExchange.ALL_TO_ALL:
            return AllToAllCore(core, group)
