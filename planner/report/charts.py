"""The charts of the page, drawn by Vega-Altair on this machine into SVG text: no script, no network.

Colours are CSS variables, so that one drawing serves light and dark mode. Every mark carries its numbers as
an `aria-label`, which the page also shows on hover and tap.

One colour for each cause, tenant and kind over the whole page, for light and for dark mode.

Hues follow Okabe and Ito's rule that neighbours differ in lightness too, so that charts stay readable for
colour-blind readers and in grey print. Passes share the family of compute: they are its two halves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

import altair as alt
import vl_convert

from planner.foundation.frozen import frozen
from planner.foundation.units import GIB, MIB, format_bytes, format_seconds
from planner.report.timeline import Slice
from planner.strategy.estimate import MEMORY_TENANTS, TIME_CAUSES


@frozen
class Colour:
    """A colour of the page: the name of its CSS variable, its value in light and in dark mode."""

    name: str
    light: str
    dark: str
    title: str = ""


COLOURS = (
    Colour(name="compute", light="#3b6fd4", dark="#6c9bf5", title="compute"),
    Colour(name="recompute", light="#4fb3cf", dark="#58c4e0", title="recompute"),
    Colour(name="tp_comm", light="#e07b1a", dark="#f09a45", title="TP communication"),
    Colour(name="cp_comm", light="#b59a00", dark="#d9c034", title="CP communication"),
    Colour(name="ep_comm", light="#c2579b", dark="#e07fbb", title="EP communication"),
    Colour(name="dp_comm", light="#d1453b", dark="#ef746a", title="DP communication"),
    Colour(name="pp_comm", light="#8455c9", dark="#ab86e8", title="pipeline transfer"),
    Colour(name="bubble", light="#aab1bd", dark="#5d6675", title="pipeline bubble"),
    Colour(name="optimizer", light="#2f9e62", dark="#4fc083", title="optimizer"),
    Colour(name="host", light="#8a6d55", dark="#b59579", title="host"),
    Colour(name="weights", light="#14808c", dark="#3fb0bd", title="weights"),
    Colour(name="grads", light="#b83280", dark="#dd6aa9", title="gradients"),
    Colour(name="activations", light="#5b67c7", dark="#8b97f0", title="activations"),
    Colour(name="transient", light="#dba32a", dark="#e8bb55", title="transient"),
    Colour(name="runtime", light="#77808f", dark="#929cac", title="runtime"),
    Colour(name="allocator", light="#b9bfc9", dark="#6f7887", title="allocator"),
    Colour(name="forward", light="#86aef0", dark="#8fb7fb", title="forward"),
    Colour(name="backward", light="#2f5fc4", dark="#4477dd", title="backward"),
    Colour(name="weight_grad", light="#1d3f8f", dark="#2c56b0", title="weight gradients"),
    Colour(name="predicted", light="#3b6fd4", dark="#6c9bf5", title="predicted"),
    Colour(name="measured", light="#c2410c", dark="#fb923c", title="measured"),
)

MARK_COLOURS = (
    Colour(name="mark_0", light="#0072b2", dark="#5aa9e6"),
    Colour(name="mark_1", light="#d55e00", dark="#ff9a4d"),
    Colour(name="mark_2", light="#00805c", dark="#3fd0a4"),
    Colour(name="mark_3", light="#b5568c", dark="#ef9fc9"),
    Colour(name="mark_4", light="#9a6b00", dark="#e6b84d"),
    Colour(name="mark_5", light="#6a4a9c", dark="#b99cec"),
    Colour(name="mark_6", light="#2b8cc4", dark="#8fd6ff"),
    Colour(name="mark_7", light="#5a6068", dark="#c4cad2"),
)
"""One for each shape of the plot of hardware: Okabe and Ito's, darker where needed on white."""


def colour_of(field: str) -> Colour:
    """The colour of a field of TimeBreakdown or MemoryBreakdown, or of a name in the table."""
    name = field.removesuffix("_s").removesuffix("_bytes")
    return next(colour for colour in COLOURS if colour.name == name)


