"""Collectives, spreads and constants of a profile, drawn."""

from __future__ import annotations

from collections.abc import Sequence

from planner.cost.constants import spec_of
from planner.foundation.units import format_bytes, format_seconds, format_si
from planner.hardware.measured_tables import wire_factor
from planner.profile.coverage import (
    Timed,
    bus_bytes_per_s,
    group_title,
    noisy,
    rate_text,
    sample_text,
    timed,
)
from planner.profile.profile import NOISY_SPREAD, CommSample, Op, Profile
from planner.report import curves
from planner.report.charts import mark_colour
from planner.report.curves import Curve, Dot, Strip, draw_curves, draw_strips
from planner.report.profile_layers import LINE_POINTS, Classes
from planner.report.profile_lines import ProfileLines
from planner.report.profile_tables import comm_table, scope_text
from planner.report.profile_words import op_title
from planner.report.sections import Figure, LegendItem
from planner.report.words import percent

OP_COLOURS = {op: mark_colour(number) for number, op in enumerate(Op)}


def comm_figures(profile: Profile, lines: ProfileLines) -> tuple[Figure, ...]:
    """Bus bandwidth over message size, a figure for each shape of groups, a colour an operation."""
    ordered = sorted(profile.comms, key=lambda s: (s.nodes, s.ranks, s.stride, s.groups))
    shapes = list(dict.fromkeys(group_title(sample) for sample in ordered))
    return tuple(
        _comm_figure(title, [s for s in profile.comms if group_title(s) == title], lines) for title in shapes
    )


def _comm_figure(title: str, samples: Sequence[CommSample], lines: ProfileLines) -> Figure:
    ops = [op for op in Op if any(sample.op is op for sample in samples)]
    drawn = [_comm_curve(op, [s for s in samples if s.op is op], lines) for op in ops]
    name = title[0].upper() + title[1:]
    return Figure(
        title=name,
        svg=draw_curves(drawn, curves.SIZE, curves.BANDWIDTH, f"{name}: bus bandwidth over message size"),
        legend=tuple(LegendItem(colour=OP_COLOURS[op], title=op_title(op), shape="dot") for op in ops),
        table=comm_table(samples),
    )


def _comm_curve(op: Op, samples: Sequence[CommSample], lines: ProfileLines) -> Curve:
    low, high = min(s.bytes for s in samples), max(s.bytes for s in samples)
    sizes = [low * (high / low) ** (step / (LINE_POINTS - 1)) for step in range(LINE_POINTS)]
    factor = wire_factor(op, samples[0].ranks)
    charged = [(size, lines.comm_s(samples[0], size)) for size in sizes]
    line = tuple((size, factor * size / seconds) for size, seconds in charged if seconds > 0)
    return Curve(
        colour=OP_COLOURS[op],
        dots=tuple(Dot(x=s.bytes, y=bus_bytes_per_s(s), tip=_comm_tip(s)) for s in samples),
        lines=(line,) if high > low else (),
    )


def _comm_tip(sample: CommSample) -> str:
    bandwidth = format_si(bus_bytes_per_s(sample), "B/s")
    return (
        f"{op_title(sample.op)} of {format_bytes(sample.bytes)}, {group_title(sample)}: "
        f"{format_seconds(sample.seconds)}, {bandwidth}, spread "
        f"{percent(sample.spread, 0)} of {sample.samples} bursts"
    )


def spread_figure(profile: Profile, classes: Classes) -> Figure | None:
    """How far repeated runs of each sample lie apart, a row a kind."""
    strips: dict[str, list[Dot]] = {}
    for layer in profile.layers:
        title = f"{classes[layer.kind, layer.shape_key].title}, {sample_text(layer)}"
        strips.setdefault(str(layer.kind), []).append(_spread_dot(layer, title))
    for comm in profile.comms:
        title = f"{op_title(comm.op)} of {format_bytes(comm.bytes)}, {group_title(comm)}"
        strips.setdefault(op_title(comm.op), []).append(_spread_dot(comm, title))
    for rate in profile.rates:
        row = str(rate.kind).replace("_", " ")
        strips.setdefault(row, []).append(_spread_dot(rate, rate_text(rate)))
    rows = [Strip(row=row, colour="mark_0", dots=tuple(dots)) for row, dots in strips.items()]
    if not rows:
        return None
    scattered, every = len(noisy(profile)), len(timed(profile))
    caption = (
        f"The middle half of a sample's runs lies within so much of its median. {scattered} of {every} "
        f"samples are beyond {percent(NOISY_SPREAD, 0)}, the dashed line: there the cost model trusts a line "
        "through all sizes more than each sample."
    )
    svg = draw_strips(rows, "spread (%)", f"Spread of samples: {caption}", limit=100 * NOISY_SPREAD)
    return Figure(title="Spread", svg=svg, caption=caption)


def _spread_dot(sample: Timed, title: str) -> Dot:
    tip = f"{title}: {percent(sample.spread, 0)} of {sample.samples} runs"
    return Dot(x=100 * sample.spread, y=0.0, tip=tip)


def constant_figure(profile: Profile) -> Figure | None:
    """Fitted constants over their usual values, a row a constant: how far the runs moved them."""
    rows = []
    for row in dict.fromkeys(constant.name for constant in profile.constants):
        usual = spec_of(row).prior
        moved = [
            Dot(
                x=c.value / usual,
                y=0.0,
                tip=f"{row} = {spec_of(row).text(c.value)} for {scope_text(c)}, usually "
                f"{spec_of(row).text(usual)}; {c.origin}",
            )
            for c in profile.constants
            if usual and c.name == row and c.value > 0 and c.origin.startswith("fitted")
        ]
        rows += [Strip(row=row, colour="mark_0", dots=tuple(moved))] if moved else []
    if not rows:
        return None
    caption = (
        "Each mark is a value for some software, device or network; at 1, the dashed line, runs left it as "
        "it was. Constants that are usually 0 are in the table alone."
    )
    svg = draw_strips(
        rows, "value over the usual", f"Fitted constants: {caption}", limit=1.0, logarithmic=True
    )
    return Figure(title="How far runs moved the constants", svg=svg, caption=caption)
