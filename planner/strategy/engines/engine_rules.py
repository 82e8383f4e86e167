"""Rules of the engine that must run a plan: every one a named predicate, with its reason and its source.

The first table holds for a problem, its model and workload, and is asked once a search; the second for
degrees; the third for a whole strategy: the sizes of stages, what their blocks recompute and what is
offloaded. A rule that is not here is not one of the engine: what it can run by options that a plan has no
word for (another batch on each rank, say) is left out of the space instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.strategy.engines.deepspeed import (
    DEEPSPEED_PROBLEM_RULES,
    DEEPSPEED_RULES,
    DEEPSPEED_STRATEGY_RULES,
)
from planner.strategy.engines.megatron import (
    MEGATRON_PROBLEM_RULES,
    MEGATRON_RULES,
    MEGATRON_SCHEDULES,
    MEGATRON_STRATEGY_RULES,
)
from planner.strategy.engines.native import NATIVE_PROBLEM_RULES, NATIVE_RULES, NATIVE_STRATEGY_RULES
from planner.strategy.engines.torchtitan import (
    TORCH_SCHEDULES,
    TORCHTITAN_PROBLEM_RULES,
    TORCHTITAN_RULES,
    TORCHTITAN_STRATEGY_RULES,
)
from planner.strategy.estimate import Rejected
from planner.strategy.strategy import Degrees, Schedule, Strategy

ProblemRule = Callable[[PlanningProblem], Rejected | None]
EngineRule = Callable[[PlanningProblem, Degrees], Rejected | None]
StrategyRule = Callable[[PlanningProblem, Strategy], Rejected | None]

ENGINE_PROBLEM_RULES: Mapping[Engine, tuple[ProblemRule, ...]] = MappingProxyType(
    {
        Engine.NATIVE: NATIVE_PROBLEM_RULES,
        Engine.TORCHTITAN: TORCHTITAN_PROBLEM_RULES,
        Engine.MEGATRON: MEGATRON_PROBLEM_RULES,
        Engine.DEEPSPEED: DEEPSPEED_PROBLEM_RULES,
    }
)

ENGINE_RULES: Mapping[Engine, tuple[EngineRule, ...]] = MappingProxyType(
    {
        Engine.NATIVE: NATIVE_RULES,
        Engine.TORCHTITAN: TORCHTITAN_RULES,
        Engine.MEGATRON: MEGATRON_RULES,
        Engine.DEEPSPEED: DEEPSPEED_RULES,
    }
)

ENGINE_STRATEGY_RULES: Mapping[Engine, tuple[StrategyRule, ...]] = MappingProxyType(
    {
        Engine.NATIVE: NATIVE_STRATEGY_RULES,
        Engine.TORCHTITAN: TORCHTITAN_STRATEGY_RULES,
        Engine.MEGATRON: MEGATRON_STRATEGY_RULES,
        Engine.DEEPSPEED: DEEPSPEED_STRATEGY_RULES,
    }
)

ENGINE_SCHEDULES: Mapping[Engine, tuple[Schedule, ...]] = MappingProxyType(
    {
        Engine.NATIVE: tuple(Schedule),
        Engine.TORCHTITAN: TORCH_SCHEDULES,
        Engine.MEGATRON: MEGATRON_SCHEDULES,
        Engine.DEEPSPEED: (Schedule.ONE_F_ONE_B,),
    }
)
"""Schedules that an engine has, which its rules name as legal."""


def problem_refused(problem: PlanningProblem) -> list[Rejected]:
    """Why the engine of a problem can train its model and workload by no plan at all; empty where it can."""
    engine = problem.limits.engine
    rules = () if engine is None else ENGINE_PROBLEM_RULES[engine]
    return [rejected for rule in rules if (rejected := rule(problem)) is not None]


def engine_rules(engine: Engine | None) -> tuple[EngineRule, ...]:
    """The rules of degrees of an engine; none where a plan is for no particular one."""
    return () if engine is None else ENGINE_RULES[engine]


def engine_strategy_rules(engine: Engine | None) -> tuple[StrategyRule, ...]:
    """The rules of a whole strategy of an engine; none where a plan is for no particular one."""
    return () if engine is None else ENGINE_STRATEGY_RULES[engine]


def candidate_schedules(engine: Engine | None) -> tuple[Schedule, ...]:
    """Schedules that a search looks at unasked: the engine's, or all."""
    return tuple(Schedule) if engine is None else ENGINE_SCHEDULES[engine]
