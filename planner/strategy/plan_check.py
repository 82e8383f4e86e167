"""What can be checked of a plan without devices: each check is named, and says what does not hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from planner.foundation.decode import digest
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.job.objective import Minimise
from planner.model.lora import module_problems
from planner.strategy.estimate import Verdict
from planner.strategy.placement import device_names, stage_groups
from planner.strategy.plan import Plan
from planner.strategy.rehearsal_check import rehearsal_faults
from planner.strategy.rules import broken_rules
from planner.strategy.schedule_check import schedule_faults
from planner.strategy.strategy import AXES

RELATIVE_TOLERANCE = 1e-6


@frozen
class PlanCheck:
    """One check and what it found wrong; nothing where it holds."""

    name: str
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.faults


def check_plan(plan: Plan) -> tuple[PlanCheck, ...]:
    """Every check of a plan, in a fixed order. Degrees below 1 end it: nothing can be said of such a plan."""
    degrees = plan.strategy.degrees
    if min(*degrees.grid_shape(), degrees.chunks, degrees.micro_batch, degrees.num_micro_batches) < 1:
        return (PlanCheck(name="rules", faults=(f"a degree is below 1: {degrees.label()}",)),)
    return tuple(PlanCheck(name=name, faults=tuple(check(plan))) for name, check in _CHECKS)


def _rules(plan: Plan) -> list[str]:
    """The strategy keeps every rule: world size, divisors, stages that cover the layers; and adapters stand
    beside modules that there are."""
    broken = broken_rules(plan.problem, plan.strategy)
    faults = [f"{rejected.rule}: {rejected.detail}" for rejected in broken]
    if plan.workload.adapters is not None:
        faults += [problem.fault for problem in module_problems(plan.workload.adapters.modules, plan.model)]
    return faults


def _grid(plan: Plan) -> list[str]:
    """The rank grid has the strategy's axes and sizes, holds every device once, and stages lie on theirs."""
    expected = plan.strategy.degrees.grid_shape()
    faults = []
    if plan.rank_axes != AXES:
        faults.append(f"axes are {', '.join(plan.rank_axes)}, not {', '.join(AXES)}")
    if plan.rank_grid_shape != expected:
        faults.append(f"the grid is {plan.rank_grid_shape}, the degrees make {expected}")
    if math.prod(plan.rank_grid_shape) != plan.cluster.devices:
        devices = plan.cluster.devices
        faults.append(
            f"the grid holds {math.prod(plan.rank_grid_shape)} ranks, the cluster {devices} devices"
        )
    return faults + _devices(plan)


def _estimate(plan: Plan) -> list[str]:
    """The estimate adds up: causes to the step time, stages within the peak, the verdict within the limit."""
    estimate = plan.estimate
    faults = []
    if not math.isclose(estimate.breakdown.total_s, estimate.step_time_s, rel_tol=RELATIVE_TOLERANCE):
        faults.append(f"causes add up to {estimate.breakdown.total_s} s, not {estimate.step_time_s} s")
    low_s, high_s = estimate.step_time_interval_s
    if not low_s <= estimate.step_time_s <= high_s:
        faults.append(f"the step time {estimate.step_time_s} s lies outside {low_s} to {high_s} s")
    tokens_per_s = plan.workload.tokens_per_step / estimate.step_time_s if estimate.step_time_s > 0 else 0.0
    if not math.isclose(tokens_per_s, estimate.tokens_per_s, rel_tol=RELATIVE_TOLERANCE):
        faults.append(f"tokens_per_s is {estimate.tokens_per_s}; batch and step time make {tokens_per_s}")
    return faults + _memory(plan)


def _memory(plan: Plan) -> list[str]:
    """The peak is that of a kind of device with its limit; where SAFE, every rank is within its own."""
    estimate, degrees = plan.estimate, plan.strategy.degrees
    peak, limit = estimate.peak_memory_bytes, estimate.memory_limit_bytes
    if len(plan.stage_estimates) != degrees.stages:
        return []  # the rules say so
    taken, kinds = Counter[int](), dict[int, tuple[str, int]]()
    for index, stage in enumerate(plan.stage_estimates):
        rank, own = degrees.pp_rank_of_stage(index), stage.memory_limit_bytes
        taken[rank] += stage.memory.total_bytes
        kinds[rank] = stage.device, limit if own is None else own
    largest: dict[tuple[str, int], int] = {}
    for rank, kind in kinds.items():
        largest[kind] = max(largest.get(kind, 0), taken[rank])
    faults = []
    judged = [size for (_, own), size in largest.items() if own == limit]
    if not any(size <= peak for size in judged):
        faults.append(f"ranks of {limit} B take {min(judged, default=0)} B, the peak of them is {peak} B")
    if estimate.verdict is Verdict.SAFE:
        over = [(rank, own) for rank, (_, own) in kinds.items() if taken[rank] > own]
        faults += [f"SAFE, but rank {rank} takes {taken[rank]} B of {own} B" for rank, own in over]
        faults += [f"SAFE, but the peak exceeds the limit of {limit} B"] if peak > limit else []
    return faults


