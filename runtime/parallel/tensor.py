"""Tensor parallelism: which dimension of which weight each rank of the tp axis holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional

from planner.strategy.strategy import Degrees
from runtime.model.attention import Attention
from runtime.model.experts import MixtureOfExperts
from runtime.model.layers import WidthNorm
from runtime.model.loss import Head
from runtime.model.transformer import Block
from runtime.parallel.expert import Leave, mixtures, shared_expert_plan
from runtime.parallel.meshes import HEAD_AXES, HeadMeshes, Meshes, mesh_axes


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
        plan: ParallelStyle | dict[str, ParallelStyle] = _block_plan(part, between, degrees, meshes)
        if part.joins:
            part.enter, part.leave = _Enter(meshes.tp, between), Leave(meshes.tp, between)
    elif name == "tok_embeddings":
        whole = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
        plan = VocabParallel(between) if type(part).forward is nn.Embedding.forward else whole
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


def _block_plan(
    block: Block, between: Shard | Replicate, degrees: Degrees, meshes: Meshes
) -> dict[str, ParallelStyle]:
    """Columns of the projections that widen, rows of those that narrow; one gather for each pair.

    Sublayers side by side get their input whole from the block, which sums their results.
    """
    if block.joins:
        return _joined_plan(block, degrees, meshes)
    whole = Replicate()
    plan: dict[str, ParallelStyle] = {
        "attention": PrepareModuleInput(
            input_layouts=(between, None, None), desired_input_layouts=(whole, None, None)
        ),
        "attention.wo": RowwiseParallel(output_layouts=between),
    }
    plan |= _attention_plan(block.attention, degrees, meshes)
    if isinstance(block.mlp, MixtureOfExperts):
        below = shared_expert_plan(block.mlp, between, degrees)
        return plan | {f"mlp.{name}".removesuffix("."): style for name, style in below.items()}
    plan |= {
        "mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(whole,)),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=between),
    }
    if block.mlp.gate is not None:
        plan["mlp.gate"] = ColwiseParallel()
    return plan


def _joined_plan(block: Block, degrees: Degrees, meshes: Meshes) -> dict[str, ParallelStyle]:
    plan = _attention_plan(block.attention, degrees, meshes)
    ups = ("mlp.up",) if block.mlp.gate is None else ("mlp.up", "mlp.gate")
    plan |= {name: ColwiseParallel() for name in ups}
    return plan | {name: RowwiseParallel(output_layouts=Partial()) for name in ("attention.wo", "mlp.down")}


def _attention_plan(attention: nn.Module, degrees: Degrees, meshes: Meshes) -> dict[str, ParallelStyle]:
    if not isinstance(attention, Attention):
        return _latent_plan(attention)
    few = attention.kv_heads < degrees.tp
    return _heads_plan(attention, meshes.copied[attention.kv_heads] if few else None)


@dataclass(frozen=True)
class _Enter:
    """Hidden states as all ranks need them; the gradients of all that read them are summed at once."""

    tp: DeviceMesh
    between: Placement

    def __call__(self, x_bsh: Tensor) -> Tensor:
        held = DTensor.from_local(x_bsh, self.tp, [self.between], run_check=False)
        return held.redistribute(placements=[Replicate()])


def _heads_plan(attention: Attention, copied: HeadMeshes | None) -> dict[str, ParallelStyle]:
    """Each rank projects to its heads, and norms them by themselves or over the width of all.

    Of key-value heads that are fewer than ranks it projects to a copy of one.
    """
    plan: dict[str, ParallelStyle] = {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    if copied is not None:
        plan |= {f"attention.{name}": CopiedParallel(copied.heads) for name in ("wk", "wv")}
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name)
        if isinstance(norm, WidthNorm):
            heads = copied.heads if copied is not None and name == "k_norm" else None
            plan[f"attention.{name}"] = WidthParallel(heads)
        elif any(True for _ in norm.parameters()):
            plan[f"attention.{name}"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return plan


def _latent_plan(attention: nn.Module) -> dict[str, ParallelStyle]:
    """Every rank computes the whole latents, and expands its heads from them."""
    ups, downs = ("wq", "wq_up", "wkv_up"), ("wq_down", "q_norm", "wkv_down", "kv_norm")
    styles: dict[str, ParallelStyle] = {
        **{name: ColwiseParallel() for name in ups},
        **{name: WholeParallel() for name in downs},
    }
    return {f"attention.{name}": style for name, style in styles.items() if hasattr(attention, name)}


class VocabParallel(ParallelStyle):
    """An embedding whose rows the ranks of the axis share out, each with the gradient of its own rows.

    Under RowwiseParallel every rank computes the gradient of the whole table, which DTensor has no rule
    to shard: vocabulary x hidden in fp32 where gradients add up. A row of padding has none. Where rows do not
    divide, each rank has as many, rounded up, and the last what is left.
    """

    def __init__(self, between: Shard | Replicate) -> None:
        self._between = between

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def forward(tokens: Tensor) -> Tensor:
            weight: Any = module.weight
            own: Tensor = weight.to_local()
            first = device_mesh.get_local_rank() * math.ceil(weight.shape[0] / device_mesh.size())
            rows = tokens - first
            elsewhere = (rows < 0) | (rows >= own.shape[0])
            row: Any = module.padding_idx
            held = row is not None and first <= row < first + own.shape[0]
            padding = row - first if held else None
            found = functional.embedding(rows.masked_fill(elsewhere, 0), own, padding_idx=padding)
            found = found.masked_fill(elsewhere[..., None], 0.0)
            part = DTensor.from_local(found, device_mesh, [Partial()], run_check=False)
            return part.redistribute(placements=[self._between]).to_local()

        module.forward = forward
        return _place(module, device_mesh, Shard(0))


class WholeParallel(ParallelStyle):
    """A module whose weights every rank of the axis holds whole, as DTensors, so that gradients that are
    partial sums are known to be. Inputs are DTensors already."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _place(module, device_mesh, Replicate())


