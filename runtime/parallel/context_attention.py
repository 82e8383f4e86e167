"""Causal attention over a sequence that the ranks of a group share out: by a ring, or by gathered keys.

The sequence is cut into 2c slices. Rank r of c holds slices r and 2c-1-r, early half first, so that every
rank has as many pairs of tokens. Of the keys of rank j, rank r's queries meet

    j = r   causally, in the order in which they lie here
    j < r   the early half, with all queries
    j > r   both halves, with the late half of the queries

so no mask is needed, and each but the own is half of the block's pairs. A ring meets ranks r, r-1, r-2, ...
in turn, each block while the next keys are on their way; gathered, those before and those behind are a block
each. Blocks are merged by their statistics (runtime.model.attention_blocks). Going back, gradients of keys
and
values go round with them, and home by a last hop; or they are scattered and summed.

Within documents (`begins`, as in runtime.model.document_attention) the same blocks come and go, and of each
only
what meets is computed.

Both are operators of their own, so that recomputation can keep what they give (runtime.parallel.recompute)
instead of
sending everything again, and so that compilers leave them whole.

Shapes: B micro-batch, S positions of this rank, N query heads, K key heads, D head_dim, E value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.model.attention_blocks import ALL, Merged, attend, empty_results
from runtime.model.document_attention import (
    Meeting,
    Slice,
    Three,
    add_parts,
    document_bounds,
    gradient_parts,
    meetings,
    merge,
)
from runtime.parallel.context_messages import PartialSums, Ring, gather_parts

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
