"""The operators of a profile drawn: each sample's time, and what the other samples say of it."""

from __future__ import annotations

from statistics import median

from planner.cost.compute.measured_operators import MeasuredRates, at_usual_speed
from planner.foundation.units import format_seconds
from planner.profile.profile import OperatorKind, OperatorSample, Profile
from planner.report import curves
from planner.report.charts import mark_colour
from planner.report.curves import Curve, Dot, draw_scatter
from planner.report.sections import Figure, LegendItem
from planner.report.words import percent

SORTS = {
    OperatorKind.GEMM: "products",
    OperatorKind.GROUPED: "products of experts",
    OperatorKind.ATTENTION: "attention",
    OperatorKind.CROSS_ENTROPY: "loss",
    OperatorKind.EMBEDDING: "embedding",
    OperatorKind.OPTIMIZER: "update",
    OperatorKind.COPY: "copies",
    OperatorKind.TO_DEVICE: "copies",
    OperatorKind.TO_HOST: "copies",
}
"""What operators are called; all others lie between the products."""


def operator_figure(profile: Profile) -> Figure | None:
    """Left-out predictions over measured times, a colour a sort; None where nothing was swept."""
    clouds: dict[str, list[Dot]] = {}
    errors = []
    for rates, sample in _each(profile):
        for way, seconds in (("forward", sample.forward_s), ("backward", sample.backward_s)):
            surface = rates.surface(sample.kind, sample.variant, backward=way == "backward")
            if not seconds or surface is None:
                continue
            told = surface.without(*sample.dims)
            errors.append(abs(told / seconds - 1))
            sort = SORTS.get(sample.kind, "between the products")
            clouds.setdefault(sort, []).append(Dot(x=seconds, y=told, tip=_tip(sample, way, seconds, told)))
    if not errors:
        return None
    caption = (
        f"By the other samples over measured, {len(errors)} values; half of them are within "
        f"{percent(median(errors), 0)}. Corners are among them, which plans seldom meet."
    )
    colours = {sort: mark_colour(number) for number, sort in enumerate(clouds)}
    drawn = [Curve(colour=colours[sort], dots=tuple(dots)) for sort, dots in clouds.items()]
    return Figure(
        title="Operators, each by the others",
        svg=draw_scatter(drawn, *curves.BY_OTHERS, f"Operators, each by the others: {caption}"),
        caption=caption,
        legend=tuple(LegendItem(colour=c, title=sort, shape="dot") for sort, c in colours.items()),
    )


def _each(profile: Profile) -> list[tuple[MeasuredRates, OperatorSample]]:
    """All samples at one speed, each with the fit of its precision."""
    samples = at_usual_speed(profile.rates)
    fits = {precision: MeasuredRates(samples, precision) for precision in {s.precision for s in samples}}
    return [(fits[sample.precision], sample) for sample in samples]


def _tip(sample: OperatorSample, way: str, seconds: float, told: float) -> str:
    name = f"{sample.kind} {sample.variant}".strip().replace("_", " ")
    sizes = " x ".join(f"{size:,}" for size in sample.dims)
    times = f"{format_seconds(seconds)} measured, {format_seconds(told)} by the others"
    return f"{name} {sizes} {sample.precision}, {way}: {times}, spread {percent(sample.spread, 0)}"
