"""The plans that ran, predicted against measured: their order in words, two charts, and all numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes, format_seconds
from planner.report import charts
from planner.report.run_record import DISTINCT, ComparisonRow, judge_order
from planner.report.sections import MEASURED, Figure, LegendItem
from planner.report.words import Table, percent, signed_percent


@frozen
class Verification:
    """Several plans, predicted and measured: whether their order was right, two charts and all numbers."""

    sentence: str
    figures: tuple[Figure, ...]
    table: Table


def verify(rows: tuple[ComparisonRow, ...]) -> Verification:
    """The comparison of the plans that were run."""
    titles = _distinct_titles(rows)
    order = judge_order(rows)
    times = [(row.predicted_step_time_s, row.measured_step_time_s) for row in rows]
    peaks = [(row.predicted_peak_memory_bytes, row.measured_peak_memory_bytes) for row in rows]
    factor, time_unit = charts.time_unit(max(measured for _, measured in times))
    divisor, memory_unit = charts.memory_unit(max(measured for _, measured in peaks))
    return Verification(
        sentence=_order_words(order.pairs, order.right, order.regret),
        figures=(
            _pairs_figure("Step time", titles, times, factor, time_unit),
            _pairs_figure("Peak memory of the fullest device", titles, peaks, 1 / divisor, memory_unit),
        ),
        table=_comparison_table(titles, rows),
    )


def _pairs_figure(
    title: str, rows: list[str], values: Sequence[tuple[float, float]], factor: float, unit: str
) -> Figure:
    pairs = [
        charts.Pair(row=row, predicted=predicted * factor, measured=measured * factor)
        for row, (predicted, measured) in zip(rows, values, strict=True)
    ]
    return Figure(
        title=title,
        svg=charts.draw_pairs(pairs, unit, f"{title} of each plan that ran, predicted and measured."),
        legend=(LegendItem(colour="predicted", title="predicted", shape="dot"), MEASURED),
    )


def _distinct_titles(rows: tuple[ComparisonRow, ...]) -> list[str]:
    """Labels, the chosen one starred; repeated ones numbered, since a chart's row is known by its title."""
    counts = Counter(row.label for row in rows)
    return [
        ("★ " if row.chosen else "") + row.label + (f" #{number}" if counts[row.label] > 1 else "")
        for number, row in enumerate(rows, 1)
    ]


def _order_words(pairs: int, right: int, regret: float) -> str:
    if pairs == 0:
        order = (
            f"No two plans differ by more than {percent(DISTINCT, 0)} as measured: their order says nothing."
        )
    else:
        count = "all" if right == pairs else str(right)
        order = (
            f"Of {pairs} pair{'s' if pairs > 1 else ''} of plans that differ by more than "
            f"{percent(DISTINCT, 0)} as measured, {count} were predicted in the right order."
        )
    chosen = "The chosen plan is the fastest measured."
    if regret > 0:
        chosen = f"The chosen plan is {percent(regret)} slower than the fastest measured."
    return f"{order} {chosen}"


def _comparison_table(titles: list[str], rows: tuple[ComparisonRow, ...]) -> Table:
    return Table(
        header=(
            "plan",
            "strategy",
            "predicted step",
            "measured step",
            "error",
            "predicted peak",
            "measured peak",
            "error",
        ),
        rows=tuple(
            (
                title,
                row.strategy,
                format_seconds(row.predicted_step_time_s),
                format_seconds(row.measured_step_time_s),
                signed_percent(row.time_error),
                format_bytes(row.predicted_peak_memory_bytes),
                format_bytes(row.measured_peak_memory_bytes),
                signed_percent(row.memory_error),
            )
            for title, row in zip(titles, rows, strict=True)
        ),
        numbers=(2, 8),
        strong_rows=tuple(index for index, row in enumerate(rows) if row.chosen),
    )
