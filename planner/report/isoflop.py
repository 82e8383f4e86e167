"""The IsoFLOP plot: loss against size at equal FLOPs, and where each law puts the optimum. SVG or one page.

Drawn on this machine by Vega-Altair; the page holds the drawing and its numbers and loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import altair as alt
import vl_convert

from planner.foundation.units import format_count
from planner.sizing.scaling import (
    FLOPS_PER_PARAM_TOKEN,
    Law,
    Optimum,
    ParametricLoss,
    training_point,
)

BUDGETS = (0.01, 0.1, 1.0, 10.0)
"""Curves that are drawn, as multiples of the budget."""

POINTS = 60
DECADES = 2.4
WIDTH_PX, HEIGHT_PX = 760, 420
CURVE_COLOURS = ("#c6dbef", "#9ecae1", "#08519c", "#6baed6")
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222;"
    "background:#fff}svg{max-width:100%;height:auto}table{border-collapse:collapse}"
    "td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}"
)


def isoflop_plot(law: Law, optima: Sequence[Optimum], html: bool) -> str:
    """The plot by one law's loss with the optima of all laws, as SVG text or as an HTML page."""
    svg: str = vl_convert.vegalite_to_svg(_chart(law, optima).to_dict())
    return _page(law, optima, svg) if html else svg


def _chart(law: Law, optima: Sequence[Optimum]) -> alt.LayerChart:
    form = law.loss
    assert form is not None, "only a law with a loss of N and D is plotted"
    flops = optima[0].flops
    names = [f"{flops * multiple:.3g} FLOPs".replace("e+", "e") for multiple in BUDGETS]
    number = "replace(format(datum.value, '~s'), 'G', 'B')"
    label = f"indexof(['1', '2', '5'], format(datum.value, 'e')[0]) < 0 ? '' : {number}"
    axis = alt.Axis(tickCount=8, labelExpr=label)
    x = alt.X("params:Q", title="parameters", scale=alt.Scale(type="log", nice=False), axis=axis)
    y = alt.Y("loss:Q", title=f"loss by {law.title} (nats a token)", scale=alt.Scale(zero=False))
    curves = (
        alt.Chart(alt.InlineData(values=_curves(form, optima, names)))
        .mark_line(strokeWidth=2)
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "budget:N",
                title="equal FLOPs",
                scale=alt.Scale(domain=names, range=list(CURVE_COLOURS)),
                sort=names,
            ),
        )
    )
    marks = (
        alt.Chart(alt.InlineData(values=_marks(form, optima)))
        .mark_point(filled=True, size=90, opacity=1)
        .encode(
            x=x,
            y=y,
            shape=alt.Shape("law:N", title="optimum by"),
            fill=alt.Fill("law:N"),
            description="tip:N",
        )
    )
    layers = alt.layer(curves, marks).resolve_scale(
        color="independent", shape="independent", fill="independent"
    )
    assert isinstance(layers, alt.LayerChart), "layers without facets make a layered chart"
    # A browser's font may be wider than the one that the picture was measured with.
    padding = {"left": 5, "top": 5, "right": 40, "bottom": 5}
    return layers.properties(width=WIDTH_PX, height=HEIGHT_PX, padding=padding)


def _curves(form: ParametricLoss, optima: Sequence[Optimum], names: Sequence[str]) -> list[dict[str, Any]]:
    """Each budget's curve, over sizes around its optimum; the budget's own reaches every law's optimum."""
    rows = []
    for multiple, name in zip(BUDGETS, names, strict=True):
        flops = optima[0].flops * multiple
        best = form.optimal_params(flops)
        reach = 10 ** (DECADES / 2)
        low, high = best / reach, best * reach
        if multiple == 1.0:
            low = min(low, *(each.params / 1.5 for each in optima))
            high = max(high, *(each.params * 1.5 for each in optima))
        for index in range(POINTS):
            params = low * (high / low) ** (index / (POINTS - 1))
            point = training_point(form, params, flops / FLOPS_PER_PARAM_TOKEN / params)
            rows.append({"budget": name, "params": params, "loss": point.loss})
    return rows


def _marks(form: ParametricLoss, optima: Sequence[Optimum]) -> list[dict[str, Any]]:
    return [
        {
            "law": each.law.title,
            "params": each.params,
            "loss": form.loss(each.params, each.tokens),
            "tip": f"{each.law.title}: {format_count(each.params)} on {format_count(each.tokens)} tokens",
        }
        for each in optima
    ]


def _page(law: Law, optima: Sequence[Optimum], svg: str) -> str:
    budget = f"{optima[0].flops:.4g}".replace("e+", "e")
    rows = "".join(
        f"<tr><td>{escape(each.law.title)}</td><td>{format_count(each.params)}</td>"
        f"<td>{format_count(each.tokens)}</td><td>{each.tokens_per_param:.3g}</td>"
        f"<td>{'inside' if each.beyond_fit <= 1 else f'{each.beyond_fit:,.3g} x beyond'}</td></tr>"
        for each in optima
    )
    title = f"IsoFLOP at {budget} FLOPs"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<p>Loss by {escape(law.title)} against size, at equal FLOPs; marks are where each law puts the "
        f"optimum of {budget} FLOPs.</p><figure>{svg}</figure>"
        "<table><tr><th>law</th><th>parameters</th><th>tokens</th><th>tokens a parameter</th>"
        f"<th>range of its fit</th></tr>{rows}</table></body></html>\n"
    )
