"""What can be checked of a plan without devices: each check is named, and says what does not hold.

What does not hold of the rehearsal that a plan carries: ranks not its own, figures that do not add up.

What is wrong with the schedule table of a plan, which a hand may have edited: it is run as written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

from planner.foundation.decode import digest
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.job.objective import Minimise
from planner.model.lora import module_problems
from planner.strategy.equivalent_ranks import alike_ranks
from planner.strategy.estimate import Verdict
from planner.strategy.placement import device_names, stage_groups
from planner.strategy.plan import Plan
from planner.strategy.rehearsal import RankRehearsal, Refined, Rehearsal
from planner.strategy.rules import broken_rules
from planner.strategy.schedule.schedules import Action, ActionKind, Table, table_faults
from planner.strategy.strategy import AXES

REHEARSAL_TOLERANCE = 1e-6


def rehearsal_faults(plan: Plan) -> list[str]:
    """The rehearsed ranks are the plan's, and the refined prediction follows from what they did."""
    rehearsal, degrees = plan.rehearsal, plan.strategy.degrees
    if rehearsal is None or len(plan.strategy.stages) != degrees.stages:
        return []  # of wrong stages the rules say so
    kinds = alike_ranks(plan)
    faults = [fault for rank in rehearsal.ranks for fault in _of_rank(plan, rank, kinds)]
    covered = {pp_rank for rank in rehearsal.ranks for pp_rank in rank.alike}
    missing = sorted(set(range(degrees.pp)) - covered)
    if rehearsal.complete and missing:
        faults.append(f"complete, but no rank stands for pp {', '.join(map(str, missing))}")
    if not rehearsal.complete and not missing:
        faults.append("not complete, but every kind of rank was rehearsed")
    if not 1 <= rehearsal.micro_batches <= degrees.num_micro_batches:
        faults.append(
            f"{rehearsal.micro_batches} micro-batches were run, the plan has {degrees.num_micro_batches}"
        )
    if rehearsal.refined is not None:
        faults += _of_refined(plan, rehearsal, rehearsal.refined)
    return faults


def _of_rank(plan: Plan, found: RankRehearsal, kinds: list[tuple[int, ...]]) -> Iterator[str]:
    """A rank is of the plan, holds the stages that it is said to, and stands for ranks that do the same."""
    degrees = plan.strategy.degrees
    if not 0 <= found.rank < degrees.world:
        yield f"rank {found.rank} was rehearsed, the plan has {degrees.world} ranks"
        return
    pp_rank = degrees.pp_rank_of_rank(found.rank)
    held = degrees.stages_of_pp_rank(pp_rank)
    if found.stages != held:
        yield f"rank {found.rank} is said to hold stages {found.stages}; the plan gives it {held}"
    strangers = sorted({each.stage for each in found.passes} - set(held))
    if strangers:
        yield f"rank {found.rank} has passes of stages {strangers}, which it does not hold"
    kind = next(kind for kind in kinds if pp_rank in kind)
    others = sorted(set(found.alike) - set(kind))
    if others or pp_rank not in found.alike:
        yield f"rank {found.rank} stands for pp {found.alike}; those that do the same are {kind}"
    peak, start = found.allocated_bytes, found.start_bytes
    if peak is not None and start is not None and start > peak:
        yield f"rank {found.rank} holds {start} B between steps, more than its peak of {peak} B"
    if peak is not None and found.reserved_bytes is not None and found.reserved_bytes < peak:
        yield f"rank {found.rank} allocated {peak} B of {found.reserved_bytes} B reserved"


