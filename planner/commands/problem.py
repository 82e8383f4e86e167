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
    if options.engine in (None, "any"):
        return Asked(problem, basis)
    engine = Engine(options.engine)
    stack = engine_stack(engine, profile)
    problem = dataclasses.replace(problem, stack=stack, limits=Limits(engine=engine))
    return Asked(problem, f"{basis}; {priced_as(stack, profile)}")


def held_to_runtime(asked: Asked, engine: str | None) -> Asked:
    """On this machine's own devices, where no engine is named: only what `plan train` runs there.

    A model or workload that it does not train is planned without that limit.
    """
    from planner.execution import not_executed, not_executed_workload
    from planner.limits import Limits
    from planner.stack import Engine

    problem = asked.problem
    missing = not_executed(problem.model) + not_executed_workload(problem.model, problem.workload)
    if engine is not None or not problem.cluster.local or missing:
        return asked
    held = dataclasses.replace(problem, limits=Limits(engine=Engine.NATIVE))
    words = "plans that `plan train` runs on this machine (--engine any for all)"
    return Asked(held, f"{asked.basis}; {words}")


def problem_of_plan(plan: Plan, profile: Path | None) -> Asked:
    """The problem that a plan answers. The profile is the one given, else the one that it was made with.

    A plan holds digests of its profiles, one of each kind of device, not the profiles: where neither a file
    nor a shipped profile is the one, the shipped profile of the device stands in, and the basis says so.
    """
    from planner.profile import load_profile

    problem = plan.problem
    given = None if profile is None else load_profile(profile)
    devices = list(dict.fromkeys(group.device for group in plan.cluster.groups))
    if len(devices) == 1:
        made_with = plan.digests.get("profile")
        found, basis = _profile_of_plan(given, f"profile {profile}", made_with, problem.device)
        return Asked(_priced(dataclasses.replace(problem, profile=found)), basis)
    known = {}
    for device in devices:
        own = given if given is not None and _speaks_of(given, device) else None
        made_with = plan.digests.get(f"profile {device.name}")
        known[device] = _profile_of_plan(own, f"profile {profile}", made_with, device)
    limits = {stage.device: stage.memory_limit_bytes or 0 for stage in plan.stage_estimates}
    mixed = dataclasses.replace(
        problem,
        profile=known[problem.device][0],
        device_profiles=tuple((device.name, found) for device, (found, _) in known.items()),
        device_limits_bytes=tuple(limits.items()),
    )
    basis = "; ".join(f"{device.name}: {words}" for device, (_, words) in known.items())
    return Asked(_priced(mixed), basis)


def _profile_of_plan(
    given: Profile | None, words: str, made_with: str | None, device: Device
) -> tuple[Profile | None, str]:
    """The profile that a plan's figures for a device rest on, and what is to be said of it."""
    from planner.codec import digest
    from planner.shipped_profile import shipped_profile

    found, basis = given, words
    if given is None and made_with is None:
        return None, f"datasheet of {device.title}: the plan was made without a profile"
    if given is None:
        found = shipped_profile(device.name)
        basis = f"shipped profile {found.name}" if found is not None else f"datasheet of {device.title}"
    if (None if found is None else digest(found)) != made_with:
        basis += (
            "; the plan was made with another: name that with --profile, all figures here are by this one"
        )
    return found, basis


def _speaks_of(profile: Profile, device: Device) -> bool:
    """Whether a profile counts for a device: if measured, for its own; if fitted, for all."""
    return not profile.layers or profile.device == device.name


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
    from planner.shipped_profile import shipped_profile

    if given is not None and _speaks_of(given, device):
        made = f"measured on {given.device}" if given.layers else f"fitted to runs on {given.device_title}"
        return given, f"profile {inputs.profile}, {made}, {given.created}"
    shipped = shipped_profile(device.name)
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
