"""`plan solve --rehearse K`: the K best plans are rehearsed, and the best by what they show is the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from planner.job.problem import PlanningProblem
    from planner.strategy.plan import Plan
    from planner.strategy.rehearsal import Refined


class _Rehearsed(NamedTuple):
    """A plan that carries its rehearsal, and its refined figures."""

    plan: Plan
    refined: Refined


def best_rehearsed(plan: Plan, problem: PlanningProblem, count: int, say: Callable[[str], None]) -> Plan:
    """The best of a solved plan and its first runners-up, `count` in all, each rehearsed on this machine.

    It carries its own rehearsal, and those of the others in short. Where it is a runner-up, the certificate's
    bound holds as before, for its own predicted time.
    """
    from planner.strategy.rehearsal import is_refined_choice

    runners_up = min(count - 1, len(plan.alternatives))
    candidates = [plan, *(_runner_up(plan, problem, place) for place in range(runners_up))]
    done: list[_Rehearsed] = []
    for candidate in candidates:
        say(f"plan {len(done) + 1} of {len(candidates)}: {candidate.strategy.degrees.label()}")
        # Once the accelerator was found free, what still shows of its use is that of the plan before.
        done.append(_rehearsed(candidate, problem, say, anyway=bool(done)))
    best = done[0]
    for other in done[1:]:
        best = other if is_refined_choice(other.refined, best.refined) else best
    return _with_others(best, [each for each in done if each is not best], plan)


def _rehearsed(
    plan: Plan, problem: PlanningProblem, say: Callable[[str], None], *, anyway: bool
) -> _Rehearsed:
    from planner.commands.shared.rehearsing import Choice, check_rehearsable, rehearse_plan

    check_rehearsable(plan)
    rehearsal = rehearse_plan(plan, problem, Choice(anyway=anyway), say)
    assert rehearsal.refined is not None
    return _Rehearsed(dataclasses.replace(plan, rehearsal=rehearsal), rehearsal.refined)


def _runner_up(plan: Plan, problem: PlanningProblem, place: int) -> Plan:
    """The plan of a runner-up, with the solver's bound for its own time."""
    from planner.cost.evaluate import CostModel
    from planner.search.solve import make_plan

    evaluation = CostModel(problem).evaluate(plan.alternatives[place].strategy)
    solver = plan.solver
    if solver is not None:
        step_s = evaluation.estimate.step_time_s
        gap = max(0.0, 1 - solver.lower_bound_s / step_s)
        solver = dataclasses.replace(solver, status="gap", objective_s=step_s, gap=gap)
    made = make_plan(problem, evaluation, solver, plan.rejected, ())
    return dataclasses.replace(made, engine=plan.engine, profiles=plan.profiles)


def _with_others(best: _Rehearsed, others: list[_Rehearsed], solved: Plan) -> Plan:
    """The best plan, with what the others came to, and with the solver's runners-up but itself."""
    from planner.strategy.plan import Alternative
    from planner.strategy.rehearsal import RehearsedPlan

    rehearsal = best.plan.rehearsal
    assert rehearsal is not None
    in_short = tuple(
        RehearsedPlan(
            label=other.plan.strategy.degrees.label(),
            predicted_step_time_s=other.plan.estimate.step_time_s,
            refined=other.refined,
        )
        for other in others
    )
    plan = dataclasses.replace(best.plan, rehearsal=dataclasses.replace(rehearsal, others=in_short))
    first = next((other for other in others if other.plan.strategy == solved.strategy), None)
    if first is None:
        return plan
    beaten = Alternative(
        strategy=solved.strategy,
        step_time_s=solved.estimate.step_time_s,
        peak_memory_bytes=solved.estimate.peak_memory_bytes,
        verdict=solved.estimate.verdict,
        reason=_why_beaten(first.refined, best.refined),
    )
    rest = tuple(other for other in solved.alternatives if other.strategy != best.plan.strategy)
    return dataclasses.replace(plan, alternatives=(beaten, *rest))


def _why_beaten(refined: Refined, best: Refined) -> str:
    if refined.verdict is not best.verdict:
        return f"rehearsed: {refined.verdict}, {best.verdict} is the plan"
    return f"rehearsed: {refined.step_time_s / best.step_time_s - 1:+.1%} step time"
