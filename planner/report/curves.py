"""Curves through measured points on logarithmic axes: time over tokens, bandwidth over bytes.

Ticks of logarithmic axes, and what stands beside them.

Strips: many values of each row as marks on one axis, with a dashed line at a limit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt

from planner.foundation.frozen import frozen
from planner.report.charts import NARROW_PX, Row, chart_of, layered, render, row_axis, variable

MOST_TICKS = 8
"""Of an axis of a small chart."""


STEPS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
"""Ticks of one decade, the most first."""


def log_ticks(low: float, high: float, most: int = MOST_TICKS) -> list[float]:
    """Round numbers of every decade within a range: as many a decade as `most` in all allow, or the tens."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    values: list[float] = []
    for steps in STEPS:
        every = [step * 10.0**decade for decade in range(first, last + 1) for step in steps]
        values = [value for value in every if low <= value <= high]
        if len(values) <= most:
            break
    return values


def power_ticks(low: float, high: float, most: int = MOST_TICKS) -> list[float]:
    """Powers of two within a range: each, or every second or fourth and so on where they are many."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    stride = 1
    while (last - first) // stride >= most:
        stride *= 2
    return [2.0**power for power in range(first, last + 1) if (power - first) % stride == 0]


def scaled_label(scales: tuple[tuple[float, str], ...]) -> str:
    """The Vega expression of a label in the largest unit that a value has one of; the least first.

    `scales` are factors and names: `((1, "B"), (1024, "KiB"))` makes 2048 `2 KiB`.
    """
    (least, name), *others = scales
    text = _one(least, name)
    for factor, larger in others:
        text = f"datum.value >= {factor * 0.999!r} ? {_one(factor, larger)} : {text}"
    return text


def _one(factor: float, name: str) -> str:
    return f"format(datum.value / {factor!r}, '~g') + ' {name}'"


SECONDS = scaled_label(((1e-6, "µs"), (1e-3, "ms"), (1.0, "s")))
BYTES = scaled_label(((1, "B"), (1024, "KiB"), (1024**2, "MiB"), (1024**3, "GiB")))
BYTES_PER_S = scaled_label(((1e3, "kB/s"), (1e6, "MB/s"), (1e9, "GB/s"), (1e12, "TB/s")))
FLOPS = scaled_label(((1e6, "MFLOP/s"), (1e9, "GFLOP/s"), (1e12, "TFLOP/s"), (1e15, "PFLOP/s")))
COUNT = scaled_label(((1, ""), (1024, "k"), (1024**2, "M"), (1024**3, "G")))
FLOPS_OF_WORK = scaled_label(((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")))


HEIGHT_PX = 220
ROOM = 1.15
"""Room beyond the outermost points of a logarithmic axis, as a factor."""

MOST_ACROSS = 5
"""Ticks side by side: their labels are wide."""
LABEL_ROOM_PX, LABEL_EXTENT_PX = 12, 62
SPAN = 1.6
"""Least ratio of the ends of an axis, so that points of one size do not fill it."""

Place = tuple[float, float]


@frozen
class Dot:
    """A measured point, and its words."""

    x: float
    y: float
    tip: str


@frozen
class Curve:
    """Measured points of one colour, the lines through them, and thin dashed ones beside them."""

    colour: str
    dots: tuple[Dot, ...]
    lines: tuple[tuple[Place, ...], ...] = ()
    dashes: tuple[tuple[Place, ...], ...] = ()


@frozen
class Axis:
    """A logarithmic axis: its title, the expression of its labels, and where it has ticks."""

    title: str
    labels: str
    ticks: Callable[[float, float, int], list[float]] = log_ticks


TOKENS = Axis(title="tokens", labels=COUNT, ticks=power_ticks)
TIME = Axis(title="time", labels=SECONDS)
SIZE = Axis(title="message", labels=BYTES, ticks=power_ticks)
BANDWIDTH = Axis(title="bus bandwidth", labels=BYTES_PER_S)
KEPT = (
    Axis(title="measured", labels=BYTES, ticks=power_ticks),
    Axis(title="by the formula", labels=BYTES, ticks=power_ticks),
)
PASS = Axis(title="measured", labels=SECONDS), Axis(title="by the formula", labels=SECONDS)
BY_OTHERS = Axis(title="measured", labels=SECONDS), Axis(title="by the others", labels=SECONDS)
HOST = Axis(title="device", labels=SECONDS), Axis(title="host", labels=SECONDS)
"""Both axes of a scatter."""

WORK = Axis(title="FLOPs", labels=FLOPS_OF_WORK)
VALUES = Axis(title="values", labels=COUNT, ticks=power_ticks)
BANDWIDTH_OF_COPY = Axis(title="bandwidth", labels=BYTES_PER_S)
RATE = Axis(title="rate", labels=FLOPS)


def draw_curves(
    curves: Sequence[Curve], x: Axis, y: Axis, label: str, floor: tuple[float, str] | None = None
) -> str:
    """The curves; with `floor` a dashed level across, and its words. Nothing without a point above 0."""
    curves = [positive(curve) for curve in curves]
    if not any(curve.dots for curve in curves):
        return ""
    places = [(dot.x, dot.y) for curve in curves for dot in curve.dots]
    places += [place for curve in curves for line in (*curve.lines, *curve.dashes) for place in line]
    if floor is not None:
        places.append((places[0][0], floor[0]))
    x_scaled, y_scaled = (
        _channels(axis, [place[i] for place in places], upright=i == 1) for i, axis in enumerate((x, y))
    )
    across, up = alt.X("x:Q", **x_scaled), alt.Y("y:Q", **y_scaled)
    layers: list[alt.Chart] = []
    for name, width, dash in (("dashes", 1.2, [3, 3]), ("lines", 2.0, [1, 0])):
        rows = _line_rows(curves, name)
        if rows:
            drawn = chart_of(rows).mark_line(strokeWidth=width, strokeDash=dash, aria=False, clip=True)
            layers.append(drawn.encode(x=across, y=up, detail="line:N", color=alt.Color("ink:N", scale=None)))
    layers.append(_dots(curves).encode(x=across, y=up))
    if floor is not None:
        rule = chart_of([{"y": floor[0], "tip": floor[1]}]).mark_rule(
            color=variable("host"), strokeDash=[6, 4], strokeWidth=1.8
        )
        layers.append(rule.encode(y=up, description="tip:N"))
    return render(layered(*layers).properties(width=NARROW_PX, height=HEIGHT_PX), label, "narrow")


def positive(curve: Curve) -> Curve:
    """A curve without the points that have no place on logarithmic axes."""
    return dataclasses.replace(curve, dots=tuple(dot for dot in curve.dots if dot.x > 0 and dot.y > 0))


def draw_scatter(curves: Sequence[Curve], x: Axis, y: Axis, label: str) -> str:
    """Points around the diagonal, both axes of one range: on the line both are equal."""
    ends = [end for curve in curves for dot in curve.dots for end in (dot.x, dot.y)]
    shared = (min(ends), max(ends))
    x_scaled, y_scaled = _channels(x, shared), _channels(y, shared, upright=True)
    across, up = alt.X("x:Q", **x_scaled), alt.Y("y:Q", **y_scaled)
    low, high = x_scaled["scale"].domain
    diagonal = chart_of([{"x": low, "y": low}, {"x": high, "y": high}]).mark_line(
        color=variable("axis"), strokeWidth=1.5, aria=False
    )
    layers = layered(diagonal.encode(x=across, y=up), _dots(curves).encode(x=across, y=up))
    return render(layers.properties(width=NARROW_PX, height=NARROW_PX * 0.8), label, "narrow")


def _dots(curves: Sequence[Curve]) -> alt.Chart:
    rows: list[Row] = [
        {"x": dot.x, "y": dot.y, "tip": dot.tip, "ink": variable(curve.colour)}
        for curve in curves
        for dot in curve.dots
    ]
    points = chart_of(rows).mark_point(
        filled=True, size=46, opacity=1, stroke=variable("card"), strokeWidth=0.8
    )
    drawn: alt.Chart = points.encode(color=alt.Color("ink:N", scale=None), description="tip:N")
    return drawn


def _line_rows(curves: Sequence[Curve], name: str) -> list[Row]:
    return [
        {"x": x, "y": y, "line": f"{number}-{index}", "ink": variable(curve.colour)}
        for number, curve in enumerate(curves)
        for index, line in enumerate(getattr(curve, name))
        for x, y in line
    ]


def _channels(axis: Axis, values: Sequence[float], *, upright: bool = False) -> dict[str, Any]:
    """Scale and axis for some values, with room around them."""
    low, high = min(values) / ROOM, max(values) * ROOM
    if high / low < SPAN:
        middle = (low * high) ** 0.5
        low, high = middle / SPAN, middle * SPAN
    return {
        "title": axis.title,
        "scale": alt.Scale(type="log", domain=[low, high], nice=False),
        # Readers' fonts are wider than the one that the drawing is measured with, so labels get room.
        "axis": alt.Axis(
            values=axis.ticks(low, high, MOST_TICKS if upright else MOST_ACROSS),
            labelExpr=axis.labels,
            labelOverlap="greedy",
            labelSeparation=LABEL_ROOM_PX,
            minExtent=LABEL_EXTENT_PX if upright else 0,
        ),
    }


STEP_PX = 28


@frozen
class Strip:
    """The values of one row: of each dot `x` alone counts."""

    row: str
    colour: str
    dots: tuple[Dot, ...]


def draw_strips(
    strips: Sequence[Strip], title: str, label: str, limit: float, *, logarithmic: bool = False
) -> str:
    """One tick a value, one row a strip."""
    rows = [strip.row for strip in strips]
    ends = [*(dot.x for strip in strips for dot in strip.dots), limit]
    if logarithmic:
        low, high = min(*ends, limit / SPAN) / ROOM, max(*ends, limit * SPAN) * ROOM
        scale = alt.Scale(type="log", domain=[low, high], nice=False)
        axis = alt.Axis(values=log_ticks(low, high), format="~g", labelOverlap=True)
    else:
        scale = alt.Scale(domain=[0, max(ends) * ROOM], nice=False)
        axis = alt.Axis(tickCount=5)
    x, y = alt.X("x:Q", title=title, scale=scale, axis=axis), row_axis(rows)
    values = [
        {"row": strip.row, "x": dot.x, "tip": dot.tip, "ink": variable(strip.colour)}
        for strip in strips
        for dot in strip.dots
    ]
    marks = chart_of(values).mark_tick(thickness=2.5, size=STEP_PX * 0.6, opacity=0.75)
    rule = chart_of([{"x": limit}]).mark_rule(
        color=variable("bad"), strokeDash=[5, 4], strokeWidth=1.5, aria=False
    )
    layers = layered(
        rule.encode(x=x), marks.encode(x=x, y=y, color=alt.Color("ink:N", scale=None), description="tip:N")
    )
    return render(layers.properties(width=NARROW_PX, height=alt.Step(STEP_PX)), label, "narrow")
