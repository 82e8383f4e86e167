"""`plan compare`: dollars against days, for devices, counts, providers and ways to pay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.hardware.sizing_options import sizing_options

if TYPE_CHECKING:
    from planner.sizing.comparison import Comparison


@click.command()
@sizing_options
@click.option(
    "--cluster",
    "clusters",
    multiple=True,
    metavar="CLUSTER",
    help="A cluster of one kind of node to look at, such as 8*p5.48xlarge or 16x8:h100-sxm-80gb; repeat for "
    "several. Default: offers by the options above.",
)
@click.option("--all", "show_all", is_flag=True, help="Show every option, not only the best of each offer.")
@click.option(
    "--csv",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write all options as a table.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write one page that needs no network: the plot, the table, what it all rests on.",
)
def compare(
    asked: dict[str, Any],
    as_json: bool,
    clusters: tuple[str, ...],
    show_all: bool,
    csv: Path | None,
    html: Path | None,
) -> int:
    """Hardware choices for one run: dollars against days, and which no other beats."""
    import sys

    from planner.commands.hardware.sizing_document import comparison_document, options_csv
    from planner.commands.hardware.sizing_options import read_sizing
    from planner.commands.hardware.sizing_progress import showing_progress
    from planner.commands.hardware.sizing_text import comparison_text, nothing_text
    from planner.commands.shared.text import print_json
    from planner.foundation.decode import write_atomic
    from planner.foundation.errors import InfeasibleError
    from planner.sizing.search import compare as compared

    request, market = read_sizing(asked, least=False, clusters=clusters)
    with showing_progress("offers") as progress:
        found = compared(request, market, progress)
    for path, written in ((csv, options_csv), (html, _page)):
        if path is not None:
            write_atomic(path, written(found))
            print(f"wrote {path}", file=sys.stderr)
    if as_json:
        print_json(comparison_document(found), rows="options")
    elif found.options:
        click.echo(comparison_text(found, show_all=show_all))
    if not any(option.meets for option in found.options):
        raise InfeasibleError(nothing_text(found))
    return 0


def _page(found: Comparison) -> str:
    from planner.report.comparison_page import render_comparison

    return render_comparison(found)
