"""The best plan that an engine can express, from searches that know only the engine's rules of degrees.

1. One search sets aside what the engine can express of stages and recomputation: its space is larger, so its
   bound holds for the engine's as well. Where its plan is one that the engine can express, it is the answer.
2. Else one search for each option of recomputation, which all blocks then share, and for every shape that
   came up, the recipes of the engine (planner.strategy.engines.recipes): in each family the one with least
   recomputation that is SAFE. The fastest of all is the answer; its gap is to the bound of the first search.

Where an engine has no other recipes than one option for all blocks, the first search is left out: the least
bound of the others is closer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import NamedTuple

from planner.cost.evaluate import CostModel, Evaluation
from planner.foundation.errors import InfeasibleError
from planner.job.problem import PlanningProblem
from planner.model.sublayer import Recompute
from planner.search.alternatives import why_slower
from planner.search.solve import OPTIMAL_GAP, SolveOptions, make_plan, solve
from planner.search.verify import verify
from planner.strategy.engines.recipes import UNIFORM, Family, Stages, recipe_families
from planner.strategy.estimate import Verdict
from planner.strategy.plan import Alternative, Certificate, Plan
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Degrees, Offload, Strategy, offloaded

LEAST_SHAPES = 8
"""Runners-up that a search is asked for: their shapes are tried with the engine's recipes."""


class Shape(NamedTuple):
    """Degrees that came up in a search, and the sizes of stages that they had there."""

    degrees: Degrees
    sizes: tuple[int, ...]


def solve_for_engine(problem: PlanningProblem, options: SolveOptions) -> Plan:
    """The best plan that the problem's engine can run; any plan where it names none."""
    if problem.limits.engine is None:
        return solve(problem, options)
    return _EngineSearch(problem, options).solve()


