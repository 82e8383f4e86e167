"""Plans at falling memory limits, each solved again, until none is feasible: step time against headroom.

Limits fall in equal steps from what the plan needs to the least that any strategy needs, which is exact
(planner.search.least_memory). What is known from other limits is known to every search, so the front never
bends
back because a search was short. Headroom is what the plan found leaves of the problem's own limit.
"""

from __future__ import annotations

from planner.advice.resolve import Clock, Effort, Solved, resolved
from planner.advice.what_if import with_limit
from planner.cost.evaluate import CostModel, Evaluation
from planner.foundation.frozen import frozen
from planner.foundation.units import MIB
from planner.job.problem import PlanningProblem
from planner.search.least_memory import need_of, survey
from planner.strategy.fix_keys import Pins
from planner.strategy.strategy import Strategy

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
    least, own = survey(problem, Pins()).need, need_of(model, evaluation.strategy)
    assert least is not None and own is not None, "the plan itself is legal"
    clock, strategies, top = Clock(effort), [evaluation.strategy, least.strategy], own.limit_bytes
    limits = [top + (least.limit_bytes - top) * step // steps // MIB * MIB for step in range(steps)]
    limits = sorted({limit for limit in limits if limit > least.limit_bytes}, reverse=True)
    limits.append(least.limit_bytes)
    found: list[Solved] = []
    for limit in limits:
        if clock.spent:
            break
        solved = resolved(with_limit(problem, limit), Pins(), clock, strategies)
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
