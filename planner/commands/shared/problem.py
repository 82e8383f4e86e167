"""From the common options to a PlanningProblem: which profile counts, and which memory limit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from planner.commands.shared.options import ProblemInputs, ProblemOptions, load_problem

if TYPE_CHECKING:
    from pathlib import Path

    from planner.hardware.cluster import Device
    from planner.job.engine_settings import Engine, EngineSettings
    from planner.job.problem import PlanningProblem
    from planner.profile.choose import ProfileUse
    from planner.profile.profile import Profile
    from planner.strategy.plan import Plan


class Asked(NamedTuple):
    """A problem, in words what its figures rest on, and the profiles among that."""

    problem: PlanningProblem
    basis: str
    profiles: tuple[ProfileUse, ...] = ()


class Known(NamedTuple):
    """What is known of one kind of device: its profile, where it has one, in words, and its use."""

    profile: Profile | None
    basis: str
    use: ProfileUse | None = None


def read_problem(options: ProblemOptions) -> Asked:
    """Reads everything that the options name. Raises InputError with every fault."""
    from planner.calibration.software import priced_as
    from planner.job.engine_settings import Engine

    inputs = load_problem(options)
    if options.engine in (None, "any"):
        return asked_of(inputs)
    engine = Engine(options.engine)
    asked = asked_of(inputs, engine)
    words = priced_as(asked.problem.engine_settings, asked.problem.profile)
    return asked._replace(basis=f"{asked.basis}; {words}")


def asked_of(inputs: ProblemInputs, engine: Engine | None = None) -> Asked:
    """The problem of what was read, with the profiles that count, at the prices of an engine (None: of the
    own runtime). Raises InputError."""
    from planner.job.problem import Limits, PlanningProblem

    limits = _limits_bytes(inputs)
    problem = PlanningProblem(
        model=inputs.model,
        workload=inputs.workload,
        cluster=inputs.cluster,
        profile=None,
        memory_limit_bytes=min(limits.values()),
        limits=Limits(engine=engine),
        overheads=inputs.overheads,
    )
    known = _profiles(inputs)
    problem = _priced(dataclasses.replace(problem, profile=known[problem.device].profile))
    if len(known) > 1:
        problem = dataclasses.replace(
            problem,
            device_profiles=tuple((device.name, own.profile) for device, own in known.items()),
            device_limits_bytes=tuple((device.name, limit) for device, limit in limits.items()),
        )
    return Asked(problem, _basis(known, problem.engine_settings), _uses(known))


def _basis(known: dict[Device, Known], settings: EngineSettings) -> str:
    """In words what the figures of each kind of device rest on, and that blocks are taken as compiled."""
    each = [f"{device.name}: {own.basis}" for device, own in known.items()]
    words = [own.basis for own in known.values()] if len(known) == 1 else each
    return "; ".join([*words, *(["blocks compiled, as plan train runs them"] if settings.compiled else [])])


def _uses(known: dict[Device, Known]) -> tuple[ProfileUse, ...]:
    return tuple(own.use for own in known.values() if own.use is not None)


def held_to_runtime(asked: Asked, engine: str | None) -> Asked:
    """On this machine's own devices, where no engine is named: only what `plan train` runs there."""
    if engine is not None or not asked.problem.cluster.local:
        return asked
    return held_to_trainer(asked, "plans that `plan train` runs on this machine (--engine any for all)")


def held_to_trainer(asked: Asked, words: str) -> Asked:
    """The problem, held to what `plan train` runs, which `words` say.

    A model or workload that it does not train is planned without that limit.
    """
    from planner.job.engine_settings import Engine
    from planner.job.problem import Limits
    from planner.strategy.engines.native import not_executed, not_executed_workload

    problem = asked.problem
    if not_executed(problem.model) + not_executed_workload(problem.model, problem.workload):
        return asked
    held = dataclasses.replace(problem, limits=Limits(engine=Engine.NATIVE))
    return asked._replace(problem=held, basis=f"{asked.basis}; {words}")