class CopiedParallel(ParallelStyle):
    """A projection to fewer heads than the axis has ranks, which `heads` share out: neighbours have copies.

    Each copy's gradient is that by the query heads beside it, a part of a sum over the copies.
    """

    def __init__(self, heads: DeviceMesh) -> None:
        self._heads = heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_module: nn.Module, args: tuple[Any, ...]) -> Tensor:
            whole: Tensor = args[0].to_local(grad_placements=[Partial()])
            entered: Tensor = _AmongHeads.apply(whole, self._heads)  # type: ignore[no-untyped-call]
            return entered

        def leave(_module: nn.Module, _args: Any, out: DTensor) -> Tensor:
            return out.redistribute(placements=[Shard(out.dim() - 1)]).to_local()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return _place(module, self._heads, Shard(0))


class _AmongHeads(Function):
    """A tensor that all ranks of a mesh have, whose gradient each leaves as its own part of a sum."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, mesh: DeviceMesh) -> DTensor:
        return DTensor.from_local(whole, mesh, [Replicate()], run_check=False)

    @staticmethod
    def backward(ctx: Any, *grads: DTensor) -> tuple[Tensor, None]:
        return grads[0].to_local(), None


class WidthParallel(ParallelStyle):
    """A norm over a width that the ranks of the axis share out: the mean of squares is summed over them.

    `heads` are the ranks that share it out where they are not all: neighbours have copies.
    """

    def __init__(self, heads: DeviceMesh | None = None) -> None:
        self._heads = heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        device_mesh = self._heads or device_mesh

        def enter(_module: nn.Module, args: tuple[Any, ...]) -> DTensor:
            return DTensor.from_local(args[0], device_mesh, [Shard(-1)], run_check=False)

        def leave(_module: nn.Module, _args: Any, out: DTensor) -> Tensor:
            return out.redistribute(placements=[Shard(out.dim() - 1)]).to_local()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return _place(module, device_mesh, Shard(0))


def _place(module: nn.Module, mesh: DeviceMesh, placement: Shard | Replicate) -> nn.Module:
    """Makes the parameters of a module DTensors; each rank takes its part from its own copy."""
    for name, parameter in list(module.named_parameters()):
        placed = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(placed))
    return module


def copies_of(parameter: Tensor, meshes: Meshes) -> DeviceMesh | None:
    """The ranks that have copies of the key-value heads that a parameter is of; None where it is of none."""
    if not isinstance(parameter, DTensor) or HEAD_AXES[0] not in mesh_axes(parameter):
        return None
    ranks = parameter.device_mesh.size(mesh_axes(parameter).index(HEAD_AXES[0]))
    return meshes.copied[ranks].copies


def partial_parameters(model: nn.Module, degrees: Degrees) -> list[nn.Parameter]:
    """Parameters that are whole on every rank of tp, whose gradient is a partial sum over it.

    Those that saw a slice of the sequence; those of routers, which weigh what each rank has of an expert's
    result, or see the tokens of a slice; and a head's bias that no parts are made of.
    """
    if degrees.tp == 1:
        return []
    roots = [model] if degrees.sequence_parallel else mixtures(model)
    found = {id(p): p for root in roots for p in root.parameters()}
    found |= {id(p): p for head in model.modules() if isinstance(head, Head) for p in head.whole_biases()}
    return [
        p
        for p in found.values()
        if not (isinstance(p, DTensor) and {"tp", "etp", HEAD_AXES[0]} & set(mesh_axes(p)))
    ]
