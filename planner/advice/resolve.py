"""Solving a changed problem again, with little time each and a bound for all: what explanations are made of.

A short search may miss what is known already. So strategies that are known to be good, those of the plan
that is explained and of its neighbours, are evaluated under the changed problem as well, and the fastest
that keeps the rules and is SAFE is the answer. Its lower bound is the search's.

Plans at falling memory limits, each solved again, until none is feasible: step time against headroom.

Limits fall in equal steps from what the plan needs to the least that any strategy needs, which is exact
(planner.search.least_memory). What is known from other limits is known to every search, so the front never
bends
back because a search was short. Headroom is what the plan found leaves of the problem's own limit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from planner.advice.what_if import with_limit
from planner.cost.evaluate import CostModel, Evaluation
from planner.foundation.errors import InfeasibleError
from planner.foundation.frozen import frozen
from planner.foundation.units import MIB
from planner.job.problem import PlanningProblem
from planner.search.engine_search import solve_for_engine
from planner.search.least_memory import need_of, survey
from planner.search.solve import SolveOptions
from planner.strategy.estimate import Verdict
from planner.strategy.fixed_choices import FixedChoices, keeps_choices
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Strategy

QUICK_GAP = 0.01
"""A re-solved plan is compared with another: 1 % is finer than what the cost model knows."""
NO_CLOCK_GAP = 0.5
"""Without a clock the search ends with the best of its even splits, which is the same on every machine."""


@frozen
class Effort:
    """Seconds of one search, and of all together; None: no clock is used."""

    each_s: float | None = 2.0
    total_s: float | None = 30.0

    def options(self, pins: FixedChoices) -> SolveOptions:
        """The options of one search."""
        if self.each_s is None:
            return SolveOptions(pins=pins, top=0, gap_tolerance=NO_CLOCK_GAP, rounds=1, reproducible=True)
        return SolveOptions(
            pins=pins, top=0, gap_tolerance=QUICK_GAP, time_limit_s=self.each_s, gives_up=True
        )


class Clock:
    """How much of an effort is left."""

    def __init__(self, effort: Effort) -> None:
        self.effort, self._started_s = effort, time.monotonic()

    @property
    def used(self) -> float:
        """What was used of the time, as a share: 0 where no clock is, 1 where there is none to use."""
        total_s = self.effort.total_s
        if not total_s:
            return 0.0 if total_s is None else 1.0
        return (time.monotonic() - self._started_s) / total_s

    @property
    def spent(self) -> bool:
        """Whether no further search may start."""
        return self.used >= 1


@frozen
class Solved:
    """The best strategy known of a problem, evaluated, and the bound below all (0: nothing was searched)."""

    problem: PlanningProblem
    evaluation: Evaluation
    lower_bound_s: float

    @property
    def step_time_s(self) -> float:
        return self.evaluation.estimate.step_time_s

    @property
    def strategy(self) -> Strategy:
        return self.evaluation.strategy

    @property
    def gap(self) -> float | None:
        """Share of the step time by which a better plan may still be faster; None: nothing was searched."""
        return max(0.0, 1 - self.lower_bound_s / self.step_time_s) if self.lower_bound_s else None

    @property
    def tokens_per_s(self) -> float:
        return self.evaluation.estimate.tokens_per_s

    @property
    def device_seconds_per_token(self) -> float:
        """Devices times seconds of a step over its tokens."""
        tokens = self.problem.workload.tokens_per_step
        return self.problem.cluster.devices * self.step_time_s / tokens


def resolved(
    problem: PlanningProblem,
    pins: FixedChoices,
    clock: Clock,
    known: Iterable[Strategy] = (),
) -> Solved | None:
    """The best of a short search and of known strategies; None where there is none that is SAFE.

    Once the clock's time is spent, known strategies alone are asked.
    """
    model = CostModel(problem)
    found, lower_s = [], 0.0
    try:
        plan = None if clock.spent else solve_for_engine(problem, clock.effort.options(pins))
        if plan is not None:
            found.append(model.evaluate(plan.strategy))
            lower_s = plan.solver.lower_bound_s if plan.solver is not None else 0.0
    except InfeasibleError:
        pass
    for strategy in known:
        if keeps_choices(strategy, pins) and not broken_rules(problem, strategy):
            found.append(model.evaluate(strategy))
    safe = [each for each in found if each.estimate.verdict is Verdict.SAFE]
    best = min(safe, key=lambda each: each.estimate.step_time_s, default=None)
    if best is None:
        return None
    return Solved(problem=problem, evaluation=best, lower_bound_s=min(lower_s, best.estimate.step_time_s))


def verified(solved: Solved, pins: FixedChoices) -> bool:
    """Whether an answer keeps rules, pins and limit, asked again of a cost model of its own."""
    problem, strategy = solved.problem, solved.strategy
    estimate = CostModel(problem).evaluate(strategy).estimate
    return (
        not broken_rules(problem, strategy)
        and keeps_choices(strategy, pins)
        and estimate.verdict is Verdict.SAFE
        and estimate.peak_memory_bytes <= estimate.memory_limit_bytes
        and abs(estimate.step_time_s - solved.step_time_s) <= 1e-9 * solved.step_time_s
    )


STEPS = 6


@frozen
class Point:
    """One plan of the front: the limit that it needs, and what it leaves of the problem's own."""

    step_time_s: float
    needed_bytes: int
    peak_memory_bytes: int
    headroom_bytes: int
    strategy: Strategy


@frozen
class Front:
    """Plans none of which is both slower and larger than another, the fastest first.

    Below `least_bytes` no plan is feasible. `solved` of `asked` limits were solved for.
    """

    points: tuple[Point, ...]
    least_bytes: int
    solved: int
    asked: int


def front(problem: PlanningProblem, evaluation: Evaluation, effort: Effort, steps: int = STEPS) -> Front:
    """The front from a plan down to the least memory that there is."""
    model = CostModel(problem)
    least, own = survey(problem, FixedChoices()).need, need_of(model, evaluation.strategy)
    assert least is not None and own is not None, "the plan itself is legal"
    clock, strategies, top = Clock(effort), [evaluation.strategy, least.strategy], own.limit_bytes
    limits = [top + (least.limit_bytes - top) * step // steps // MIB * MIB for step in range(steps)]
    limits = sorted({limit for limit in limits if limit > least.limit_bytes}, reverse=True)
    limits.append(least.limit_bytes)
    found: list[Solved] = []
    for limit in limits:
        if clock.spent:
            break
        solved = resolved(with_limit(problem, limit), FixedChoices(), clock, strategies)
        if solved is not None:
            found.append(solved)
            strategies.append(solved.strategy)
    points = [_point(model, strategy) for strategy in dict.fromkeys(strategies)]
    kept = [point for point in points if point is not None and point.headroom_bytes >= 0]
    return Front(
        points=_undominated(kept), least_bytes=least.limit_bytes, solved=len(found), asked=len(limits)
    )


def _point(model: CostModel, strategy: Strategy) -> Point | None:
    need = need_of(model, strategy)
    if need is None:
        return None
    limit = model.problem.memory_limit_bytes
    return Point(
        step_time_s=model.evaluate(strategy).estimate.step_time_s,
        needed_bytes=need.limit_bytes,
        peak_memory_bytes=need.peak_bytes,
        headroom_bytes=limit - need.limit_bytes,
        strategy=strategy,
    )


def _undominated(points: list[Point]) -> tuple[Point, ...]:
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.step_time_s, p.needed_bytes)):
        if not kept or point.needed_bytes < kept[-1].needed_bytes:
            kept.append(point)
    return tuple(kept)
