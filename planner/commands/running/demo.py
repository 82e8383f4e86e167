"""`plan demo`: the main job on this machine, end to end.

Profile, solve, train the plan, train other plans for comparison, report predicted against measured.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from planner.commands.shared.options import json_option

if TYPE_CHECKING:
    from planner.job.problem import PlanningProblem
    from planner.profile.profile import Profile
    from planner.report.run_record import ComparisonRow
    from planner.strategy.plan import Plan
    from runtime.train.metrics import TrainSummary

MODEL = "shardwise-demo"
SEQ, BATCH = 256, 16
LEARNING_RATE, WARMUP = 3e-3, 10
OTHERS = ((("tp", "1"), ("pp", "1")), (("tp", "1"), ("dp", "1")), (("tp", "max"), ("pp", "1")))
"""What the comparison runs beside the chosen plan: the best purely data-parallel plan, the best pipeline,
the best purely tensor-parallel plan."""


class _Stage:
    """Announces the stages of the demo with the time since it began."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begun_s = total, 0, time.monotonic()

    def begin(self, text: str) -> None:
        self.done += 1
        elapsed_s = time.monotonic() - self.begun_s
        click.secho(f"\n[{self.done}/{self.total}] {text}  ({elapsed_s:.0f} s)", bold=True)


class _Run(NamedTuple):
    """A plan that was trained."""

    plan: Plan
    summary: TrainSummary


@click.command()
@click.option(
    "--cluster",
    "cluster_text",
    metavar="local[:N]",
    help="Devices of this machine. Default: its accelerators, or 4 processes on its CPU.",
)
@click.option("--steps", type=click.IntRange(min=8), default=40, show_default=True, help="Steps of the plan.")
@click.option(
    "--other-steps",
    type=click.IntRange(min=8),
    default=14,
    show_default=True,
    help="Steps of each other plan, to measure it.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-run"),
    show_default=True,
    help="Where everything goes. Made anew.",
)
@json_option
def demo(cluster_text: str | None, steps: int, other_steps: int, run_dir: Path, as_json: bool) -> None:
    """Measure this machine, plan, train by the plan, and show how far the prediction was off."""
    from planner.commands.running.report import write_report
    from planner.commands.shared.with_torch import require_torch
    from planner.report.run_record import load_report_input, save_comparison

    require_torch("demo")
    _clear(run_dir)
    stage = _Stage(5)
    stage.begin(f"Profile this machine for {MODEL}")
    problem = _measure(cluster_text, run_dir)
    stage.begin("Solve for the best plan")
    plan = _solve(problem, (), run_dir / "plan.json", shown=True)
    stage.begin(f"Train it for {steps} steps: {plan.strategy.degrees.label()}")
    chosen = _train(plan, run_dir, run_dir / "data", steps)
    others = _other_plans(problem, plan)
    stage.begin(f"Train {len(others)} other plans for {other_steps} steps each")
    runs = [chosen]
    for number, other in enumerate(others, 1):
        click.echo(f"\n{other.strategy.degrees.label()}")
        runs.append(_train(other, run_dir / f"other-{number}", run_dir / "data", other_steps))
    stage.begin("Report predicted against measured")
    rows = tuple(_row(run, chosen=run is chosen) for run in runs)
    save_comparison(rows, run_dir / "comparison.json")
    write_report(load_report_input(run_dir), run_dir / "report.html", run_dir / "trace.json")
    if as_json:
        from planner.commands.shared.text import print_json
        from planner.foundation.decode import encode

        print_json([encode(row) for row in rows])
        return
    click.echo("\n" + comparison_text(rows))
    click.echo(_closing(chosen, run_dir))


def _clear(run_dir: Path) -> None:
    """Removes what an earlier demo left; refuses a folder that a demo did not make."""
    import shutil

    from planner.foundation.errors import InputError, Problem

    if not run_dir.exists():
        run_dir.mkdir(parents=True)
    elif any(run_dir.iterdir()) and not (run_dir / "profile.json").exists():
        raise InputError(
            Problem(
                where=f"--run-dir {run_dir}",
                fault="is not empty and no demo made it, so it is left alone.",
                fix="name another folder",
            )
        )
    else:
        shutil.rmtree(run_dir)
        run_dir.mkdir()


def _measure(cluster_text: str | None, run_dir: Path) -> PlanningProblem:
    """Takes the profile of this machine; the planning problem that it is for."""
    from planner.commands.running.profile import measure
    from planner.commands.running.profile_text import describe
    from planner.commands.shared.options import chosen_precision
    from planner.foundation.decode import to_json, write_atomic
    from planner.hardware.catalog import load_model
    from planner.hardware.cluster_text import parse_cluster
    from planner.hardware.local_machine import accelerators
    from planner.job.engine_settings import Engine
    from planner.job.problem import Limits, PlanningProblem
    from planner.model.workload import Workload

    begun_s = time.monotonic()
    model = load_model(MODEL)
    cluster = parse_cluster(cluster_text or ("local" if accelerators() else "local:4"))
    precision = chosen_precision(None, cluster)
    profile: Profile = measure(model, cluster, SEQ, precision)
    write_atomic(run_dir / "profile.json", to_json(profile))
    click.echo(describe(profile, run_dir / "profile.json", time.monotonic() - begun_s), nl=False)
    return PlanningProblem(
        model=model,
        workload=Workload(seq=SEQ, batch=BATCH, precision=precision),
        cluster=cluster,
        profile=profile,
        memory_limit_bytes=min(group.device.usable_memory_bytes for group in cluster.groups),
        limits=Limits(engine=Engine.NATIVE),
    )


