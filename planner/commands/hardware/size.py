"""`plan size`: the smallest and the cheapest cluster for a run, or what a cluster can do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.hardware.sizing_options import sizing_options

if TYPE_CHECKING:
    from planner.sizing.comparison import Option


@click.command()
@sizing_options
@click.option(
    "--cluster",
    metavar="CLUSTER",
    help="What can be done with this: the days of the run, the longest sequence, the largest model. Here "
    "the soonest plan is also the cheapest, whatever --objective says.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the plan of the best option to FILE, searched for like `plan solve` does.",
)
def size(asked: dict[str, Any], as_json: bool, cluster: str | None, output: Path | None) -> int:
    """The smallest and the cheapest cluster that do a run by a deadline, for a budget."""
    import sys

    from planner.commands.hardware.sizing_document import size_document
    from planner.commands.hardware.sizing_options import read_sizing
    from planner.commands.hardware.sizing_progress import showing_progress
    from planner.commands.hardware.sizing_text import nothing_text, size_text
    from planner.commands.shared.text import print_json
    from planner.foundation.errors import InfeasibleError
    from planner.job.objective import Minimise
    from planner.sizing.comparison import answers_of
    from planner.sizing.search import compare
    from planner.sizing.sized import whole_plan
    from planner.strategy.plan import save_plan

    if cluster is not None:
        return _with(cluster, asked, output, as_json=as_json)
    request, market = read_sizing(asked, least=asked["objective"] == "cost")
    with showing_progress("offers") as progress:
        found = compare(request, market, progress)
    answers = answers_of(found)
    if as_json:
        print_json(size_document(found, answers), rows="options")
    elif answers.soonest is not None:
        click.echo(size_text(found, answers))
    best: Option | None = answers.soonest
    if request.goal.minimise is Minimise.COST:
        best = answers.cheapest or answers.soonest
    if best is None:
        raise InfeasibleError(nothing_text(found))
    if output is not None:
        save_plan(whole_plan(request, market, best), output)
        print(f"wrote {output}: {best.name}", file=sys.stderr)
    return 0


def _with(cluster: str, asked: dict[str, Any], output: Path | None, *, as_json: bool) -> int:
    """What a given cluster can do."""
    import sys

    from planner.commands.hardware.ability_text import ability_document, ability_text
    from planner.commands.hardware.sizing_options import read_on_cluster
    from planner.commands.shared.text import print_json
    from planner.foundation.errors import InfeasibleError
    from planner.sizing.ability import ability_of
    from planner.strategy.plan import save_plan

    given = read_on_cluster(cluster, asked)
    found = ability_of(given.problem)
    if as_json:
        print_json(ability_document(found, given))
    else:
        click.echo(ability_text(found, given))
    if found.plan is None:
        raise InfeasibleError(found.why_not)
    if output is not None:
        save_plan(found.plan, output)
        print(f"wrote {output}", file=sys.stderr)
    return 0
