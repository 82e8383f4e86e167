"""The figures of the page: each a chart, its legend, a sentence and the same numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence

from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes, format_seconds
from planner.report import charts
from planner.report.charts import CAUSE_COLOURS, TENANT_COLOURS
from planner.report.run_record import RunRecord
from planner.report.timeline import Slice, SliceKind, idle_share
from planner.report.words import Table, percent, signed_percent
from planner.strategy.estimate import MEMORY_TENANTS, TIME_CAUSES, MemoryBreakdown
from planner.strategy.placement import device_names, is_mixed, rank_groups
from planner.strategy.plan import Plan

MAX_SLICES = 1600
"""Slices drawn in one timeline. More are thinner than a pixel, and the trace holds them all."""
MAX_TIMELINE_ROWS = 16
FAR_LIMIT = 3.0
"""A limit beyond this many times the largest bar is told in words: drawn, it would flatten the bars."""


@frozen
class LegendItem:
    """A colour of a chart and what it stands for."""

    colour: str
    title: str
    shape: str = "square"


@frozen
class Figure:
    """A chart with what belongs to it. `svg` is markup that this program drew."""

    title: str
    svg: str
    caption: str = ""
    legend: tuple[LegendItem, ...] = ()
    table: Table | None = None


MEASURED = LegendItem(colour="measured", title="measured", shape="diamond")


def timeline_figures(
    plan: Plan, predicted: tuple[Slice, ...], measured: tuple[Slice, ...]
) -> tuple[Figure, ...]:
    """The step as predicted and as measured, one row a pipeline rank, on the same scale."""
    degrees = plan.strategy.degrees
    rows = min(degrees.pp, MAX_TIMELINE_ROWS)
    both = [(t, s) for t, s in (("Predicted", predicted), ("Measured", measured)) if s]
    kept = [[s for s in slices if s.row < rows] for _, slices in both]
    cut_s = min((_cut(slices) for slices in kept), default=0.0)
    shown = [[s for s in slices if s.end_s <= cut_s] for slices in kept]
    end_s = max((s.end_s for slices in shown for s in slices), default=0.0)
    if end_s <= 0:
        return ()
    return tuple(
        _timeline_figure(plan, title, slices, drawn, end_s)
        for (title, slices), drawn in zip(both, shown, strict=True)
    )


def _cut(slices: Sequence[Slice]) -> float:
    """The time up to which MAX_SLICES have ended; infinity where there are no more than that."""
    if len(slices) <= MAX_SLICES:
        return float("inf")
    return sorted(s.end_s for s in slices)[MAX_SLICES - 1]


def _timeline_figure(
    plan: Plan, title: str, slices: tuple[Slice, ...], drawn: list[Slice], end_s: float
) -> Figure:
    degrees = plan.strategy.degrees
    rows = min(degrees.pp, MAX_TIMELINE_ROWS)
    titles = [_rank_title(plan, pp_rank) for pp_rank in range(rows)]
    span_s = max(s.end_s for s in slices)
    idle = idle_share(slices, degrees.pp)
    kinds = [kind for kind in SliceKind if any(s.kind is kind for s in drawn)]
    caption = f"{format_seconds(span_s)} from start to end; ranks idle {percent(idle, 0)} of it."
    if len(drawn) < len(slices):
        caption += f" Shown: {len(drawn):,} of {len(slices):,} slices; the trace holds all."
    if title == "Measured" and degrees.world > degrees.pp:
        caption += " The first rank of each pipeline rank is drawn."
    label = f"{title} timeline of one step: {caption}"
    return Figure(
        title=title,
        svg=charts.draw_timeline(drawn, titles, end_s, label),
        caption=caption,
        legend=tuple(LegendItem(colour=kind, title=kind.words) for kind in kinds),
        table=_timeline_table(slices, titles),
    )


def _timeline_table(slices: tuple[Slice, ...], titles: list[str]) -> Table:
    rows = []
    span_s = max(s.end_s for s in slices)
    for row, title in enumerate(titles):
        own = [s for s in slices if s.row == row]
        forward_s = sum(s.duration_s for s in own if s.kind is SliceKind.FORWARD)
        backward_s = sum(s.duration_s for s in own if s.kind is SliceKind.BACKWARD)
        other_s = sum(s.duration_s for s in own) - forward_s - backward_s
        idle_s = span_s - sum(s.duration_s for s in own)
        cells = (format_seconds(max(value, 0.0)) for value in (forward_s, backward_s, other_s, idle_s))
        rows.append((title, *cells))
    return Table(header=("rank", "forward", "backward", "other", "idle"), rows=tuple(rows))


def _rank_title(plan: Plan, pp_rank: int) -> str:
    degrees = plan.strategy.degrees
    if degrees.pp == 1:
        return "all ranks"
    kind = f" ({_devices_by_pp_rank(plan)[pp_rank]})" if is_mixed(plan.cluster) else ""
    return (f"stage {pp_rank}" if degrees.chunks == 1 else f"pipeline rank {pp_rank}") + kind


def memory_figure(plan: Plan, run: RunRecord | None) -> Figure:
    """Memory of each pipeline rank's devices by tenant, against the limit, the measured peaks beside."""
    memories = _memory_by_pp_rank(plan)
    titles = [_rank_title(plan, index) for index in range(len(memories))]
    peaks = _measured_peaks(plan, run)
    limit, limits = plan.estimate.memory_limit_bytes, _limits_by_pp_rank(plan)
    largest = max([*(m.total_bytes for m in memories), *(max(p, default=0) for p in peaks)])
    near, several = 0 < limit <= FAR_LIMIT * largest, len(set(limits)) > 1
    divisor, unit = charts.memory_unit(max(limits) if near else largest)
    caption = _limits_words(plan, limits) if several else _limit_words(limit, largest, near)
    stacks = [_stack(title, memory, divisor) for title, memory in zip(titles, memories, strict=True)]
    svg = charts.draw_bars(
        [bar for stack in stacks for bar in stack],
        titles,
        unit,
        f"Predicted memory of a device by tenant and stage. {caption}",
        marks=[
            charts.Mark(row=t, value=max(p) / divisor, tip=f"{t}: measured peak {format_bytes(max(p))}")
            for t, p in zip(titles, peaks, strict=True)
            if p
        ],
        limit=limit / divisor if near and not several else None,
        limit_tip=f"limit: {format_bytes(limit)}",
        own_limits=[
            charts.Mark(row=title, value=own / divisor, tip=f"{title}: limit {format_bytes(own)}")
            for title, own in zip(titles, limits, strict=True)
            if several
        ],
    )
    used = [tenant for tenant in MEMORY_TENANTS if any(getattr(m, tenant) for m in memories)]
    legend = [LegendItem(colour=TENANT_COLOURS[t].name, title=TENANT_COLOURS[t].title) for t in used]
    if any(peaks):
        legend.append(MEASURED)
    table = _memory_table(plan, titles, memories, peaks)
    return Figure(title="Memory of a device", svg=svg, caption=caption, legend=tuple(legend), table=table)


