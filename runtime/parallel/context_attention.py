"""Causal attention over a sequence that the ranks of a group share out: by a ring, or by gathered keys.

The sequence is cut into 2c slices. Rank r of c holds slices r and 2c-1-r, early half first, so that every
rank has as many pairs of tokens. Of the keys of rank j, rank r's queries meet

    j = r   causally, in the order in which they lie here
    j < r   the early half, with all queries
    j > r   both halves, with the late half of the queries

so no mask is needed, and each but the own is half of the block's pairs. A ring meets ranks r, r-1, r-2, ...
in turn, each block while the next keys are on their way; gathered, those before and those behind are a block
each. Blocks are merged by their statistics (runtime.attention_blocks). Going back, gradients of keys and
values go round with them, and home by a last hop; or they are scattered and summed.

Both are operators of their own, so that recomputation can keep what they give (runtime.recompute) instead of
sending everything again, and so that compilers leave them whole.

Shapes: B micro-batch, S positions of this rank, N query heads, K key heads, D head_dim, E value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.attention_blocks import Merged, attend, attend_backward
from runtime.parallel.context_messages import PartialSums, Ring, gather_parts

FORWARD = "(Tensor q, Tensor k, Tensor v, str group, float? scale) -> (Tensor, Tensor)"
BACKWARD = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, str group, float? scale) "
    "-> (Tensor, Tensor, Tensor)"
)

Three = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("shardwise::ring_attention", mutates_args=(), schema=FORWARD)
def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: str, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention [B, S, N, E] of this rank's queries to all keys before them, and its statistics [B, N, S].

    Keys and values go round in size - 1 hops, each behind the attention to the block before.
    """
    ring, half = Ring(_group(group)), q.shape[1] // 2
    k, v = k.contiguous(), v.contiguous()
    hop = ring.send(k, v)
    total = Merged(*attend(q, k, v, causal=True, scale=scale))
    for step in range(1, ring.size):
        k, v = hop.arrive()
        if step < ring.size - 1:
            hop = ring.send(k, v)
        if step <= ring.rank:
            total.add(*attend(q, k[:, :half], v[:, :half], causal=False, scale=scale))
        else:
            total.add(*attend(q[:, half:], k, v, causal=False, scale=scale), first=half)
    return total.out.to(q.dtype), total.lse


@torch.library.custom_op("shardwise::ring_attention_backward", mutates_args=(), schema=BACKWARD)
def ring_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group: str, scale: float | None
) -> Three:
    """Gradients of this rank's queries, keys and values.

    Keys and values go round again; the gradients of a rank's follow them, a block behind, and one hop more.
    """
    ring, half = Ring(_group(group)), q.shape[1] // 2
    late = slice(half, None)
    k, v = k.contiguous(), v.contiguous()
    hop = ring.send(k, v)
    grad_q, grad_k, grad_v = attend_backward(grad, (q, k, v), out, lse, causal=True, scale=scale)
    total_q = grad_q.to(lse.dtype)
    carried: tuple[Tensor, ...] = (grad_k.contiguous(), grad_v.contiguous())
    for step in range(1, ring.size):
        k, v = hop.arrive()
        if step < ring.size - 1:
            hop = ring.send(k, v)
        following = ring.send(*carried, kind=1)
        if step <= ring.rank:
            keys = (q, k[:, :half], v[:, :half])
            part = attend_backward(grad, keys, out, lse, causal=False, scale=scale)
            queries, met = slice(None), slice(half)
        else:
            late_only = (grad[:, late], (q[:, late], k, v), out[:, late], lse[..., late])
            part = attend_backward(*late_only, causal=False, scale=scale)
            queries, met = late, slice(None)
        carried = following.arrive()
        for total, more in zip((total_q[:, queries], *(t[:, met] for t in carried)), part, strict=True):
            total += more
    grad_k, grad_v = ring.send(*carried, kind=1).arrive()
    return total_q.to(q.dtype), grad_k, grad_v


@torch.library.custom_op("shardwise::gathered_attention", mutates_args=(), schema=FORWARD)
def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, group: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    """As `ring_attention`, with the keys and values of all ranks gathered first, in one message."""
    members, half = _group(group), q.shape[1] // 2
    rank, size = dist.get_rank(members), dist.get_world_size(members)
    keys, values = gather_parts((k, v), members)
    total = Merged(*attend(q, k, v, causal=True, scale=scale))
    if rank > 0:
        early = (_in_a_row(t[:rank, :, :half]) for t in (keys, values))
        total.add(*attend(q, *early, causal=False, scale=scale))
    if rank < size - 1:
        behind = (_in_a_row(t[rank + 1 :]) for t in (keys, values))
        total.add(*attend(q[:, half:], *behind, causal=False, scale=scale), first=half)
    return total.out.to(q.dtype), total.lse


@torch.library.custom_op("shardwise::gathered_attention_backward", mutates_args=(), schema=BACKWARD)
def gathered_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group: str, scale: float | None
) -> Three:
    """Gathers keys and values again, which are not kept, then scatters and sums their gradients."""
    members, half = _group(group), q.shape[1] // 2
    late = slice(half, None)
    rank, size = dist.get_rank(members), dist.get_world_size(members)
    keys, values = gather_parts((k, v), members)
    sums = PartialSums((k, v), members)
    own = attend_backward(grad, (q, k, v), out, lse, causal=True, scale=scale)
    total_q = own[0].to(lse.dtype)
    for whole, part in zip(sums.views, own[1:], strict=True):
        whole[rank] = part
    if rank > 0:
        early = (q, _in_a_row(keys[:rank, :, :half]), _in_a_row(values[:rank, :, :half]))
        grad_q, *others = attend_backward(grad, early, out, lse, causal=False, scale=scale)
        total_q += grad_q
        for whole, part in zip(sums.views, others, strict=True):
            whole[:rank, :, :half] = _by_rank(part, rank)
    if rank < size - 1:
        behind = (q[:, late], _in_a_row(keys[rank + 1 :]), _in_a_row(values[rank + 1 :]))
        late_only = (grad[:, late], behind, out[:, late], lse[..., late])
        grad_q, *others = attend_backward(*late_only, causal=False, scale=scale)
        total_q[:, late] += grad_q
        for whole, part in zip(sums.views, others, strict=True):
            whole[rank + 1 :] = _by_rank(part, size - 1 - rank)
    grad_k, grad_v = sums.scatter()
    return total_q.to(q.dtype), grad_k, grad_v


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
    q, k, v, ctx.group, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _ring_gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return *ring_attention_backward(grad, *ctx.saved_tensors, ctx.group, ctx.scale), None, None


def _gathered_gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return *gathered_attention_backward(grad, *ctx.saved_tensors, ctx.group, ctx.scale), None, None


def _empty_forward(q: Tensor, k: Tensor, v: Tensor, group: str, scale: float | None) -> tuple[Tensor, Tensor]:
    statistics = q.new_empty(
        q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32)
    )
    return q.new_empty(*q.shape[:3], v.shape[3]), statistics


def _empty_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group: str, scale: float | None
) -> Three:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


for _forward, _backward, _gradients in (
    (ring_attention, ring_attention_backward, _ring_gradients),
    (gathered_attention, gathered_attention_backward, _gathered_gradients),
):
    _forward.register_fake(_empty_forward)
    _backward.register_fake(_empty_backward)
    _forward.register_autograd(_gradients, setup_context=_keep_inputs)

CONTEXT_OPERATORS = (
    torch.ops.shardwise.ring_attention.default,
    torch.ops.shardwise.gathered_attention.default,
)
"""The operators whose results are attention's, as dispatched."""
