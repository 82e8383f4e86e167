"""What a given cluster can do: this run, the longest sequence of its model, the largest of all models."""

from __future__ import annotations

import dataclasses

from planner.foundation.errors import InfeasibleError
from planner.foundation.frozen import frozen
from planner.hardware.catalog import load_model, model_index
from planner.job.problem import PlanningProblem
from planner.search.greedy_plan import Scout, Shared
from planner.search.least_memory import fitting
from planner.search.solve import SolveOptions, solve
from planner.strategy.estimate import JobFigures
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.placement import is_mixed
from planner.strategy.plan import Plan

MOST_SEQ = 2**24
"""Sequences beyond this are not looked for: published contexts end at ten million tokens."""
SEQ_PART = 16
"""The longest sequence is found to one part in so many."""
TIME_LIMIT_S = 3.0
"""Seconds of the search for the plan of the run; `plan solve` takes longer and proves more."""


@frozen
class Longest:
    """The longest sequence that fits, the sequences of a step at it, and what stands in the way of longer."""

    seq: int
    batch: int
    bound: str


@frozen
class LargestModel:
    """The largest model of the catalog that fits, as this run trains it; None where none does."""

    name: str
    params_total: int
    params_active: int


@frozen
class Ability:
    """What a cluster can do. `plan` is of the run that was asked for, None where it does not fit: `why_not`
    says why. Days and dollars are at the job's goodput."""

    cluster: str
    plan: Plan | None
    losses: JobFigures | None
    why_not: str
    longest: Longest | None
    largest: LargestModel | None


def ability_of(problem: PlanningProblem) -> Ability:
    """What the problem's cluster can do."""
    plan, why_not = _plan(problem)
    return Ability(
        cluster=problem.cluster.name,
        plan=plan,
        losses=None if plan is None else plan.estimate.job,
        why_not=why_not,
        longest=longest_sequence(problem),
        largest=largest_model(problem),
    )


def _plan(problem: PlanningProblem) -> tuple[Plan | None, str]:
    try:
        return solve(problem, SolveOptions(pins=FixedChoices(), time_limit_s=TIME_LIMIT_S)), ""
    except InfeasibleError as error:
        return None, str(error)


def _fits(problem: PlanningProblem) -> bool:
    """Whether a usual choice fits; in a mixed cluster, whether any does."""
    if is_mixed(problem.cluster):
        return fitting(problem, FixedChoices()) is not None
    return Scout(problem, Shared(FixedChoices())).plan(problem.cluster) is not None


def longest_sequence(problem: PlanningProblem) -> Longest | None:
    """The longest sequence that fits, at as many tokens a step as the problem has, or one sequence.

    Lengths double until one does not fit; between the last two, sixteenths of the shorter are tried.
    """
    tokens, model = problem.workload.tokens_per_step, problem.model
    learned = min(model.learned_positions, model.max_positions) or MOST_SEQ

    def at(seq: int) -> PlanningProblem:
        batch = 2 ** max(0, (tokens // seq).bit_length() - 1)
        return dataclasses.replace(
            problem, workload=dataclasses.replace(problem.workload, seq=seq, batch=batch)
        )

    length = min(1024, learned)
    if not _fits(at(length)):
        return None
    while 2 * length <= learned and _fits(at(2 * length)):
        length *= 2
    steps = [length * part // SEQ_PART for part in range(SEQ_PART + 1, 2 * SEQ_PART)]
    steps = [seq for seq in steps if seq <= learned]
    while steps:
        middle = len(steps) // 2
        if _fits(at(steps[middle])):
            length, steps = steps[middle], steps[middle + 1 :]
        else:
            steps = steps[:middle]
    if length >= MOST_SEQ:
        bound = "no longer one was looked for"
    elif 2 * length > learned or length == learned:
        bound = f"{model.name} has {learned} learned positions"
    else:
        bound = "memory"
    return Longest(seq=length, batch=at(length).workload.batch, bound=bound)


def largest_model(problem: PlanningProblem) -> LargestModel | None:
    """The largest model of the catalog, by all its parameters, that fits at this workload."""
    index = model_index()
    for name in sorted(index, key=lambda name: -index[name].params_total):
        model = load_model(name)
        learned = min(model.learned_positions, model.max_positions)
        if learned and problem.workload.seq > learned:
            continue
        if _fits(dataclasses.replace(problem, model=model)):
            total, active = model.params_total, model.params_active
            return LargestModel(name=name, params_total=total, params_active=active)
    return None
