"""What all schedulers need of a plan: nodes of one kind, how long, and the files of its engine."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from planner.export.artifact import Export, ExportFile
from planner.export.deepspeed import export_deepspeed
from planner.export.megatron_files import export_megatron
from planner.export.native import SCRIPT as NATIVE_SCRIPT
from planner.export.native import native_files
from planner.export.torchtitan import export_torchtitan
from planner.job.engine_settings import Engine
from planner.strategy.estimate import Rejected
from planner.strategy.plan import Plan

START_S = 900.0
"""Seconds for starting, loading and compiling, beside the steps."""
DAY_S = 86_400.0
ENGINE_EXPORTS: Mapping[Engine, Callable[[Plan], Export]] = MappingProxyType(
    {
        Engine.DEEPSPEED: export_deepspeed,
        Engine.MEGATRON: export_megatron,
        Engine.TORCHTITAN: export_torchtitan,
    }
)
"""The files of every engine that a scheduler can start."""


def one_kind_of_node(plan: Plan) -> list[Rejected]:
    """Schedulers give equal nodes, in an order of their own."""
    kinds = {(group.device.name, group.devices_per_node) for group in plan.cluster.groups}
    if len(kinds) == 1:
        return []
    return [
        Rejected(
            rule="one_kind_of_node",
            detail=f"{plan.cluster.name} has {len(kinds)} kinds of nodes, to be numbered in the order "
            "of the plan's groups: a scheduler numbers them as it likes.",
            legal="a cluster of one kind of node; or the engine's own export, started on each node with its "
            "NODE_RANK",
            fix="--to the engine",
        )
    ]


def nodes(plan: Plan) -> int:
    return sum(group.nodes for group in plan.cluster.groups)


def job_name(plan: Plan) -> str:
    """A name of letters, digits and dashes that Kubernetes takes too (RFC 1123)."""
    return re.sub(r"[^a-z0-9]+", "-", plan.model.name.lower()).strip("-")[:40] or "plan"


def run_s(plan: Plan) -> float | None:
    """Seconds of the whole run at the slow end of its interval, with its goodput where that was said."""
    estimate = plan.estimate
    days = estimate.days if estimate.job is None or estimate.job.days is None else estimate.job.days
    if days is None:
        return None
    slow = estimate.step_time_interval_s[1] / estimate.step_time_s if estimate.step_time_s > 0 else 1.0
    return math.ceil((days * DAY_S * slow + START_S) / 60) * 60.0


class Launched:
    """The engine that a scheduled plan is for: its files, its script, and what its export says."""

    def __init__(self, plan: Plan) -> None:
        self.engine = plan.engine or Engine.NATIVE
        self.export = None if self.native else engine_export(plan, self.engine)
        self.files: tuple[ExportFile, ...] = native_files(plan) if self.export is None else self.export.files

    @property
    def native(self) -> bool:
        return self.engine is Engine.NATIVE

    @property
    def script(self) -> str:
        if self.native:
            return NATIVE_SCRIPT
        return next(file.name for file in self.files if file.name.endswith(".sh"))

    @property
    def decides(self) -> tuple[str, ...]:
        return () if self.export is None else self.export.decides

    @property
    def yours(self) -> tuple[str, ...]:
        if self.export is not None:
            return self.export.yours
        return ("data (DATA; without it a novel that ships with the program), RUN_DIR on shared storage",)


def engine_export(plan: Plan, engine: Engine) -> Export:
    """The export for the engine itself."""
    return ENGINE_EXPORTS[engine](plan)
