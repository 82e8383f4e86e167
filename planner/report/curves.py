"""Curves through measured points on logarithmic axes: time over tokens, bandwidth over bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt

from planner.foundation.frozen import frozen
from planner.report import ticks
from planner.report.charts import NARROW_PX, Row, chart_of, layered, render
from planner.report.palette import variable

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
    ticks: Callable[[float, float, int], list[float]] = ticks.log_ticks


TOKENS = Axis(title="tokens", labels=ticks.COUNT, ticks=ticks.power_ticks)
TIME = Axis(title="time", labels=ticks.SECONDS)
SIZE = Axis(title="message", labels=ticks.BYTES, ticks=ticks.power_ticks)
BANDWIDTH = Axis(title="bus bandwidth", labels=ticks.BYTES_PER_S)
KEPT = (
    Axis(title="measured", labels=ticks.BYTES, ticks=ticks.power_ticks),
    Axis(title="by the formula", labels=ticks.BYTES, ticks=ticks.power_ticks),
)
PASS = Axis(title="measured", labels=ticks.SECONDS), Axis(title="by the formula", labels=ticks.SECONDS)
BY_OTHERS = Axis(title="measured", labels=ticks.SECONDS), Axis(title="by the others", labels=ticks.SECONDS)
HOST = Axis(title="device", labels=ticks.SECONDS), Axis(title="host", labels=ticks.SECONDS)
"""Both axes of a scatter."""

WORK = Axis(title="FLOPs", labels=ticks.FLOPS_OF_WORK)
VALUES = Axis(title="values", labels=ticks.COUNT, ticks=ticks.power_ticks)
BANDWIDTH_OF_COPY = Axis(title="bandwidth", labels=ticks.BYTES_PER_S)
RATE = Axis(title="rate", labels=ticks.FLOPS)


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
            values=axis.ticks(low, high, ticks.MOST_TICKS if upright else MOST_ACROSS),
            labelExpr=axis.labels,
            labelOverlap="greedy",
            labelSeparation=LABEL_ROOM_PX,
            minExtent=LABEL_EXTENT_PX if upright else 0,
        ),
    }
