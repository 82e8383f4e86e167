"""What a plan can be exported to, and what each target refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from planner.export.accelerate import accelerate_refusals, export_accelerate
from planner.export.artifact import Export
from planner.export.kubernetes import export_kubernetes
from planner.export.scheduled import ENGINE_EXPORTS, one_kind_of_node
from planner.export.skypilot import export_skypilot
from planner.export.slurm import export_slurm
from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine
from planner.job.problem import Limits
from planner.strategy.estimate import Rejected
from planner.strategy.plan import Plan
from planner.strategy.rules import broken_rules


def nothing_refused(plan: Plan) -> list[Rejected]:
    return []


@frozen
class Target:
    """One target: how a plan is exported, what is refused beside an engine's rules, and whose rules hold.

    `engine` None is that of the plan: the native runtime where it names none.
    """

    export: Callable[[Plan], Export]
    refusals: Callable[[Plan], list[Rejected]] = nothing_refused
    engine: Engine | None = None
    schedules: bool = False


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        **{str(engine): Target(export=export, engine=engine) for engine, export in ENGINE_EXPORTS.items()},
        "accelerate": Target(export=export_accelerate, refusals=accelerate_refusals),
        "slurm": Target(export=export_slurm, refusals=one_kind_of_node, schedules=True),
        "kubernetes": Target(export=export_kubernetes, refusals=one_kind_of_node, schedules=True),
        "skypilot": Target(export=export_skypilot, refusals=one_kind_of_node, schedules=True),
    }
)


def refusals(plan: Plan, to: str) -> list[Rejected]:
    """Everything that keeps a target from running exactly this plan; empty where it can."""
    target = TARGETS[to]
    engine = plan.engine or Engine.NATIVE if target.schedules else target.engine
    problem = dataclasses.replace(plan.problem, limits=Limits(engine=engine))
    return broken_rules(problem, plan.strategy) + target.refusals(plan)
