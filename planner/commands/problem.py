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
    from planner.limits import Limits
    from planner.problem import PlanningProblem
    from planner.runs.engine_stack import engine_stack, priced_as
    from planner.stack import Engine

    inputs = load_problem(options)
    limits = _limits_bytes(inputs)
    problem = PlanningProblem(
        model=inputs.model,
        workload=inputs.workload,
        cluster=inputs.cluster,
        profile=None,
        memory_limit_bytes=min(limits.values()),
        upkeep=inputs.upkeep,
    )
    known = _profiles(inputs)
    profile, basis = known[problem.device]
    problem = dataclasses.replace(problem, profile=profile)
    if len(known) > 1:
        problem = dataclasses.replace(
            problem,
            device_profiles=tuple((device.name, own) for device, (own, _) in known.items()),
            device_limits_bytes=tuple((device.name, limit) for device, limit in limits.items()),
        )
        basis = "; ".join(f"{device.name}: {basis}" for device, (_, basis) in known.items())
    if options.engine is None:
        return Asked(problem, basis)
    engine = Engine(options.engine)
    stack = engine_stack(engine, profile)
    problem = dataclasses.replace(problem, stack=stack, limits=Limits(engine=engine))
    return Asked(problem, f"{basis}; {priced_as(stack, profile)}")


def held_to_runtime(asked: Asked) -> Asked:
    """Held to what `plan train` runs, where the cluster is this machine and no engine was named."""
    from planner.limits import Limits
    from planner.stack import Engine

    problem = asked.problem
    if problem.limits.engine is not None or not problem.cluster.local:
        return asked
    limits = Limits(engine=Engine.NATIVE, max_tp=problem.limits.max_tp)
    basis = f"{asked.basis}; for this machine, held to what plan train runs (--engine native)"
    return Asked(dataclasses.replace(problem, limits=limits), basis)


def problem_of_plan(plan: Plan, profile: Path | None) -> Asked:
    """The problem that a plan answers. The profile is the one given, else the one that it was made with.

    A plan holds a digest of its profile, not the profile: where neither a file nor a shipped profile is that
    one, the shipped profile of the device stands in, and the basis says so.
    """
    from planner.codec import digest
    from planner.limits import Limits
    from planner.placement import is_mixed
    from planner.problem import PlanningProblem
    from planner.profile import load_profile

    problem = PlanningProblem(
        model=plan.model,
        workload=plan.workload,
        cluster=plan.cluster,
        profile=None,
        memory_limit_bytes=plan.estimate.memory_limit_bytes,
        limits=Limits(engine=plan.engine),
        device_limits_bytes=tuple(
            {stage.device: stage.memory_limit_bytes or 0 for stage in plan.stage_estimates}.items()
        )
        if is_mixed(plan.cluster)
        else (),
    )
    made_with, device = plan.digests.get("profile"), problem.device
    if profile is not None:
        found: Profile | None = load_profile(profile)
        basis = f"profile {profile}"
    elif made_with is None:
        return Asked(_priced(problem), f"datasheet of {device.title}: the plan was made without a profile")
    else:
        found = _shipped(device.name)
        basis = f"shipped profile {found.name}" if found is not None else f"datasheet of {device.title}"
    if (None if found is None else digest(found)) != made_with:
        basis += (
            "; the plan was made with another: name that with --profile, all figures here are by this one"
        )
    return Asked(_priced(dataclasses.replace(problem, profile=found)), basis)


def _priced(problem: PlanningProblem) -> PlanningProblem:
    """The problem with the software of its engine, where it names one."""
    from planner.runs.engine_stack import engine_stack

    if problem.limits.engine is None:
        return problem
    return dataclasses.replace(problem, stack=engine_stack(problem.limits.engine, problem.profile))


def _limits_bytes(inputs: ProblemInputs) -> dict[Device, int]:
    """The memory limit of each kind of device: what it has, or what was asked for; of several, the less."""
    usable = {group.device: group.device.usable_memory_bytes for group in inputs.cluster.groups}
    stated = inputs.memory_limit_bytes
    if stated is None:
        return usable
    return {device: stated if len(usable) == 1 else min(stated, own) for device, own in usable.items()}


def _profiles(inputs: ProblemInputs) -> dict[Device, tuple[Profile | None, str]]:
    """For each kind of device the profile that counts, and in words what its figures rest on.

    A profile that was measured on one of several kinds counts for that one; one that was fitted, for all.
    """
    from planner.profile import load_profile

    devices = list(dict.fromkeys(group.device for group in inputs.cluster.groups))
    given = None if inputs.profile is None else load_profile(inputs.profile)
    if given is not None:
        _check_device(given, [device.name for device in devices], inputs)
    return {device: _profile(inputs, given, device) for device in devices}


def _profile(inputs: ProblemInputs, given: Profile | None, device: Device) -> tuple[Profile | None, str]:
    if given is not None and (not given.layers or given.device == device.name):
        made = f"measured on {given.device}" if given.layers else f"fitted to runs on {given.device_title}"
        return given, f"profile {inputs.profile}, {made}, {given.created}"
    shipped = _shipped(device.name)
    if shipped is not None:
        made = "measured" if shipped.layers else "fitted to runs"
        return shipped, f"shipped profile {shipped.name}, {made} on {shipped.device_title}, {shipped.created}"
    return None, f"datasheet of {device.title}: nothing was measured on it"


def _check_device(profile: Profile, devices: list[str], inputs: ProblemInputs) -> None:
    from planner.errors import InputError, Problem

    if profile.layers and profile.device not in devices:
        raise InputError(
            Problem(
                where=f"--profile {inputs.profile}",
                fault=f"was measured on {profile.device}, the cluster is made of {' and '.join(devices)}.",
                legal=f"a profile of {' or '.join(devices)}",
                fix="plan profile on that device, or leave --profile out",
            )
        )


def _shipped(device: str) -> Profile | None:
    from planner.catalog import profile_files
    from planner.profile import load_profile

    fitting = [profile for profile in map(load_profile, profile_files()) if profile.device == device]
    return max(fitting, key=lambda profile: profile.created, default=None)