class _EngineSearch:
    def __init__(self, problem: PlanningProblem, options: SolveOptions) -> None:
        self.problem, self.options = problem, options
        self.relaxed = dataclasses.replace(problem, limits=dataclasses.replace(problem.limits, whole=False))
        self.model = CostModel(problem)
        self.started_s = time.monotonic()
        assert problem.limits.engine is not None
        self.engine = problem.limits.engine

    def solve(self) -> Plan:
        uniform = UNIFORM.get(self.engine, ())
        if set(self.options.pins.recomputes) >= set(uniform) and uniform:
            plans = self._of_one_option(uniform)
            bound_s = min((_certificate_of(plan).lower_bound_s for plan in plans), default=0.0)
        else:
            plans = []
        if not plans:
            first = self._search(self.options)
            if self._expressed(first.strategy):
                kept = [other for other in first.alternatives if self._expressed(other.strategy)]
                return self._trimmed(first, kept)
            plans = [first, *self._of_one_option(self.options.pins.recomputes)]
            bound_s = _certificate_of(first).lower_bound_s
        found = self._evaluated(plans)
        if not found:
            raise InfeasibleError(self._why_none(plans[0]))
        return self._plan(plans, found, bound_s)

    def _of_one_option(self, options: Iterable[Recompute]) -> list[Plan]:
        """The best plan in which all blocks share an option, for each that fits; none where one is pinned."""
        plans = []
        for option in options if self.options.pins.recompute is None else ():
            pins = dataclasses.replace(self.options.pins, recompute=option)
            try:
                plans.append(self._search(dataclasses.replace(self.options, pins=pins)))
            except InfeasibleError:
                continue
        return plans

    def _search(self, options: SolveOptions) -> Plan:
        """A search of the larger space, in what is left of the time."""
        left_s = options.time_limit_s
        if left_s is not None:
            left_s = max(0.05 * left_s, left_s - (time.monotonic() - self.started_s))
        top = max(options.top, LEAST_SHAPES)
        return solve(self.relaxed, dataclasses.replace(options, time_limit_s=left_s, top=top))

    def _expressed(self, strategy: Strategy) -> bool:
        return not broken_rules(self.problem, strategy)

    def _trimmed(self, plan: Plan, others: Iterable[Alternative]) -> Plan:
        return dataclasses.replace(plan, alternatives=tuple(others)[: self.options.top])

    def _evaluated(self, plans: list[Plan]) -> list[Evaluation]:
        """SAFE strategies that the engine can express, of every shape that came up, the fastest first."""
        strategies = [plan.strategy for plan in plans]
        strategies += [other.strategy for plan in plans for other in plan.alternatives]
        kept = [strategy for strategy in strategies if self._expressed(strategy)]
        shapes = dict.fromkeys(
            Shape(strategy.degrees, tuple(stage.layers for stage in strategy.stages))
            for strategy in strategies
        )
        for shape in shapes:
            kept += self._recipes(shape)
        each = (self.model.evaluate(strategy) for strategy in dict.fromkeys(kept))
        safe = [evaluation for evaluation in each if evaluation.estimate.verdict is Verdict.SAFE]
        return sorted(safe, key=lambda e: (e.estimate.step_time_s, e.strategy.degrees.label()))

    def _recipes(self, shape: Shape) -> list[Strategy]:
        allowed = set(self.options.pins.recomputes)
        families = recipe_families(self.engine, shape.degrees, shape.sizes)
        kept = [self._offloading(shape.degrees, _within(family, allowed)) for family in families]
        least = [self._least(shape.degrees, family) for family in kept]
        return [strategy for strategy in least if strategy is not None and self._expressed(strategy)]

    def _offloading(self, degrees: Degrees, family: Family) -> Family:
        """The recipes of a family with what is pinned to host memory there, as far as rules allow it."""
        what = self.options.pins.offloaded
        if what is Offload.NONE:
            return family
        each = [offloaded(stages, what) for stages in family]
        return [stages for stages in each if self._expressed(Strategy(degrees=degrees, stages=stages))]

    def _least(self, degrees: Degrees, family: Family) -> Strategy | None:
        """The recipe of a family with the least recomputation that is SAFE, by bisection."""
        low, high = 0, len(family)
        while low < high:
            middle = (low + high) // 2
            strategy = Strategy(degrees=degrees, stages=family[middle])
            if self.model.evaluate(strategy).estimate.verdict is Verdict.SAFE:
                high = middle
            else:
                low = middle + 1
        return Strategy(degrees=degrees, stages=family[low]) if low < len(family) else None

    def _plan(self, plans: list[Plan], found: list[Evaluation], bound_s: float) -> Plan:
        best = found[0]
        certificate = self._certificate(plans, best.estimate.step_time_s, bound_s)
        verify(self.problem, best, certificate.lower_bound_s)
        plan = make_plan(self.problem, best, certificate, plans[0].rejected, self._others(found))
        return self._trimmed(plan, plan.alternatives)

    def _certificate(self, plans: list[Plan], step_s: float, bound_s: float) -> Certificate:
        each, tolerance = [_certificate_of(plan) for plan in plans], self.options.gap_tolerance
        lower_s = min(bound_s, step_s)
        gap = max(0.0, 1 - lower_s / step_s)
        proven = gap <= tolerance * (1 + OPTIMAL_GAP) + OPTIMAL_GAP
        return dataclasses.replace(
            each[0],
            status="optimal" if proven else "gap",
            objective_s=step_s,
            lower_bound_s=lower_s,
            gap=gap if gap > OPTIMAL_GAP else 0.0,
            wall_s=0.0 if self.options.reproducible else time.monotonic() - self.started_s,
            milps=sum(certificate.milps for certificate in each),
        )

    def _others(self, found: list[Evaluation]) -> tuple[Alternative, ...]:
        """The best of each other shape, and why it lost."""
        best, *rest = found
        firsts: dict[Degrees, Evaluation] = {}
        for evaluation in rest:
            if evaluation.strategy.degrees != best.strategy.degrees:
                firsts.setdefault(evaluation.strategy.degrees, evaluation)
        return tuple(
            Alternative(
                strategy=other.strategy,
                step_time_s=other.estimate.step_time_s,
                peak_memory_bytes=other.estimate.peak_memory_bytes,
                verdict=other.estimate.verdict,
                reason=why_slower(best, other),
            )
            for other in firsts.values()
        )

    def _why_none(self, first: Plan) -> str:
        broken = broken_rules(self.problem, first.strategy)
        lines = [f"no feasible plan that {self.engine} can express for {self.problem.model.name}."]
        for rejected in broken:
            lines.append(f"  {rejected.rule}: {rejected.detail}")
            lines.append(f"    legal here: {rejected.legal}")
        lines.append(
            f"Without this rule {first.strategy.degrees.label()} fits, with "
            f"{first.estimate.step_time_s:.4g} s a step: another --engine, or more devices, would help."
        )
        return "\n".join(lines)


def _within(family: Family, allowed: set[Recompute]) -> Family:
    """The recipes of a family that use allowed options alone."""
    return [stages for stages in family if _options(stages) <= allowed]


def _options(stages: Stages) -> set[Recompute]:
    return {option for stage in stages for option in set(stage.recompute.options())}


def _certificate_of(plan: Plan) -> Certificate:
    assert plan.solver is not None
    return plan.solver
