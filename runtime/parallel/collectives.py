"""Collectives that autograd goes back through. They are the operators that torch traces, so that selective
recomputation can keep their results (`runtime.recompute`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ops = torch.ops._c10d_functional


def _exchanged(
    x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """All-to-all along dim 0: out_splits[r] rows go to rank r, in_splits[r] come from it."""
    sent = _ops.all_to_all_single(x.contiguous(), list(in_splits), list(out_splits), group.group_name)
    received: Tensor = _ops.wait_tensor(sent)
    return received


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row r of `counts` goes to rank r of the group; row r of the result came from it."""
    ones = [1] * group.size()
    return _exchanged(counts, ones, ones, group)


def exchange_rows(
    rows: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """As many rows to and from each rank as the splits say; gradients go the other way."""
    received: Tensor = _Exchange.apply(rows, out_splits, in_splits, group)  # type: ignore[no-untyped-call]
    return received


def gather_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks one after another along dim 0; gradients are summed and scattered."""
    gathered: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return gathered


def sum_to_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' tensors, of which each gets its equal part along dim 0."""
    own: Tensor = _SumToRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return own


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = _ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    received: Tensor = _ops.wait_tensor(sent)
    return received


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = _ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    received: Tensor = _ops.wait_tensor(sent)
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.back = (in_splits, out_splits, group)
        return _exchanged(rows, out_splits, in_splits, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], *ctx.back), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _SumToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.group), None