def _limit_words(limit: int, largest: int, near: bool) -> str:
    if limit <= 0:
        return "No limit is given."
    if near:
        return f"Limit {format_bytes(limit)} a device (dashed line)."
    return f"Limit {format_bytes(limit)} a device, far beyond: the fullest takes {percent(largest / limit)}."


def _limits_words(plan: Plan, limits: list[int]) -> str:
    placed = zip(_devices_by_pp_rank(plan), limits, strict=True)
    each = [f"{format_bytes(limit)} on {device}" for device, limit in dict.fromkeys(placed)]
    return f"Limit of a device (dash beside each bar): {', '.join(each)}."


def _limits_by_pp_rank(plan: Plan) -> list[int]:
    """The memory limit of each pipeline rank's devices."""
    limits = [plan.estimate.memory_limit_bytes] * plan.strategy.degrees.pp
    for index, stage in enumerate(plan.stage_estimates):
        if stage.memory_limit_bytes is not None:
            limits[plan.strategy.degrees.pp_rank_of_stage(index)] = stage.memory_limit_bytes
    return limits


def _devices_by_pp_rank(plan: Plan) -> list[str]:
    return [device_names(plan.cluster, groups) for groups in rank_groups(plan.cluster, plan.strategy.degrees)]


def _memory_by_pp_rank(plan: Plan) -> list[MemoryBreakdown]:
    """A rank's peak is the sum over the stages that it holds."""
    degrees = plan.strategy.degrees
    totals = [MemoryBreakdown() for _ in range(degrees.pp)]
    for index, estimate in enumerate(plan.stage_estimates):
        pp_rank = degrees.pp_rank_of_stage(index)
        totals[pp_rank] = totals[pp_rank] + estimate.memory
    return totals


