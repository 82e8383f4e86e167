"""Whether the devices of this machine are those that a plan was made for."""

from __future__ import annotations

import torch

from planner.foundation.errors import InputError, Problem
from planner.foundation.units import format_bytes
from planner.hardware.catalog import device_reported_as
from planner.hardware.local_machine import accelerators, cpu_title, physical_memory_bytes
from planner.profile.choose import release
from planner.strategy.plan import Plan, predicted_memory_by_rank

ANYWAY = "run it anyway with --any-device; what was predicted will not hold"


def pick_device(plan: Plan) -> str:
    """`cpu` or `cuda`, as the plan's devices are. Raises InputError where this machine has none."""
    names = {group.device.name for group in plan.cluster.groups}
    if names == {"cpu"}:
        return "cpu"
    # The count comes from the driver's library and leaves CUDA alone, so forking stays possible.
    if torch.cuda.device_count() == 0:
        raise InputError(
            Problem(
                where="cluster",
                fault=f"the plan is for {', '.join(sorted(names))}; this machine has no CUDA device.",
                fix="run it there, or solve again with --cluster local:4 for processes on this CPU",
            )
        )
    return "cuda"


def check_same_devices(plan: Plan, device: str) -> None:
    """Raises InputError where this machine's devices are of another kind, or too small for the plan."""
    if device == "cuda":
        _check_accelerators(plan)
    else:
        _check_memory(plan)


def _check_accelerators(plan: Plan) -> None:
    planned = sorted({group.device.name for group in plan.cluster.groups})
    here = sorted({_catalog_name(reported) for reported, _ in accelerators()})
    foreign = [name for name in here if name not in planned]
    if foreign:
        raise InputError(
            Problem(
                where="cluster",
                fault=f"the plan is for {', '.join(planned)}; this machine has {', '.join(foreign)}.",
                fix=f"solve again with --cluster local, or {ANYWAY}",
            )
        )


def _catalog_name(reported: str) -> str:
    """How plans call the device that the driver calls `reported`, as `planner.hardware.local_machine` names
    it."""
    known = device_reported_as(reported)
    return "-".join(reported.lower().split()) if known is None else known.device().name


def _check_memory(plan: Plan) -> None:
    needed, here = sum(predicted_memory_by_rank(plan)), physical_memory_bytes()
    if needed > here:
        raise InputError(
            Problem(
                where="cluster",
                fault=f"all ranks of the plan are predicted to hold {format_bytes(needed)} together; "
                f"this machine has {format_bytes(here)}.",
                fix=f"solve again with --cluster local here, or {ANYWAY}",
            )
        )


def foreign_cpu(plan: Plan) -> str | None:
    """A remark where a plan for processes on one kind of CPU runs on another."""
    title = plan.cluster.groups[0].device.title
    if plan.cluster.groups[0].device.name != "cpu" or title == cpu_title():
        return None
    return f"the plan was made for processes on {title}, this is {cpu_title()}: times will differ"


def foreign_torch(plan: Plan) -> str | None:
    """A remark where the plan's figures were measured with another release of torch than runs it."""
    here = torch.__version__
    taken = [use.torch for use in plan.profiles if use.torch and release(use.torch) != release(here)]
    if not taken:
        return None
    return f"the plan's profile was taken with torch {', '.join(taken)}, this is {here}: times may differ"


def check_world(plan: Plan, world: int) -> None:
    """Raises InputError where torchrun started another number of ranks than the plan needs."""
    needed = plan.strategy.degrees.world
    if world != needed:
        raise InputError(
            Problem(
                where="WORLD_SIZE",
                fault=f"torchrun started {world} ranks, but the plan ({plan.strategy.degrees.label()}) "
                f"needs {needed}.",
                legal=str(needed),
                fix=f"start {needed} ranks, or solve again for {world} devices",
            )
        )


def check_fits_here(plan: Plan, device: str) -> None:
    """Raises InputError where the plan needs more devices than this one machine has."""
    needed = plan.strategy.degrees.world
    here = torch.cuda.device_count() if device == "cuda" else needed
    if here < needed:
        raise InputError(
            Problem(
                where="cluster",
                fault=f"the plan needs {needed} devices; this machine has {here}.",
                fix="start it on every node: torchrun --nnodes N --nproc-per-node "
                f"{plan.cluster.devices_per_node} --rdzv-endpoint HOST:PORT -m runtime.train PLAN ...",
            )
        )
