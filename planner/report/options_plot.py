"""The plot of dollars against days: where each option stands, in percent of a box of any size.

Both axes are logarithmic. Percentages let one drawing fit a phone, a desk and a sheet of paper with text of
one size; the template draws them as SVG, so a page of thousands of points is made without a browser.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S, format_count
from planner.report.options_words import limit_days, provider_of, provider_title, tip, usd
from planner.sizing.comparison import Comparison, Option

MARGIN = 1.18
"""Room beyond the outermost points, as a factor."""

FAR = 30.0
"""A limit beyond so many times the outermost option is told in words: it would press the marks together."""

SHAPES = (
    "M0-5A5 5 0 1 1 0 5A5 5 0 1 1 0-5Z",
    "M-4.6-4.6H4.6V4.6H-4.6Z",
    "M0-5.8L5.4 4.2H-5.4Z",
    "M0-6.2L5.4 0L0 6.2L-5.4 0Z",
    "M0 5.8L5.4-4.2H-5.4Z",
    "M-1.9-5.6H1.9V-1.9H5.6V1.9H1.9V5.6H-1.9V1.9H-5.6V-1.9H-1.9Z",
    "M0-6.2L1.6-2H6L2.4.8L3.8 5.4L0 2.6L-3.8 5.4L-2.4.8L-6-2H-1.6Z",
    "M0-5.8L5.5-1.8L3.4 4.7H-3.4L-5.5-1.8Z",
)
"""Outlines around the origin: a circle, a square, triangles, a diamond, a cross, a star, a pentagon."""


BEYOND = 30.0
"""Options that take or cost more than so many times the most of the Pareto front are told in words: an
option that is interrupted without end takes millions of days."""


@frozen
class PlotMark:
    """How the points of one provider look; `shape` is an index of SHAPES and of the mark colours."""

    provider: str
    title: str
    shape: int
    count: int


@frozen
class Point:
    """An option in the plot: `row` is its place in the comparison; `x` and `y` are percent from top left."""

    row: int
    x: float
    y: float
    shape: int
    front: bool
    meets: bool
    tip: str


@frozen
class Tick:
    """A line of the grid; `minor` ones have no label where there is little room."""

    at: float
    text: str
    minor: bool


@frozen
class Segment:
    """A piece of a line, in percent."""

    x1: float
    y1: float
    x2: float
    y2: float


@frozen
class Limit:
    """The deadline or the budget as a line; `at` is None where it lies too far away to be drawn."""

    at: float | None
    text: str


@frozen
class Plot:
    """The whole plot. Points are in drawing order: the Pareto front lies on top."""

    points: tuple[Point, ...]
    front: tuple[Segment, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    deadline: Limit | None
    budget: Limit | None
    marks: tuple[PlotMark, ...]
    unpriced: int
    beyond: int
    pale: bool
    label: str


@frozen
class LogAxis:
    """A logarithmic scale from `low` to `high`."""

    low: float
    high: float

    def percent(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 100 at the high end."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(100 * share, 2)


def build_plot(comparison: Comparison) -> Plot | None:
    """The plot of all options with a price and a time; None where there are none."""
    priced = [(row, o) for row, o in enumerate(comparison.options) if (o.cost_usd or 0.0) > 0 and o.days > 0]
    shown = within_reach(priced)
    if not shown:
        return None
    goal = comparison.goal
    deadline_days = None if goal.deadline_s is None else goal.deadline_s / DAY_S
    x_axis = axis_of([option.days for _, option in shown], deadline_days)
    y_axis = axis_of([option.cost_usd or 0.0 for _, option in shown], goal.budget_usd)
    marks = marks_of([option for _, option in shown])
    shape = {mark.provider: mark.shape for mark in marks}
    last = len(SHAPES) - 1
    points = [
        Point(
            row=row,
            x=x_axis.percent(option.days),
            y=round(100 - y_axis.percent(option.cost_usd or 0.0), 2),
            shape=shape.get(provider_of(option), last),
            front=option.pareto,
            meets=option.meets,
            tip=tip(option),
        )
        for row, option in shown
    ]
    front = [point for point in points if point.front]
    return Plot(
        points=tuple(sorted(points, key=lambda p: (p.front, p.meets, p.row))),
        front=staircase(front),
        x_ticks=log_ticks(x_axis, _day_label),
        y_ticks=tuple(
            Tick(at=round(100 - tick.at, 2), text=tick.text, minor=tick.minor)
            for tick in log_ticks(y_axis, _usd_label)
        ),
        deadline=_limit(
            deadline_days, x_axis, "deadline", "" if goal.deadline_s is None else limit_days(goal.deadline_s)
        ),
        budget=_limit(goal.budget_usd, y_axis, "budget", usd(goal.budget_usd), upward=True),
        marks=marks,
        unpriced=len(comparison.options) - len(priced),
        beyond=len(priced) - len(shown),
        pale=not all(point.meets for point in points),
        label=f"Dollars against days of {len(shown):,} options, {len(front):,} of them on the Pareto front",
    )


def within_reach(priced: Sequence[tuple[int, Option]]) -> list[tuple[int, Option]]:
    """Those that are not far beyond the Pareto front."""
    front = [option for _, option in priced if option.pareto] or [option for _, option in priced]
    most_days = BEYOND * max((option.days for option in front), default=0.0)
    most_usd = BEYOND * max((option.cost_usd or 0.0 for option in front), default=0.0)
    return [each for each in priced if each[1].days <= most_days and (each[1].cost_usd or 0.0) <= most_usd]


def axis_of(values: Sequence[float], limit: float | None) -> LogAxis:
    """A scale over all values, and over a limit that is not far from them."""
    low, high = min(values), max(values)
    if limit is not None and low / FAR <= limit <= high * FAR:
        low, high = min(low, limit), max(high, limit)
    return LogAxis(low=low / MARGIN, high=high * MARGIN)


def marks_of(options: Sequence[Option]) -> tuple[PlotMark, ...]:
    """A mark for each provider, those with most options first; the last mark is for all others."""
    counts = Counter(provider_of(option) for option in options)
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    own = ordered if len(ordered) <= len(SHAPES) else ordered[: len(SHAPES) - 1]
    marks = [
        PlotMark(provider=name, title=provider_title(name), shape=shape, count=counts[name])
        for shape, name in enumerate(own)
    ]
    others = sum(counts[name] for name in ordered[len(own) :])
    if others:
        marks.append(PlotMark(provider="", title="other providers", shape=len(SHAPES) - 1, count=others))
    return tuple(marks)


def staircase(front: Sequence[Point]) -> tuple[Segment, ...]:
    """Edge of what is reached: level from each point to the days of the next, then down to its dollars."""
    ordered = sorted({(point.x, point.y) for point in front}, key=lambda place: (place[0], -place[1]))
    segments = []
    for (x1, y1), (x2, y2) in itertools.pairwise(ordered):
        segments.append(Segment(x1=x1, y1=y1, x2=x2, y2=y1))
        segments.append(Segment(x1=x2, y1=y1, x2=x2, y2=y2))
    return tuple(segment for segment in segments if (segment.x1, segment.y1) != (segment.x2, segment.y2))


MOST_TICKS = 8
STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0))
FINE = tuple(round(1 + 0.1 * step, 1) for step in range(90))


def log_ticks(axis: LogAxis, words: Callable[[float], str]) -> tuple[Tick, ...]:
    """Round values of a scale: as many as fit, every other one minor where there are more than four."""
    chosen = _round_values(axis, STEPS[0])
    for steps in STEPS[1:]:
        finer = _round_values(axis, steps)
        if len(finer) > MOST_TICKS and len(chosen) >= 3:
            break
        chosen = finer
    if len(chosen) < 3:
        finer = _round_values(axis, FINE)
        stride = max(1, len(finer) // 5)
        chosen = finer[::stride] if len(finer) >= 3 else chosen
    stride = -(-len(chosen) // MOST_TICKS)
    chosen = chosen[::stride]
    many = len(chosen) > 4
    return tuple(
        Tick(at=axis.percent(value), text=words(value), minor=many and index % 2 == 1)
        for index, value in enumerate(chosen)
    )


def _day_label(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _usd_label(value: float) -> str:
    return f"${format_count(value)}"


def _round_values(axis: LogAxis, steps: Sequence[float]) -> list[float]:
    first, last = math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high))
    values = [step * 10.0**decade for decade in range(first, last + 1) for step in steps]
    return [value for value in values if axis.low <= value <= axis.high]


def _limit(
    value: float | None, axis: LogAxis, name: str, words: str, *, upward: bool = False
) -> Limit | None:
    if value is None:
        return None
    if not axis.low <= value <= axis.high:
        return Limit(at=None, text=f"{name} {words}, outside the plot")
    at = axis.percent(value)
    return Limit(at=round(100 - at, 2) if upward else at, text=f"{name} {words}")
