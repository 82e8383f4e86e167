"""Which pipeline ranks of a plan do the same, and the plan of fewer micro-batches that tells as much.

Ranks do the same that hold the same classes of blocks with the same options, the same ends of the model, on
the same kind of device, and have as many micro-batches in flight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.strategy.placement import device_names, stage_groups
from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import Table, build_table, print_table
from planner.strategy.schedule.table import Flights
from planner.strategy.strategy import Stage

LEAST_MICRO_BATCHES = 3
"""So that some passes are neither the first nor the last, which also gather weights or reduce gradients."""

WAITS = 2
"""What waits for W apart from what is alive, whatever it takes
(planner.cost.memory.activations.most_waits)."""


def alike_ranks(plan: Plan) -> list[tuple[int, ...]]:
    """The pipeline ranks in groups of those that do the same, in order of the first of each."""
    table = plan.table
    found: dict[object, list[int]] = {}
    for rank in range(plan.strategy.degrees.pp):
        found.setdefault(_doing(plan, table, rank), []).append(rank)
    return [tuple(ranks) for ranks in found.values()]


def _doing(plan: Plan, table: Table, rank: int) -> object:
    """What a pipeline rank does: equal for ranks of which one rehearsal tells all."""
    stages, last = plan.strategy.stages, plan.strategy.degrees.stages - 1
    placed = stage_groups(plan.cluster, plan.strategy.degrees, len(stages))
    held = table.stages_of(rank)
    kinds = tuple(sorted((held.index(s), str(k), n) for (s, k), n in table.counts(rank).items()))
    flights = tuple(tuple(v[stage] for stage in held) for v in table.in_flight(rank, WAITS))
    return (
        tuple(
            (
                _classes(plan, stages[index]),
                stages[index].recompute,
                stages[index].offload,
                index == 0,
                index == last,
                device_names(plan.cluster, placed[index]),
            )
            for index in held
        ),
        kinds,
        flights,
    )


def _classes(plan: Plan, stage: Stage) -> tuple[str, ...]:
    keys = [s.block.shape_key for s in plan.model.segments for _ in range(s.count)]
    return tuple(keys[stage.first : stage.end])


def shortened(plan: Plan) -> Plan:
    """The plan with as few micro-batches a step as have every rank hold as many at once as the plan's own.

    As many as well once gradients of earlier ones lie beside them. Their order is that of the same schedule.
    The plan itself where its table is not its schedule's usual one.
    """
    degrees, full = plan.strategy.degrees, plan.table
    usual = _usual_table(plan, degrees.num_micro_batches)
    if usual is None or usual != full:
        return plan
    flights = _flights(full)
    for count in _shorter_counts(degrees.pp, degrees.stages, degrees.num_micro_batches):
        table = _usual_table(plan, count)
        if table is not None and _flights(table) == flights:
            return _with_micro_batches(plan, count, table)
    return plan


def _flights(table: Table) -> list[Flights]:
    """What is in flight on every rank."""
    return [table.in_flight(rank, WAITS) for rank in range(len(table))]


def _shorter_counts(pp: int, stages: int, whole: int) -> Sequence[int]:
    """Counts of micro-batches to try, rising."""
    tried = {LEAST_MICRO_BATCHES, *(times * of for times in (1, 2, 3, 4, 5, 6) for of in (pp, stages))}
    return sorted(count for count in tried if LEAST_MICRO_BATCHES <= count < whole)


def _usual_table(plan: Plan, micro_batches: int) -> Table | None:
    degrees = plan.strategy.degrees
    try:
        return build_table(degrees.schedule, degrees.pp, degrees.chunks, micro_batches)
    except ValueError:
        return None


def _with_micro_batches(plan: Plan, count: int, table: Table) -> Plan:
    degrees = dataclasses.replace(plan.strategy.degrees, num_micro_batches=count)
    return dataclasses.replace(
        plan,
        strategy=dataclasses.replace(plan.strategy, degrees=degrees),
        workload=dataclasses.replace(plan.workload, batch=degrees.batch),
        schedule_table=print_table(table),
        timeline=(),
    )
