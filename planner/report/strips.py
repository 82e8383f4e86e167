"""Strips: many values of each row as marks on one axis, with a dashed line at a limit."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from planner.foundation.frozen import frozen
from planner.report import ticks
from planner.report.charts import NARROW_PX, chart_of, layered, render, row_axis
from planner.report.curves import ROOM, SPAN, Dot
from planner.report.palette import variable

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
        axis = alt.Axis(values=ticks.log_ticks(low, high), format="~g", labelOverlap=True)
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