def _solve(problem: PlanningProblem, fixed: tuple[str, ...], path: Path | None, *, shown: bool) -> Plan:
    from planner.commands.shared.plan_text import plan_text
    from planner.job.objective import Goal
    from planner.search.solve import SolveOptions
    from planner.search.solve_for import solve_for
    from planner.strategy.fixed_choices import parse_fixed_choices
    from planner.strategy.plan import save_plan

    plan = solve_for(problem, SolveOptions(pins=parse_fixed_choices(fixed)), Goal())
    if path is not None:
        save_plan(plan, path)
    if shown:
        click.echo(plan_text(plan, "the profile just taken; held to what plan train runs (--engine native)"))
    return plan


def _other_plans(problem: PlanningProblem, chosen: Plan) -> list[Plan]:
    """The best plan of each kind in OTHERS that differs from the chosen one and from each other."""
    from planner.foundation.errors import InfeasibleError

    widest = max(
        d
        for d in range(1, problem.cluster.devices + 1)
        if problem.cluster.devices % d == 0
        and all(heads.split_over(d) for heads in problem.model.heads_split)
    )
    plans: list[Plan] = []
    for pins in OTHERS:
        fixed = tuple(f"{key}={widest if value == 'max' else value}" for key, value in pins)
        try:
            plan = _solve(problem, fixed, None, shown=False)
        except InfeasibleError as error:
            click.echo(f"{' '.join(fixed)}: {error}", err=True)
            continue
        shapes = [other.strategy.degrees for other in (chosen, *plans)]
        kind = (plan.strategy.degrees.tp, plan.strategy.degrees.pp, plan.strategy.degrees.dp)
        if kind not in [(d.tp, d.pp, d.dp) for d in shapes]:
            plans.append(plan)
    return plans


def _train(plan: Plan, run_dir: Path, cache: Path, steps: int) -> _Run:
    from runtime.train.data.prepare import DataOptions
    from runtime.train.options import TrainOptions
    from runtime.train.train import run_training

    options = TrainOptions(
        steps=steps,
        run_dir=str(run_dir),
        data_cache=str(cache),
        data=DataOptions(tokenizer="byte"),
        lr=LEARNING_RATE,
        warmup=WARMUP,
    )
    summary = run_training(plan, options)
    assert summary is not None  # only ranks under torchrun return None, and the demo forks its own
    return _Run(plan, summary)


def _row(run: _Run, *, chosen: bool) -> ComparisonRow:
    from planner.report.run_record import ComparisonRow

    label = run.plan.strategy.degrees.label()
    return ComparisonRow(
        label=label,
        strategy=label,
        predicted_step_time_s=run.plan.estimate.step_time_s,
        measured_step_time_s=run.summary.measured_step_time_s or 0.0,
        predicted_peak_memory_bytes=run.plan.estimate.peak_memory_bytes,
        measured_peak_memory_bytes=run.summary.measured_peak_memory_bytes or 0,
        chosen=chosen,
    )


def comparison_text(rows: tuple[ComparisonRow, ...]) -> str:
    """The closing table: step time and memory, predicted against measured, and whether the order held."""
    from planner.commands.shared.text import table
    from planner.foundation.units import format_bytes, format_seconds
    from planner.report.run_record import judge_order

    header = ("plan", "", "step predicted", "measured", "error", "memory predicted", "measured", "error")
    body = [
        (
            row.label,
            "chosen" if row.chosen else "",
            format_seconds(row.predicted_step_time_s),
            format_seconds(row.measured_step_time_s),
            f"{row.time_error:+.1%}",
            format_bytes(row.predicted_peak_memory_bytes),
            format_bytes(row.measured_peak_memory_bytes),
            f"{row.memory_error:+.1%}",
        )
        for row in rows
    ]
    order = judge_order(rows)
    words = (
        f"Of {order.pairs} pairs that differ by more than 10 %, {order.right} were predicted in order."
        if order.pairs
        else "The plans are within 10 % of each other: their order says nothing."
    )
    regret = (
        "the fastest measured" if order.regret <= 0 else f"{order.regret:.1%} behind the fastest measured"
    )
    return f"{table(header, body)}\n\n{words} The chosen plan is {regret}."


def _closing(chosen: _Run, run_dir: Path) -> str:
    summary = chosen.summary
    return (
        f"\nLoss {summary.first_loss:.3f} -> {summary.last_loss:.3f} in {summary.last_step} steps.\n"
        f"Report  {run_dir / 'report.html'}\n"
        f"Trace   {run_dir / 'trace.json'} (open it at ui.perfetto.dev)"
    )
