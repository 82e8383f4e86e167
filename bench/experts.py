"""Layouts that experts trained with, against the plan that `plan solve` would make in their place.

    python -m bench.experts [--set NAME ...] [--limit SECONDS] [--calibrate] [--out FILE.json]

For each published run its own layout is estimated, and the best plan searched for the same model, workload,
cluster and software, under the same cost model. The ratio is the plan's step time over that of the experts'
layout. Above 1 it is a defect of the search or of its space, unless the layout is one that the planner would
not hand out: it breaks a rule of the engine, or its memory is not judged safe. Where a run does not state its
micro-batch or its recomputation, the layout gets those that suit it best. `--calibrate` fits the constants to
the runs of each set's file first; otherwise those that are shipped count.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby, product
from pathlib import Path
from typing import Any

import click

from planner.calibration.calibrate import calibrate
from planner.calibration.run_setup import RunSetup, Setups
from planner.calibration.runs import Run, RunRecompute, Status, read_runs
from planner.commands.shared.text import table
from planner.cost.evaluate import CostModel
from planner.foundation.decode import encode, write_atomic
from planner.foundation.errors import InfeasibleError
from planner.foundation.frozen import frozen
from planner.foundation.suggest import divisors
from planner.hardware.catalog import profile_files
from planner.job.problem import Limits, PlanningProblem
from planner.profile.profile import Profile, load_profile
from planner.search.engine_search import solve_for_engine
from planner.search.solve import SolveOptions
from planner.strategy.estimate import Estimate, Rejected, Verdict
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.plan import Plan
from planner.strategy.rules import broken_rules
from planner.strategy.strategy import Strategy

DATA = Path(__file__).parent / "data"
RESULTS = Path(__file__).parent / "results"
GAP = 0.01
MOST_MICRO_BATCH = 16


def every(run: Run) -> bool:
    """All runs."""
    return True


def whole_405b(run: Run) -> bool:
    """Llama 3.1 405B in bf16, not cut down to fewer layers."""
    return "405b" in run.model.lower() and run.layers in (None, 126) and run.precision == "bf16"


def megatron_core(run: Run) -> bool:
    """Runs of Megatron-LM's own table of H100 throughput and of MegaScale's comparison with it."""
    return run.framework.startswith("Megatron")


@frozen
class ExpertSet:
    """Runs of a file by the prefix of their id; `fastest`: of each group of layouts the fastest alone."""

    name: str
    file: str
    prefixes: tuple[str, ...]
    where: Callable[[Run], bool] = every
    fastest: bool = False

    def runs(self) -> list[Run]:
        """The runs whose layouts are judged: those that ran, with a step time."""
        table_ = read_runs([DATA / self.file]).runs
        ran = [
            run
            for run in table_
            if run.status is Status.OK and run.step_time_s and run.id.split("-")[0] in self.prefixes
        ]
        chosen = [run for run in ran if self.where(run)]
        return fastest(chosen) if self.fastest else chosen


SETS = (
    ExpertSet(name="megatron-2021", file="tables.csv", prefixes=("mlm21", "mtnlg")),
    ExpertSet(name="megatron-2022", file="tables.csv", prefixes=("korth",)),
    ExpertSet(name="megatron-core", file="tables.csv", prefixes=("mcore", "megascale"), where=megatron_core),
    ExpertSet(name="llama-405b", file="tables.csv", prefixes=("dgxc", "mbridge", "titan"), where=whole_405b),
    ExpertSet(name="layout-sweeps", file="layout_sweeps.csv", prefixes=("alephalpha",), fastest=True),
)

LLAMA_3 = Run(
    id="llama3-8k",
    where="bench/experts.py",
    source="The Llama 3 Herd of Models, arXiv 2407.21783, Table 4; chunks and micro-batch are not stated",
    model="Llama 3.1 405B",
    seq_len=8192,
    device="h100-sxm-80gb",
    nodes=2048,
    gpus_per_node=8,
    network="roce400x8",
    framework="Megatron-Core",
    precision="bf16",
    tp=8,
    pp=16,
    chunks=4,
    dp=128,
    cp=1,
    zero=1,
    sequence_parallel=True,
    micro_batch=1,
    global_batch=2048,
    status=Status.OK,
)
LLAMA_3_LONG = dataclasses.replace(
    LLAMA_3, id="llama3-128k", seq_len=131072, dp=8, cp=16, cp_exchange="gather", global_batch=128
)
"""Its own code; taken for Megatron's, the nearest that has its schedule. Its FSDP keeps weights gathered."""


