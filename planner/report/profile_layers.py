"""The layers of a profile drawn: time over tokens by width, saved bytes and times against the formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from planner.cost.stage.layer_samples import at_usual_speed
from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes, format_seconds
from planner.model.sublayer import Recompute
from planner.profile.coverage import ClassKey, SampledClass, sample_text, variant_text, width_text
from planner.profile.profile import LayerKind, LayerSample, Profile
from planner.report import curves
from planner.report.charts import mark_colour
from planner.report.curves import Axis, Curve, Dot, draw_curves, draw_scatter
from planner.report.profile_lines import ProfileLines
from planner.report.profile_tables import layer_table
from planner.report.sections import Figure, LegendItem
from planner.report.words import Table, percent, signed_percent

LINE_POINTS = 24
FAR_FLOOR = 3.0
"""A floor so many times below every point is told in words: drawn, it would flatten the curves."""
MOST_CLASSES = 12
"""Layer classes that are drawn; of more, the numbers of the rest are in the tables."""

CLOSE = 0.1
"""Errors of which a scatter says how many are smaller."""

COLOURS_OF = {
    Recompute.NONE: "mark_0",
    Recompute.SELECTIVE: "mark_2",
    Recompute.FULL: "mark_1",
}
RECOMPUTE_TITLES = {
    Recompute.NONE: "nothing recomputed",
    Recompute.SELECTIVE: "selective recompute",
    Recompute.FULL: "full recompute",
}
COLOURS_OF_KIND = {LayerKind.EMBEDDING: "mark_2", LayerKind.BLOCK: "mark_0", LayerKind.HEAD: "mark_1"}

Classes = Mapping[ClassKey, SampledClass]


@frozen
class LayerSection:
    """One layer class in one format: two charts and all its numbers."""

    title: str
    note: str
    figures: tuple[Figure, ...]
    table: Table


def layer_sections(profile: Profile, classes: Classes, lines: ProfileLines) -> tuple[LayerSection, ...]:
    """Every class in every format it was measured in; blocks first, the drawn ones before the others."""
    floor_s = profile.constant("host_block_forward_s")
    grouped: dict[tuple[ClassKey, str], list[LayerSample]] = {}
    for sample in at_usual_speed(profile.layers):
        grouped.setdefault(((sample.kind, sample.shape_key), variant_text(sample)), []).append(sample)
    ordered = sorted(grouped.items(), key=lambda item: item[0][0][0] is not LayerKind.BLOCK)
    return tuple(
        _section(classes[key], variant, samples, lines, floor_s, drawn=number < MOST_CLASSES)
        for number, ((key, variant), samples) in enumerate(ordered)
    )


def _section(
    found: SampledClass,
    variant: str,
    samples: Sequence[LayerSample],
    lines: ProfileLines,
    floor_s: float | None,
    *,
    drawn: bool,
) -> LayerSection:
    title = f"{found.title[0].upper()}{found.title[1:]}, {variant}"
    table = layer_table(found, samples)
    plain = [sample for sample in samples if sample.recompute is Recompute.NONE]
    if not drawn or not plain:
        return LayerSection(title=title, note=found.shape_key, figures=(), table=table)
    floor = None if floor_s is None or found.kind is not LayerKind.BLOCK else floor_s
    figures = tuple(_times(found, title, plain, lines, name, floor) for name in ("forward", "backward"))
    return LayerSection(title=title, note=found.shape_key, figures=figures, table=table)


def _times(
    found: SampledClass,
    title: str,
    samples: Sequence[LayerSample],
    lines: ProfileLines,
    name: str,
    floor_s: float | None,
) -> Figure:
    """Time of one pass over tokens, a colour a width; forward with the host's floor."""
    widths = list(
        dict.fromkeys(width_text(sample) for sample in sorted(samples, key=lambda s: (s.tp, width_text(s))))
    )
    drawn, legend = [], []
    for number, width in enumerate(widths):
        colour = mark_colour(number)
        own = [sample for sample in samples if width_text(sample) == width]
        drawn.append(_curve(found, own, lines, name, colour))
        legend.append(LegendItem(colour=colour, title=width, shape="dot"))
    floor, caption = None, ""
    if floor_s is not None and name == "forward":
        told = f"The host takes {format_seconds(floor_s)} to launch a small block's forward."
        if min(sample.forward_s for sample in samples) > FAR_FLOOR * floor_s:
            caption = f"{told} All of these take longer."
        else:
            floor = (floor_s, told)
            legend.append(LegendItem(colour="host", title="host floor of a small block", shape="dash"))
    pass_title = name[0].upper() + name[1:]
    return Figure(
        title=pass_title,
        svg=draw_curves(drawn, curves.TOKENS, curves.TIME, f"{title}: {name} time over tokens", floor),
        caption=caption,
        legend=tuple(legend),
    )


def _curve(
    found: SampledClass, samples: Sequence[LayerSample], lines: ProfileLines, name: str, colour: str
) -> Curve:
    dots = tuple(
        Dot(
            x=sample.micro_batch * sample.seq,
            y=getattr(sample, f"{name}_s"),
            tip=f"{sample_text(sample)}: {name} {format_seconds(getattr(sample, f'{name}_s'))}, "
            f"spread {percent(sample.spread, 0)} of {sample.samples} runs",
        )
        for sample in samples
    )
    if found.model is None:
        return Curve(colour=colour, dots=dots)
    by_seq = {seq: [s for s in samples if s.seq == seq] for seq in sorted({s.seq for s in samples})}
    through = tuple(_line(found, own, lines, name, sampled=True) for own in by_seq.values())
    alone = tuple(_line(found, own, lines, name, sampled=False) for own in by_seq.values())
    return Curve(
        colour=colour,
        dots=dots,
        lines=tuple(line for line in through if len(line) > 1),
        dashes=tuple(line for line in alone if len(line) > 1),
    )