def _objective(plan: Plan) -> list[str]:
    """The nodes, days and dollars are those of the plan, within deadline and budget, above their bound."""
    objective = plan.objective
    if objective is None:
        return []
    faults = []
    nodes = sum(group.nodes for group in plan.cluster.groups)
    if objective.nodes != nodes:
        faults.append(f"the plan runs on {nodes} nodes, the objective names {objective.nodes}")
    if objective.nodes_unused < 0:
        faults.append(f"{objective.nodes_unused} nodes are left unused")
    job = plan.estimate.job
    days, usd = (plan.estimate.days, plan.estimate.cost_usd) if job is None else (job.days, job.cost_usd)
    own_figures = (("days", objective.days, days), ("cost_usd", objective.cost_usd, usd))
    for name, written, own in own_figures if objective.rest is None else ():
        if (written is None) != (own is None) or not math.isclose(
            written or 0.0, own or 0.0, rel_tol=RELATIVE_TOLERANCE
        ):
            faults.append(f"{name} is {written}, the estimate has {own}")
    limits = (
        ("deadline_days", objective.deadline_days, objective.days),
        ("budget_usd", objective.budget_usd, objective.cost_usd),
    )
    for name, limit, value in limits:
        if limit is not None and (value is None or value > limit * (1 + RELATIVE_TOLERANCE)):
            faults.append(f"{name} is {limit}, the run takes {value}")
    figure = objective.cost_usd if objective.minimise is Minimise.COST else objective.days
    if figure is not None and objective.lower_bound > figure * (1 + RELATIVE_TOLERANCE):
        faults.append(f"the bound {objective.lower_bound} lies above {figure}")
    return faults


def _devices(plan: Plan) -> list[str]:
    """Each stage is said to run on the devices on which its pipeline rank lies."""
    placed = stage_groups(plan.cluster, plan.strategy.degrees, len(plan.stage_estimates))
    named = [
        (stage.device, device_names(plan.cluster, groups))
        for stage, groups in zip(plan.stage_estimates, placed, strict=True)
    ]
    return [
        f"stage {index} is said to run on {said}; its ranks are {lies_on}"
        for index, (said, lies_on) in enumerate(named)
        if said and said != lies_on
    ]


def certificate_faults(plan: Plan) -> list[str]:
    """The certificate is about this plan, and its bound lies below it."""
    solver = plan.solver
    if solver is None:
        return []
    faults = []
    if not math.isclose(solver.objective_s, plan.estimate.step_time_s, rel_tol=RELATIVE_TOLERANCE):
        faults.append(f"objective {solver.objective_s} s is not the step time {plan.estimate.step_time_s} s")
    if solver.lower_bound_s > solver.objective_s * (1 + RELATIVE_TOLERANCE):
        faults.append(f"bound {solver.lower_bound_s} s lies above the objective {solver.objective_s} s")
    if not solver.verified:
        faults.append("the answer was not verified")
    return faults


def _digests(plan: Plan) -> list[str]:
    """The model, workload and cluster in the plan are those that it was made from."""
    inputs = {"model": plan.model, "workload": plan.workload, "cluster": plan.cluster}
    faults = []
    for name, value in inputs.items():
        written = plan.digests.get(name)
        if written is None:
            faults.append(f"no digest of the {name}")
        elif written != digest(value):
            faults.append(f"the {name} was changed after the plan was made")
    return faults


STRUCTURAL = ("rules", "rank grid", "schedule table")
"""Checks of what is executed; the others are of what is predicted of it."""


def check_sound(plan: Plan) -> None:
    """Raises InputError with everything in a plan that cannot be executed as it is written."""
    problems = [
        Problem(where=f"plan: {check.name}", fault=fault, fix="solve again, or see `plan check`")
        for check in check_plan(plan)
        if check.name in STRUCTURAL
        for fault in check.faults
    ]
    if problems:
        raise InputError(*problems)


_CHECKS: tuple[tuple[str, Callable[[Plan], list[str]]], ...] = (
    ("rules", _rules),
    ("rank grid", _grid),
    ("schedule table", schedule_faults),
    ("estimate", _estimate),
    ("certificate", certificate_faults),
    ("objective", _objective),
    ("rehearsal", rehearsal_faults),
    ("digests", _digests),
)
