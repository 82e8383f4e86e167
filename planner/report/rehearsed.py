"""The rehearsal of a plan: single ranks beside their prediction, and the plan's refined figures."""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes, format_seconds
from planner.report import charts
from planner.report.sections import Figure, LegendItem
from planner.report.words import Fact, Table, percent, signed_percent
from planner.strategy.plan import Plan
from planner.strategy.rehearsal import (
    BACKWARD_KINDS,
    FORWARD_KINDS,
    RankRehearsal,
    Refined,
    Rehearsal,
    RehearsalMode,
)

PREDICTED = LegendItem(colour="predicted", title="predicted", shape="dot")
REHEARSED = LegendItem(colour="measured", title="rehearsed", shape="diamond")


@frozen
class RehearsedSection:
    """What the page says of a rehearsal."""

    sentence: str
    facts: tuple[Fact, ...]
    refined: Table | None
    figures: tuple[Figure, ...]
    ranks: Table
    others: Table | None
    remarks: tuple[str, ...]


def rehearsed_section(plan: Plan) -> RehearsedSection | None:
    """The section of a plan that carries a rehearsal, else None."""
    done = plan.rehearsal
    if done is None:
        return None
    figures = (_memory_figure(plan, done), _times_figure(plan, done))
    return RehearsedSection(
        sentence=_sentence(plan, done),
        facts=_facts(plan, done),
        refined=None if done.refined is None else _refined_table(plan, done.refined),
        figures=tuple(figure for figure in figures if figure is not None),
        ranks=_ranks_table(plan, done),
        others=_others_table(done) if done.others else None,
        remarks=done.remarks,
    )


def _sentence(plan: Plan, done: Rehearsal) -> str:
    """How many ranks ran where, and what that says of the plan."""
    count, world = len(done.ranks), plan.strategy.degrees.world
    ran = "was executed" if count == 1 else "were executed, each alone,"
    how = "" if done.mode is RehearsalMode.DEVICE else f" ({done.mode})"
    text = f"{count} of {world} ranks {ran} on {done.device}{how}."
    short = [rank.rank for rank in done.ranks if rank.ran_out]
    if short:
        text += f" Memory ran out on rank {', '.join(map(str, short))}."
    if done.refined is not None:
        change = (
            done.refined.step_time_s / plan.estimate.step_time_s - 1 if plan.estimate.step_time_s else 0.0
        )
        text += (
            f" With what was measured, a step takes {format_seconds(done.refined.step_time_s)} "
            f"({signed_percent(change)}) and the plan is {done.refined.verdict}."
        )
    if not done.complete:
        text += " Ranks of other kinds keep the model's figures."
    return text


def _facts(plan: Plan, done: Rehearsal) -> tuple[Fact, ...]:
    found = [
        ("device", done.device),
        ("mode", f"{done.mode}{', compiled' if done.compiled else ''}"),
        ("software", ", ".join(f"{name} {version}" for name, version in done.versions.items())),
        ("taken", done.created),
        ("micro-batches", f"{done.micro_batches} of {plan.strategy.degrees.num_micro_batches} a step"),
    ]
    if done.refined is not None:
        found.append(("measured", f"{percent(done.refined.measured_share, 0)} of a rank's time"))
    return tuple(Fact(name=name, value=value) for name, value in found if value)


def _refined_table(plan: Plan, refined: Refined) -> Table:
    """Step time, memory and verdict as predicted and as refined."""
    estimate = plan.estimate
    spans = (estimate.step_time_interval_s, refined.step_time_interval_s)
    times = [
        f"{format_seconds(value)} ({format_seconds(low)} to {format_seconds(high)})"
        for value, (low, high) in zip((estimate.step_time_s, refined.step_time_s), spans, strict=True)
    ]
    peaks = (estimate.peak_memory_bytes, refined.peak_memory_bytes)
    return Table(
        header=("", "predicted", "refined", "change"),
        rows=(
            ("step time", *times, _change(estimate.step_time_s, refined.step_time_s)),
            ("memory of the fullest device", *map(format_bytes, peaks), _change(*peaks)),
            ("verdict", str(estimate.verdict), str(refined.verdict), ""),
        ),
    )


def _change(before: float, after: float) -> str:
    return signed_percent(after / before - 1) if before else ""


def _title(rank: RankRehearsal) -> str:
    stages = ", ".join(map(str, rank.stages))
    return f"rank {rank.rank} (stage{'s' if len(rank.stages) > 1 else ''} {stages})"


