"""What does not hold of the rehearsal that a plan carries: ranks not its own, figures that do not add up."""

from __future__ import annotations

import math
from collections.abc import Iterator

from planner.advice.rank_kinds import alike_ranks
from planner.strategy.estimate import Verdict
from planner.strategy.plan import Plan
from planner.strategy.rehearsal import RankRehearsal, Refined, Rehearsal

RELATIVE_TOLERANCE = 1e-6


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
    if not math.isclose(refined.breakdown.total_s, refined.step_time_s, rel_tol=RELATIVE_TOLERANCE):
        yield f"refined causes add up to {refined.breakdown.total_s} s, not {refined.step_time_s} s"
    intervals = (
        ("step time", refined.step_time_s, refined.step_time_interval_s),
        ("peak memory", refined.peak_memory_bytes, refined.peak_memory_interval_bytes),
    )
    for name, figure, (low, high) in intervals:
        if not low <= figure <= high:
            yield f"the refined {name} {figure} lies outside {low} to {high}"
    if not 0 <= refined.measured_share <= 1 + RELATIVE_TOLERANCE:
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
