"""How good the predictions are: predicted against measured on published runs, beside the naive rule.

Every set is split by whole groups of runs into parts, by a fixed seed; what is fitted on never holds a row
of what is predicted. `keep` says what stays together: a model (so models are wholly left out), a group (one
model, workload and cluster), a width or a device. A set is fitted on all parts but one and that is predicted,
in turn; where `narrow`, it is fitted on one part alone and all others are. Errors are over rows predicted.

Beside them: the cost model without a fit, and the naive rule, which has no constants:

    t = C / (0.5 P devices) (m + (p - 1) / v) / m,  C = tokens (6 N + 3 A) (4/3 with full recomputation)

N are parameters that a token meets, A the FLOPs of attention between the projections (causal), P the dense
peak, m micro-batches, p pipeline ranks, v chunks. It knows no memory: its choice is among runs that ran.

    python -m bench.accuracy [--only NAME ...] [--out bench/results/DATE-accuracy.json]
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click

from planner.calibration.calibrate import calibrate
from planner.calibration.run_setup import RunSetup, Setups
from planner.calibration.runs import Run, Status, read_runs
from planner.calibration.validate import ValidatedRow, Validation, judge, validate
from planner.commands.shared.text import table
from planner.foundation.decode import encode, write_atomic
from planner.foundation.frozen import frozen
from planner.model.sublayer import Recompute
from planner.profile.profile import Profile
from planner.strategy.estimate import Verdict

DATA = Path(__file__).parent / "data"
SEED = 20261124
NAIVE_SHARE = 0.5
RECOMPUTE_FACTOR = 4 / 3


def by_model(run: Run) -> str:
    """Models stay together."""
    return run.model or f"{run.layers}-{run.hidden}"


def by_group(run: Run) -> str:
    """Groups stay together."""
    return run.group_name


def by_width(run: Run) -> str:
    """Hidden sizes stay together."""
    return str(run.hidden)


def by_device(run: Run) -> str:
    """Devices stay together."""
    return run.device


@frozen
class RunSet:
    """Runs that are judged together, and how they are split; `also` are more runs to fit on.

    `fit_only` names keys that are always fitted on and never predicted, for a prediction from one kind of
    device to another.
    """

    name: str
    title: str
    file: str
    prefixes: tuple[str, ...]
    keep: Callable[[Run], str]
    parts: int
    narrow: bool = False
    fit_only: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    target: str = ""


SETS = (
    RunSet(
        name="layout",
        title="layout sweeps on A100, a model left out",
        file="layout_sweeps.csv",
        prefixes=("alephalpha",),
        keep=by_model,
        parts=3,
        target="4 %, bias 2 %, regret 0 in 9 of 10",
    ),
    RunSet(
        name="layout-sweep",
        title="layout sweeps on A100, a sweep (model and kernels) left out",
        file="layout_sweeps.csv",
        prefixes=("alephalpha",),
        keep=by_group,
        parts=13,
        target="4 %, bias 2 %, regret 0 in 9 of 10",
    ),
    RunSet(
        name="layout-few",
        title="layout sweeps on A100, fitted on a quarter of the sweeps",
        file="layout_sweeps.csv",
        prefixes=("alephalpha",),
        keep=by_group,
        parts=4,
        narrow=True,
        target="4 %, bias 2 %",
    ),
    RunSet(
        name="megatron",
        title="Megatron-LM's tables of 2022 (22B to 1T, with and without recomputation), a model left out",
        file="tables.csv",
        prefixes=("korth",),
        keep=by_model,
        parts=3,
        also=("mlm21", "mtnlg"),
        target="3 % mean, 7 % worst",
    ),
    RunSet(
        name="megatron-2021",
        title="Megatron-LM and DeepSpeed in the tables of 2021, a model left out",
        file="tables.csv",
        prefixes=("mlm21", "mtnlg"),
        keep=by_model,
        parts=3,
        also=("korth",),
    ),
    RunSet(
        name="small-gpt",
        title="small GPTs on one node, a model left out",
        file="small_gpt.csv",
        prefixes=("vtrain-single",),
        keep=by_model,
        parts=5,
        target="5 %, regret 1.5 %",
    ),
    RunSet(
        name="small-gpt-width",
        title="small GPTs on one node, a width left out",
        file="small_gpt.csv",
        prefixes=("vtrain-single",),
        keep=by_width,
        parts=2,
    ),
    RunSet(
        name="large-gpt",
        title="GPTs on 64 to 512 A100, a model left out",
        file="small_gpt.csv",
        prefixes=("vtrain-multi",),
        keep=by_model,
        parts=2,
        also=("vtrain-single",),
        target="4 %, regret 1 %",
    ),
    RunSet(
        name="h100",
        title="H100 reference, models left out",
        file="h100_reference.csv",
        prefixes=("h100",),
        keep=by_model,
        parts=5,
        target="5 %; memory 2 %, reserved 5 %",
    ),
    RunSet(
        name="sota",
        title="Megatron-Bridge on H100, B200, GB200 and later, fitted on a third",
        file="tables.csv",
        prefixes=("mbridge",),
        keep=by_group,
        parts=3,
        narrow=True,
        target="8 %",
    ),
    RunSet(
        name="sota-nemo",
        title="NeMo on H100, fitted on a third",
        file="tables.csv",
        prefixes=("dgxc", "nemo"),
        keep=by_group,
        parts=3,
        narrow=True,
        target="8 %",
    ),
    RunSet(
        name="fsdp",
        title="llm-foundry (FSDP) on A100 and H100, a model left out",
        file="tables.csv",
        prefixes=("mosaic",),
        keep=by_model,
        parts=5,
    ),
    RunSet(
        name="torchtitan",
        title="torchtitan (FSDP2) on A100, H100 and H200, a model left out",
        file="tables.csv",
        prefixes=("titan",),
        keep=by_model,
        parts=3,
    ),
    RunSet(
        name="new-device",
        title="H100 from A100's calibration, llm-foundry (FSDP)",
        file="tables.csv",
        prefixes=("mosaic",),
        keep=by_device,
        parts=1,
        fit_only=("a100-sxm-40gb", "a100-sxm-80gb"),
        target="10 %",
    ),
)


Fitted = Callable[[Sequence[Run]], Callable[[str], Profile | None]]
"""Fits runs; the answer gives the profile of each device."""


def parts_of(runs: Sequence[Run], chosen: RunSet) -> list[list[Run]]:
    """The runs in parts of whole keys, dealt out in a shuffled order that the seed fixes."""
    keys = sorted({chosen.keep(run) for run in runs} - set(chosen.fit_only))
    random.Random(SEED).shuffle(keys)
    count = min(chosen.parts, len(keys))
    part = {key: index % count for index, key in enumerate(keys)}
    return [[run for run in runs if part.get(chosen.keep(run)) == index] for index in range(count)]


def splits(runs: Sequence[Run], chosen: RunSet) -> Iterator[tuple[list[Run], list[Run]]]:
    """Pairs of runs to fit on and runs to predict."""
    always = [run for run in runs if chosen.keep(run) in chosen.fit_only]
    parts = parts_of(runs, chosen)
    for part in parts:
        rest = [run for other in parts if other is not part for run in other]
        yield (part, rest) if chosen.narrow else (always + rest, part)


def load_set(chosen: RunSet) -> tuple[list[Run], list[Run]]:
    """The set's runs, and those that are only fitted on."""
    runs = read_runs([DATA / chosen.file]).runs
    return _of(runs, chosen.prefixes), _of(runs, chosen.also)


