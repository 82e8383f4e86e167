"""`plan solve`: the best plan for a model, a workload and a cluster, with its certificate."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.cli import ENDS
from planner.commands.options import ProblemOptions, problem_options

if TYPE_CHECKING:
    from planner.plan import Plan
    from planner.problem import PlanningProblem
    from planner.search.space import Pins

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
    "--gap",
    "gap_tolerance",
    type=click.FloatRange(min=0, max=1),
    default=0.005,
    show_default=True,
    metavar="SHARE",
    help="Stop when nothing left can be faster by more than this share of the step time.",
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
    "--max-tp",
    type=click.IntRange(min=1),
    metavar="N",
    help="The largest tensor-parallel degree to use.",
)
@click.option(
    "--objective",
    type=click.Choice(["time", "cost"]),
    help="Least time (the default), or least dollars for all --tokens: then on as many of the cluster's "
    "nodes as pay.",
)
@click.option("--deadline", metavar="DAYS", help="The whole run ends within: 30 (days), 30d, 12h.")
@click.option(
    "--budget",
    metavar="USD",
    help="The whole run costs at most so many dollars, such as 50000 or 1.5M: on as many nodes as that pays.",
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
    fixed: tuple[str, ...],
    time_limit_s: float | None,
    gap_tolerance: float,
    top: int,
    reproducible: bool,
    max_tp: int | None,
    objective: str | None,
    deadline: str | None,
    budget: str | None,
    rehearse: int | None,
    output: Path | None,
) -> int:
    """Find the best plan and prove how good it is."""
    _collect_no_cycles()
    import dataclasses

    from planner.commands.goal import read_goal
    from planner.commands.infeasible import tell_infeasible
    from planner.commands.problem import held_to_runtime, read_problem
    from planner.commands.text import print_json
    from planner.errors import InfeasibleError
    from planner.plan import encode_plan, save_plan
    from planner.search.objective import solve_for
    from planner.search.solve import SolveOptions

    time_limit_s = _time_limit_s(time_limit_s, reproducible=reproducible)
    asked = held_to_runtime(read_problem(options), options.engine)
    problem = with_max_tp(asked.problem, max_tp)
    goal = read_goal(objective, deadline, budget, problem)
    chosen = SolveOptions(
        pins=pins_for(fixed, problem),
        time_limit_s=time_limit_s,
        top=max(top, (rehearse or 1) - 1),
        gap_tolerance=gap_tolerance,
        reproducible=reproducible,
    )
    try:
        plan = solve_for(problem, chosen, goal)
    except InfeasibleError:
        if goal.plain:
            return tell_infeasible(problem, chosen, as_json=as_json)
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
    return TIME_LIMIT_EXIT if _ended_by_time(plan, time_limit_s) else 0


def _collect_no_cycles() -> None:
    """Until the command ends: a search makes many small objects and hardly a cycle."""
    gc.disable()
    context = click.get_current_context()
    if context.obj != ENDS:
        context.call_on_close(gc.enable)


def _text(plan: Plan, basis: str) -> str:
    """The answer for people, and its rehearsal where there was one."""
    from planner.commands.plan_text import plan_text
    from planner.commands.rehearsal_text import rehearsal_text

    text = plan_text(plan, basis)
    return text if plan.rehearsal is None else f"{text}\n\n{rehearsal_text(plan, basis)}"


def _rehearsed(plan: Plan, problem: PlanningProblem, count: int) -> Plan:
    """The best of the plan and its runners-up by what single ranks of them show on this machine."""
    import dataclasses

    from planner.commands.rehearsed_choice import best_rehearsed
    from planner.commands.with_torch import require_torch

    require_torch("solve --rehearse")
    answered = dataclasses.replace(problem, cluster=plan.cluster)
    return best_rehearsed(plan, answered, count, lambda text: click.echo(f"rehearsing {text}", err=True))


def _time_limit_s(given_s: float | None, *, reproducible: bool) -> float | None:
    """The limit of a search: as given, else the default; none where it shall be reproducible."""
    from planner.errors import InputError, Problem

    if not reproducible:
        return DEFAULT_TIME_LIMIT_S if given_s is None else given_s
    if given_s is not None:
        fault = "uses no clock, and --time-limit does."
        raise InputError(Problem(where="--reproducible", fault=fault, fix="leave one of them out"))
    return None


def check_certificate(plan: Plan) -> None:
    """Raises CheckError where what the answer claims does not hold."""
    from planner.errors import CheckError
    from planner.plan_check import certificate_faults

    faults = certificate_faults(plan)
    if faults:
        raise CheckError("the certificate of the answer does not hold: " + "; ".join(faults))


def with_max_tp(problem: PlanningProblem, max_tp: int | None) -> PlanningProblem:
    """The problem, held to a largest tensor-parallel degree."""
    import dataclasses

    return dataclasses.replace(problem, limits=dataclasses.replace(problem.limits, max_tp=max_tp))


def pins_for(fixed: tuple[str, ...], problem: PlanningProblem) -> Pins:
    """The pinned choices; what context parallelism leaves open is the engine's way, where it has one."""
    import dataclasses

    from planner.engines.defaults import usual_exchange
    from planner.search.space import parse_pins

    pins = parse_pins(fixed, problem.cluster)
    if problem.limits.engine is None or pins.cp in (None, 1) or pins.cp_exchange is not None:
        return pins
    return dataclasses.replace(pins, cp_exchange=usual_exchange(problem.limits.engine))


def _ended_by_time(plan: Plan, time_limit_s: float | None) -> bool:
    if plan.objective is not None:
        return plan.objective.status == "time_limit"
    assert plan.solver is not None
    return plan.solver.status == "gap" and time_limit_s is not None and plan.solver.wall_s >= time_limit_s
