"""Context parallelism: which tokens of a sequence a rank of the cp axis holds, and how it meets the others.

Shapes: B micro-batch, S positions of this rank, N heads, D head_dim.

Causal attention over a sequence that the ranks of a group share out: by a ring, or by gathered keys.

The sequence is cut into 2c slices. Rank r of c holds slices r and 2c-1-r, early half first, so that every
rank has as many pairs of tokens. Of the keys of rank j, rank r's queries meet

    j = r   causally, in the order in which they lie here
    j < r   the early half, with all queries
    j > r   both halves, with the late half of the queries

so no mask is needed, and each but the own is half of the block's pairs. A ring meets ranks r, r-1, r-2, ...
in turn, each block while the next keys are on their way; gathered, those before and those behind are a block
each. Blocks are merged by their statistics (runtime.model.block_attention). Going back, gradients of keys
and
values go round with them, and home by a last hop; or they are scattered and summed.

Within documents (`begins`, as in runtime.model.block_attention) the same blocks come and go, and of each
only
what meets is computed.

Both are operators of their own, so that recomputation can keep what they give (runtime.parallel.recompute)
instead of
sending everything again, and so that compilers leave them whole.

Shapes: B micro-batch, S positions of this rank, N query heads, K key heads, D head_dim, E value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.model.attention import CpExchange
from planner.strategy.strategy import Degrees
from runtime.model.attention import Core
from runtime.model.block_attention import (
    ALL,
    Meeting,
    Merged,
    Slice,
    Three,
    add_parts,
    attend,
    document_bounds,
    empty_results,
    gradient_parts,
    meetings,
    merge,
)
from runtime.model.layers import Rotary
from runtime.model.transformer import Block
from runtime.parallel.collectives import (
    PartialSums,
    Ring,
    gather_parts,
    heads_for_sequence,
    sequence_for_heads,
)
from runtime.parallel.meshes import Meshes

FORWARD = "(Tensor q, Tensor k, Tensor v, Tensor? begins, str group, float? scale) -> (Tensor, Tensor)"
BACKWARD = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? begins, Tensor out, Tensor lse, str group, "
    "float? scale) -> (Tensor, Tensor, Tensor)"
)

Gradients = tuple[Tensor, Tensor, Tensor, None, None, None]
OWN = Meeting(causal=True)


class Meets:
    """Whom the queries of a rank meet: for each block of keys the meetings in it."""

    def __init__(self, rank: int, size: int, half: int, begins: Tensor | None) -> None:
        self.rank, self.size, self.half = rank, size, half
        self._bounds = None if begins is None else document_bounds(begins)

    def of(self, other: int) -> list[Meeting]:
        """The keys of another rank, or of this one."""
        usual = (
            Meeting(keys=slice(self.half)) if other < self.rank else Meeting(queries=slice(self.half, None))
        )
        return self._within(self._held(other), OWN if other == self.rank else usual)

    def before(self) -> list[Meeting]:
        """The early halves of all ranks before this one, in a row."""
        return self._within([Slice(0, self.rank * self.half, 0)], Meeting())

    def behind(self) -> list[Meeting]:
        """All keys of all ranks behind this one, in a row."""
        slices = [
            part._replace(place=part.place + 2 * self.half * turn)
            for turn, other in enumerate(range(self.rank + 1, self.size))
            for part in self._held(other)
        ]
        return self._within(slices, Meeting(queries=slice(self.half, None)))

    def _held(self, rank: int) -> list[Slice]:
        """The slices of the sequence that a rank holds."""
        half = self.half
        numbers = (rank, 2 * self.size - 1 - rank)
        return [Slice(n * half, (n + 1) * half, place * half) for place, n in enumerate(numbers)]

    def _within(self, keys: list[Slice], usual: Meeting) -> list[Meeting]:
        if self._bounds is None:
            return [usual]
        return meetings(self._bounds, self._held(self.rank), keys)


@torch.library.custom_op("shardwise::ring_attention", mutates_args=(), schema=FORWARD)
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor | None, group: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention [B, S, N, E] of this rank's queries to all keys before them, and its statistics [B, N, S].

    Keys and values go round in size - 1 hops, each behind the attention to the block before.
    """
    ring = Ring(_group(group))
    meets = Meets(ring.rank, ring.size, q.shape[1] // 2, begins)
    k, v = k.contiguous(), v.contiguous()
    hop = ring.send(k, v)
    total = _own_result(q, k, v, meets, scale)
    for step in range(1, ring.size):
        k, v = hop.arrive()
        if step < ring.size - 1:
            hop = ring.send(k, v)
        merge(total, (q, k, v), meets.of((ring.rank - step) % ring.size), scale)
    return total.out.to(q.dtype), total.lse


@torch.library.custom_op("shardwise::ring_attention_backward", mutates_args=(), schema=BACKWARD)
def ring_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: Tensor | None,
    out: Tensor,
    lse: Tensor,
    group: str,
    scale: float | None,
) -> Three:
    """Gradients of this rank's queries, keys and values.

    Keys and values go round again; the gradients of a rank's follow them, a block behind, and one hop more.
    """
    ring = Ring(_group(group))
    meets = Meets(ring.rank, ring.size, q.shape[1] // 2, begins)
    k, v = k.contiguous(), v.contiguous()
    hop = ring.send(k, v)
    total_q = torch.zeros_like(q, dtype=lse.dtype)
    own = _key_gradients(total_q, grad, (q, k, v), out, lse, meets.of(ring.rank), scale)
    carried = tuple(part.contiguous() for part in own)
    for step in range(1, ring.size):
        k, v = hop.arrive()
        if step < ring.size - 1:
            hop = ring.send(k, v)
        following = ring.send(*carried, kind=1)
        met = meets.of((ring.rank - step) % ring.size)
        parts = gradient_parts(grad, (q, k, v), out, lse, met, scale)
        carried = following.arrive()
        add_parts((total_q, *carried), parts)
    grad_k, grad_v = ring.send(*carried, kind=1).arrive()
    return total_q.to(q.dtype), grad_k, grad_v


@torch.library.custom_op("shardwise::gathered_attention", mutates_args=(), schema=FORWARD)
def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor | None, group: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    """As `ring_attention`, with the keys and values of all ranks gathered first, in one message."""
    members, half = _group(group), q.shape[1] // 2
    rank, size = dist.get_rank(members), dist.get_world_size(members)
    meets = Meets(rank, size, half, begins)
    keys, values = gather_parts((k, v), members)
    total = _own_result(q, k, v, meets, scale)
    if rank > 0:
        early = (q, _in_a_row(keys[:rank, :, :half]), _in_a_row(values[:rank, :, :half]))
        merge(total, early, meets.before(), scale)
    if rank < size - 1:
        behind = (q, _in_a_row(keys[rank + 1 :]), _in_a_row(values[rank + 1 :]))
        merge(total, behind, meets.behind(), scale)
    return total.out.to(q.dtype), total.lse


@torch.library.custom_op("shardwise::gathered_attention_backward", mutates_args=(), schema=BACKWARD)
def gathered_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: Tensor | None,
    out: Tensor,
    lse: Tensor,
    group: str,
    scale: float | None,
) -> Three:
    """Gathers keys and values again, which are not kept, then scatters and sums their gradients."""
    members, half = _group(group), q.shape[1] // 2
    rank, size = dist.get_rank(members), dist.get_world_size(members)
    meets = Meets(rank, size, half, begins)
    keys, values = gather_parts((k, v), members)
    sums = PartialSums((k, v), members)
    total_q = torch.zeros_like(q, dtype=lse.dtype)
    own = _key_gradients(total_q, grad, (q, k, v), out, lse, meets.of(rank), scale)
    for whole, part in zip(sums.views, own, strict=True):
        whole[rank] = part
    if rank > 0:
        early = (q, _in_a_row(keys[:rank, :, :half]), _in_a_row(values[:rank, :, :half]))
        others = _key_gradients(total_q, grad, early, out, lse, meets.before(), scale)
        for whole, part in zip(sums.views, others, strict=True):
            whole[:rank, :, :half] = _by_rank(part, rank)
    if rank < size - 1:
        behind = (q, _in_a_row(keys[rank + 1 :]), _in_a_row(values[rank + 1 :]))
        others = _key_gradients(total_q, grad, behind, out, lse, meets.behind(), scale)
        for whole, part in zip(sums.views, others, strict=True):
            whole[rank + 1 :] = _by_rank(part, size - 1 - rank)
    grad_k, grad_v = sums.scatter()
    return total_q.to(q.dtype), grad_k, grad_v