def _predicted_bytes(plan: Plan, rank: RankRehearsal) -> int:
    return sum(plan.stage_estimates[stage].memory.allocated_bytes for stage in rank.stages)


def _memory_figure(plan: Plan, done: Rehearsal) -> Figure | None:
    """Peak of live tensors of every rank, predicted and rehearsed."""
    told = [(rank, rank.allocated_bytes) for rank in done.ranks if rank.allocated_bytes is not None]
    if not told:
        return None
    divisor, unit = charts.memory_unit(max(size for _, size in told))
    pairs = [
        charts.Pair(
            row=_title(rank), predicted=_predicted_bytes(plan, rank) / divisor, measured=size / divisor
        )
        for rank, size in told
    ]
    off = [_predicted_bytes(plan, rank) / size - 1 for rank, size in told if size]
    caption = f"Peak of live tensors. The prediction is {_range(off)} off."
    svg = charts.draw_pairs(pairs, unit, f"Memory of rehearsed ranks. {caption}")
    return Figure(title="Memory of a rank", svg=svg, caption=caption, legend=(PREDICTED, REHEARSED))


def _range(errors: list[float]) -> str:
    low, high = min(errors, default=0.0), max(errors, default=0.0)
    return signed_percent(low) if low == high else f"{signed_percent(low)} to {signed_percent(high)}"


def _times_figure(plan: Plan, done: Rehearsal) -> Figure | None:
    """Forward and backward of a micro-batch through each rehearsed stage."""
    rows = [
        (f"stage {stage}, {name}", predicted_s, measured_s)
        for rank in done.ranks
        for stage in rank.stages
        for name, kinds, predicted_s in (
            ("forward", FORWARD_KINDS, plan.stage_estimates[stage].forward_s),
            ("backward", BACKWARD_KINDS, plan.stage_estimates[stage].backward_s),
        )
        if (measured_s := rank.passes_s(kinds, stage)) > 0
    ]
    if not rows:
        return None
    factor, unit = charts.time_unit(max(measured_s for _, _, measured_s in rows))
    pairs = [
        charts.Pair(row=row, predicted=predicted_s * factor, measured=measured_s * factor)
        for row, predicted_s, measured_s in {row[0]: row for row in rows}.values()
    ]
    caption = "One micro-batch. Predicted times have messages to other ranks in them, rehearsed ones none."
    svg = charts.draw_pairs(pairs, unit, f"Passes of rehearsed stages. {caption}")
    return Figure(title="Time of a pass", svg=svg, caption=caption, legend=(PREDICTED, REHEARSED))


def _ranks_table(plan: Plan, done: Rehearsal) -> Table:
    """Each rank beside its prediction; what was measured of none has no column."""
    header = (
        "rank", "stages", "stands for", "forward", "backward", "update", "idle", "allocated", "predicted",
        "error", "reserved",
    )  # fmt: skip
    rows = [_rank_row(plan, rank) for rank in done.ranks]
    known = [place for place in range(len(header)) if any(row[place] for row in rows)]
    return Table(
        header=tuple(header[place] for place in known),
        rows=tuple(tuple(row[place] for place in known) for row in rows),
        numbers=(3, len(known)),
    )


def _rank_row(plan: Plan, rank: RankRehearsal) -> tuple[str, ...]:
    predicted, allocated = _predicted_bytes(plan, rank), rank.allocated_bytes
    passes = [rank.passes_s(kinds) for kinds in (FORWARD_KINDS, BACKWARD_KINDS)]
    return (
        str(rank.rank),
        ", ".join(map(str, rank.stages)),
        f"pipeline ranks {', '.join(map(str, rank.alike))}",
        *(format_seconds(seconds) if seconds else "" for seconds in passes),
        "" if rank.update_s is None else format_seconds(rank.update_s),
        "" if rank.idle_share is None else percent(rank.idle_share, 0),
        "ran out" if rank.ran_out else "" if allocated is None else format_bytes(allocated),
        format_bytes(predicted),
        signed_percent(predicted / allocated - 1) if allocated else "",
        "" if rank.reserved_bytes is None else format_bytes(rank.reserved_bytes),
    )


def _others_table(done: Rehearsal) -> Table:
    rows = tuple(
        (
            other.label,
            format_seconds(other.predicted_step_time_s),
            format_seconds(other.refined.step_time_s),
            format_bytes(other.refined.peak_memory_bytes),
            str(other.refined.verdict),
        )
        for other in done.others
    )
    return Table(
        header=("rehearsed too", "predicted", "refined", "memory", "verdict"), rows=rows, numbers=(1, 4)
    )
