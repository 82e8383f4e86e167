"""refine(): a plan's estimate with the measured times and bytes of rehearsed ranks in place of modelled ones.

The schedule is replayed with them. A pass of a stage takes

    measured + hops + messages

where `measured` is the rank alone (compute, recomputation, kernel launches, the copies and hooks of
sharding), `hops` what the schedule adds to a pass, and `messages` the model's time of what it sends to other
ranks. Gathering weights and reducing gradients once a step take the model's messages and the measured rest.
Ranks that were not rehearsed keep the model's figures.

Memory of a rank is what its allocator reserved, or what it allocated with the model's slack, and the model's
communicators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from planner.cost.evaluate import TIME_ERROR, CostModel, memory_of_ranks, time_breakdown
from planner.cost.layer import Pass
from planner.cost.stage.layer_samples import usual_reference_s
from planner.cost.stage.peak_memory import REHEARSED_MEMORY_ERROR, ErrorBand, RankMemory, verdict
from planner.cost.stage.stage import LayoutModel, StageCost
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import TimeBreakdown, Verdict
from planner.strategy.plan import Plan
from planner.strategy.rehearsal import RankRehearsal, Refined, RehearsalMode
from planner.strategy.schedule.schedules import ActionKind
from planner.strategy.strategy import Zero

OWN = ("compute_s", "recompute_s", "host_s", "optimizer_s")
"""Causes that are a rank's own time."""


def refine(
    problem: PlanningProblem, plan: Plan, ranks: Sequence[RankRehearsal], mode: RehearsalMode
) -> Refined:
    """The refined prediction of a plan that answers `problem`, from its rehearsed ranks."""
    model, strategy = CostModel(problem), plan.strategy
    shape, shapes = model.layout(strategy.degrees), model.rank_layouts(strategy.degrees)
    modelled = model.stage_costs(shape, strategy)
    costs, table = list(modelled), plan.table
    timed = [_at_usual_speed(rank, problem) for rank in ranks if rank.passes]
    for rank in timed:
        _put(rank, shape, costs)
    replayed = model.replay(shape, table, tuple(costs))
    hops_s = model.hops_s(shape, tuple(costs), replayed)
    breakdown = time_breakdown(replayed, table, tuple(costs), hops_s)
    measured_share = _measured_share(timed, breakdown, strategy.degrees.pp)
    step_s = replayed.step_time_s
    error = _time_error(plan, measured_share)
    peak, limit = _fullest(ranks, memory_of_ranks(shapes, table, modelled), shapes)
    error_of_memory = REHEARSED_MEMORY_ERROR[mode]
    band = ErrorBand(lower=error_of_memory, upper=error_of_memory)
    fits = Verdict.NO if any(rank.ran_out for rank in ranks) else verdict(peak, limit, band)
    return Refined(
        step_time_s=step_s,
        step_time_interval_s=(step_s * (1 - error), step_s * (1 + error)),
        breakdown=breakdown,
        measured_share=measured_share,
        peak_memory_bytes=peak,
        peak_memory_interval_bytes=(round(peak * (1 - band.lower)), round(peak * (1 + band.upper))),
        memory_limit_bytes=limit,
        verdict=fits,
    )


def _at_usual_speed(rank: RankRehearsal, problem: PlanningProblem) -> RankRehearsal:
    """The rank's times as if the machine ran as fast as when its profile was taken.

    All else in the refined figures is of that profile, and plans are compared that ran at other times.
    """
    usual_s = usual_reference_s(problem.profile.layers) if problem.profile else None
    if usual_s is None or not rank.reference_s:
        return rank
    factor = usual_s / rank.reference_s
    names = ("first_extra_s", "last_extra_s", "update_s", "step_s")
    own = {name: value * factor for name in names if (value := getattr(rank, name)) is not None}
    passes = tuple(dataclasses.replace(each, seconds=each.seconds * factor) for each in rank.passes)
    return dataclasses.replace(rank, passes=passes, **own)


def _put(rank: RankRehearsal, shape: LayoutModel, costs: list[StageCost]) -> None:
    """Puts a rank's measured times into the costs of its stages, and of those that stand for the same."""
    own = {(each.stage, each.kind): each.seconds for each in rank.passes}
    for other in rank.alike:
        held = shape.degrees.stages_of_pp_rank(other)
        for place, (stage, like) in enumerate(zip(held, rank.stages, strict=True)):
            seconds = {kind: s for (of, kind), s in own.items() if of == like}
            costs[stage] = _measured(costs[stage], seconds, shape)
            costs[stage] = _with_once(costs[stage], rank, shape, first=place == 0)


