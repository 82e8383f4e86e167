"""From a run and another cluster to the problem of its rest, and to what is left of its goal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.commands.shared.options import ProblemInputs, ProblemOptions, read_place
from planner.commands.shared.problem import Asked, asked_of, held_to_trainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from planner.commands.running.replan_run import RunToGoOn
    from planner.commands.shared.search_options import SearchRequest
    from planner.foundation.errors import Problem
    from planner.hardware.cluster import ClusterSpec
    from planner.job.objective import Goal
    from planner.job.problem import PlanningProblem
    from planner.strategy.plan import Plan


def problem_of_run(run: RunToGoOn, place: dict[str, Any]) -> tuple[Asked, tuple[str, ...]]:
    """What is asked of the search: the run's job at its new place; and remarks. Raises InputError."""
    from planner.foundation.errors import InputError

    plan, problems = run.plan, list[Any]()
    workload = plan.workload
    options = ProblemOptions(
        **place,
        model=plan.model.name,
        seq=workload.seq,
        batch=workload.batch,
        tokens=None,
        precision=None,
        optimizer=str(workload.optimizer),
        method=str(workload.method),
    )
    cluster, stated, overheads = read_place(options, problems)
    if cluster is not None:
        problems += _unfit(plan, cluster)
    if problems or cluster is None:
        raise InputError(*problems)
    limit = stated if stated is not None else _limit_of(plan, cluster)
    inputs = ProblemInputs(plan.model, workload, cluster, options.profile, limit, overheads)
    asked = held_to_trainer(asked_of(inputs), "plans that `plan train` runs")
    return asked, (
        *run.remarks(),
        *_remarks(run, asked.problem, kept_limit=stated is None and limit is not None),
    )


def _unfit(plan: Plan, cluster: ClusterSpec) -> Iterator[Problem]:
    """A run keeps its number format, which other devices may not have."""
    from planner.foundation.errors import Problem
    from planner.model.workload import Precision

    if plan.workload.precision is not Precision.FP8:
        return
    for title in dict.fromkeys(g.device.title for g in cluster.groups if g.device.peak_fp8_flops is None):
        fault = f"the run trains in fp8, and no fp8 peak of {title} is known."
        yield Problem(
            where="--cluster", fault=fault, fix="name devices that multiply fp8: a run keeps its format"
        )


def _limit_of(plan: Plan, cluster: ClusterSpec) -> int | None:
    """The memory limit that was stated for the run's plan, where it has the same one kind of device."""
    before = {group.device for group in plan.cluster.groups}
    now = {group.device.name for group in cluster.groups}
    if len(before) > 1 or now != {device.name for device in before}:
        return None
    (device,), limit = before, plan.estimate.memory_limit_bytes
    return None if limit == device.usable_memory_bytes else limit


def _remarks(run: RunToGoOn, problem: PlanningProblem, *, kept_limit: bool) -> Iterator[str]:
    """What of the run's plan was taken over, or could not be."""
    from planner.foundation.decode import digest
    from planner.foundation.units import format_bytes

    plan = run.plan
    if kept_limit:
        yield f"the memory limit is that of the run's plan, {format_bytes(problem.memory_limit_bytes)}"
    before, now = ([g.device.name for g in c.groups] for c in (plan.cluster, problem.cluster))
    if set(before) != set(now):
        kinds = (", ".join(dict.fromkeys(names)) for names in (now, before))
        yield f"devices are other ones: {next(kinds)}, not {next(kinds)}"
        return
    made_with = plan.digests.get("profile")
    if made_with != (None if problem.profile is None else digest(problem.profile)) and len(set(now)) == 1:
        names = ", ".join(dict.fromkeys(use.name for use in plan.profiles)) or "none"
        yield (
            f"the run's plan was made with another profile ({names}): name that with --profile, so that "
            "old and new are compared by the same figures"
        )
    if plan.estimate.job is not None and problem.overheads.silent:
        yield (
            "failures, checkpoints and other stalls that were stated for the run's plan are not in it, and "
            "do not count: state them again (--checkpoint-every, --storage, ...)"
        )


def goal_of_run(run: RunToGoOn, search: SearchRequest, problem: PlanningProblem) -> Goal:
    """What is left of the run's goal; options of the command line come before what its plan was made for.

    Raises InputError where it cannot be counted, InfeasibleError where nothing is left of it.
    """
    from planner.advice.replanning import with_tokens
    from planner.commands.shared.goal import read_goal
    from planner.foundation.errors import InputError, Problem
    from planner.foundation.units import DAY_S
    from planner.job.objective import Minimise, goal_left, goal_of

    own, rest = goal_of(run.plan.objective), run.rest()
    deadline, budget = search.deadline, search.budget
    if deadline is None and own.deadline_s is not None:
        deadline = f"{own.deadline_s / DAY_S:.12f}"
    if budget is None and own.budget_usd is not None:
        budget = repr(own.budget_usd)
    minimise = search.objective or own.minimise
    if rest is None:
        if minimise is Minimise.COST or deadline is not None or budget is not None:
            fault = "is not known, and deadline, budget and dollars are of the whole run."
            raise InputError(Problem(where="--steps", fault=fault, fix="add --steps N"))
        return own
    whole = read_goal(minimise, deadline, budget, with_tokens(problem, rest.tokens))
    return goal_left(whole, rest)
