"""Collectives that autograd goes back through. They are the operators that torch traces, so that selective
recomputation can keep their results (`runtime.parallel.recompute`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.launch.fake_answers import FILLS, alone, balanced_counts, fill

_ops = torch.ops._c10d_functional

Linear = Callable[[Tensor], Tensor]


def _exchanged(
    x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """All-to-all along dim 0: out_splits[r] rows go to rank r, in_splits[r] come from it."""
    sent = _ops.all_to_all_single(x.contiguous(), list(in_splits), list(out_splits), group.group_name)
    received: Tensor = _ops.wait_tensor(sent)
    if not FILLS and alone(group):
        fill(received, x)
    return received


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row r of `counts` goes to rank r of the group; row r of the result came from it.

    Where the others exist in name only, their routers and this rank's are taken to be balanced.
    """
    ones = [1] * group.size()
    received = _exchanged(counts, ones, ones, group)
    return balanced_counts(counts) if alone(group) else received


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
    if not FILLS and alone(group):
        fill(received, x)
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