def mark_colour(number: int) -> str:
    """The name of the mark colour of the curve, cloud or kind of this number; they come round again."""
    return MARK_COLOURS[number % len(MARK_COLOURS)].name


def variable(name: str) -> str:
    """The CSS text that a chart uses for a colour, so that the page's mode decides its value."""
    return f"var(--{name.replace('_', '-')})"


CAUSE_COLOURS = {field: colour_of(field) for field in TIME_CAUSES}
TENANT_COLOURS = {field: colour_of(field) for field in MEMORY_TENANTS}


FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WIDE_PX = 980
NARROW_PX = 310
MAX_POINTS = 600
CHARACTER_PX = 6.6
"""Width of a digit in the timeline's labels at 11 px."""

LABEL_LIMIT_PX = 260
Row = dict[str, Any]


@frozen
class Bar:
    """A piece of a stacked or waterfall bar: which row, which colour, from where to where, and its words."""

    row: str
    colour: str
    start: float
    end: float
    tip: str


@frozen
class Mark:
    """A measured value beside a bar."""

    row: str
    value: float
    tip: str


@frozen
class Pair:
    """A predicted and a measured value of one row."""

    row: str
    predicted: float
    measured: float


def time_unit(span_s: float) -> tuple[float, str]:
    """The factor and the name of the unit in which seconds of this size are drawn."""
    if span_s < 2e-3:
        return 1e6, "µs"
    return (1e3, "ms") if span_s < 1 else (1.0, "s")


def memory_unit(span_bytes: float) -> tuple[float, str]:
    """The divisor and the name of the unit in which bytes of this size are drawn."""
    return (GIB, "GiB") if span_bytes >= GIB else (MIB, "MiB")


def draw_timeline(slices: Sequence[Slice], row_titles: Sequence[str], end_s: float, label: str) -> str:
    """One bar a slice, one row a rank, from 0 to `end_s`; micro-batch numbers where there is room."""
    factor, unit = time_unit(end_s)
    values = [_slice_row(s, row_titles, end_s, factor) for s in slices]
    scale = alt.Scale(domain=[0, end_s * factor], nice=False)
    chart = chart_of(values).encode(y=row_axis(row_titles))
    bars = chart.mark_bar(stroke=variable("card"), strokeWidth=0.6).encode(
        x=alt.X("start:Q", title=f"time ({unit})", scale=scale),
        x2="end:Q",
        color=alt.Color("fill:N", scale=None),
        description="tip:N",
    )
    texts = chart.mark_text(fontSize=11, aria=False).encode(
        x=alt.X("middle:Q", scale=scale), text="text:N", color=alt.Color("ink:N", scale=None)
    )
    layers = layered(bars, texts).properties(width=WIDE_PX, height=alt.Step(30))
    return render(layers, label, "wide")


def _slice_row(s: Slice, row_titles: Sequence[str], end_s: float, factor: float) -> Row:
    action = s.action
    text = str(action[2]) if action else ""
    room = s.duration_s / end_s * WIDE_PX if end_s > 0 else 0.0
    return {
        "row": row_titles[s.row],
        "start": s.start_s * factor,
        "end": s.end_s * factor,
        "middle": (s.start_s + s.duration_s / 2) * factor,
        "fill": variable(s.kind),
        "ink": variable("on-light" if s.kind == "forward" else "on-dark"),
        "text": text if room > CHARACTER_PX * len(text) + 2 else "",
        "tip": f"{s.text}: {format_seconds(s.duration_s)}, from {format_seconds(s.start_s)}",
    }


