"""Puts a plan onto modules: one `apply_*` verb for each axis, always in the same order.

    deferral -> materialize -> tensor -> context -> expert parallel -> fp8 -> adapters -> recompute ->
    activations offloaded -> compile -> data parallel,

part by part, then the root: a rank never holds more than one whole part besides its own shards.
"""

from __future__ import annotations

import torch
from torch import nn

from planner.model.saved_tensors import Recompute
from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import ActionKind
from planner.strategy.strategy import Stage
from runtime.model.fp8 import apply_fp8
from runtime.model.lora import apply_lora
from runtime.model.transformer import Transformer, build_transformer
from runtime.parallel import recompute
from runtime.parallel.activation_offload import ActivationOffload, apply_activation_offload
from runtime.parallel.backend import Backend, StageModel
from runtime.parallel.compiled import apply_compile
from runtime.parallel.context import apply_context_parallel, hidden_positions
from runtime.parallel.data import apply_data_parallel, apply_expert_data_parallel
from runtime.parallel.deferred_gradients import apply_deferral
from runtime.parallel.expert import apply_expert_parallel, keep_own_experts
from runtime.parallel.meshes import Meshes
from runtime.parallel.tensor import apply_tensor_parallel


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
    row = plan.schedule_table[plan.strategy.degrees.pp_rank_of_stage(index)]
    if not any(text.startswith(f"{index}{ActionKind.WEIGHT_GRAD}") for text in row):
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
