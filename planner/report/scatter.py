"""The scatter page of `plan validate`: predicted against measured, one mark a run, drawn on this machine.

The page holds the drawings and their numbers and loads nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

import altair as alt
import vl_convert

from planner.calibration.validate import Summary, ValidatedRow, Validation, summarise
from planner.report.curves import log_ticks

SIDE_PX = 620
MOST_COLOURS = 9
"""Frameworks with a colour of their own; the rest share one."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31", "#5f7f3f")
"""Okabe and Ito's colours, and three more."""

OTHER = "other frameworks"
OTHER_COLOUR = "#999999"
BANDS = (0.9, 1.0, 1.1)
MOST_GROUPS = 40
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222;"
    "background:#fff}figure{margin:0}svg{max-width:100%;height:auto}table{border-collapse:collapse}"
    "svg path:hover{stroke-width:3px}.wide{overflow-x:auto}"
    ".wide td:nth-child(n+2){white-space:nowrap}"
    "td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd;"
    "font-variant-numeric:tabular-nums}"
    ".wide td:first-child{min-width:9rem;overflow-wrap:anywhere}"
    "td:first-child,th:first-child{text-align:left}"
)


def scatter_page(result: Validation) -> str:
    """An HTML page with the scatter of step time, that of peak memory where there is one, and the errors."""
    names = _names(result.rows)
    figures = [
        _figure(_time_marks(result.rows, names), names, "step time", "s"),
        _figure(_memory_marks(result.rows, names), names, "peak memory", "GiB"),
    ]
    title = "Predicted against measured"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{result.summary.n} runs predicted of {result.summary.rows}{_summary(result.summary)}. On the "
        "middle line the prediction is right; the outer lines are 10 % off. A mark names its run where the "
        "pointer rests on it.</p>"
        f"{''.join(figures)}{_errors_table(result)}{_groups_table(result)}{_verdicts_table(result)}"
        "</body></html>\n"
    )


def _summary(summary: Summary) -> str:
    """Both mean errors in words."""
    parts = [
        f"; {what}: mean error {_percent(mape)}, bias {_percent(bias, sign=True)}"
        for what, mape, bias in (
            ("step time", summary.time_mape, summary.time_bias),
            ("peak memory", summary.memory_mape, summary.memory_bias),
        )
        if mape is not None
    ]
    return "".join(parts)


def _names(rows: Sequence[ValidatedRow]) -> dict[str, str]:
    """Every framework and the name of its colour: the most frequent keep their own."""
    counts = Counter(row.framework or "framework not stated" for row in rows if row.verdict is not None)
    common = [name for name, _ in counts.most_common(MOST_COLOURS)]
    return {name: name if name in common else OTHER for name in counts}


def _time_marks(rows: Sequence[ValidatedRow], names: dict[str, str]) -> list[dict[str, Any]]:
    return [
        _mark(row, names, row.predicted_step_time_s, row.step_time_s, "s")
        for row in rows
        if row.error is not None
    ]


def _memory_marks(rows: Sequence[ValidatedRow], names: dict[str, str]) -> list[dict[str, Any]]:
    return [
        _mark(row, names, row.predicted_peak_memory_gib, row.peak_memory_gib, "GiB")
        for row in rows
        if row.memory_error is not None
    ]


def _mark(
    row: ValidatedRow, names: dict[str, str], predicted: float | None, measured: float | None, unit: str
) -> dict[str, Any]:
    text = f"{row.id} {row.strategy}: predicted {predicted:.4g} {unit}, measured {measured:.4g} {unit}"
    name = names[row.framework or "framework not stated"]
    return {"predicted": predicted, "measured": measured, "framework": name, "tip": text}


def _figure(marks: list[dict[str, Any]], names: dict[str, str], what: str, unit: str) -> str:
    if not marks:
        return ""
    svg: str = vl_convert.vegalite_to_svg(_chart(marks, names, what, unit).to_dict())
    return f"<h2>{what[0].upper()}{what[1:]}</h2><figure>{_named_marks(svg)}</figure>"


def _named_marks(svg: str) -> str:
    """The drawing with each mark's description as a title, which browsers show beside the pointer."""
    return re.sub(
        r'(<path aria-label="([^"]*: predicted [^"]*)"[^>]*?)(/>|></path>)',
        r"\1><title>\2</title></path>",
        svg,
    )


