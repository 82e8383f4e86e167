"""Data parallelism: replicas and ZeRO stages 1 to 3, by FSDP2's units, over dp x cp."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from planner.strategy import Degrees, Zero
from planner.workload import Precision
from runtime.parallel.meshes import Meshes
from runtime.precision import compute_dtype


def apply_data_parallel(
    unit: nn.Module | list[nn.Module], degrees: Degrees, precision: Precision, meshes: Meshes
) -> None:
    """Makes modules a unit of data parallelism: replicated (ZeRO 0) or sharded (ZeRO 1 to 3).

    In 16 bits even a single rank has such a unit, since it keeps the fp32 masters. ZeRO 1 and 2 keep the
    gathered parameters until the step's last backward pass; ZeRO 3 frees them after each use. Frozen weights
    have no gradient to reduce and no master: they belong to a unit under ZeRO 3 alone, which shards them.
    """
    modules = unit if isinstance(unit, list) else [unit]
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
            mesh=meshes.data,
            reshard_after_forward=degrees.zero is Zero.PARAMETERS,
            mp_policy=policy,
            ignored_params=apart or None,
        )
    elif degrees.replicas > 1 or precision is not Precision.FP32:
        replicate(modules, mesh=meshes.data, mp_policy=policy, ignored_params=apart or None)


def set_unit(unit: FSDPModule, *, reduce: bool, reshard: bool) -> None:
    """Says what the next backward pass does with a unit's gradients and its gathered parameters."""
    unit.set_requires_gradient_sync(reduce, recurse=False)
    unit.set_reshard_after_backward(reshard, recurse=False)


def end_unit(unit: FSDPModule) -> None:
    """What FSDP does with a unit's gradients after its backward pass, for gradients that came later."""
    for group in groups_of(unit):
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
