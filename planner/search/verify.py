"""Checks an answer with code that shares nothing with the search: counts, rules, timeline, bound."""

from __future__ import annotations

from collections import Counter

from planner.cost.evaluate import Evaluation
from planner.foundation.errors import CheckError
from planner.job.problem import PlanningProblem
from planner.strategy.placement import rank_limits_bytes
from planner.strategy.rules import broken_rules
from planner.strategy.schedule.schedules import ActionKind, table_faults

TOLERANCE = 1e-9


def verify(problem: PlanningProblem, evaluation: Evaluation, lower_bound_s: float) -> None:
    """Raises CheckError with every fault of an evaluated strategy."""
    degrees = evaluation.strategy.degrees
    faults = [rejected.detail for rejected in broken_rules(problem, evaluation.strategy)]
    faults += table_faults(
        evaluation.table, degrees.stages, degrees.num_micro_batches, degrees.pp_rank_of_stage
    )
    faults += timeline_faults(evaluation)
    estimate = evaluation.estimate
    faults += memory_faults(problem, evaluation)
    if lower_bound_s > estimate.step_time_s * (1 + TOLERANCE):
        faults.append(f"bound {lower_bound_s} s lies above the step time {estimate.step_time_s} s")
    total_s = estimate.breakdown.total_s
    if abs(total_s - estimate.step_time_s) > 1e-6 * estimate.step_time_s:
        faults.append(f"causes add up to {total_s} s, the step takes {estimate.step_time_s} s")
    if faults:
        raise CheckError("the plan fails its own verification:\n  " + "\n  ".join(faults))


def memory_faults(problem: PlanningProblem, evaluation: Evaluation) -> list[str]:
    """Whether the stages that a pipeline rank holds fit together into a device of its own kind."""
    degrees, taken = evaluation.strategy.degrees, Counter[int]()
    for index, stage in enumerate(evaluation.stages):
        taken[degrees.pp_rank_of_stage(index)] += stage.memory.total_bytes
    limits = rank_limits_bytes(problem, degrees)
    return [
        f"pipeline rank {rank}: peak {taken[rank]} B exceeds {limit} B"
        for rank, limit in enumerate(limits)
        if taken[rank] > limit
    ]


def timeline_faults(evaluation: Evaluation) -> list[str]:
    """Whether the replay's events keep the order of rows and of stages, one at a time on each rank."""
    faults: list[str] = []
    ends: dict[tuple[int, bool, int], float] = {}
    starts: dict[tuple[int, bool, int], float] = {}
    for rank, row in enumerate(evaluation.table):
        events = evaluation.replay.rank_events(rank)
        passes = [e for e in events if e.kind in ("forward", "backward")]
        if [e.name for e in passes] != [str(action) for action in row]:
            faults.append(f"rank {rank} replays another order than its row")
            continue
        clock_s = 0.0
        for event, action in zip(passes, row, strict=True):
            if event.start_s < clock_s * (1 - TOLERANCE):
                faults.append(f"{event.name} starts before the action before it has ended")
            clock_s = event.start_s + event.duration_s
            if action.kind is not ActionKind.WEIGHT_GRAD:
                key = (action.stage, action.kind is ActionKind.FORWARD, action.micro_batch)
                starts[key], ends[key] = event.start_s, clock_s
    last = len(evaluation.strategy.stages) - 1
    for (stage, forward, micro_batch), start_s in starts.items():
        before = stage - 1 if forward else stage + 1
        if 0 <= before <= last and start_s < ends[(before, forward, micro_batch)] * (1 - TOLERANCE):
            what = "forward" if forward else "backward"
            faults.append(f"{what} {micro_batch} of stage {stage} starts before stage {before} has sent it")
    return faults
