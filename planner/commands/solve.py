"""`plan solve`: the best plan for a model, a workload and a cluster, with its certificate."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from planner.commands.options import ProblemOptions, problem_options

TIME_LIMIT_EXIT = 5
DEFAULT_TIME_LIMIT_S = 60.0


@click.command()
@problem_options
@click.option("--fix", "fixed", multiple=True, metavar="KEY=VALUE", help="Pin a choice, such as tp=8.")
@click.option(
    "--time-limit",
    "time_limit_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Stop the search then and return the best plan so far with its gap (exit code 5). "
    "Default: 60, or none with --reproducible.",
)
@click.option(
    "--top",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    metavar="K",
    help="Runners-up to keep.",
)
@click.option(
    "--reproducible", is_flag=True, help="Use no clock: the same inputs give the same bytes everywhere."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write plan.json.",
)
def solve(
    options: ProblemOptions,
    as_json: bool,
    fixed: tuple[str, ...],
    time_limit_s: float | None,
    top: int,
    reproducible: bool,
    output: Path | None,
) -> int:
    """Find the best plan and prove how good it is."""
    from planner.commands.infeasible import tell_infeasible
    from planner.commands.plan_text import plan_text
    from planner.commands.problem import read_problem
    from planner.commands.text import print_json
    from planner.errors import InfeasibleError, InputError, Problem
    from planner.plan import encode_plan, save_plan
    from planner.search.solve import SolveOptions
    from planner.search.solve import solve as search
    from planner.search.space import parse_pins

    if reproducible and time_limit_s is not None:
        raise InputError(
            Problem(
                where="--reproducible",
                fault="uses no clock, and --time-limit does.",
                fix="leave one of them out",
            )
        )
    asked = read_problem(options)
    if time_limit_s is None and not reproducible:
        time_limit_s = DEFAULT_TIME_LIMIT_S
    chosen = SolveOptions(
        pins=parse_pins(fixed), time_limit_s=time_limit_s, top=top, reproducible=reproducible
    )
    try:
        plan = search(asked.problem, chosen)
    except InfeasibleError:
        return tell_infeasible(asked.problem, chosen, as_json=as_json)
    if output is not None:
        save_plan(plan, output)
        print(f"wrote {output}", file=sys.stderr)
    if as_json:
        print_json(encode_plan(plan))
    else:
        click.echo(plan_text(plan, asked.basis))
    assert plan.solver is not None
    out_of_time = time_limit_s is not None and plan.solver.wall_s >= time_limit_s
    return TIME_LIMIT_EXIT if plan.solver.status == "gap" and out_of_time else 0