def _measured_peaks(plan: Plan, run: RunRecord | None) -> list[tuple[int, ...]]:
    degrees = plan.strategy.degrees
    by_rank = run.peak_memory_by_rank if run else ()
    return [
        tuple(by_rank[rank] for rank in degrees.ranks_of_pp_rank(pp_rank)) if by_rank else ()
        for pp_rank in range(degrees.pp)
    ]


def _stack(title: str, memory: MemoryBreakdown, divisor: float) -> list[charts.Bar]:
    bars, start = [], 0
    for tenant in MEMORY_TENANTS:
        size = getattr(memory, tenant)
        colour = TENANT_COLOURS[tenant]
        if size:
            words = charts.describe_bytes(colour.title, size, memory.total_bytes)
            bars.append(
                charts.Bar(
                    row=title, colour=colour.name, start=start / divisor, end=(start + size) / divisor,
                    tip=f"{title}: {words}",
                )
            )  # fmt: skip
        start += size
    return bars


def _memory_table(
    plan: Plan, titles: list[str], memories: list[MemoryBreakdown], peaks: list[tuple[int, ...]]
) -> Table:
    header = ["", *(TENANT_COLOURS[t].title for t in MEMORY_TENANTS), "predicted peak"]
    rows = [
        [title, *(format_bytes(getattr(m, t)) for t in MEMORY_TENANTS), format_bytes(m.total_bytes)]
        for title, m in zip(titles, memories, strict=True)
    ]
    if any(peaks):
        header += ["measured, by rank", "error"]
        for pp_rank, (row, memory, measured) in enumerate(zip(rows, memories, peaks, strict=True)):
            ranks = plan.strategy.degrees.ranks_of_pp_rank(pp_rank)
            each = [f"{r}: {format_bytes(p)}" for r, p in zip(ranks, measured, strict=True)]
            row.append(", ".join(each[:8]) + (f", … {len(each)} ranks" if len(each) > 8 else ""))
            row.append(signed_percent(memory.total_bytes / max(measured) - 1) if max(measured) else "")
    return Table(header=tuple(header), rows=tuple(tuple(row) for row in rows))


def time_figure(plan: Plan, run: RunRecord | None) -> Figure:
    """Where the step time goes: each cause starts where the one before ended."""
    breakdown = plan.estimate.breakdown
    total_s = breakdown.total_s
    measured_s = run.step_time_s if run else None
    factor, unit = charts.time_unit(max(total_s, measured_s or 0.0))
    bars, rows, start_s = [], [], 0.0
    for cause in TIME_CAUSES:
        seconds, colour = getattr(breakdown, cause), CAUSE_COLOURS[cause]
        if seconds <= 0:
            continue
        share = percent(seconds / total_s)
        rows.append((colour.title, format_seconds(seconds), share))
        bars.append(
            charts.Bar(
                row=colour.title, colour=colour.name, start=start_s * factor,
                end=(start_s + seconds) * factor, tip=f"{colour.title}: {format_seconds(seconds)} ({share})",
            )
        )  # fmt: skip
        start_s += seconds
    whole = charts.Bar(
        row="whole step", colour="ink-soft", start=0.0, end=total_s * factor,
        tip=f"whole step: {format_seconds(total_s)}",
    )  # fmt: skip
    marks = []
    if measured_s is not None:
        tip = f"measured step: {format_seconds(measured_s)}"
        marks.append(charts.Mark(row="whole step", value=measured_s * factor, tip=tip))
    label = "Predicted step time by cause: " + ", ".join(f"{name} {share}" for name, _, share in rows)
    table = Table(
        header=("cause", "time", "share"),
        rows=(*rows, ("whole step", format_seconds(total_s), "100.0 %")),
        strong_rows=(len(rows),),
    )
    return Figure(
        title="Step time by cause",
        svg=charts.draw_bars([*bars, whole], [*(row[0] for row in rows), whole.row], unit, label, marks),
        caption=_cause_caption(rows),
        legend=(MEASURED,) if marks else (),
        table=table,
    )