def _of_refined(plan: Plan, rehearsal: Rehearsal, refined: Refined) -> Iterator[str]:
    """Causes add up to the time, the intervals hold their figures, and the verdict is that of the ranks."""
    if not math.isclose(refined.breakdown.total_s, refined.step_time_s, rel_tol=REHEARSAL_TOLERANCE):
        yield f"refined causes add up to {refined.breakdown.total_s} s, not {refined.step_time_s} s"
    intervals = (
        ("step time", refined.step_time_s, refined.step_time_interval_s),
        ("peak memory", refined.peak_memory_bytes, refined.peak_memory_interval_bytes),
    )
    for name, figure, (low, high) in intervals:
        if not low <= figure <= high:
            yield f"the refined {name} {figure} lies outside {low} to {high}"
    if not 0 <= refined.measured_share <= 1 + REHEARSAL_TOLERANCE:
        yield f"{refined.measured_share} of a rank's time is said to be measured"
    if rehearsal.ran_out and refined.verdict is not Verdict.NO:
        yield f"a rank ran out of memory, and the refined verdict is {refined.verdict}"
    limits = {
        plan.estimate.memory_limit_bytes if own is None else own
        for own in (stage.memory_limit_bytes for stage in plan.stage_estimates)
    }
    if refined.memory_limit_bytes not in limits:
        said = ", ".join(str(limit) for limit in sorted(limits))
        yield f"the refined limit is {refined.memory_limit_bytes} B, the plan's {said} B"
    if refined.verdict is Verdict.SAFE and refined.peak_memory_bytes > refined.memory_limit_bytes:
        yield f"refined SAFE, but {refined.peak_memory_bytes} B exceed {refined.memory_limit_bytes} B"


SHOWN = 5


def schedule_faults(plan: Plan) -> list[str]:
    """Every stage and micro-batch runs forward, then backward, on its rank, and no rank waits for ever."""
    degrees, stages = plan.strategy.degrees, len(plan.strategy.stages)
    if len(plan.schedule_table) != degrees.pp:
        return [f"has {len(plan.schedule_table)} rows for {degrees.pp} pipeline ranks"]
    texts = sum(len(row) for row in plan.schedule_table)
    passes = stages * degrees.num_micro_batches
    if texts > 4 * passes:
        return [f"has {texts} actions; forward and backward of each stage and micro-batch make {2 * passes}"]
    try:
        table = plan.table
    except InputError as error:
        return [str(problem) for problem in error.problems]
    faults = table_faults(table, stages, degrees.num_micro_batches, degrees.pp_rank_of_stage)
    return faults or stuck_actions(table, stages)


def check_schedule_table(plan: Plan) -> None:
    """Raises InputError with what keeps the plan's schedule table from being executed."""
    faults = schedule_faults(plan)
    if faults:
        more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
        degrees = plan.strategy.degrees
        raise InputError(
            Problem(
                where="schedule_table",
                fault=f"cannot be executed: {'; '.join(faults[:SHOWN])}{more}.",
                legal="in the row of the rank that holds it, each stage's F of each of "
                f"{degrees.num_micro_batches} micro-batches, then its B, or its I and later its W",
                fix=f"take the table of {degrees.schedule}: plan estimate with the same --fix writes it",
            )
        )


def stuck_actions(table: Table, stages: int) -> list[str]:
    """The actions at which rows wait for ever, and for what; none where every row comes to its end."""
    rows = list(table)
    positions = [0] * len(rows)
    sent: set[tuple[int, bool, int]] = set()
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while positions[rank] < len(row) and _can_run(row[positions[rank]], sent, stages):
                action = row[positions[rank]]
                positions[rank] += 1
                moved = True
                if not action.paired:  # what a pair makes leaves at its end
                    pair = row[max(positions[rank] - 2, 0) : positions[rank]]
                    sent.update(_signal(a) for a in pair if a == action or a.paired)
    return [
        f"rank {rank} waits for ever at {row[position]} for {_wanted(row[position])}"
        for rank, (position, row) in enumerate(zip(positions, rows, strict=True))
        if position < len(row)
    ]


def _signal(action: Action) -> tuple[int, bool, int]:
    return action.stage, action.kind is ActionKind.FORWARD, action.micro_batch


def _can_run(action: Action, sent: set[tuple[int, bool, int]], stages: int) -> bool:
    if action.kind is ActionKind.WEIGHT_GRAD:
        return True
    forward = action.kind is ActionKind.FORWARD
    sender = action.stage - 1 if forward else action.stage + 1
    return not 0 <= sender < stages or (sender, forward, action.micro_batch) in sent


def _wanted(action: Action) -> str:
    if action.kind is ActionKind.FORWARD:
        return f"{action.stage - 1}F{action.micro_batch}"
    return f"the backward of micro-batch {action.micro_batch} on stage {action.stage + 1}"


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
