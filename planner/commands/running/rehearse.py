"""`plan rehearse`: runs single ranks of a plan on one device, without the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.options import json_option

if TYPE_CHECKING:
    from planner.strategy.plan import Plan


DEFAULT_STEPS = 3


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option(
    "--rank",
    "ranks",
    multiple=True,
    type=click.IntRange(min=0),
    metavar="K",
    help="Rehearse this rank; repeat for several. Default: one of each kind, which --stages says too.",
)
@click.option(
    "--stages",
    metavar="all|I,J",
    help="Rehearse the ranks of these pipeline stages, one each. all: one of each kind of rank.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Steps to time, after two that warm up and tell the memory. Default: {DEFAULT_STEPS}.",
)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="torch.compile, as in training. Default: on CUDA where Triton is, not on a CPU.",
)
@click.option(
    "--fake",
    is_flag=True,
    help="Trace memory on shapes alone, also where a device could run the rank.",
)
@click.option("--anyway", is_flag=True, help="Use an accelerator although others do.")
@click.option(
    "--whole",
    is_flag=True,
    help="Run every micro-batch of a step. Default: as few as have as many in flight.",
)
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="The profile that the plan was made with, where it is not the shipped one.",
)
@click.option(
    "--runs",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Add what came of it to this table of runs (runs.csv): the peak, or that memory ran out.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write the plan with its rehearsal.",
)
@json_option
def rehearse(
    plan_file: Path,
    ranks: tuple[int, ...],
    stages: str | None,
    steps: int | None,
    profile: Path | None,
    runs: Path | None,
    output: Path | None,
    as_json: bool,
    **how: Any,
) -> int:
    """Run single ranks of a plan on one device, without the others.

    The code is that of training: the same modules, shards, schedule and optimizer, in a process group of
    which no other rank exists. Measured are memory and a rank's own time; messages stay modelled. Exit code 4
    where a rank ran out of memory, or its peak does not fit.
    """
    import dataclasses

    from planner.commands.shared.problem import problem_of_plan
    from planner.commands.shared.rehearsal_text import rehearsal_text
    from planner.commands.shared.rehearsing import Choice, check_rehearsable, rehearse_plan
    from planner.commands.shared.text import print_json
    from planner.commands.shared.with_torch import require_torch
    from planner.foundation.decode import encode
    from planner.foundation.errors import InputError, Problem
    from planner.strategy.estimate import Verdict
    from planner.strategy.plan import load_plan, save_plan

    require_torch("rehearse")
    for flag, given, done_to_it in (("--compile", how["compiled"], "compiled"), ("--steps", steps, "timed")):
        if how["fake"] and given:
            fault = f"shapes alone are traced (--fake), of which nothing is {done_to_it}."
            raise InputError(Problem(where=flag, fault=fault, fix="leave one of both out"))
    plan = load_plan(plan_file)
    check_rehearsable(plan)
    chosen = Choice(ranks=_chosen_ranks(plan, ranks, stages), steps=steps or DEFAULT_STEPS, **how)
    asked = problem_of_plan(plan, profile)
    done = rehearse_plan(plan, asked.problem, chosen, lambda text: click.echo(f"rehearsing {text}", err=True))
    rehearsed = dataclasses.replace(plan, rehearsal=done)
    if output is not None:
        save_plan(rehearsed, output)
        click.echo(f"wrote {output}", err=True)
    if as_json:
        predicted = {
            "step_time_s": plan.estimate.step_time_s,
            "peak_memory_bytes": plan.estimate.peak_memory_bytes,
            "verdict": str(plan.estimate.verdict),
        }
        print_json({"plan": plan.strategy.degrees.label(), "predicted": predicted, **encode(done)})
    else:
        click.echo(rehearsal_text(rehearsed, asked.basis))
    if runs is not None:  # last: a table that cannot take the row costs nothing of what was measured
        _note_run(runs, rehearsed)
    fits = done.refined is not None and done.refined.verdict is not Verdict.NO
    return 0 if fits and not done.ran_out else 4


def _chosen_ranks(plan: Plan, ranks: tuple[int, ...], stages: str | None) -> tuple[int, ...]:
    """The ranks that are named, or the first of each pipeline rank that holds these stages; () for all kinds.

    Raises InputError where both are named, or a stage that the plan does not have.
    """
    from planner.foundation.errors import InputError, Problem

    degrees = plan.strategy.degrees
    if stages is None:
        return ranks
    if ranks:
        fault = "the ranks are named by --rank already."
        raise InputError(Problem(where="--stages", fault=fault, fix="leave one of both out"))
    if stages == "all":
        return ()
    parts = [part.strip() for part in stages.split(",")]
    wrong = [part for part in parts if not part.isdecimal() or int(part) >= degrees.stages]
    if wrong:
        fault = f"'{', '.join(wrong)}' is no stage of the plan, which has {degrees.stages}."
        raise InputError(
            Problem(where="--stages", fault=fault, legal=f"all, or 0 to {degrees.stages - 1} with commas")
        )
    held = dict.fromkeys(degrees.pp_rank_of_stage(int(part)) for part in parts)
    return tuple(degrees.ranks_of_pp_rank(pp_rank)[0] for pp_rank in held)


def _note_run(path: Path, plan: Plan) -> None:
    """Adds the row of a rehearsed plan to a table of runs, which is made where there is none."""
    from planner.calibration.plan_row import rehearsed_run
    from planner.calibration.runs import read_runs, runs_csv
    from planner.foundation.decode import write_atomic

    before = read_runs([path]).runs if path.exists() else ()
    run = rehearsed_run(plan)
    write_atomic(path, runs_csv([*(r for r in before if r.id != run.id), run]))
    click.echo(f"noted {run.id} in {path}", err=True)
