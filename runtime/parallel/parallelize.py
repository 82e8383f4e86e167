"""Puts a plan onto modules: one `apply_*` verb for each axis, always in the same order.

    deferral -> materialize -> tensor -> context -> expert parallel -> fp8 -> adapters -> recompute ->
    activations offloaded -> compile -> data parallel,

part by part, then the root: a rank never holds more than one whole part besides its own shards.

What of a plan the runtime refuses to execute, before it builds anything.

Where the modules of a plan come from: our own transformer, or Hugging Face Transformers' models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from planner.foundation.errors import InputError, Problem
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Optimizer
from planner.strategy.engines.native import (
    WORKLOADS_EXECUTED,
    check_executed_offload,
    context_not_executed,
    not_executed_workload,
    products_not_executed,
    vocabulary_not_executed,
)
from planner.strategy.parallel_rules import (
    context_divides,
    context_heads,
    experts_divide,
    experts_need_sequence_parallel,
    experts_within_replicas,
)
from planner.strategy.plan import Plan
from planner.strategy.plan_check import check_schedule_table
from planner.strategy.schedule.schedules import ActionKind
from planner.strategy.strategy import AXES, Degrees, Stage, Zero
from runtime.model.fp8 import apply_fp8
from runtime.model.lora import apply_lora
from runtime.model.transformer import Transformer, build_transformer
from runtime.parallel import recompute
from runtime.parallel.context import apply_context_parallel, hidden_positions
from runtime.parallel.data import apply_data_parallel, apply_expert_data_parallel
from runtime.parallel.deferred_gradients import apply_deferral
from runtime.parallel.expert import apply_expert_parallel, keep_own_experts
from runtime.parallel.meshes import Meshes
from runtime.parallel.offload import ActivationOffload, apply_activation_offload
from runtime.parallel.recompute import apply_compile
from runtime.parallel.tensor import apply_tensor_parallel

if TYPE_CHECKING:
    from planner.strategy.strategy import Degrees


MOST_TP = 64
"""Larger tensor-parallel degrees are not named as legal."""
EXPERT_RULES = (experts_divide, experts_within_replicas, experts_need_sequence_parallel)


def check_supported(plan: Plan) -> None:
    """Raises InputError with every part of the plan that this runtime cannot execute."""
    degrees = plan.strategy.degrees
    check_schedule_table(plan)
    check_executed_offload(plan.strategy)
    problems = [*_degree_problems(plan, degrees), *_tensor_problems(plan.model, plan.workload.seq, degrees)]
    problems += _context_problems(plan)
    if problems:
        raise InputError(*problems)


def _degree_problems(plan: Plan, degrees: Degrees) -> list[Problem]:
    found = []
    found += [
        Problem(where="workload", fault=f"cannot be trained: {fault}.", legal=WORKLOADS_EXECUTED)
        for fault in (
            *not_executed_workload(plan.model, plan.workload),
            *products_not_executed(plan.model, plan.workload, degrees),
        )
    ]
    found += _offload_problems(plan)
    shards = degrees.dp_shard if degrees.zero is Zero.NONE else degrees.weight_shards
    if (degrees.zero is Zero.NONE) != (shards == 1):
        found.append(
            Problem(
                where="strategy.zero",
                fault=f"is {int(degrees.zero)} with dp_shard={degrees.dp_shard} and cp={degrees.cp}: a ZeRO "
                "stage shares out over dp_shard x cp ranks, and dp_shard ranks share something out.",
                legal="zero=0 with dp_shard=1, zero=1, 2 or 3 with dp_shard x cp over 1",
            )
        )
    broken = (rule(plan.problem, degrees) for rule in EXPERT_RULES)
    found += [
        Problem(where="strategy", fault=each.detail, legal=each.legal, fix=each.fix)
        for each in broken
        if each is not None
    ]
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


def _context_problems(plan: Plan) -> list[Problem]:
    """What context parallelism must divide: the sequence, and heads where they are traded for it."""
    broken = (rule(plan.problem, plan.strategy.degrees) for rule in (context_divides, context_heads))
    problems = [
        Problem(where="strategy.cp", fault=rejected.detail, legal=rejected.legal, fix=rejected.fix)
        for rejected in broken
        if rejected is not None
    ]
    met = context_not_executed(plan.model, plan.strategy.degrees)
    return problems + [
        Problem(
            where="strategy.cp_exchange",
            fault=f"is {plan.strategy.degrees.cp_exchange}: keys are met block by block, and {fault}.",
            legal="all_to_all",
        )
        for fault in met
    ]


def _offload_problems(plan: Plan) -> list[Problem]:
    """Offload that no plan of the planner has, but one edited by hand may."""
    found = [
        Problem(
            where=f"stages[{index}].offload",
            fault=f"is {stage.offload}, and the stage holds {stage.layers} layers.",
            legal=f"0 to {stage.layers} each",
        )
        for index, stage in enumerate(plan.strategy.stages)
        if min(stage.offload.optimizer, stage.offload.activations) < 0
        or max(stage.offload.optimizer, stage.offload.activations) > stage.layers
    ]
    by_elements = plan.workload.optimizer is not Optimizer.MUON and plan.workload.adapters is None
    if any(stage.offload.optimizer for stage in plan.strategy.stages) and not by_elements:
        fault = (
            "keeps optimizer state in host memory, where updates are element by element: no muon, no LoRA."
        )
        found.append(Problem(where="stages.offload", fault=fault, legal="optimizer=0"))
    return found


def _tensor_problems(model: ModelSpec, seq: int, degrees: Degrees) -> list[Problem]:
    """What tensor parallelism must divide: whole heads, columns, and the sequence; and the vocabulary."""
    sizes = {what: size for size, what in model.widths_split}
    if degrees.sequence_parallel:
        sizes["the sequence" if degrees.cp == 1 else "a context-parallel rank's tokens"] = seq // degrees.cp
    found = [
        (name, size, [n for n in range(1, min(size, MOST_TP) + 1) if size % n == 0])
        for name, size in sizes.items()
        if size % degrees.tp
    ]
    found += [
        (heads.what, heads.count, [n for n in range(1, MOST_TP + 1) if heads.split_over(n)])
        for heads in model.heads_split
        if not heads.split_over(degrees.tp)
    ]
    where = f"strategy.tp={degrees.tp}"
    vocabulary = [
        Problem(where=where, fault=f"cannot split the vocabulary of {model.vocab}: {fault}.")
        for fault in vocabulary_not_executed(model, degrees)
    ]
    return vocabulary + [
        Problem(
            where=where,
            fault=f"cannot split {name} of {size}: each rank needs an equal part.",
            legal=f"tp of {', '.join(map(str, legal))}",
        )
        for name, size, legal in found
    ]


StageModel = Any
"""A stage on meta: a module with the parts, the `units()` and the names of `runtime.model.transformer`."""


@dataclass(frozen=True)
class Backend:
    """How the stage of a plan is made, and how tensor parallelism splits a part of it."""

    stage: Callable[[Plan, int], StageModel]
    tensor_parallel: Callable[[StageModel, str, nn.Module, Degrees, Meshes], None]


def build_stage(
    plan: Plan,
    index: int,
    meshes: Meshes,
    *,
    seed: int,
    device: torch.device,
    backend: Backend | None = None,
    lora_alpha: float | None = None,
    compiled: bool = False,
) -> StageModel:
    """Stage `index` of the plan, initialised, sharded and ready to train on this rank."""
    degrees, stage = plan.strategy.degrees, plan.strategy.stages[index]
    backend = backend or NATIVE
    model = backend.stage(plan, index)
    options = _options_by_name(stage)
    model.offload = ActivationOffload(device) if stage.offload.activations else None
    deferring = _deferring(plan, index, options)
    for unit in model.units():
        modules = []
        for name, part in unit:
            if name in deferring:
                apply_deferral(part)
            keep_own_experts(part, meshes)
            model.materialize(name, part, seed=seed, device=device)
            backend.tensor_parallel(model, name, part, degrees, meshes)
            apply_context_parallel(part, plan.workload.seq, degrees, meshes)
            apply_expert_parallel(part, plan.workload.seq, degrees, meshes)
            apply_fp8(part, plan.workload.precision)
            apply_lora(name, part, plan.workload, alpha=lora_alpha, seed=seed)
            apply_expert_data_parallel(part, degrees, plan.workload.precision, meshes)
            modules.append(apply_recompute(model, name, part, options.get(name, Recompute.NONE)))
            apply_activation_offload(model.offload, stage, name, modules[-1])
            if compiled:
                apply_compile(modules[-1], block=name in options)
        if not (model.tied and _holds_tied_weight(modules)):
            apply_data_parallel(modules, degrees, plan.workload.precision, meshes)
    model.tie()
    if degrees.sequence_parallel or degrees.cp > 1:
        model.position_ids = hidden_positions(plan.workload.seq, degrees, meshes).to(device)
    apply_data_parallel(model, degrees, plan.workload.precision, meshes)
    return model


def _native_stage(plan: Plan, index: int) -> Transformer:
    stage, last = plan.strategy.stages[index], plan.strategy.degrees.stages - 1
    return build_transformer(
        plan.model, stage.first, stage.end, index == 0, index == last, seq=plan.workload.seq
    )


NATIVE = Backend(
    stage=_native_stage,
    tensor_parallel=lambda _model, name, part, degrees, meshes: apply_tensor_parallel(
        name, part, degrees, meshes
    ),
)
"""Our own transformer."""


def _deferring(plan: Plan, index: int, options: dict[str, Recompute]) -> set[str]:
    """The blocks whose weight gradients wait for the stage's W actions: those that recompute nothing."""
    rank = plan.strategy.degrees.pp_rank_of_stage(index)
    if (index, ActionKind.WEIGHT_GRAD) not in plan.table.counts(rank):
        return set()
    return {name for name, option in options.items() if option is Recompute.NONE}


def _holds_tied_weight(modules: list[nn.Module]) -> bool:
    """Whether a weight of these modules belongs to another unit too, so that only the root can shard it."""
    return any(isinstance(module, nn.Embedding | nn.Linear) for module in modules)


def _options_by_name(stage: Stage) -> dict[str, Recompute]:
    layers = range(stage.first, stage.end)
    return {f"layers.{i}": option for i, option in zip(layers, stage.recompute.options(), strict=True)}


def apply_recompute(model: nn.Module, name: str, part: nn.Module, option: Recompute) -> nn.Module:
    """Puts the part's recompute option around it, in its place in the model."""
    wrapped = recompute.wrap(part, option)
    if wrapped is not part:
        model.set_submodule(name, wrapped)
    return wrapped