def _cause_caption(rows: list[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    by_share = sorted(rows, key=lambda row: -float(row[2].split()[0]))[:3]
    most = ", ".join(f"{name} ({share})" for name, _, share in by_share)
    return f"On the busiest pipeline rank. Most of it: {most}."


def training_figures(plan: Plan, run: RunRecord) -> tuple[Figure, ...]:
    """The loss curve and the step times of a run."""
    figures = []
    losses = [(step.step, step.loss) for step in run.steps if step.loss is not None]
    if losses:
        first, last = losses[0][1], losses[-1][1]
        caption = f"From {first:.4g} to {last:.4g} in {losses[-1][0] - losses[0][0] + 1} steps."
        svg = charts.draw_loss(charts.thin_out(losses), f"Loss by step. {caption}")
        figures.append(Figure(title="Loss", svg=svg, caption=caption))
    if run.steps:
        figures.append(_step_time_figure(plan, run))
    return tuple(figures)


def _step_time_figure(plan: Plan, run: RunRecord) -> Figure:
    estimate, typical_s = plan.estimate, run.step_time_s
    top_s = 1.6 * max(typical_s or 0.0, estimate.step_time_interval_s[1])
    top_s = top_s or max(step.step_time_s for step in run.steps)
    above = [step.step for step in run.steps if step.step_time_s > top_s]
    typical = f"Typical step: {format_seconds(typical_s)}." if typical_s else "No step was timed."
    caption = f"{typical} Dashed: predicted, with its interval."
    if above:
        count = f"{len(above)} slower step{'s are' if len(above) > 1 else ' is'}"
        caption += f" {count} cut off at the top; the first steps warm up and record."
    svg = charts.draw_step_times(
        charts.thin_out([(step.step, step.step_time_s) for step in run.steps]),
        estimate.step_time_s,
        estimate.step_time_interval_s,
        top_s,
        f"Step time by step. {caption}",
    )
    legend = (
        LegendItem(colour="measured", title="measured", shape="dot"),
        LegendItem(colour="predicted", title="predicted", shape="dash"),
    )
    return Figure(title="Step time", svg=svg, caption=caption, legend=legend)


def alternatives_table(plan: Plan) -> Table:
    """The chosen plan and its runners-up, with how much slower each is and why it lost."""
    own = plan.estimate
    rows = [
        (
            "★ " + plan.strategy.degrees.label(),
            format_seconds(own.step_time_s),
            "chosen",
            format_bytes(own.peak_memory_bytes),
            str(own.verdict),
            "",
        )
    ]
    rows += [
        (
            other.strategy.degrees.label(),
            format_seconds(other.step_time_s),
            signed_percent(other.step_time_s / own.step_time_s - 1) if own.step_time_s > 0 else "",
            format_bytes(other.peak_memory_bytes),
            str(other.verdict),
            other.reason,
        )
        for other in plan.alternatives
    ]
    header = ("strategy", "step time", "against chosen", "peak memory", "verdict", "why it lost")
    return Table(header=header, rows=tuple(rows), numbers=(1, 4), strong_rows=(0,))
