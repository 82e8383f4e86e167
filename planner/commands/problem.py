"""From the common options to a PlanningProblem: which profile counts, and which memory limit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from planner.commands.options import ProblemInputs, ProblemOptions, load_problem

if TYPE_CHECKING:
    from pathlib import Path

    from planner.cluster import Device
    from planner.plan import Plan
    from planner.problem import PlanningProblem
    from planner.profile import Profile


class Asked(NamedTuple):
    """A problem, and in words what its figures rest on."""

    problem: PlanningProblem
    basis: str


def read_problem(options: ProblemOptions) -> Asked:
    """Reads everything that the options name. Raises InputError with every fault."""
    from planner.problem import PlanningProblem

    inputs = load_problem(options)
    usable = min(group.device.usable_memory_bytes for group in inputs.cluster.groups)
    problem = PlanningProblem(
        model=inputs.model,
        workload=inputs.workload,
        cluster=inputs.cluster,
        profile=None,
        memory_limit_bytes=inputs.memory_limit_bytes or usable,
        upkeep=inputs.upkeep,
    )
    profile, basis = _profile(inputs, problem.device)
    return Asked(dataclasses.replace(problem, profile=profile), basis)


def problem_of_plan(plan: Plan, profile: Path | None) -> Asked:
    """The problem that a plan answers. The profile is the one given, else the one that it was made with.

    A plan holds a digest of its profile, not the profile: where neither a file nor a shipped profile is that
    one, the shipped profile of the device stands in, and the basis says so.
    """
    from planner.codec import digest
    from planner.problem import PlanningProblem
    from planner.profile import load_profile

    problem = PlanningProblem(
        model=plan.model,
        workload=plan.workload,
        cluster=plan.cluster,
        profile=None,
        memory_limit_bytes=plan.estimate.memory_limit_bytes,
    )
    made_with, device = plan.digests.get("profile"), problem.device
    if profile is not None:
        found: Profile | None = load_profile(profile)
        basis = f"profile {profile}"
    elif made_with is None:
        return Asked(problem, f"datasheet of {device.title}: the plan was made without a profile")
    else:
        found = _shipped(device.name)
        basis = f"shipped profile {found.name}" if found is not None else f"datasheet of {device.title}"
    if (None if found is None else digest(found)) != made_with:
        basis += (
            "; the plan was made with another: name that with --profile, all figures here are by this one"
        )
    return Asked(dataclasses.replace(problem, profile=found), basis)


def _profile(inputs: ProblemInputs, device: Device) -> tuple[Profile | None, str]:
    from planner.profile import load_profile

    if inputs.profile is not None:
        profile = load_profile(inputs.profile)
        _check_device(profile, device.name, inputs)
        made = (
            f"measured on {profile.device}" if profile.layers else f"fitted to runs on {profile.device_title}"
        )
        return profile, f"profile {inputs.profile}, {made}, {profile.created}"
    shipped = _shipped(device.name)
    if shipped is not None:
        made = "measured" if shipped.layers else "fitted to runs"
        return shipped, f"shipped profile {shipped.name}, {made} on {shipped.device_title}, {shipped.created}"
    return None, f"datasheet of {device.title}: nothing was measured on it"


def _check_device(profile: Profile, device: str, inputs: ProblemInputs) -> None:
    from planner.errors import InputError, Problem

    if profile.layers and profile.device != device:
        raise InputError(
            Problem(
                where=f"--profile {inputs.profile}",
                fault=f"was measured on {profile.device}, the cluster is made of {device}.",
                legal=f"a profile of {device}",
                fix="plan profile on that device, or leave --profile out",
            )
        )


def _shipped(device: str) -> Profile | None:
    from planner.catalog import profile_files
    from planner.profile import load_profile

    fitting = [profile for profile in map(load_profile, profile_files()) if profile.device == device]
    return max(fitting, key=lambda profile: profile.created, default=None)