def fastest(runs: Sequence[Run]) -> list[Run]:
    """The fastest run of each group."""
    ordered = sorted(runs, key=lambda run: run.group_name)
    groups = (list(group) for _, group in groupby(ordered, key=lambda run: run.group_name))
    return [min(group, key=lambda run: run.step_time_s or float("inf")) for group in groups]


# The experts' side


def variants(run: Run) -> Iterator[Run]:
    """The run with each micro-batch and recomputation that it may have had."""
    share = max(1, (run.global_batch or 1) // (run.dp or 1))
    sizes = [size for size in divisors(share) if size <= MOST_MICRO_BATCH]
    micro_batches = [run.micro_batch] if run.micro_batch is not None else sizes
    recomputes = [run.recompute] if run.recompute is not None else [*RunRecompute][:3]
    for micro_batch, recompute in product(micro_batches, recomputes):
        yield dataclasses.replace(run, micro_batch=micro_batch, recompute=recompute)


def experts_layout(run: Run, setups: Setups) -> tuple[RunSetup, Estimate] | Rejected:
    """The layout of a run with its estimate; of several that it may have had, the fastest that is safe."""
    found, rejected = [], None
    for variant in variants(run):
        setup = setups.setup(variant)
        if isinstance(setup, Rejected):
            rejected = rejected or setup
            continue
        found.append((setup, CostModel(setup.problem).evaluate(setup.strategy).estimate))
    if not found:
        assert rejected is not None, "a run has a variant"
        return rejected
    return min(found, key=lambda pair: (pair[1].verdict is not Verdict.SAFE, pair[1].step_time_s))


# The planner's side


def held(problem: PlanningProblem) -> PlanningProblem:
    """The problem held to what its engine can run."""
    return dataclasses.replace(problem, limits=Limits(engine=problem.engine_settings.engine))


def planned(problem: PlanningProblem, limit_s: float | None) -> Plan | None:
    """The best plan, or None where none is found."""
    try:
        return solve_for_engine(
            problem, SolveOptions(pins=FixedChoices(), time_limit_s=limit_s, gap_tolerance=GAP)
        )
    except InfeasibleError:
        return None


def judge(run: Run, setups: Setups, limit_s: float | None) -> dict[str, Any]:
    """Both sides of one run."""
    row: dict[str, Any] = {"id": run.id, "model": run.model, "source": run.source}
    row["measured_s"] = run.step_time_s
    layout = experts_layout(run, setups)
    if isinstance(layout, Rejected):
        return row | {"rejected": f"{layout.rule}: {layout.detail}"}
    setup, estimate = layout
    problem = held(setup.problem)
    broken = [rejected.rule for rejected in broken_rules(problem, setup.strategy)]
    row |= {
        "cluster": problem.cluster.name,
        "engine": str(problem.engine_settings.engine),
        "seq": problem.workload.seq,
        "batch": problem.workload.batch,
        "assumed": setup.assumed,
        "experts": described(setup.strategy, estimate),
        "broken": broken,
        "legal": not broken and estimate.verdict is Verdict.SAFE,
    }
    plan = planned(problem, limit_s)
    if plan is None or plan.solver is None:
        return row | {"ratio": None}
    return row | {
        "planned": described(plan.strategy, plan.estimate),
        "solver": {"status": plan.solver.status, "gap": plan.solver.gap, "wall_s": plan.solver.wall_s},
        "ratio": plan.estimate.step_time_s / estimate.step_time_s,
    }


def described(strategy: Strategy, estimate: Estimate) -> dict[str, Any]:
    """A strategy and what is expected of it, as JSON."""
    counts = [stage.recompute for stage in strategy.stages]
    layers = sum(each.layers for each in counts)
    return {
        "label": strategy.degrees.label(),
        "recomputed": sum(each.full + each.selective for each in counts) / layers,
        "in_full": sum(each.full for each in counts) / layers,
        "step_time_s": estimate.step_time_s,
        "peak_memory_gib": estimate.peak_memory_bytes / 2**30,
        "verdict": str(estimate.verdict),
        "breakdown": encode(estimate.breakdown),
    }


HEADER = ("run", "measured", "experts", "s", "memory", "planned", "s", "gap", "ratio", "")


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the printed table."""
    measured = "" if row["measured_s"] is None else f"{row['measured_s']:.4g}"
    if "rejected" in row:
        return row["id"], measured, row["rejected"][:60], *[""] * 7
    theirs, ours = row["experts"], row.get("planned")
    first = row["id"], measured, theirs["label"], f"{theirs['step_time_s']:.4g}", theirs["verdict"]
    if ours is None:
        return *first, "no plan", "", "", "", defect(row)
    return (
        *first,
        ours["label"],
        f"{ours['step_time_s']:.4g}",
        f"{row['solver']['gap']:.1%}",
        f"{row['ratio']:.3f}",
        defect(row),
    )


def defect(row: dict[str, Any]) -> str:
    """What a reader should look at: a plan slower than a legal layout, or why the layout is none."""
    if row["broken"]:
        return ", ".join(row["broken"])
    if not row["legal"]:
        return "not safe"
    return "" if row["ratio"] is not None and row["ratio"] <= 1 + GAP else "DEFECT"


def shipped(device: str) -> Profile | None:
    """The shipped profile that counts for a device."""
    fitting = [profile for profile in map(load_profile, profile_files()) if profile.device == device]
    return max(fitting, key=lambda profile: profile.created, default=None)


def profiles_of(chosen: ExpertSet, calibrated: bool) -> Callable[[str], Profile | None]:
    """Shipped constants, or those fitted to all runs of a set's file with its prefixes."""
    if not calibrated:
        return shipped
    runs = [run for run in read_runs([DATA / chosen.file]).runs if run.id.split("-")[0] in chosen.prefixes]
    profile = calibrate(runs, name="experts", progress=lambda text: click.echo(f"  {text}", err=True)).profile
    return lambda device: profile


@click.command()
@click.option("--set", "names", multiple=True, type=click.Choice([each.name for each in SETS]))
@click.option("--limit", "limit_s", default=20.0, show_default=True, help="Time limit of each search.")
@click.option("--calibrate", "calibrated", is_flag=True, help="Fit the constants to the runs first.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write. Default: in bench/results.")
def main(names: tuple[str, ...], limit_s: float, calibrated: bool, out: Path | None) -> None:
    """Compare, print the table, write the result."""
    rows = []
    for chosen in (each for each in SETS if not names or each.name in names):
        setups = Setups(profiles_of(chosen, calibrated))
        more = [LLAMA_3, LLAMA_3_LONG] if chosen.name == "llama-405b" else []
        for run in [*chosen.runs(), *more]:
            rows.append({"set": chosen.name} | judge(run, setups, limit_s))
            click.echo("  ".join(line(rows[-1])), err=True)
    click.echo(table(HEADER, [line(row) for row in rows]))
    judged = [row for row in rows if row.get("legal")]
    wrong = [row["id"] for row in judged if defect(row)]
    click.echo(
        f"{len(rows)} runs, {len(judged)} of legal and safe layouts, slower than experts: {wrong or 'none'}"
    )
    document = {
        "bench": "experts",
        "date": datetime.now(UTC).isoformat(),
        "limit_s": limit_s,
        "calibrated": calibrated,
        "defects": wrong,
        "rows": rows,
    }
    file = out or RESULTS / f"{datetime.now(UTC).date().isoformat()}-experts.json"
    write_atomic(file, json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
