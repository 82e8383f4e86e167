"""A rehearsal as text for a terminal: each rank beside its prediction, then the refined one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.commands.shared.text import WIDTH, pairs, table

if TYPE_CHECKING:
    from planner.strategy.plan import Plan
    from planner.strategy.rehearsal import RankRehearsal, Rehearsal


def rehearsal_text(plan: Plan, basis: str) -> str:
    """What the rehearsal of a plan that carries it has shown."""
    done = plan.rehearsal
    assert done is not None
    degrees = plan.strategy.degrees
    head = f"{plan.model.name}, {degrees.label()}: {len(done.ranks)} of {degrees.world} ranks, each alone"
    facts = [
        ("on", f"{done.device} ({done.mode}), torch {done.versions['torch']}{', compiled' * done.compiled}"),
        ("micro-batches", f"{done.micro_batches} of {degrees.num_micro_batches} a step"),
        ("note", "; ".join(done.remarks) or None),
        ("not rehearsed", None if done.complete else "ranks of other kinds: their figures stay modelled"),
    ]
    sections = [head + "\n" + pairs(facts, WIDTH), _ranks(plan, done), _refined(plan, done, basis)]
    if done.others:
        sections.append(_others(done))
    return "\n\n".join(sections)


def rehearsed_line(plan: Plan) -> str | None:
    """The refined figures of a plan that carries a rehearsal, in one line."""
    from planner.foundation.units import format_bytes, format_seconds

    done = plan.rehearsal
    if done is None or done.refined is None:
        return None
    refined = done.refined
    return (
        f"{format_seconds(refined.step_time_s)} a step, {format_bytes(refined.peak_memory_bytes)}: "
        f"{refined.verdict}; {len(done.ranks)} of {plan.strategy.degrees.world} ranks on {done.device}, "
        f"{refined.measured_share:.0%} of a rank's time measured"
    )


def _ranks(plan: Plan, done: Rehearsal) -> str:
    header = (
        "rank",
        "stages",
        "stands for",
        "forward",
        "backward",
        "update",
        "idle",
        "allocated",
        "predicted",
        "",
    )
    return table(header, [_row(plan, rank) for rank in done.ranks], numbers=(0, 3, 4, 5, 6, 7, 8, 9))


def _row(plan: Plan, rank: RankRehearsal) -> tuple[str, ...]:
    from planner.foundation.units import format_bytes
    from planner.strategy.rehearsal import BACKWARD_KINDS, FORWARD_KINDS

    predicted = sum(plan.stage_estimates[stage].memory.allocated_bytes for stage in rank.stages)
    share = rank.idle_share
    allocated, error = "-", ""
    if rank.ran_out:
        allocated = "ran out"
    elif rank.allocated_bytes is not None:
        allocated = format_bytes(rank.allocated_bytes)
        error = f"{predicted / rank.allocated_bytes - 1:+.1%}"
    return (
        str(rank.rank),
        ",".join(map(str, rank.stages)),
        _span(rank.alike),
        _told(rank.passes_s(FORWARD_KINDS)),
        _told(rank.passes_s(BACKWARD_KINDS)),
        _told(rank.update_s),
        "-" if share is None else f"{share:.0%}",
        allocated,
        format_bytes(predicted),
        error,
    )


def _span(ranks: tuple[int, ...]) -> str:
    if len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"pp {ranks[0]}..{ranks[-1]}"
    return "pp " + ",".join(map(str, ranks))


def _told(seconds: float | None) -> str:
    """Seconds for people; `-` where none were taken."""
    from planner.foundation.units import format_seconds

    return format_seconds(seconds) if seconds else "-"


def _refined(plan: Plan, done: Rehearsal, basis: str) -> str:
    from planner.foundation.units import format_bytes, format_seconds

    refined, estimate = done.refined, plan.estimate
    if refined is None:
        return ""
    low, high = refined.step_time_interval_s
    limit = format_bytes(refined.memory_limit_bytes)
    rows = [
        (
            "step time",
            format_seconds(estimate.step_time_s),
            f"{format_seconds(refined.step_time_s)}  ({format_seconds(low)} to {format_seconds(high)})",
            f"{refined.step_time_s / estimate.step_time_s - 1:+.1%}" if estimate.step_time_s else "-",
        ),
        (
            "memory",
            format_bytes(estimate.peak_memory_bytes),
            f"{format_bytes(refined.peak_memory_bytes)} of {limit}",
            f"{refined.peak_memory_bytes / max(estimate.peak_memory_bytes, 1) - 1:+.1%}",
        ),
        ("verdict", str(estimate.verdict), str(refined.verdict), ""),
    ]
    share = f"{refined.measured_share:.0%} of a rank's time; messages are modelled"
    if not any(rank.passes for rank in done.ranks):
        share = "memory, on shapes alone; times stay as predicted"
    tail = [("measured", share), ("basis", basis), *_out_of_memory(plan, done)]
    return table(("", "predicted", "refined", "change"), rows, numbers=(3,)) + "\n\n" + pairs(tail, WIDTH)


def _out_of_memory(plan: Plan, done: Rehearsal) -> list[tuple[str, str]]:
    from planner.strategy.estimate import Verdict

    short = [rank for rank in done.ranks if rank.ran_out]
    if not short:
        return []
    where = "; ".join(f"rank {rank.rank} while {rank.ran_out}" for rank in short)
    if plan.estimate.verdict is Verdict.SAFE:
        where += ". The plan was judged SAFE: please report it (--runs FILE notes the case)"
    return [("ran out", where)]


def _others(done: Rehearsal) -> str:
    from planner.foundation.units import format_bytes, format_seconds

    rows = [
        (
            other.label,
            format_seconds(other.predicted_step_time_s),
            format_seconds(other.refined.step_time_s),
            format_bytes(other.refined.peak_memory_bytes),
            str(other.refined.verdict),
        )
        for other in done.others
    ]
    return table(("rehearsed too", "predicted", "refined", "memory", "verdict"), rows, numbers=(1, 2, 3))
