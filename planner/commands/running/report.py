"""`plan report`: the page of a plan or a run, and its Perfetto trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import json_option

if TYPE_CHECKING:
    from planner.report.run_record import ReportInput


@click.command()
@click.argument("source", metavar="RUN_OR_PLAN", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page. Default: report.html in the run folder, or beside the plan.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The trace for ui.perfetto.dev. Default for a run: trace.json beside the page.",
)
@json_option
def report(source: Path, output: Path | None, trace: Path | None, as_json: bool) -> None:
    """Write one offline HTML page about a plan or a run, and a Perfetto trace.

    RUN_OR_PLAN is a plan.json or a folder that `plan train` or `plan demo` wrote.
    """
    from planner.commands.shared.text import print_json
    from planner.report.run_record import load_report_input

    document = load_report_input(source)
    folder = source if source.is_dir() else source.parent
    page_path = output or folder / "report.html"
    if trace is None and source.is_dir():
        trace = page_path.parent / "trace.json"
    write_report(document, page_path, trace)
    dollars = run_dollars(document)
    if as_json:
        told = {} if dollars is None else {"dollars": dollars}
        print_json({"page": str(page_path), "trace": str(trace) if trace else None, **told})
        return
    click.echo(f"page   {page_path}")
    if trace is not None:
        click.echo(f"trace  {trace} (open it at ui.perfetto.dev or chrome://tracing)")
    if dollars is not None:
        click.echo(f"cost   {_told(dollars, document.plan.cluster.name)}")


def _told(dollars: dict[str, Any], cluster: str) -> str:
    """Dollars spent beside those predicted, in words."""
    from planner.foundation.units import format_usd

    if dollars["spent_usd"] is None and dollars["predicted_usd"] is None:
        return f"unknown: {cluster} has no price"
    return (
        f"{format_usd(dollars['spent_usd'])} spent in {dollars['steps']:,} steps, "
        f"{format_usd(dollars['predicted_usd'])} predicted for them; "
        f"{format_usd(dollars['expected_usd'])} expected in all"
    )


def run_dollars(document: ReportInput) -> dict[str, Any] | None:
    """Dollars of a run so far beside those predicted for its steps; each None where it is not known.

    None for a plan alone, and for files that say neither a price nor how far the run came.
    """
    from planner.strategy.plan import usd_per_hour

    run = document.run
    if run is None or not run.steps_done:
        return None
    if usd_per_hour(document.plan) is None and (run.summary is None or run.summary.last_step is None):
        return None
    return {
        "steps": run.steps_done,
        "spent_usd": run.cost_usd,
        "predicted_usd": run.predicted_cost_usd(document.plan),
        "expected_usd": run.expected_cost_usd,
    }


def write_report(document: ReportInput, page_path: Path, trace_path: Path | None) -> None:
    """Writes the page, and the trace where a path is given."""
    from planner.foundation.decode import write_atomic
    from planner.report.page import render_page
    from planner.report.timeline import build_trace, print_trace, slices_of

    write_atomic(page_path, render_page(document))
    if trace_path is None:
        return
    measured = slices_of(document.run.timeline) if document.run else ()
    trace = build_trace(slices_of(document.plan.timeline), measured, document.plan.model.name)
    write_atomic(trace_path, print_trace(trace))