def _of(runs: Sequence[Run], prefixes: tuple[str, ...]) -> list[Run]:
    return [run for run in runs if run.id.rpartition("-")[0].startswith(prefixes) and prefixes]


def fitted(runs: Sequence[Run]) -> Callable[[str], Profile | None]:
    """The fit of `plan calibrate`, from nothing but these runs."""

    def report(text: str) -> None:
        print(f"  {text}", file=sys.stderr)

    profile = calibrate(runs, name="bench", base=None, progress=report).profile
    return lambda device: profile


# The naive rule


def naive_time_s(setup: RunSetup) -> float | None:
    """The step time by the naive rule, or None where the peak is unknown."""
    problem, strategy = setup.problem, setup.strategy
    model, workload, degrees = problem.model, problem.workload, strategy.degrees
    peak = problem.cluster.groups[0].device.peak_flops(workload.precision)
    if peak is None:
        return None
    attention = sum(s.count * s.block.attention_flops_forward(1, workload.seq) for s in model.segments)
    flops = workload.tokens_per_step * (6 * model.params_active + 3 * attention)
    if strategy.stages[0].recompute.options()[0] is Recompute.FULL:
        flops *= RECOMPUTE_FACTOR
    batches = degrees.num_micro_batches
    bubble = (batches + (degrees.pp - 1) / degrees.chunks) / batches
    return flops / (NAIVE_SHARE * peak * problem.cluster.devices) * bubble


def naive_rows(rows: Sequence[ValidatedRow], runs: Sequence[Run]) -> list[ValidatedRow]:
    """The same rows by the naive rule, which judges no memory: those out of memory are left out."""
    setups = Setups(lambda device: None)
    known = {run.id: run for run in runs}
    found = []
    for row in rows:
        if row.verdict is None or row.status is Status.OOM:
            continue
        setup = setups.setup(known[row.id])
        step_s = naive_time_s(setup) if isinstance(setup, RunSetup) else None
        if step_s is None:
            continue
        error = step_s / row.step_time_s - 1 if row.step_time_s else None
        found.append(
            dataclasses.replace(
                row,
                predicted_step_time_s=step_s,
                error=error,
                verdict=Verdict.SAFE,
                predicted_peak_memory_gib=None,
                memory_error=None,
                reserved_error=None,
                device_error=None,
            )
        )
    return found