def _measured(cost: StageCost, seconds: Mapping[str, float], shape: LayoutModel) -> StageCost:
    """A stage whose passes take the measured seconds and the modelled messages."""
    added_s = shape.action.work_s
    forward = _scaled(cost.forward, seconds[ActionKind.FORWARD] + added_s)
    if ActionKind.INPUT_GRAD not in seconds:
        backward = _scaled(cost.backward, seconds[ActionKind.BACKWARD] + added_s)
        return dataclasses.replace(cost, forward=forward, backward=backward)
    inputs_s, weights_s = seconds[ActionKind.INPUT_GRAD], seconds.get(ActionKind.WEIGHT_GRAD, 0.0)
    again_s = min(cost.backward.recompute_s, inputs_s)
    # The split takes `weights_s` out of compute and half of the host's time for each part: there is none.
    backward = dataclasses.replace(
        cost.backward, compute_s=inputs_s + weights_s + added_s - again_s, recompute_s=again_s, host_s=0.0
    )
    return dataclasses.replace(
        cost, forward=forward, backward=backward, weights_s=weights_s, deferred_s=weights_s
    )


def _scaled(passing: Pass, work_s: float) -> Pass:
    """The pass with another work time, by cause as before; its messages stay."""
    factor = work_s / passing.work_s if passing.work_s > 0 else 0.0
    own = {name: getattr(passing, name) * factor for name in ("compute_s", "recompute_s", "host_s")}
    return dataclasses.replace(passing, **own) if factor else dataclasses.replace(passing, compute_s=work_s)


def _with_once(cost: StageCost, rank: RankRehearsal, shape: LayoutModel, *, first: bool) -> StageCost:
    """What the rank does once a step, charged to its first stage; messages of that as they are modelled."""
    zero = shape.degrees.zero
    once: dict[str, Any] = {}
    if rank.first_extra_s is not None and zero in (Zero.OPTIMIZER, Zero.GRADIENTS):
        sent_s = max(cost.unshard_s - _copies_s(cost, shape, gathers=True), 0.0)
        once["unshard_s"] = sent_s + rank.first_extra_s * first
    if rank.last_extra_s is not None and zero in (Zero.NONE, Zero.OPTIMIZER):
        sent_s = max(cost.reduce_s - _copies_s(cost, shape, gathers=False), 0.0)
        once["reduce_s"] = sent_s + rank.last_extra_s * first
    if rank.update_s is not None:
        once["optimizer_s"] = rank.update_s * first
    return dataclasses.replace(cost, **once)


def _copies_s(cost: StageCost, shape: LayoutModel, *, gathers: bool) -> float:
    """The work in the modelled gathering or reducing of a stage once a step: launches and copies of units."""
    messages = shape.updates if gathers else shape.reduces
    blocks = sum(messages[unit].work_s for unit in shape.block_units.values()) / len(shape.block_units)
    return shape.slow * blocks * cost.blocks


def _measured_share(timed: Sequence[RankRehearsal], breakdown: TimeBreakdown, pp: int) -> float:
    """The part of a rank's time, without waiting, that was measured: its own work, not its messages."""
    covered = {other for rank in timed for other in rank.alike}
    own_s = sum(getattr(breakdown, name) for name in OWN)
    busy_s = own_s + sum(getattr(breakdown, f"{axis}_comm_s") for axis in ("tp", "cp", "ep", "dp", "pp"))
    return len(covered) / pp * own_s / busy_s if busy_s > 0 else 0.0


def _time_error(plan: Plan, measured_share: float) -> float:
    """Half width of the interval: the plan's own for what is modelled, a measurement's for the rest."""
    low_s, high_s = plan.estimate.step_time_interval_s
    modelled = (high_s - low_s) / 2 / plan.estimate.step_time_s if plan.estimate.step_time_s else 0.0
    known = min(TIME_ERROR["measured"], modelled)
    return measured_share * known + (1 - measured_share) * modelled


def _fullest(
    ranks: Sequence[RankRehearsal], memory: Sequence[RankMemory], shapes: Sequence[LayoutModel]
) -> tuple[int, int]:
    """The peak and the limit of the rehearsed rank that is nearest to its limit."""
    each = [
        (_peak_bytes(rank, memory[other], shapes[other]), shapes[other].problem.memory_limit_bytes)
        for rank in ranks
        for other in rank.alike
    ]
    return max(each, key=lambda pair: pair[0] / max(pair[1], 1))


def _peak_bytes(rank: RankRehearsal, memory: RankMemory, shape: LayoutModel) -> int:
    """What a rank takes of its limit; the model's figure where it ran out of memory."""
    if rank.allocated_bytes is None:
        return memory.peak_bytes
    if rank.reserved_bytes is not None:
        return rank.reserved_bytes + shape.runtime_bytes
    parts = memory.parts.values()
    slack = sum(part.allocator_bytes for part in parts)
    tensors = sum(part.allocated_bytes for part in parts)
    return round(rank.allocated_bytes * (1 + slack / max(tensors, 1))) + shape.runtime_bytes
