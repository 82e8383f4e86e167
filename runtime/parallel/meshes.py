"""The rank grid as device meshes.

A world of ranks of which only this one exists: its hooks and copies are real, its messages are not.

torch's `fake` backend answers every collective at once, with this rank's own data where it can, so what is
timed is a rank's own work: DTensor and FSDP2 at full host cost, and no communication.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from planner.strategy.plan import Plan
from planner.strategy.strategy import AXES, Degrees, Zero

HEAD_AXES = ("kv_heads", "kv_copies")


@dataclass(frozen=True)
class ExpertMeshes:
    """The slices that this rank belongs to of the grid (pp, edp_replicate, edp_shard, ep, etp)."""

    ep: DeviceMesh
    etp: DeviceMesh
    both: DeviceMesh
    """ep x etp: the ranks that hold all experts once."""
    data: DeviceMesh
    """The ranks that share out or copy this rank's experts: edp_replicate x edp_shard or one of these."""


@dataclass(frozen=True)
class HeadMeshes:
    """The ranks of tp where key-value heads are fewer: neighbours have copies of one."""

    heads: DeviceMesh
    """The ranks that hold all heads once."""
    copies: DeviceMesh
    """Those that hold the same head as this one."""


@dataclass(frozen=True)
class Meshes:
    """The rank grid, and the slices of it that this rank belongs to."""

    world: DeviceMesh
    tp: DeviceMesh
    pp: DeviceMesh
    cp: DeviceMesh
    data: DeviceMesh
    """The ranks that share out or copy this rank's weights: dp_replicate x dp_shard or one of these alone,
    with cp folded into the last."""
    experts: ExpertMeshes | None = None
    """None where experts are shared out as all other weights are."""
    copied: Mapping[int, HeadMeshes] = field(default_factory=dict)
    """By the number of key-value heads, where it is below tp."""


def build_meshes(plan: Plan, device_type: str) -> Meshes:
    """The rank grid of the plan as device meshes. Collective: every rank of the world calls it."""
    assert plan.rank_axes == AXES, plan.rank_axes
    degrees = plan.strategy.degrees
    return meshes_of(degrees, device_type, plan.model.heads_copied(degrees.tp))


def meshes_of(degrees: Degrees, device_type: str, copied: Collection[int] = ()) -> Meshes:
    """The rank grid of these degrees as device meshes; `copied` are the numbers of key-value heads that are
    below tp. Collective.

    Where cp is folded into a data axis, weights live on a second grid that has them as one: a parameter's tp
    and data axes must be slices of the same grid.
    """
    world = init_device_mesh(device_type, degrees.grid_shape(), mesh_dim_names=AXES)
    names: tuple[str, ...] = ("dp_replicate",) if degrees.zero is Zero.NONE else ("dp_shard",)
    if degrees.zero is not Zero.NONE and degrees.dp_replicate > 1:
        names = ("dp_replicate", "dp_shard")
    weights = world
    if degrees.cp > 1:
        weights = _folded(degrees, device_type)
        names = (*names[:-1], f"{names[-1]}_cp")
    return Meshes(
        world=world,
        tp=weights["tp"],
        pp=world["pp"],
        cp=world["cp"],
        data=weights[names] if len(names) > 1 else weights[names[0]],
        experts=_expert_meshes(degrees, device_type) if degrees.spreads_experts else None,
        copied={heads: _head_meshes(weights, heads, degrees.tp) for heads in copied},
    )


def _head_meshes(weights: DeviceMesh, heads: int, tp: int) -> HeadMeshes:
    """The axis tp as two. By its place: torch 2.11 refuses the name of an axis that there is."""
    names = weights.mesh_dim_names
    assert names is not None
    grid = weights._unflatten(names.index("tp"), (heads, tp // heads), HEAD_AXES)
    return HeadMeshes(heads=grid[HEAD_AXES[0]], copies=grid[HEAD_AXES[1]])


def _expert_meshes(degrees: Degrees, device_type: str) -> ExpertMeshes:
    """The same ranks in the same order as the grid of experts."""
    replicas = degrees.expert_replicas // degrees.expert_shards
    shape = (degrees.pp, replicas, degrees.expert_shards, degrees.ep, degrees.expert_tp)
    axes = ("pp", "edp_replicate", "edp_shard", "ep", "etp")
    world = init_device_mesh(device_type, shape, mesh_dim_names=axes)
    data = world["edp_replicate"] if degrees.zero is Zero.NONE else world["edp_shard"]
    if degrees.zero is not Zero.NONE and replicas > 1:
        data = world["edp_replicate", "edp_shard"]
    return ExpertMeshes(ep=world["ep"], etp=world["etp"], both=world["ep", "etp"], data=data)


def _folded(degrees: Degrees, device_type: str) -> DeviceMesh:
    """The same ranks in the same order, with cp and the data axis before it as one axis."""
    if degrees.zero is Zero.NONE:
        shape: tuple[int, ...] = (degrees.pp, degrees.replicas, degrees.tp)
        axes: tuple[str, ...] = ("pp", "dp_replicate_cp", "tp")
    else:
        shape = (degrees.pp, degrees.dp_replicate, degrees.dp_shard * degrees.cp, degrees.tp)
        axes = ("pp", "dp_replicate", "dp_shard_cp", "tp")
    return init_device_mesh(device_type, shape, mesh_dim_names=axes)


def mesh_axes(parameter: DTensor) -> tuple[str, ...]:
    """The axes of the mesh that a parameter lives on."""
    return tuple(parameter.device_mesh.mesh_dim_names or ())


@contextmanager
def fake_world(degrees: Degrees, device_type: str, copied: Collection[int] = ()) -> Iterator[Meshes]:
    """Rank 0 of a world of these degrees, as meshes (`meshes_of`). One at a time in a process."""
    with fake_group(degrees.world):
        yield meshes_of(degrees, device_type, copied)


@contextmanager
def fake_group(world: int, rank: int = 0) -> Iterator[None]:
    """One rank of a process group of which no other exists. One at a time in a process."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # Where a torch version leaves received buffers as they are, their garbage may be denormal: slow.
    torch.set_flush_denormal(True)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """Empties DTensor's caches: what they answer an equal mesh with holds groups that are gone."""
    from torch.distributed.tensor import debug

    clear = getattr(debug, "_clear_sharding_prop_cache", None)
    if clear is not None:
        clear()
        return
    propagate: Any = DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding
    propagate.cache.cache_clear()
