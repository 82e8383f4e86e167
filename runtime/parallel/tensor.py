"""Tensor parallelism: which dimension of which weight each rank of the tp axis holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from planner.strategy import Degrees
from runtime.parallel.meshes import Meshes, mesh_axes
from runtime.transformer.block import Block
from runtime.transformer.head import Head


def apply_tensor_parallel(name: str, part: nn.Module, degrees: Degrees, meshes: Meshes) -> None:
    """Shards the projections, embedding and output of a part over the tp axis (Megatron-LM's split).

    Between parts, hidden states are plain tensors: whole, or with sequence_parallel this rank's slice of
    the sequence. What is left whole (norms, positions) then sees only that slice, so its gradient is a
    partial sum; the executor adds these up over tp once a step.
    """
    if degrees.tp == 1:
        return
    between = Shard(1) if degrees.sequence_parallel else Replicate()
    if isinstance(part, Block):
        plan: ParallelStyle | dict[str, ParallelStyle] = _block_plan(part, between)
    elif name == "tok_embeddings":
        plan = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    elif isinstance(part, Head):
        part.shard(meshes.tp, between)
        return
    else:
        return
    # Every rank drew the same whole weights, so each takes its shard from its own copy.
    parallelize_module(part, meshes.tp, plan, src_data_rank=None)
    if name == "tok_embeddings":
        part.register_forward_hook(_finish)


def _finish(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    """The embedding's result once its collective is done: compiled blocks do not take an unfinished one."""
    done: Tensor = _Finished.apply(out)  # type: ignore[no-untyped-call]
    return done


class _Finished(Function):
    @staticmethod
    def forward(ctx: Any, unfinished: Tensor) -> Tensor:
        waits = isinstance(unfinished, AsyncCollectiveTensor)
        done: Tensor = unfinished.trigger_wait() if waits else unfinished  # type: ignore[attr-defined]
        return done.view_as(done)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _block_plan(block: Block, between: Shard | Replicate) -> dict[str, ParallelStyle]:
    """Columns of the projections that widen, rows of those that narrow; one gather for each pair."""
    whole = Replicate()
    plan: dict[str, ParallelStyle] = {
        "attention": PrepareModuleInput(
            input_layouts=(between, None, None), desired_input_layouts=(whole, None, None)
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=between),
        "mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(whole,)),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=between),
    }
    if block.mlp.gate is not None:
        plan["mlp.gate"] = ColwiseParallel()
    return plan


def whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that tensor parallelism left whole on every rank of the tp axis."""
    return [p for p in model.parameters() if not (isinstance(p, DTensor) and "tp" in mesh_axes(p))]