def draw_bars(
    bars: Sequence[Bar], rows: Sequence[str], unit: str, label: str, marks: Sequence[Mark] = (),
    limit: float | None = None, limit_tip: str = "", own_limits: Sequence[Mark] = (),
) -> str:  # fmt: skip
    """Bars in rows, with measured marks beside them and a dashed line at `limit` where it is given.

    `own_limits` are dashes at the limits of rows that differ.
    """
    y = row_axis(rows)
    x_axis = alt.Axis(title=unit, tickCount=5)
    step_px = 44 if len(rows) <= 4 else 30
    layers: list[alt.Chart] = [
        chart_of([_bar_row(bar) for bar in bars])
        .mark_bar(size=step_px * 0.6, stroke=variable("card"), strokeWidth=0.6)
        .encode(
            y=y,
            x=alt.X("start:Q", axis=x_axis),
            x2="end:Q",
            color=alt.Color("fill:N", scale=None),
            description="tip:N",
        )
    ]
    if marks:
        layers.append(_draw_marks(marks, y))
    if own_limits:
        ticks = chart_of([{"row": own.row, "value": own.value, "tip": own.tip} for own in own_limits])
        layers.append(
            ticks.mark_tick(color=variable("bad"), thickness=2, size=step_px * 0.8).encode(
                y=y, x="value:Q", description="tip:N"
            )
        )
    if limit is not None:
        rule = chart_of([{"limit": limit, "tip": limit_tip}])
        layers.append(
            rule.mark_rule(color=variable("bad"), strokeDash=[5, 4], strokeWidth=2).encode(
                x="limit:Q", description="tip:N"
            )
        )
    return render(layered(*layers).properties(width=NARROW_PX, height=alt.Step(step_px)), label, "narrow")


def _bar_row(bar: Bar) -> Row:
    return {
        "row": bar.row,
        "start": bar.start,
        "end": bar.end,
        "fill": variable(bar.colour),
        "tip": bar.tip,
    }


def _draw_marks(marks: Sequence[Mark], y: alt.Y) -> alt.Chart:
    rows = [{"row": mark.row, "value": mark.value, "tip": mark.tip} for mark in marks]
    marked: alt.Chart = (
        chart_of(rows)
        .mark_point(
            shape="diamond", size=90, filled=True, opacity=1,
            color=variable("measured"), stroke=variable("card"), strokeWidth=1.5,
        )
        .encode(y=y, x="value:Q", description="tip:N")
    )  # fmt: skip
    return marked


def draw_loss(points: Sequence[tuple[int, float]], label: str) -> str:
    """The loss of each step."""
    values = [{"step": step, "loss": loss, "tip": f"step {step}: loss {loss:.4g}"} for step, loss in points]
    chart = chart_of(values).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False)),
        y=alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False)),
    )
    return render(_line_with_points(chart).properties(width=NARROW_PX, height=200), label, "narrow")


def draw_step_times(
    points: Sequence[tuple[int, float]], predicted_s: float, interval_s: tuple[float, float], top_s: float,
    label: str,
) -> str:  # fmt: skip
    """Measured step times against the predicted one and its interval; times above `top_s` are cut off."""
    factor, unit = time_unit(top_s)
    values = [
        {"step": step, "time": min(time_s, top_s) * factor, "tip": f"step {step}: {format_seconds(time_s)}"}
        for step, time_s in points
    ]
    scale = alt.Scale(domain=[0, top_s * factor], nice=False)
    y = alt.Y("time:Q", title=f"step time ({unit})", scale=scale)
    chart = chart_of(values).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False)), y=y
    )
    expected = chart_of(
        [
            {
                "low": interval_s[0] * factor,
                "high": min(interval_s[1], top_s) * factor,
                "time": predicted_s * factor,
                "tip": f"predicted: {format_seconds(predicted_s)}",
            }
        ]
    )
    band = expected.mark_rect(color=variable("predicted"), opacity=0.16, aria=False).encode(
        y=alt.Y("low:Q", scale=scale), y2="high:Q"
    )
    rule = expected.mark_rule(color=variable("predicted"), strokeDash=[5, 4], strokeWidth=2).encode(
        y=y, description="tip:N"
    )
    layers = layered(band, rule, _line_with_points(chart))
    return render(layers.properties(width=NARROW_PX, height=200), label, "narrow")