def _line(
    found: SampledClass, samples: Sequence[LayerSample], lines: ProfileLines, name: str, *, sampled: bool
) -> tuple[tuple[float, float], ...]:
    """The cost model's time from the smallest to the largest micro-batch of one width and length."""
    assert found.model is not None
    low, high = (end(s.micro_batch for s in samples) for end in (min, max))
    places = []
    for step in range(LINE_POINTS) if high > low else ():
        micro_batch = low * (high / low) ** (step / (LINE_POINTS - 1))
        cost = lines.cost(found.model, samples[0], micro_batch, sampled=sampled)
        seconds = 0.0 if cost is None else getattr(cost, f"{name}_s")
        if seconds > 0:
            places.append((micro_batch * samples[0].seq, seconds))
    return tuple(places)


@frozen
class Against:
    """A measured and a predicted value: its group and colour, and which sample it is of."""

    group: str
    colour: str
    of: str
    measured: float
    predicted: float


def formula_figures(profile: Profile, classes: Classes, lines: ProfileLines) -> tuple[Figure, ...]:
    """What the cost model would say without the samples, against them: kept bytes and times."""
    kept, times = [], []
    for sample in at_usual_speed(profile.layers):
        found = classes[sample.kind, sample.shape_key]
        cost = None
        if found.model is not None:
            cost = lines.cost(found.model, sample, sample.micro_batch, sampled=False)
        if cost is None:
            continue
        of = f"{found.title}, {sample_text(sample)}"
        if found.kind is LayerKind.BLOCK:
            group, colour = RECOMPUTE_TITLES[sample.recompute], COLOURS_OF[sample.recompute]
            kept.append(_against(group, colour, of, sample.saved_bytes, cost.saved_bytes))
        kind, colour = str(sample.kind), COLOURS_OF_KIND[sample.kind]
        times.append(_against(kind, colour, f"{of}, forward", sample.forward_s, cost.forward_s))
        times.append(_against(kind, colour, f"{of}, backward", sample.backward_s, cost.backward_s))
    figures = (
        _scatter("Bytes that blocks keep", kept, curves.KEPT, format_bytes),
        _scatter("Times without the samples", times, curves.PASS, format_seconds),
        _host_figure(profile, classes),
    )
    return tuple(figure for figure in figures if figure is not None)


def _host_figure(profile: Profile, classes: Classes) -> Figure | None:
    """What the host takes to begin a pass, over what the device takes; None where they are one."""
    dots, bound = [], 0
    for sample in profile.layers:
        for name in ("forward", "backward"):
            device_s, host_s = getattr(sample, f"{name}_s"), getattr(sample, f"host_{name}_s")
            if not host_s or device_s <= 0:
                continue
            bound += host_s > device_s
            of = f"{classes[sample.kind, sample.shape_key].title}, {sample_text(sample)}, {name}"
            tip = f"{of}: {format_seconds(device_s)} on the device, {format_seconds(host_s)} on the host"
            dots.append(Dot(x=device_s, y=host_s, tip=tip))
    if not dots:
        return None
    caption = f"{bound} of {len(dots)} passes take the host longer than the device: above the line it waits."
    cloud = Curve(colour="mark_0", dots=tuple(dots))
    svg = draw_scatter([cloud], *curves.HOST, f"Host time over device time: {caption}")
    return Figure(title="Host time", svg=svg, caption=caption)


def _against(group: str, colour: str, of: str, measured: float, predicted: float) -> Against:
    return Against(group=group, colour=colour, of=of, measured=float(measured), predicted=float(predicted))


def _scatter(
    title: str, pairs: Sequence[Against], axes: tuple[Axis, Axis], told: Callable[[float], str]
) -> Figure | None:
    """Predicted over measured, a colour a group; None where there is nothing to draw."""
    drawn = [pair for pair in pairs if pair.measured > 0 and pair.predicted > 0]
    if not drawn:
        return None
    groups = {pair.group: pair.colour for pair in drawn}
    off = [pair.predicted / pair.measured - 1 for pair in drawn]
    within = sum(abs(error) <= CLOSE for error in off) / len(off)
    middle = signed_percent(median(off))
    caption = (
        f"By the formula over measured, {len(drawn)} values: {percent(within, 0)} of them within "
        f"{percent(CLOSE, 0)}, the median {middle}. Plans use the samples where there are some."
    )
    clouds = [
        Curve(colour=colour, dots=tuple(_dot(pair, told) for pair in drawn if pair.group == group))
        for group, colour in groups.items()
    ]
    return Figure(
        title=title,
        svg=draw_scatter(clouds, *axes, f"{title}: {caption}"),
        caption=caption,
        legend=tuple(LegendItem(colour=c, title=group, shape="dot") for group, c in groups.items()),
    )


def _dot(pair: Against, told: Callable[[float], str]) -> Dot:
    tip = f"{pair.of}: {told(pair.measured)} measured, {told(pair.predicted)} by the formula"
    return Dot(x=pair.measured, y=pair.predicted, tip=tip)
