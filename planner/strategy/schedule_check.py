"""What is wrong with the schedule table of a plan, which a hand may have edited: it is run as written."""

from __future__ import annotations

from planner.foundation.errors import InputError, Problem
from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import Action, ActionKind, Table, parse_table, table_faults

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
        table = parse_table(plan.schedule_table)
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
