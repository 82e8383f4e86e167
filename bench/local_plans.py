"""Predicted against measured step time and memory of fixed plans on this machine.

The plans are fixed here, before anything is measured, and cover every axis: replication, each ZeRO stage,
tensor parallelism with and without sequence parallelism, the three schedules, uneven stages, recompute.
A profile is taken first; then every plan is trained for a few steps, in several rounds so that slow
changes of a shared machine's speed meet all plans alike. A reference (runtime.profiler.timing) is timed
before and
after each run: how the machine's speed compares with that in the profile is printed beside the errors, and
nothing is corrected by it.

    python -m bench.local_plans [--rounds 2] [--steps 11] [--out bench/results/NAME.json]
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import click

from planner.commands.running.profile import measure
from planner.commands.shared.with_torch import require_torch
from planner.commands.splitting.estimate import strategy_of
from planner.cost.evaluate import CostModel
from planner.foundation.decode import to_json, write_atomic
from planner.hardware.catalog import load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.model.workload import Precision, Workload
from planner.profile.profile import Profile, load_profile
from planner.report.run_record import ComparisonRow, judge_order
from planner.search.solve import make_plan
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.plan import Plan
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import RecomputeCounts, Stage, Strategy

MODEL, SEQ, BATCH = "shardwise-demo", 256, 16
PLANS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("dp=4 zero=0 micro_batch=2", ()),
    ("dp=4 zero=3 micro_batch=4", ()),
    ("tp=2 dp=2 zero=1 sequence_parallel=true micro_batch=4", ()),
    ("pp=2 dp=2 zero=0 micro_batch=2 schedule=1f1b", ()),
    ("pp=4 micro_batch=2 schedule=1f1b", (2, 3, 2, 1)),
    ("tp=4 micro_batch=8", ()),
    ("tp=2 pp=2 chunks=2 schedule=interleaved micro_batch=4", ()),
    ("dp=4 zero=2 micro_batch=2 recompute=full", ()),
    ("pp=2 dp=2 zero=2 micro_batch=2 schedule=gpipe recompute=selective", ()),
)
"""Pins of each plan, and the layers of each stage where they are uneven."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run of a plan."""

    step_time_s: float
    peak_memory_bytes: int
    reference_s: float


def build_plan(problem: PlanningProblem, pins: str, layers: tuple[int, ...]) -> Plan:
    """The plan of fixed pins, with uneven stages where `layers` says so."""
    strategy = strategy_of(problem, parse_fixed_choices(tuple(pins.split())))
    if layers:
        bounds = [sum(layers[:i]) for i in range(len(layers) + 1)]
        stages = tuple(
            Stage(first=a, end=b, recompute=RecomputeCounts(none=b - a))
            for a, b in itertools.pairwise(bounds)
        )
        strategy = Strategy(degrees=strategy.degrees, stages=stages)
    broken = broken_rules(problem, strategy)
    assert not broken, (pins, broken)
    return make_plan(problem, CostModel(problem).evaluate(strategy), None, {}, ())


def train(plan: Plan, steps: int, cache: Path) -> Run:
    """Trains a plan for a few steps in a folder that is thrown away."""
    from runtime.profiler.timing import reference_s
    from runtime.train.data.prepare import DataOptions
    from runtime.train.options import TrainOptions
    from runtime.train.train import run_training

    before_s = reference_s()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(
            steps=steps, run_dir=folder, data_cache=str(cache), data=DataOptions(tokenizer="byte")
        )
        summary = run_training(plan, options, shown=False)
    assert summary is not None
    assert summary.executed_differences == (), summary.executed_differences
    assert summary.measured_step_time_s is not None
    assert summary.measured_peak_memory_bytes is not None
    return Run(
        step_time_s=summary.measured_step_time_s,
        peak_memory_bytes=summary.measured_peak_memory_bytes,
        reference_s=(before_s + reference_s()) / 2,
    )