def _own_result(q: Tensor, k: Tensor, v: Tensor, meets: Meets, scale: float | None) -> Merged:
    """What a rank's queries meet of its own keys."""
    met = meets.of(meets.rank)
    if met == [OWN]:
        return Merged(*attend(q, k, v, causal=True, scale=scale))
    total = Merged.empty(q, v)
    merge(total, (q, k, v), met, scale)
    return total


def _key_gradients(
    total_q: Tensor,
    grad: Tensor,
    inputs: Three,
    out: Tensor,
    lse: Tensor,
    met: list[Meeting],
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of a block of keys and values; those of queries are added to `total_q`."""
    parts = gradient_parts(grad, inputs, out, lse, met, scale)
    if len(met) == 1 and met[0].rows == met[0].keys == ALL:
        part_q, part_k, part_v = parts[0][1]
        total_q[:, met[0].queries] += part_q
        return part_k, part_v
    _, k, v = inputs
    totals = (torch.zeros_like(k), torch.zeros_like(v))
    add_parts((total_q, *totals), parts)
    return totals


def _group(name: str) -> dist.ProcessGroup:
    resolve: Callable[[str], dist.ProcessGroup] = getattr(dist.distributed_c10d, "_resolve_process_group")  # noqa: B009
    return resolve(name)


def _in_a_row(x_rbskd: Tensor) -> Tensor:
    """[B, r S, K, D]: what r ranks hold, one after the other."""
    return x_rbskd.transpose(0, 1).flatten(1, 2)


def _by_rank(x_bskd: Tensor, ranks: int) -> Tensor:
    """[r, B, S, K, D]: the inverse."""
    return x_bskd.reshape(len(x_bskd), ranks, -1, *x_bskd.shape[2:]).transpose(0, 1)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.group, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _ring_gradients(ctx: Any, grad: Tensor, _: Any) -> Gradients:
    return *ring_attention_backward(grad, *ctx.saved_tensors, ctx.group, ctx.scale), None, None, None


def _gathered_gradients(ctx: Any, grad: Tensor, _: Any) -> Gradients:
    return *gathered_attention_backward(grad, *ctx.saved_tensors, ctx.group, ctx.scale), None, None, None


def _empty_forward(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor | None, group: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    return empty_results(q, v)


def _empty_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Three:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


for _forward, _backward, _gradients in (
    (ring_attention, ring_attention_backward, _ring_gradients),
    (gathered_attention, gathered_attention_backward, _gathered_gradients),
):
    _forward.register_fake(_empty_forward)
    _backward.register_fake(_empty_backward)
    _forward.register_autograd(_gradients, setup_context=_keep_inputs)

ATTENTION_OPERATORS = (
    torch.ops.shardwise.document_attention.default,
    torch.ops.shardwise.ring_attention.default,
    torch.ops.shardwise.gathered_attention.default,
)
"""The operators whose results are attention's, as dispatched."""


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