def _chart(marks: list[dict[str, Any]], names: dict[str, str], what: str, unit: str) -> alt.LayerChart:
    values = [mark[key] for mark in marks for key in ("predicted", "measured")]
    low, high = min(values) / 1.2, max(values) * 1.2
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis = alt.Axis(values=log_ticks(low, high), labelExpr="format(datum.value, '~g')")
    drawn = Counter(mark["framework"] for mark in marks)
    shown = sorted(drawn, key=lambda name: (name == OTHER, -drawn[name]))
    many = len(shown) > 1
    known = sorted(set(names.values()) - {OTHER})
    colours = [OTHER_COLOUR if name == OTHER else COLOURS[known.index(name)] for name in shown]
    points = (
        alt.Chart(alt.InlineData(values=marks))
        .mark_point(size=30, opacity=0.65)
        .encode(
            x=alt.X("measured:Q", title=f"measured {what} ({unit})", scale=scale, axis=axis),
            y=alt.Y("predicted:Q", title=f"predicted {what} ({unit})", scale=scale, axis=axis),
            color=alt.Color(
                "framework:N",
                scale=alt.Scale(domain=shown, range=colours),
                legend=alt.Legend(title=None, orient="bottom", columns=2, labelLimit=280, columnPadding=48)
                if many
                else None,
            ),
            description="tip:N",
        )
    )
    lines = [
        {"line": str(band), "measured": value, "predicted": value * band}
        for band in BANDS
        for value in (low, high)
    ]
    guides = (
        alt.Chart(alt.InlineData(values=lines))
        .mark_line(color="#888", strokeWidth=1, clip=True)
        .encode(x="measured:Q", y="predicted:Q", detail="line:N")
    )
    layers = alt.layer(guides, points)
    assert isinstance(layers, alt.LayerChart), "layers without facets make a layered chart"
    return layers.properties(width=SIDE_PX, height=SIDE_PX)


def _errors_table(result: Validation) -> str:
    groups: dict[str, list[ValidatedRow]] = {}
    for row in result.rows:
        if row.verdict is not None:
            groups.setdefault(row.framework or "framework not stated", []).append(row)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    body = "".join(_errors_row(name, rows) for name, rows in ordered)
    return (
        '<h2>Errors</h2><div class="wide"><table><tr><th>framework</th><th>runs</th>'
        "<th>step time, mean error</th><th>bias</th><th>peak memory, mean error</th><th>bias</th></tr>"
        f"{body}</table></div>"
    )


def _errors_row(name: str, rows: Sequence[ValidatedRow]) -> str:
    summary = summarise(rows)
    cells = (
        _percent(summary.time_mape),
        _percent(summary.time_bias, sign=True),
        _percent(summary.memory_mape),
        _percent(summary.memory_bias, sign=True),
    )
    return f"<tr><td>{escape(name)}</td><td>{summary.n}</td>{_cells(cells)}</tr>"


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{text}</td>" for text in texts)


def _percent(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+.1%}" if sign else f"{value:.1%}"


def _groups_table(result: Validation) -> str:
    """Groups of layouts of one job: how well they were put in order, and what the choice would have cost."""
    judged = [group for group in result.groups if group.n > 1 and group.regret is not None]
    if not judged:
        return ""
    judged.sort(key=lambda group: (-(group.regret or 0.0), -group.n))
    body = "".join(
        f"<tr><td>{escape(group.group)}</td><td>{group.n}</td>"
        + _cells(
            (
                _percent(group.time_mape),
                "" if group.kendall_tau is None else f"{group.kendall_tau:.2f}",
                _percent(group.regret),
            )
        )
        + f"<td>{escape(group.chosen or '')}</td><td>{escape(group.best or '')}</td></tr>"
        for group in judged[:MOST_GROUPS]
    )
    left = len(judged) - MOST_GROUPS
    more = f"<p>... and {left} more groups.</p>" if left > 0 else ""
    return (
        "<h2>Choices</h2><p>Layouts of one job on one cluster. Tau is the rank correlation of predicted with "
        "measured times; the regret is what the layout of least predicted time takes more than the fastest."
        '</p><div class="wide"><table><tr><th>group</th><th>runs</th><th>mean error</th><th>tau</th>'
        f"<th>regret</th><th>chosen</th><th>fastest</th></tr>{body}</table></div>{more}"
    )


def _verdicts_table(result: Validation) -> str:
    rows = "".join(
        f"<tr><td>{name.upper()}</td><td>{result.verdicts[f'{name}_ran']}</td>"
        f"<td>{result.verdicts[f'{name}_oom']}</td></tr>"
        for name in ("safe", "risky", "no")
    )
    return (
        "<h2>Verdicts</h2><table><tr><th>verdict</th><th>ran</th><th>ran out of memory</th></tr>"
        f"{rows}</table>"
    )
