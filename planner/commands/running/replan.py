"""`plan replan`: a new plan for what is left of a cluster, with which a run goes on from its checkpoint."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import place_options
from planner.commands.shared.search_options import SearchRequest, search_options

if TYPE_CHECKING:
    from planner.commands.running.replan_run import RunToGoOn
    from planner.commands.shared.problem import Asked
    from planner.job.objective import Goal
    from planner.strategy.plan import Plan


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@place_options
@search_options
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Steps of the whole run. Default: as its latest launch was told, else the workload's tokens.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write the new plan.",
)
def replan(
    folder: Path,
    place: dict[str, Any],
    as_json: bool,
    search: SearchRequest,
    steps: int | None,
    output: Path | None,
) -> int:
    """Plan the rest of a run for another cluster, from its newest whole checkpoint.

    RUN is a folder that `plan train` wrote. Model, batch, sequence, optimizer and number format stay, so that
    data and learning rate go on as they were. Deadline and budget are of the whole run: what it has taken is
    taken off. Nothing in RUN is changed.
    """
    from planner.commands.running.replan_answer import Replanned
    from planner.commands.running.replan_problem import goal_of_run, problem_of_run
    from planner.commands.running.replan_run import read_run
    from planner.commands.running.replan_text import replan_document, replan_text
    from planner.commands.shared.infeasible import tell_infeasible
    from planner.commands.shared.text import print_json
    from planner.commands.splitting.solve import TIME_LIMIT_EXIT, collect_no_cycles, ended_by_time
    from planner.foundation.errors import InfeasibleError

    collect_no_cycles()
    begun_s = time.monotonic()
    run = read_run(folder, steps)
    _check_output(output, folder)
    asked, remarks = problem_of_run(run, place)
    goal = goal_of_run(run, search, asked.problem)
    if goal.budget_usd is not None and run.spent_usd is None:
        remarks += ("what the run has cost is not known, and is not taken off the budget",)
    chosen = search.options(asked.problem)
    try:
        plan = _solved(run, asked, goal, search)
    except InfeasibleError:
        _tell(remarks)
        if goal.plain:
            return tell_infeasible(asked.problem, chosen, begun_s, as_json=as_json, goes_on=True)
        raise
    if output is not None:
        from planner.strategy.plan import save_plan

        save_plan(plan, output)
        print(f"wrote {output}", file=sys.stderr)
    answer = Replanned(run, plan, asked, remarks, output, clock=not search.reproducible)
    if as_json:
        _tell(remarks)
        print_json(replan_document(answer))
    else:
        click.echo(replan_text(answer))
    return TIME_LIMIT_EXIT if ended_by_time(plan, chosen.time_limit_s) else 0


def _solved(run: RunToGoOn, asked: Asked, goal: Goal, search: SearchRequest) -> Plan:
    """The best plan for what is left of the run. Raises InfeasibleError."""
    import dataclasses

    from planner.advice.replanning import solve_rest
    from planner.commands.splitting.solve import check_certificate

    plan = solve_rest(asked.problem, search.options(asked.problem), goal, run.rest())
    plan = dataclasses.replace(plan, profiles=asked.profiles)
    check_certificate(plan)
    return plan


def _tell(remarks: tuple[str, ...]) -> None:
    for remark in remarks:
        click.echo(f"note: {remark}", err=True)


def _check_output(output: Path | None, folder: Path) -> None:
    """Raises InputError where the answer would take the place of the run's own plan."""
    from planner.foundation.errors import InputError, Problem

    own = folder / "plan.json"
    if output is not None and output.resolve() == own.resolve():
        fault = "is the plan that the run has. `plan train --resume` replaces it and keeps it with its steps."
        raise InputError(Problem(where=f"-o {output}", fault=fault, fix="name another file"))
