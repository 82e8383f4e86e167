"""The rank grid as device meshes."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from planner.plan import Plan


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


def mesh_axes(parameter: DTensor) -> tuple[str, ...]:
    """The axes of the mesh that a parameter lives on."""
    return tuple(parameter.device_mesh.mesh_dim_names or ())
