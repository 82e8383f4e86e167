"""The page of `plan compare`: which hardware for one run, as one HTML document that needs nothing but itself.

Like the report, its content security policy forbids every fetch and the template escapes all text.
"""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.report import options_bars as bars
from planner.report import options_tables as tables
from planner.report import options_words as words
from planner.report.charts import COLOURS, MARK_COLOURS, Colour
from planner.report.options_plot import SHAPES, Plot, build_plot
from planner.report.page import template
from planner.report.words import Table, Tile
from planner.sizing.comparison import Comparison


@frozen
class OptionsPage:
    """All that the template shows. Tables without rows, and None, leave their part out."""

    model: str
    run: str
    headline: str
    warnings: tuple[str, ...]
    tiles: tuple[Tile, ...]
    command: str
    side_by_side: Table
    plot: Plot | None
    shapes: tuple[str, ...]
    rows: tuple[tables.Row, ...]
    columns: tuple[tuple[str, str], ...]
    providers: tuple[tuple[str, str], ...]
    devices: tuple[str, ...]
    pricings: tuple[str, ...]
    memory: tuple[bars.Meter, ...]
    step: bars.Bars | None
    losses: bars.Bars | None
    energy: Table
    sensitivity: Table
    sensitivity_of: str
    break_even: Table
    coverage: str
    assumptions: Table
    prices: Table
    left_out: Table
    not_modelled: tuple[str, ...]
    created: str
    version: str
    colours: tuple[Colour, ...]


def render_comparison(comparison: Comparison) -> str:
    """The comparison as HTML."""
    return template("options.html.j2").render(page=build_options_page(comparison), web=None)


def build_options_page(comparison: Comparison) -> OptionsPage:
    """Everything that the page says, in order."""
    picks = words.pick(comparison)
    chosen = tables.few(comparison, picks)
    rows = tables.option_rows(comparison)
    shown = picks.best or picks.cheapest or picks.fastest
    return OptionsPage(
        model=comparison.model,
        run=words.run_sentence(comparison),
        headline=words.headline(comparison, picks),
        warnings=words.warnings(comparison, picks),
        tiles=words.pick_tiles(comparison, picks) if comparison.options else (),
        command=words.solve_command(comparison, picks.best) if picks.best else "",
        side_by_side=tables.side_by_side(comparison),
        plot=build_plot(comparison),
        shapes=SHAPES,
        rows=rows,
        columns=tables.COLUMNS,
        providers=tuple(sorted({(row.provider, row.provider_title) for row in rows})),
        devices=tuple(sorted({row.device for row in rows})),
        pricings=tuple(sorted({row.pricing for row in rows})),
        memory=bars.memory_meters(chosen),
        step=bars.step_bars(chosen),
        losses=bars.loss_bars(chosen),
        energy=tables.energy_table(chosen),
        sensitivity=tables.sensitivity_table(comparison),
        sensitivity_of=shown.name if shown else "",
        break_even=tables.break_even_table(comparison),
        coverage=tables.coverage_words(shown) if shown else "",
        assumptions=tables.assumption_table(comparison),
        prices=tables.price_table(comparison.options),
        left_out=tables.left_out_table(comparison),
        not_modelled=comparison.not_modelled,
        created=comparison.created,
        version=comparison.version,
        colours=(*COLOURS, *MARK_COLOURS),
    )
