"""`plan solve`: the best plan for a model, a workload and a cluster, with its certificate."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.cli import ENDS
from planner.commands.shared.options import ProblemOptions, problem_options
from planner.commands.shared.search_options import SearchRequest, search_options

if TYPE_CHECKING:
    from planner.job.problem import PlanningProblem
    from planner.strategy.plan import Plan

TIME_LIMIT_EXIT = 5


@click.command()
@problem_options
@search_options
@click.option(
    "--max-tp",
    type=click.IntRange(min=1),
    metavar="N",
    help="The largest tensor-parallel degree to use.",
)
@click.option(
    "--rehearse",
    type=click.IntRange(min=1),
    metavar="K",
    help="Run single ranks of the K best plans on this machine, as `plan rehearse` does, and take the best "
    "by what they show.",
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
    search: SearchRequest,
    max_tp: int | None,
    rehearse: int | None,
    output: Path | None,
) -> int:
    """Find the best plan and prove how good it is."""
    collect_no_cycles()
    begun_s = time.monotonic()
    import dataclasses

    from planner.commands.shared.goal import read_goal
    from planner.commands.shared.infeasible import tell_infeasible
    from planner.commands.shared.problem import held_to_runtime, read_problem
    from planner.commands.shared.text import print_json
    from planner.foundation.errors import InfeasibleError
    from planner.search.solve_for import solve_for
    from planner.strategy.plan import encode_plan, save_plan

    time_limit_s = search.limit_s
    asked = held_to_runtime(read_problem(options), options.engine)
    problem = with_max_tp(asked.problem, max_tp)
    goal = read_goal(search.objective, search.deadline, search.budget, problem)
    chosen = search.options(problem, least_top=(rehearse or 1) - 1)
    try:
        plan = solve_for(problem, chosen, goal)
    except InfeasibleError:
        if goal.plain:
            return tell_infeasible(problem, chosen, begun_s, as_json=as_json)
        raise
    plan = dataclasses.replace(plan, profiles=asked.profiles)
    if rehearse is not None:
        gc.enable()
        plan = _rehearsed(plan, problem, rehearse)
    check_certificate(plan)
    if output is not None:
        save_plan(plan, output)
        print(f"wrote {output}", file=sys.stderr)
    if as_json:
        print_json(encode_plan(plan))
    else:
        click.echo(_text(plan, asked.basis))
    return TIME_LIMIT_EXIT if ended_by_time(plan, time_limit_s) else 0


def collect_no_cycles() -> None:
    """Until the command ends: a search makes many small objects and hardly a cycle."""
    gc.disable()
    context = click.get_current_context()
    if context.obj != ENDS:
        context.call_on_close(gc.enable)


def _text(plan: Plan, basis: str) -> str:
    """The answer for people, and its rehearsal where there was one."""
    from planner.commands.shared.plan_text import plan_text
    from planner.commands.shared.rehearsal_text import rehearsal_text

    text = plan_text(plan, basis)
    return text if plan.rehearsal is None else f"{text}\n\n{rehearsal_text(plan, basis)}"


def _rehearsed(plan: Plan, problem: PlanningProblem, count: int) -> Plan:
    """The best of the plan and its runners-up by what single ranks of them show on this machine."""
    import dataclasses

    from planner.commands.shared.with_torch import require_torch
    from planner.commands.splitting.rehearsed_choice import best_rehearsed

    require_torch("solve --rehearse")
    answered = dataclasses.replace(problem, cluster=plan.cluster)
    return best_rehearsed(plan, answered, count, lambda text: click.echo(f"rehearsing {text}", err=True))


def check_certificate(plan: Plan) -> None:
    """Raises CheckError where what the answer claims does not hold."""
    from planner.foundation.errors import CheckError
    from planner.strategy.plan_check import certificate_faults

    faults = certificate_faults(plan)
    if faults:
        raise CheckError("the certificate of the answer does not hold: " + "; ".join(faults))


def with_max_tp(problem: PlanningProblem, max_tp: int | None) -> PlanningProblem:
    """The problem, held to a largest tensor-parallel degree."""
    import dataclasses

    return dataclasses.replace(problem, limits=dataclasses.replace(problem.limits, max_tp=max_tp))


def ended_by_time(plan: Plan, time_limit_s: float | None) -> bool:
    """Whether the time limit ended the search that made a plan."""
    if plan.objective is not None:
        return plan.objective.status == "time_limit"
    from planner.search.solve import FINISHING

    assert plan.solver is not None
    if time_limit_s is None or plan.solver.status != "gap":
        return False
    return plan.solver.wall_s >= (1 - FINISHING) * time_limit_s
