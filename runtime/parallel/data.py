"""Data parallelism: replicas and ZeRO stages 1 to 3, by FSDP2's units, over dp x cp."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from planner.model.workload import Precision
from planner.strategy.strategy import Degrees, Zero
from runtime.model.experts import Experts
from runtime.model.precision import compute_dtype
from runtime.parallel.meshes import Meshes


def apply_data_parallel(
    unit: nn.Module | list[nn.Module], degrees: Degrees, precision: Precision, meshes: Meshes
) -> None:
    """Makes modules a unit of data parallelism: replicated (ZeRO 0) or sharded (ZeRO 1 to 3).

    In 16 bits even a single rank has such a unit, since it keeps the fp32 masters. ZeRO 1 and 2 keep the
    gathered parameters until the step's last backward pass; ZeRO 3 frees them after each use. Frozen weights
    have no gradient to reduce and no master: they belong to a unit under ZeRO 3 alone, which shards them.
    """
    _wrap(unit if isinstance(unit, list) else [unit], degrees, precision, meshes.data)


def apply_expert_data_parallel(
    part: nn.Module, degrees: Degrees, precision: Precision, meshes: Meshes
) -> None:
    """Makes routed experts a unit of their own where they are on meshes of their own, even of one rank.

    FSDP then averages their gradients over `expert_replicas`; the executor makes that the mean over tokens.
    """
    if meshes.experts is not None:
        for module in part.modules():
            if isinstance(module, Experts):
                _wrap([module], degrees, precision, meshes.experts.data)


def _wrap(modules: list[nn.Module], degrees: Degrees, precision: Precision, data: DeviceMesh) -> None:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    apart = {p for p in parameters if not p.requires_grad and degrees.zero is not Zero.PARAMETERS}
    if len(apart) == len(set(parameters)):
        return
    modules = [module for module in modules if any(p not in apart for p in module.parameters())]
    policy = MixedPrecisionPolicy()
    if precision is not Precision.FP32:
        policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype(precision), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if degrees.zero is not Zero.NONE:
        fully_shard(
            modules,
            mesh=data,
            reshard_after_forward=degrees.zero is Zero.PARAMETERS,
            shard_placement_fn=partial(_placement, data.size(-1)),
            mp_policy=policy,
            ignored_params=apart or None,
        )
    elif max(degrees.replicas, degrees.expert_replicas) > 1 or precision is not Precision.FP32:
        replicate(modules, mesh=data, mp_policy=policy, ignored_params=apart or None)


def _placement(ranks: int, parameter: nn.Parameter) -> Shard | None:
    """The dimension that is split where it is not the first: the hidden size, which tensor parallelism leaves
    whole.

    Of stacked experts that do not divide over the ranks: else few would hold whole experts, and the others
    none. Of a vocabulary in unequal parts: parts of these have no place in the whole that torch computes.
    """
    local: Tensor = parameter
    split: set[int] = set()
    if isinstance(parameter, DTensor):
        local, split = parameter.to_local(), {p.dim for p in parameter.placements if isinstance(p, Shard)}
        if local.dim() == 2 and 0 in split and parameter.shape[0] % parameter.device_mesh.size():
            return Shard(1)
    if local.dim() != 3 or local.shape[0] % ranks == 0:
        return None
    free = (dim for dim in (2, 1) if dim not in split and local.shape[dim] % ranks == 0)
    return next((Shard(dim) for dim in free), None)


def set_unit(unit: FSDPModule, *, reduce: bool, reshard: bool) -> None:
    """Says what the next backward pass does with a unit's gradients and its gathered parameters."""
    unit.set_requires_gradient_sync(reduce, recurse=False)
    unit.set_reshard_after_backward(reshard, recurse=False)


def end_unit(unit: FSDPModule) -> None:
    """What FSDP does with a unit's gradients after its backward pass, for gradients that came later.

    Those that came in the pass, of norms, were added up in the precision that is reduced, and the later ones
    are in that of compute: FSDP reduces a unit whose gradients are of one kind.
    """
    for group in groups_of(unit):
        for parameter in group.fsdp_params:
            if hasattr(parameter, "_unsharded_param"):
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()
        group.post_backward()


def end_backward(model: nn.Module) -> None:
    """What FSDP does when a backward pass is over: the device waits for the reductions that it began."""
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._root_post_backward_final_callback()


def groups_of(unit: FSDPModule) -> list[Any]:
    """The parameter groups of one unit; one up to torch 2.12, a list since."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def unit_groups(model: nn.Module) -> list[Any]:
    """The parameter groups of FSDP's units in a model, in module order; empty where there are none."""
    found: list[Any] = []
    for unit in units_of(model):
        found += [group for group in groups_of(unit) if group not in found]
    return found


def units_of(model: nn.Module) -> list[FSDPModule]:
    """FSDP's units in a model, in module order."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