# Figures


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Errors and regret over the predicted parts of a set."""

    n: int
    mape: float | None
    median: float | None
    bias: float | None
    worst: float | None
    within_interval: float | None
    memory_mape: float | None
    memory_bias: float | None
    reserved_mape: float | None
    regret: float | None
    worst_regret: float | None
    groups_without_regret: str
    verdicts: dict[str, int]


def figures(parts: Sequence[Validation]) -> Figures:
    """The errors of all parts together."""
    rows = [row for part in parts for row in part.rows]
    time_errors = [row.error for row in rows if row.error is not None]
    regrets = [g.regret for part in parts for g in part.groups if g.regret is not None and g.n > 1]
    whole = judge(rows)
    return Figures(
        n=len(time_errors),
        mape=whole.summary.time_mape,
        median=median(abs(error) for error in time_errors) if time_errors else None,
        bias=whole.summary.time_bias,
        worst=max(time_errors, key=abs, default=None),
        within_interval=whole.summary.within_interval,
        memory_mape=whole.summary.memory_mape,
        memory_bias=whole.summary.memory_bias,
        reserved_mape=whole.summary.reserved_mape,
        regret=fmean(regrets) if regrets else None,
        worst_regret=max(regrets, default=None),
        groups_without_regret=f"{sum(regret == 0 for regret in regrets)} of {len(regrets)}",
        verdicts=whole.verdicts,
    )


def run_set(chosen: RunSet, fit: Fitted | None) -> dict[str, Any]:
    """One set: with a fit, without, and by the naive rule, over the same rows."""
    begun = time.perf_counter()
    runs, also = load_set(chosen)
    methods: dict[str, list[Validation]] = {"fitted": [], "prior": [], "naive": []}
    prior = {row.id: row for row in validate(runs, lambda device: None).rows}
    for known, held in splits(runs, chosen):
        rows = [prior[run.id] for run in held]
        methods["prior"].append(judge(rows))
        methods["naive"].append(judge(naive_rows(rows, held)))
        if fit is not None:
            methods["fitted"].append(validate(held, fit([*known, *also])))
        print(f"{chosen.name}: {len(known) + len(also)} to fit, {len(held)} predicted", file=sys.stderr)
    result: dict[str, Any] = {"set": chosen.name, "title": chosen.title, "target": chosen.target}
    for method, parts in methods.items():
        if parts:
            result[method] = dataclasses.asdict(figures(parts))
    told = methods["fitted"] or methods["prior"]
    result["groups"] = [encode(group) for part in told for group in part.groups]
    result["wall_s"] = time.perf_counter() - begun
    return result


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """The sets, a line a method."""
    rows = [
        (
            result["set"] if first else "",
            method,
            found["n"],
            _share(found["mape"]),
            _share(found["median"]),
            _share(found["bias"], "+"),
            _share(found["worst"], "+"),
            _share(found["within_interval"]) if method != "naive" else "-",
            _share(found["regret"]),
            _share(found["worst_regret"]),
            found["groups_without_regret"],
            _share(found["memory_mape"]),
            _share(found["reserved_mape"]),
            " ".join(str(count) for count in found["verdicts"].values()) if method != "naive" else "-",
            result["target"] if first else "",
        )
        for result in results
        for first, method, found in _methods(result)
    ]
    header = (
        "set",
        "by",
        "n",
        "error",
        "median",
        "bias",
        "worst",
        "inside",
        "regret",
        "worst",
        "zero",
        "memory",
        "reserved",
        "SAFE ran/oom RISKY NO",
        "target",
    )
    print(table(header, rows, numbers=range(2, 13)))


def _methods(result: dict[str, Any]) -> Iterator[tuple[bool, str, dict[str, Any]]]:
    present = [method for method in ("fitted", "prior", "naive") if method in result]
    for method in present:
        yield method == present[0], method, result[method]


def _share(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1%}"


@click.command()
@click.option("--only", multiple=True, help="Names of sets to run.")
@click.option("--prior", "prior_only", is_flag=True, help="Without any fit.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the result.")
def main(only: tuple[str, ...], prior_only: bool, out: Path | None) -> None:
    """Predict the published runs and print the table."""
    fit = None if prior_only else fitted
    results = [run_set(chosen, fit) for chosen in SETS if not only or chosen.name in only]
    print_table(results)
    now = datetime.now(UTC)
    path = out or Path(__file__).parent / "results" / f"{now.date().isoformat()}-accuracy.json"
    document = {"bench": "accuracy", "date": now.isoformat(), "seed": SEED, "sets": results}
    write_atomic(path, json.dumps(document, indent=1) + "\n")
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