def problem_of_plan(plan: Plan, profile: Path | None) -> Asked:
    """The problem that a plan answers. The profile is the one given, else the one that it was made with.

    A plan holds digests of its profiles, one of each kind of device, not the profiles: where neither a file
    nor a shipped profile is the one, the shipped profile of the device stands in, and the basis says so.
    Raises InputError where the one given was measured on another device.
    """
    from planner.profile.choose import check_device, speaks_of
    from planner.profile.profile import load_profile

    problem = plan.problem
    given = None if profile is None else load_profile(profile)
    devices = list(dict.fromkeys(group.device for group in plan.cluster.groups))
    if given is not None:
        names = [device.name for device in devices]
        check_device(given, names, f"--profile {profile}", "the plan's cluster is made")
    known = {}
    for device in devices:
        own = given if given is not None and speaks_of(given, device.name) else None
        made_with = plan.digests.get("profile" if len(devices) == 1 else f"profile {device.name}")
        known[device] = _profile_of_plan(plan, own, f"profile {profile}", made_with, device)
    problem = dataclasses.replace(problem, profile=known[problem.device].profile)
    if len(devices) > 1:
        limits = {stage.device: stage.memory_limit_bytes or 0 for stage in plan.stage_estimates}
        problem = dataclasses.replace(
            problem,
            device_profiles=tuple((device.name, own.profile) for device, own in known.items()),
            device_limits_bytes=tuple(limits.items()),
        )
    priced = _priced(problem)
    return Asked(priced, _basis(known, priced.engine_settings), _uses(known))


def _profile_of_plan(
    plan: Plan, given: Profile | None, words: str, made_with: str | None, device: Device
) -> Known:
    """The profile that a plan's figures for a device rest on, and what is to be said of it."""
    from planner.foundation.decode import digest
    from planner.profile.choose import shipped_profile, use_of

    if given is None and made_with is None:
        return Known(None, f"datasheet of {device.title}: the plan was made without a profile")
    found, basis = given, words
    if given is None:
        found = shipped_profile(device.name)
        basis = f"shipped profile {found.name}" if found is not None else f"datasheet of {device.title}"
    if (None if found is None else digest(found)) != made_with:
        basis += (
            "; the plan was made with another: name that with --profile, all figures here are by this one"
        )
    if found is None:
        return Known(None, basis)
    precision = plan.workload.precision
    use = use_of(found, device, model=plan.model, precision=precision, cluster=plan.cluster)
    return Known(found, basis + _minded(use), use)


def _minded(use: ProfileUse) -> str:
    """What is to be said of a profile that does not quite fit, behind its name."""
    return f"; mind: {'; '.join(use.remarks)}" if use.remarks else ""


def _priced(problem: PlanningProblem) -> PlanningProblem:
    """The problem with the software of its engine, or where it names none with that of the own runtime."""
    from planner.job.engine_settings import native_settings

    engine = problem.limits.engine
    if engine is None:
        return dataclasses.replace(problem, engine_settings=native_settings(problem.cluster))
    from planner.calibration.software import settings_for_engine

    return dataclasses.replace(
        problem, engine_settings=settings_for_engine(engine, problem.profile, problem.cluster)
    )


def _limits_bytes(inputs: ProblemInputs) -> dict[Device, int]:
    """The memory limit of each kind of device: what it has, or what was asked for; of several, the less."""
    usable = {group.device: group.device.usable_memory_bytes for group in inputs.cluster.groups}
    stated = inputs.memory_limit_bytes
    if stated is None:
        return usable
    return {device: stated if len(usable) == 1 else min(stated, own) for device, own in usable.items()}


def _profiles(inputs: ProblemInputs) -> dict[Device, Known]:
    """For each kind of device the profile that counts, and in words what its figures rest on.

    A profile that was measured on one of several kinds counts for that one; one that was fitted, for all.
    Raises InputError where the one given was measured on none of them.
    """
    from planner.profile.choose import check_device
    from planner.profile.profile import load_profile

    devices = list(dict.fromkeys(group.device for group in inputs.cluster.groups))
    given = None if inputs.profile is None else load_profile(inputs.profile)
    if given is not None:
        names = [device.name for device in devices]
        check_device(given, names, f"--profile {inputs.profile}", "the cluster is made")
    return {device: _known(inputs, given, device) for device in devices}


def _known(inputs: ProblemInputs, given: Profile | None, device: Device) -> Known:
    from planner.profile.choose import shipped_profile, speaks_of, use_of

    own = given is not None and speaks_of(given, device.name)
    found = given if own else shipped_profile(device.name)
    if found is None:
        return Known(None, f"datasheet of {device.title}: nothing was measured on it")
    precision = inputs.workload.precision
    use = use_of(found, device, model=inputs.model, precision=precision, cluster=inputs.cluster)
    name = f"profile {inputs.profile}" if own else f"shipped profile {found.name}"
    made = "measured" if found.measured else "fitted to runs"
    torch = f" with torch {use.torch}" if use.torch else ""
    where = found.device if own and found.measured else found.device_title
    return Known(found, f"{name}, {made} on {where}{torch}, {found.created}{_minded(use)}", use)