def row(plan: Plan, runs: list[Run]) -> ComparisonRow:
    """Predicted against the median of the runs."""
    label = plan.strategy.degrees.label()
    counts = {s.recompute.options()[0] for s in plan.strategy.stages}
    recompute = "" if counts == {"none"} else f" recompute {'/'.join(sorted(counts))}"
    return ComparisonRow(
        label=label + recompute,
        strategy=label,
        predicted_step_time_s=plan.estimate.step_time_s,
        measured_step_time_s=statistics.median(run.step_time_s for run in runs),
        predicted_peak_memory_bytes=plan.estimate.peak_memory_bytes,
        measured_peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
    )


def take_profile(path: Path | None, cluster_text: str) -> tuple[Profile, float | None]:
    """The profile in `path`, or a new one with the reference time around its measurement."""
    from runtime.profiler.timing import reference_s

    if path is not None and path.exists():
        return load_profile(path), None
    before_s = reference_s()
    profile = measure(load_model(MODEL), parse_cluster(cluster_text), SEQ, Precision.FP32)
    if path is not None:
        write_atomic(path, to_json(profile))
    return profile, (before_s + reference_s()) / 2


@click.command()
@click.option("--rounds", default=2, show_default=True)
@click.option("--steps", default=11, show_default=True)
@click.option(
    "--profile", "profile_path", type=click.Path(path_type=Path), help="A profile to reuse or write."
)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the result.")
@click.option("--only", type=int, multiple=True, help="Numbers of plans to run.")
def main(rounds: int, steps: int, profile_path: Path | None, out: Path | None, only: tuple[int, ...]) -> None:
    """Measure the fixed plans and print the table."""
    require_torch("bench")
    cluster_text = "local:4"
    profile, profiled_s = take_profile(profile_path, cluster_text)
    problem = PlanningProblem(
        model=load_model(MODEL),
        workload=Workload(seq=SEQ, batch=BATCH, precision=Precision.FP32),
        cluster=parse_cluster(cluster_text),
        profile=profile,
        memory_limit_bytes=parse_cluster(cluster_text).groups[0].device.usable_memory_bytes,
    )
    chosen = [PLANS[number] for number in only] or list(PLANS)
    plans = [build_plan(problem, pins, layers) for pins, layers in chosen]
    runs: list[list[Run]] = [[] for _ in plans]
    with tempfile.TemporaryDirectory() as cache:
        for number in range(rounds):
            for index, plan in enumerate(plans):
                runs[index].append(train(plan, steps, Path(cache)))
                print(f"round {number + 1}: {plan.strategy.degrees.label()}", file=sys.stderr)
    rows = tuple(row(plan, each) for plan, each in zip(plans, runs, strict=True))
    print(table(rows, runs, profiled_s))
    if out is not None:
        write_atomic(out, json.dumps(document(rows, runs, profile, profiled_s), indent=1) + "\n")


def table(rows: tuple[ComparisonRow, ...], runs: list[list[Run]], profiled_s: float | None) -> str:
    """The errors, and how fast the machine was compared with when it was profiled."""
    from planner.commands.running.demo import comparison_text

    speed = []
    if profiled_s is not None:
        speed = [
            f"  {r.label}: machine at {profiled_s / statistics.median(x.reference_s for x in each):.2f} of "
            "its speed around the profile"
            for r, each in zip(rows, runs, strict=True)
        ]
    within = sum(abs(r.time_error) <= 0.15 for r in rows)
    memory = sum(abs(r.memory_error) <= 0.10 for r in rows)
    return (
        comparison_text(rows)
        + f"\n\n{within} of {len(rows)} step times within 15 %, {memory} of {len(rows)} peaks within 10 %.\n"
        + "\n".join(speed)
    )


def document(
    rows: tuple[ComparisonRow, ...], runs: list[list[Run]], profile: Profile, profiled_s: float | None
) -> dict[str, object]:
    """The result file: versions, date, every run."""
    order = judge_order(rows)
    return {
        "bench": "local_plans",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{profile.device_title}, {profile.cores} cores",
        "python": platform.python_version(),
        "versions": profile.versions,
        "profile_created": profile.created,
        "reference_s_while_profiled": profiled_s,
        "pairs_beyond_10_percent": order.pairs,
        "pairs_in_order": order.right,
        "rows": [
            {
                **dataclasses.asdict(r),
                "time_error": r.time_error,
                "memory_error": r.memory_error,
                "runs": [dataclasses.asdict(run) for run in each],
            }
            for r, each in zip(rows, runs, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
