"""The operators of a profile drawn: rates of products and attention, times of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.cost.compute.measured_operators import at_usual_speed
from planner.foundation.units import format_seconds, format_si
from planner.profile.coverage import kind_text, rate_flops, rate_text, rate_values
from planner.profile.profile import OperatorKind, OperatorSample, Profile
from planner.report import curves
from planner.report.charts import mark_colour
from planner.report.curves import Axis, Curve, Dot, draw_curves
from planner.report.profile_tables import COPIES, rate_table
from planner.report.sections import Figure, LegendItem
from planner.report.words import percent

LEAST_DIMS = (64, 512, 2048)
"""Products are told apart by their least dim: up to each of these, or beyond."""


def rate_figures(profile: Profile) -> tuple[Figure, ...]:
    """Rates of what computes, times of what moves values, and copies."""
    samples = [sample for sample in at_usual_speed(profile.rates) if sample.forward_s > 0]
    computing = [sample for sample in samples if rate_flops(sample)]
    drawn = [
        *(
            _rates(f"{title}, {name}", [s for s in computing if s.kind is kind], name)
            for kind, title in KINDS_DRAWN
            for name in (("forward",) if kind is OperatorKind.CROSS_ENTROPY else ("forward", "backward"))
        ),
        *(
            _by_kind(title, [s for s in samples if s.kind in kinds], how)
            for title, kinds, how in (
                ("Between the products", ELEMENTWISE, _TIMED),
                ("Embedding and routing", (OperatorKind.EMBEDDING, OperatorKind.ROUTING), _TIMED),
                ("Update of the optimizer", (OperatorKind.OPTIMIZER,), _TIMED),
                ("Copies", COPIES, _COPIED),
            )
        ),
    ]
    return tuple(figure for figure in drawn if figure is not None)


ELEMENTWISE = (OperatorKind.ADD, OperatorKind.ACTIVATION, OperatorKind.NORM, OperatorKind.ROTARY)
KINDS_DRAWN = (
    (OperatorKind.GEMM, "Matrix products"),
    (OperatorKind.GROUPED, "Products of experts"),
    (OperatorKind.ATTENTION, "Attention"),
    (OperatorKind.CROSS_ENTROPY, "Output projection and loss"),
)


def _rates(title: str, samples: Sequence[OperatorSample], name: str) -> Figure | None:
    """FLOP/s over FLOPs of one pass; products by their least dim."""
    dots: dict[tuple[int, str], list[Dot]] = {}
    for sample in samples:
        seconds, flops = getattr(sample, f"{name}_s"), rate_flops(sample)
        if not seconds or not flops:
            continue
        work = flops * (1 if name == "forward" else 2)
        tip = f"{rate_text(sample)}, {name}: {format_seconds(seconds)}, {format_si(work / seconds, 'FLOP/s')}"
        dots.setdefault(_group(sample), []).append(Dot(x=work, y=work / seconds, tip=tip))
    if not dots:
        return None
    order = {group: mark_colour(number) for number, group in enumerate(sorted(dots))}
    shown = [Curve(colour=colour, dots=tuple(dots[group])) for group, colour in order.items()]
    return Figure(
        title=title,
        svg=draw_curves(shown, curves.WORK, curves.RATE, f"{title}: rate over work"),
        legend=tuple(
            LegendItem(colour=colour, title=group, shape="dot") for (_, group), colour in order.items()
        ),
        table=rate_table(samples) if name == "forward" else None,
    )


def _group(sample: OperatorSample) -> tuple[int, str]:
    """What the dots of a kind are coloured by, with its place: the least dim of products, else the head."""
    if sample.kind is OperatorKind.ATTENTION:
        return sample.dims[-1], f"heads of {sample.dims[-1]}, {sample.precision}"
    least = min(sample.dims[-3:])
    place = sum(least > bound for bound in LEAST_DIMS)
    width = f"up to {LEAST_DIMS[place]:,}" if place < len(LEAST_DIMS) else f"beyond {LEAST_DIMS[-1]:,}"
    return place, f"least dim {width}, {sample.precision}"


Drawing = tuple[Axis, Axis, Callable[[OperatorSample], float]]
"""The axes of a chart, and the height of a sample's dot."""


def _timed_y(sample: OperatorSample) -> float:
    return sample.forward_s


def _copied_y(sample: OperatorSample) -> float:
    return sample.dims[0] / sample.forward_s


_TIMED: Drawing = (curves.VALUES, curves.TIME, _timed_y)
_COPIED: Drawing = (curves.SIZE, curves.BANDWIDTH_OF_COPY, _copied_y)


def _by_kind(title: str, samples: Sequence[OperatorSample], how: Drawing) -> Figure | None:
    """All samples of some kinds in one chart, a colour a kind and variant."""
    if not samples:
        return None
    x, y, value = how
    names = list(dict.fromkeys(kind_text(sample) for sample in samples))
    shown, legend = [], []
    for number, name in enumerate(names):
        colour = mark_colour(number)
        own = [sample for sample in samples if kind_text(sample) == name]
        dots = tuple(
            Dot(
                x=rate_values(s),
                y=value(s),
                tip=f"{rate_text(s)}: {format_seconds(s.forward_s)}, spread {percent(s.spread, 0)}",
            )
            for s in own
        )
        shown.append(Curve(colour=colour, dots=dots))
        legend.append(LegendItem(colour=colour, title=name, shape="dot"))
    svg = draw_curves(shown, x, y, f"{title} by size")
    return Figure(title=title, svg=svg, legend=tuple(legend), table=rate_table(samples))
