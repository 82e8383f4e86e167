"""A sizing request as planning problems: on which device in which precision, by which profile."""

from __future__ import annotations

import dataclasses

from planner.cost.compute.weight_gradients import trained_flops_per_token
from planner.hardware.catalog import device_names
from planner.hardware.cluster import ClusterSpec, Device
from planner.job.engine_settings import own_stack
from planner.job.problem import PlanningProblem
from planner.profile.profile import Profile
from planner.profile.shipped import shipped_profile, shipped_profiles
from planner.sizing.request import SizingRequest
from planner.sizing.usual_overheads import usual_upkeep


def profiles_for(request: SizingRequest) -> dict[str, Profile]:
    """The shipped profile of each device that has one; the one that was given, for the device it was measured
    on, or if it was fitted for all."""
    names = {name for profile in shipped_profiles() for name in profile.devices}
    known = {name: found for name in names if (found := shipped_profile(name)) is not None}
    given = request.profile
    if given is None:
        return known
    return known | dict.fromkeys(given.devices if given.measured else device_names(), given)


def peak_device_s(request: SizingRequest, device: Device) -> float:
    """Device-seconds of the whole run at a device's dense peak, which no plan beats; 0: no peak is known."""
    precision = request.precision or device.usual_precision
    workload = dataclasses.replace(request.workload, precision=precision)
    peak = device.peak_flops(precision)
    flops = trained_flops_per_token(request.model, workload) * (workload.tokens or 0)
    return flops / peak if peak else 0.0


def problem_on(
    request: SizingRequest, cluster: ClusterSpec, device: Device, profile: Profile | None
) -> PlanningProblem:
    """The request as a problem on one cluster of a device."""
    usable = device.usable_memory_bytes
    precision = request.precision or device.usual_precision
    return PlanningProblem(
        model=request.model,
        workload=dataclasses.replace(request.workload, precision=precision),
        cluster=cluster,
        profile=profile,
        memory_limit_bytes=min(usable, request.memory_limit_bytes or usable),
        stack=own_stack(cluster),
        upkeep=usual_upkeep(cluster.devices, request.upkeep),
    )
