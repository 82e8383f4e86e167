"""Tensor parallelism: which dimension of which weight each rank of the tp axis holds."""

from __future__ import annotations

from torch import nn
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
    elif name == "output":
        plan = ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False)
    else:
        return
    # Every rank drew the same whole weights, so each takes its shard from its own copy.
    parallelize_module(part, meshes.tp, plan, src_data_rank=None)


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