def _line_with_points(chart: alt.Chart) -> alt.LayerChart:
    line = chart.mark_line(color=variable("measured"), strokeWidth=2, aria=False)
    points = chart.mark_point(color=variable("measured"), filled=True, size=22, opacity=1)
    return layered(line, points.encode(description="tip:N"))


def draw_pairs(pairs: Sequence[Pair], unit: str, label: str) -> str:
    """Predicted and measured values of each row as two points and the line between them."""
    rows = [pair.row for pair in pairs]
    y = row_axis(rows)
    values: list[Row] = [
        {"row": p.row, "predicted": p.predicted, "measured": p.measured, "value": value, "kind": kind,
         "tip": f"{p.row}: {kind} {value:.4g} {unit}"}
        for p in pairs
        for kind, value in (("predicted", p.predicted), ("measured", p.measured))
    ]  # fmt: skip
    chart = chart_of(values).encode(y=y)
    axis = alt.Axis(title=unit, tickCount=5)
    line = chart.mark_rule(color=variable("axis"), strokeWidth=2, aria=False).encode(
        x=alt.X("predicted:Q", axis=axis), x2="measured:Q"
    )
    kinds = ["predicted", "measured"]
    points = chart.mark_point(filled=True, size=110, opacity=1).encode(
        x=alt.X("value:Q", axis=axis, scale=alt.Scale(zero=True)),
        color=alt.Color(
            "kind:N", scale=alt.Scale(domain=kinds, range=[variable(k) for k in kinds]), legend=None
        ),
        shape=alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=["circle", "diamond"]), legend=None),
        description="tip:N",
    )
    layers = layered(line, points).properties(width=NARROW_PX, height=alt.Step(36))
    return render(layers, label, "narrow")


def thin_out(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MAX_POINTS of the points, evenly spaced, the last one always kept."""
    stride = -(-len(points) // MAX_POINTS)
    kept = list(points[:: max(stride, 1)])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def describe_bytes(title: str, value_bytes: float, whole_bytes: float) -> str:
    """`weights: 1.2 GiB (34 %)`."""
    share = f" ({100 * value_bytes / whole_bytes:.0f} %)" if whole_bytes else ""
    return f"{title}: {format_bytes(value_bytes)}{share}"


def row_axis(titles: Sequence[str]) -> alt.Y:
    # Readers' fonts differ in width from the one that the drawing is measured with, so labels get room.
    room_px = min(LABEL_LIMIT_PX, CHARACTER_PX * 1.15 * max((len(title) for title in titles), default=0))
    axis = alt.Axis(minExtent=room_px, labelLimit=LABEL_LIMIT_PX, grid=False)
    return alt.Y("row:N", title=None, sort=list(titles), scale=alt.Scale(domain=list(titles)), axis=axis)


def chart_of(rows: list[Row]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows))


def layered(*charts: alt.Chart | alt.LayerChart) -> alt.LayerChart:
    layers = alt.layer(*charts)
    assert isinstance(layers, alt.LayerChart), "layers without facets make a layered chart"
    return layers


def render(chart: alt.LayerChart, label: str, size: str) -> str:
    svg: str = vl_convert.vegalite_to_svg(_styled(chart))
    root = re.match(r"<svg[^>]*viewBox=\"0 0 ([\d.]+) ([\d.]+)\"[^>]*>", svg)
    assert root is not None, "vl_convert writes an svg element with a viewBox"
    width, height = root[1], root[2]
    opening = (
        f'<svg class="chart {size}" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {width} {height}" style="--natural: {width}px">'
    )
    return opening + svg[root.end() :]


def _styled(chart: alt.LayerChart) -> dict[str, Any]:
    muted, axis = variable("muted"), variable("axis")
    styled: dict[str, Any] = (
        chart.configure(background="transparent", font=FONT, padding=4)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=muted, titleColor=muted, gridColor=variable("grid"), domainColor=axis, tickColor=axis,
            labelFontSize=12, titleFontSize=12, titleFontWeight="normal", labelPadding=6,
            labelFlush=False,
        )
        .configure_axisY(ticks=False, domain=False)
        .to_dict()
    )  # fmt: skip
    return styled
