"""Puts a plan onto modules: one `apply_*` verb for each axis, always in the same order.

    materialize -> tensor parallel -> recompute -> data parallel, part by part, then the root.

Part by part, so that a rank never holds more than one whole part besides its own shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from planner.errors import InputError, Problem
from planner.execution import check_executed_axes, check_executed_schedule, executed_widths
from planner.model import ModelSpec
from planner.plan import Plan
from planner.strategy import AXES, Degrees, Recompute, Stage, Zero
from planner.workload import Precision
from runtime import recompute
from runtime.model import Block, Transformer, build_transformer, materialize


@dataclass(frozen=True)
class Meshes:
    """The rank grid, and the slices of it that this rank belongs to."""

    world: DeviceMesh
    tp: DeviceMesh
    pp: DeviceMesh
    replicate: DeviceMesh
    data: DeviceMesh
    """dp_replicate x dp_shard, or dp_shard alone where nothing is replicated."""


def build_meshes(plan: Plan, device_type: str) -> Meshes:
    """The rank grid of the plan as a device mesh. Collective: every rank of the world calls it."""
    world = init_device_mesh(device_type, plan.rank_grid_shape, mesh_dim_names=plan.rank_axes)
    hybrid = plan.strategy.degrees.dp_replicate > 1
    return Meshes(
        world=world,
        tp=world["tp"],
        pp=world["pp"],
        replicate=world["dp_replicate"],
        data=world["dp_replicate", "dp_shard"] if hybrid else world["dp_shard"],
    )


def check_supported(plan: Plan) -> None:
    """Raises InputError with every part of the plan that this runtime cannot execute."""
    degrees = plan.strategy.degrees
    check_executed_schedule(degrees)
    check_executed_axes(degrees)
    problems = [*_degree_problems(plan, degrees), *_tensor_problems(plan.model, plan.workload.seq, degrees)]
    if problems:
        raise InputError(*problems)


def _degree_problems(plan: Plan, degrees: Degrees) -> list[Problem]:
    found = [
        Problem(where=f"strategy.{axis}", fault=f"is {size}; this runtime executes 1 only.", legal="1")
        for axis, size in (("cp", degrees.cp), ("ep", degrees.ep))
        if size != 1
    ]
    if plan.workload.precision is Precision.FP16:
        fault = "is fp16, which needs loss scaling; this runtime has none."
        found.append(Problem(where="workload.precision", fault=fault, legal="bf16, fp32"))
    if (degrees.zero is Zero.NONE) != (degrees.dp_shard == 1):
        found.append(
            Problem(
                where="strategy.zero",
                fault=f"is {int(degrees.zero)} with dp_shard={degrees.dp_shard}: a ZeRO stage shares out "
                "over dp_shard ranks, and dp_shard ranks share something out.",
                legal="zero=0 with dp_shard=1, zero=1, 2 or 3 with dp_shard over 1",
            )
        )
    if degrees.chunks > 1 and degrees.pp == 1:
        fault = f"is {degrees.chunks} with pp=1: chunks of one rank would be one stage."
        found.append(Problem(where="strategy.chunks", fault=fault, legal="1"))
    if plan.rank_axes != AXES or plan.rank_grid_shape != degrees.grid_shape():
        fault = f"is {plan.rank_axes} {plan.rank_grid_shape}, not the strategy's {degrees.grid_shape()}."
        found.append(Problem(where="ranks", fault=fault, legal=f"axes {AXES}"))
    if degrees.batch != plan.workload.batch:
        found.append(
            Problem(
                where="workload.batch",
                fault=f"is {plan.workload.batch}, but micro_batch x num_micro_batches x dp is "
                f"{degrees.micro_batch} x {degrees.num_micro_batches} x {degrees.dp}.",
                legal=str(degrees.batch),
            )
        )
    return found


def _tensor_problems(model: ModelSpec, seq: int, degrees: Degrees) -> list[Problem]:
    """What tensor parallelism must divide: whole heads, columns, vocabulary rows, and the sequence."""
    sizes = {what: size for size, what in (*model.heads_split, *executed_widths(model))}
    if degrees.sequence_parallel:
        sizes["the sequence"] = seq
    return [
        Problem(
            where=f"strategy.tp={degrees.tp}",
            fault=f"cannot split {name} of {size}: each rank needs an equal part.",
            legal=f"tp of {', '.join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)}",
        )
        for name, size in sizes.items()
        if size % degrees.tp
    ]


def build_stage(plan: Plan, index: int, meshes: Meshes, *, seed: int, device: torch.device) -> Transformer:
    """Stage `index` of the plan, initialised, sharded and ready to train on this rank."""
    degrees, stage = plan.strategy.degrees, plan.strategy.stages[index]
    model = build_transformer(
        plan.model, stage.first, stage.end, index == 0, index == degrees.stages - 1, seq=plan.workload.seq
    )
    options = _options_by_name(stage)
    for unit in model.units():
        modules = []
        for name, part in unit:
            materialize(part, plan.model, prefix=f"{name}.", seed=seed, device=device)
            apply_tensor_parallel(name, part, degrees, meshes)
            modules.append(apply_recompute(model, name, part, options.get(name, Recompute.NONE)))
        if not (model.tied and _holds_tied_weight(modules)):
            apply_data_parallel(modules, degrees, plan.workload.precision, meshes)
    model.tie()
    model.sequence_rank = meshes.tp.get_local_rank() if degrees.sequence_parallel else 0
    apply_data_parallel(model, degrees, plan.workload.precision, meshes)
    return model


def _holds_tied_weight(modules: list[nn.Module]) -> bool:
    """Whether a weight of these modules belongs to another unit too, so that only the root can shard it."""
    return any(isinstance(module, nn.Embedding | nn.Linear) for module in modules)


def _options_by_name(stage: Stage) -> dict[str, Recompute]:
    layers = range(stage.first, stage.end)
    return {f"layers.{i}": option for i, option in zip(layers, stage.recompute.options(), strict=True)}


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


def apply_recompute(model: Transformer, name: str, part: nn.Module, option: Recompute) -> nn.Module:
    """Puts the part's recompute option around it, in its place in the model."""
    wrapped = recompute.wrap(part, option)
    if wrapped is not part:
        model.set_submodule(name, wrapped)
    return wrapped


