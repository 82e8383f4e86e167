"""Collectives that autograd goes back through. They are the operators that torch traces, so that selective
recomputation can keep their results (`runtime.parallel.recompute`).

The messages of context parallelism: hops of a ring, gathers, and the trade of sequence for heads.

Shapes: B micro-batch, c ranks of the group, s = S / c positions of a rank, N heads, D head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor
from torch.torch_version import TorchVersion

FAKE_BACKEND_COPIES = TorchVersion(torch.__version__) >= "2.13"
"""Whether the fake backend itself copies what a rank sends into what it receives, of collectives; earlier
ones leave what is exchanged or reduced as it was allocated, which is filled here, but for DTensor's own. No
version does for messages of a pair."""


def is_fake(group: dist.ProcessGroup) -> bool:
    """Whether the other ranks of the group exist in name only."""
    return dist.get_backend(group) == "fake"


def balanced_counts(counts: Tensor) -> Tensor:
    """As many rows in all as `counts` [ranks, experts] says, as even as whole rows can be."""
    cells = counts.numel()
    begun = torch.arange(cells - 1, -1, -1, device=counts.device)
    return ((counts.sum() + begun) // cells).view_as(counts)


def fill_received(received: Tensor, sent: Tensor) -> None:
    """Writes what was sent into what is received, row by row, again from the start where that is longer.

    Autograd and recomputation, which keep what was received, take it as part of receiving.
    """
    rows = max(len(sent), 1)
    target = received.data
    for first in range(0, len(received) if len(sent) else 0, rows):
        part = target[first : first + rows]
        part.copy_(sent.data[: len(part)])


_ops = torch.ops._c10d_functional

Linear = Callable[[Tensor], Tensor]


def _exchanged(
    x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """All-to-all along dim 0: out_splits[r] rows go to rank r, in_splits[r] come from it."""
    sent = _ops.all_to_all_single(x.contiguous(), list(in_splits), list(out_splits), group.group_name)
    received: Tensor = _ops.wait_tensor(sent)
    if not FAKE_BACKEND_COPIES and is_fake(group):
        fill_received(received, x)
    return received


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row r of `counts` goes to rank r of the group; row r of the result came from it.

    Where the others exist in name only, their routers and this rank's are taken to be balanced.
    """
    ones = [1] * group.size()
    received = _exchanged(counts, ones, ones, group)
    return balanced_counts(counts) if is_fake(group) else received


def exchange_rows(
    rows: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """As many rows to and from each rank as the splits say; gradients go the other way."""
    return with_transpose(
        rows,
        lambda x: _exchanged(x, out_splits, in_splits, group),
        lambda grad: _exchanged(grad, in_splits, out_splits, group),
    )


def gather_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks one after another along dim 0; gradients are summed and scattered."""
    return with_transpose(x, lambda x: _gathered(x, group), lambda grad: _summed(grad, group))


def sum_to_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' tensors, of which each gets its equal part along dim 0."""
    return with_transpose(x, lambda x: _summed(x, group), lambda grad: _gathered(grad, group))


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = _ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    received: Tensor = _ops.wait_tensor(sent)
    return received


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = _ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    received: Tensor = _ops.wait_tensor(sent)
    if not FAKE_BACKEND_COPIES and is_fake(group):
        fill_received(received, x)
    return received


def with_transpose(x: Tensor, there: Linear, back: Linear) -> Tensor:
    """`there(x)`, a linear map over ranks whose gradient goes through its transpose `back`."""
    mapped: Tensor = _Transposed.apply(x, there, back)  # type: ignore[no-untyped-call]
    return mapped


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Linear, back: Linear) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grads[0]), None, None