def apply_data_parallel(
    unit: nn.Module | list[nn.Module], degrees: Degrees, precision: Precision, meshes: Meshes
) -> None:
    """Makes modules a unit of data parallelism: replicated (ZeRO 0) or sharded (ZeRO 1 to 3).

    In bf16 even a single rank has such a unit, since it keeps the fp32 masters. ZeRO 1 and 2 keep the
    gathered parameters until the step's last backward pass; ZeRO 3 frees them after each use.
    """
    modules = [m for m in (unit if isinstance(unit, list) else [unit]) if any(True for _ in m.parameters())]
    if not modules:
        return
    policy = MixedPrecisionPolicy()
    if precision is Precision.BF16:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if degrees.zero is not Zero.NONE:
        fully_shard(
            modules,
            mesh=meshes.data,
            reshard_after_forward=degrees.zero is Zero.PARAMETERS,
            mp_policy=policy,
        )
    elif degrees.dp > 1 or precision is not Precision.FP32:
        replicate(modules, mesh=meshes.replicate, mp_policy=policy)


def set_gradient_sync(model: nn.Module, zero: Zero, *, last: bool) -> None:
    """Says what the next backward pass does with gradients and gathered parameters.

    ZeRO 0 and 1 reduce gradients in a step's last backward pass only; 2 and 3 in every one, so that whole
    gradients never outlive a micro-batch. All but 3 keep gathered parameters until the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or zero >= Zero.GRADIENTS)
        model.set_reshard_after_backward(last or zero is Zero.PARAMETERS)


def reduces_gradients(model: nn.Module) -> bool:
    """Whether the next backward pass will reduce gradients, read from FSDP's own state."""
    return isinstance(model, FSDPModule) and all(group.reduce_grads for group in unit_groups(model))


def unit_groups(model: nn.Module) -> list[Any]:
    """The parameter groups of FSDP's units in a model, in module order; empty where there are none."""
    found: list[Any] = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            # One group a unit up to torch 2.12, a list since.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            found += [group for group in groups if group is not None and group not in found]
    return found


def whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that tensor parallelism left whole on every rank of the tp axis."""
    return [p for p in model.parameters() if not (isinstance(p, DTensor) and "tp" in mesh_axes(p))]


def mesh_axes(parameter: DTensor) -> tuple[str, ...]:
    """The axes of the mesh that a parameter lives on."""
    return tuple(parameter.device_mesh.mesh_dim_names or ())