class Ring:
    """The ranks of a group in a circle: each sends to the next one and receives from the one before."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def send(self, *tensors: Tensor, kind: int = 0) -> Hop:
        """Starts one hop of these contiguous tensors. Hops of two kinds that overlap need not be in order."""
        ahead, behind = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        received = tuple(torch.empty_like(tensor) for tensor in tensors)
        if is_fake(self.group):
            for empty, own in zip(received, tensors, strict=True):
                fill_received(empty, own)
        sends = self._operations(dist.isend, tensors, ahead, kind)
        receives = self._operations(dist.irecv, received, behind, kind)
        return Hop(tensors, received, dist.batch_isend_irecv([*sends, *receives]))

    def _operations(
        self, operation: Callable[..., Any], tensors: Sequence[Tensor], peer: int, kind: int
    ) -> list[dist.P2POp]:
        peer = dist.get_global_rank(self.group, peer)
        return [
            dist.P2POp(operation, tensor, peer, self.group, tag=kind * len(tensors) + place)
            for place, tensor in enumerate(tensors)
        ]


class Hop:
    """Tensors on their way round; what is sent stays alive until it has arrived."""

    def __init__(
        self, sent: tuple[Tensor, ...], received: tuple[Tensor, ...], works: list[dist.Work]
    ) -> None:
        self._sent, self._received, self._works = sent, received, works

    def arrive(self) -> tuple[Tensor, ...]:
        """What the rank before sent. The device waits, the host only where communication is its own work."""
        for work in self._works:
            work.wait()
        self._works, self._sent = [], ()
        return self._received


def gather_parts(parts: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """For each tensor those of all ranks, [c, ...], in one message."""
    own = torch.cat([part.reshape(-1) for part in parts])
    whole = own.new_empty(dist.get_world_size(group), own.numel())
    # The old name is deprecated since 2.13, the new one missing before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole.view(-1), own, group=group)
    return _views(whole, parts)


class PartialSums:
    """For tensors of every rank what this one adds to them; `scatter` gives each rank the sum of its own.

    `views` are [c, ...] for each tensor, zeros at first.
    """

    def __init__(self, like: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self._like, self._group = like, group
        count = sum(tensor.numel() for tensor in like)
        self._whole = like[0].new_zeros(dist.get_world_size(group), count)
        self.views = _views(self._whole, like)

    def scatter(self) -> tuple[Tensor, ...]:
        """The sums over all ranks of this rank's own tensors, in one message."""
        own = self._whole.new_empty(1, self._whole.shape[1])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(own.view(-1), self._whole.view(-1), group=self._group)
        if not FAKE_BACKEND_COPIES and is_fake(self._group):
            fill_received(own, self._whole)
        return tuple(view[0].clone() for view in _views(own, self._like))


def _views(whole: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    starts = itertools.accumulate((tensor.numel() for tensor in like), initial=0)
    return tuple(
        whole[:, start : start + tensor.numel()].view(-1, *tensor.shape)
        for start, tensor in zip(starts, like, strict=False)
    )


def sequence_for_heads(x_bsnd: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, s, N, D] of every head and this rank's positions -> [B, S, N/c, D] of this rank's heads and all."""
    return with_transpose(x_bsnd, lambda x: _to_heads(x, group), lambda grad: _to_sequence(grad, group))


def heads_for_sequence(x_bsnd: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S, N/c, D] of this rank's heads -> [B, s, N, D] of every head and this rank's positions."""
    return with_transpose(x_bsnd, lambda x: _to_sequence(x, group), lambda grad: _to_heads(grad, group))


def _to_heads(x_bsnd: Tensor, group: dist.ProcessGroup) -> Tensor:
    batch, positions, _, width = x_bsnd.shape
    ranks = dist.get_world_size(group)
    parts = x_bsnd.reshape(batch, positions, ranks, -1, width).permute(2, 0, 1, 3, 4)
    return _trade(parts, group).permute(1, 0, 2, 3, 4).flatten(1, 2)


def _to_sequence(x_bsnd: Tensor, group: dist.ProcessGroup) -> Tensor:
    batch, _, heads, width = x_bsnd.shape
    ranks = dist.get_world_size(group)
    parts = x_bsnd.reshape(batch, ranks, -1, heads, width).permute(1, 0, 2, 3, 4)
    return _trade(parts, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _trade(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gives part r to rank r, and returns what each rank gave, in the order of ranks."""
    traded = functional_collectives.all_to_all_single(parts.contiguous(), None, None, group)
    arrived: Tensor = functional_collectives.wait_tensor(traded)  # type: ignore[no-untyped-call]
    if not FAKE_BACKEND_COPIES and is_fake(group):
        fill_received(arrived, parts)
    return arrived
