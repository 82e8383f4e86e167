"""What published training runs cost, predicted from the models' own settings.

    python -m bench.published_cost [--only ID ...] [--search] [--calibrate] [--out FILE]

prints every run of bench/data/published_costs.toml with its published figure and two predicted ones, and
writes bench/results/DATE-published-cost.json: as `plan estimate` predicts it where no profile is given (the
shipped profile of the device, else its datasheet), and with constants fitted to measured steps of other runs,
which are in profiles/measured/a100-published-runs.json, the shipped profile of A100 (`--calibrate` fits them
anew to the rows of FITTED_ON in bench/data/tables.csv; none of them is of a run that is predicted).

A layout is the published one; degrees that are not published are a search's over all that fit, `chosen` in
the file, which `--search` makes anew. Goodput is that of what runs usually suffer, as `plan size` counts it
(planner.sizing.usual_overheads). With T tokens, S of them in a step of t seconds on n GPUs, and a goodput g
(1
where the published figure was derived from the time of steps alone):

    days = T / S x t / g / 86400      GPU-hours = 24 n x days      dollars = GPU-hours x the published price
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import click

from planner.calibration.run_setup import RunSetup, Setups
from planner.calibration.runs import Run, RunRecompute
from planner.commands.shared.text import table
from planner.cost.evaluate import CostModel
from planner.foundation.decode import decode, encode, load_toml, write_atomic
from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S
from planner.hardware.catalog import data_folder
from planner.profile.choose import shipped_profile
from planner.profile.profile import Profile, load_profile
from planner.sizing.usual_overheads import usual_overheads
from planner.strategy.estimate import Estimate, Rejected, Verdict

DATA = Path(__file__).parent / "data" / "published_costs.toml"
FITTED = data_folder() / "measured" / "a100-published-runs.json"
FITTED_ON = ("mosaic", "fmsfsdp", "korth")
"""Prefixes of rows: FSDP of llm-foundry and of IBM on A100 and H100, Megatron-LM on A100."""
WITHIN = 0.20
"""The aim: a prediction is off by no more than this share."""

OPEN: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4, 8),
    "pp": (1, 2, 4, 8, 16),
    "micro_batch": (1, 2, 4, 8, 16),
    "recompute": (RunRecompute.NONE, RunRecompute.SELECTIVE, RunRecompute.FULL),
}
"""What a search tries for a degree that is not published."""


class Figure(StrEnum):
    """What a published number counts."""

    GPU_HOURS = "gpu_hours"
    DAYS = "days"
    USD = "usd"


class Losses(StrEnum):
    """Whether a published number holds lost time, or was derived from the time of steps alone."""

    ALL = "all"
    STEPS = "steps"


@frozen
class PublishedCost:
    """One run: what is published of its cost, its settings, and what of them is not published."""

    id: str
    title: str
    tokens: float
    figure: Figure
    published: float
    losses: Losses
    includes: str
    sources: tuple[str, ...]
    run: dict[str, Any]
    chosen: dict[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    usd_per_gpu_hour: float | None = None
    miss: str = ""


@frozen
class PublishedCosts:
    """The file."""

    runs: tuple[PublishedCost, ...]


@frozen
class PredictedCost:
    """A published figure with the predicted ones. An error is predicted / published - 1.

    `step_time_s`, `mfu`, `goodput` and `verdict` are of the prediction without a fit.
    """

    id: str
    title: str
    figure: Figure
    published: float
    predicted: float
    error: float
    interval: tuple[float, float]
    fitted_predicted: float
    fitted_error: float
    fitted_interval: tuple[float, float]
    steps_only: bool
    step_time_s: float
    fitted_step_time_s: float
    mfu: float | None
    goodput: float
    verdict: Verdict
    layout: str
    includes: str
    sources: tuple[str, ...]
    assumed: tuple[str, ...]
    miss: str

    @property
    def within(self) -> tuple[bool, bool]:
        """Whether the predictions, without and with a fit, keep the aim."""
        return abs(self.error) <= WITHIN, abs(self.fitted_error) <= WITHIN

    @property
    def inside(self) -> tuple[bool, bool]:
        """Whether the published figure lies in the intervals of the step times, without and with a fit."""
        low, high = self.interval
        fitted_low, fitted_high = self.fitted_interval
        return low <= self.published <= high, fitted_low <= self.published <= fitted_high


def load_costs(path: Path = DATA) -> tuple[PublishedCost, ...]:
    """The runs of the file. Raises InputError."""
    return load_toml(path, PublishedCosts).runs


def row_of(cost: PublishedCost, **degrees: Any) -> Run:
    """The run as a row of runs.csv, with degrees for those that are not published."""
    values = {"id": cost.id, "where": f"published_costs.toml: {cost.id}", **cost.run}
    return decode(Run, {**values, **cost.chosen, **degrees}, source=cost.id)


class Bases(NamedTuple):
    """The two ways to predict: as shipped, and with constants fitted to other runs."""

    shipped: Setups
    fitted: Setups


def bases() -> Bases:
    """The bases, with the profile that the repository holds."""
    fitted = load_profile(FITTED)
    return Bases(Setups(shipped_profile), Setups(lambda device: fitted))


class Cost(NamedTuple):
    """A predicted figure, and what it is made of."""

    figure: float
    estimate: Estimate
    goodput: float
    setup: RunSetup

    @property
    def interval(self) -> tuple[float, float]:
        """The figure at both ends of the step time's interval."""
        low, high = (end / self.estimate.step_time_s for end in self.estimate.step_time_interval_s)
        return self.figure * low, self.figure * high


def cost_of(cost: PublishedCost, setups: Setups) -> Cost:
    """The predicted figure of a run whose layout is known or chosen."""
    setup = setups.setup(row_of(cost))
    if isinstance(setup, Rejected):
        raise ValueError(f"{cost.id}: {setup.rule}: {setup.detail}")
    estimate, goodput = estimate_of(cost, setup)
    days = cost.tokens / setup.problem.workload.tokens_per_step * estimate.step_time_s / goodput / DAY_S
    gpu_hours = days * 24 * setup.problem.cluster.devices
    figure = {
        Figure.DAYS: days,
        Figure.GPU_HOURS: gpu_hours,
        Figure.USD: gpu_hours * (cost.usd_per_gpu_hour or 0.0),
    }[cost.figure]
    return Cost(figure, estimate, goodput, setup)


def predict(cost: PublishedCost, on: Bases) -> PredictedCost:
    """Both predictions for a run."""
    shipped, fitted = cost_of(cost, on.shipped), cost_of(cost, on.fitted)
    return PredictedCost(
        id=cost.id,
        title=cost.title,
        figure=cost.figure,
        published=cost.published,
        predicted=shipped.figure,
        error=shipped.figure / cost.published - 1,
        interval=shipped.interval,
        fitted_predicted=fitted.figure,
        fitted_error=fitted.figure / cost.published - 1,
        fitted_interval=fitted.interval,
        steps_only=cost.losses is Losses.STEPS,
        step_time_s=shipped.estimate.step_time_s,
        fitted_step_time_s=fitted.estimate.step_time_s,
        mfu=shipped.estimate.mfu,
        goodput=shipped.goodput,
        verdict=shipped.estimate.verdict,
        layout=layout_text(shipped.setup),
        includes=cost.includes,
        sources=cost.sources,
        assumed=(*cost.assumed, *shipped.setup.assumed),
        miss=cost.miss,
    )


def estimate_of(cost: PublishedCost, setup: RunSetup) -> tuple[Estimate, float]:
    """The estimate of a run, and its usual goodput where the published figure holds lost time."""
    plain = CostModel(setup.problem).evaluate(setup.strategy).estimate
    if cost.losses is Losses.STEPS:
        return plain, 1.0
    problem = dataclasses.replace(
        setup.problem,
        overheads=usual_overheads(setup.problem.cluster.devices),
        workload=dataclasses.replace(setup.problem.workload, tokens=round(cost.tokens)),
    )
    job = CostModel(problem).evaluate(setup.strategy).estimate.job
    assert job is not None
    return plain, job.goodput


def layout_text(setup: RunSetup) -> str:
    """The layout for people."""
    degrees = setup.strategy.degrees
    named = [
        f"{name} {getattr(degrees, name)}"
        for name in ("tp", "pp", "chunks", "cp", "ep")
        if getattr(degrees, name) > 1
    ]
    recompute = setup.strategy.stages[0].recompute.options()[0]
    data = degrees.dp_replicate * degrees.dp_shard
    named += [f"dp {data}", f"zero {int(degrees.zero)}", f"mb {degrees.micro_batch}"]
    return " ".join([*named, f"recompute {recompute}", *([str(degrees.schedule)] if degrees.pp > 1 else [])])


def candidates(cost: PublishedCost) -> Iterator[dict[str, Any]]:
    """Values of all degrees that are not published."""
    names = [name for name in OPEN if name not in cost.run]
    for values in itertools.product(*(OPEN[name] for name in names)):
        degrees = dict(zip(names, values, strict=True))
        tp = degrees.get("tp", cost.run.get("tp", 1))
        if "sequence_parallel" not in cost.run:
            degrees["sequence_parallel"] = tp > 1
        yield degrees


def choose(cost: PublishedCost, setups: Setups) -> dict[str, Any]:
    """The degrees that make a step shortest of those that surely or perhaps fit."""
    open_cost = dataclasses.replace(cost, chosen={})
    best: tuple[float, dict[str, Any]] | None = None
    for degrees in candidates(cost):
        setup = setups.setup(row_of(open_cost, **degrees))
        if isinstance(setup, Rejected):
            continue
        estimate = CostModel(setup.problem).evaluate(setup.strategy).estimate
        if estimate.verdict is not Verdict.NO and (best is None or estimate.step_time_s < best[0]):
            best = estimate.step_time_s, degrees
    if best is None:
        raise ValueError(f"{cost.id}: no layout fits")
    return best[1]


def fit() -> Profile:
    """Constants of other runs, by `plan calibrate`'s own fit."""
    from planner.calibration.calibrate import calibrate
    from planner.calibration.runs import read_runs

    rows = read_runs([DATA.parent / "tables.csv"]).runs
    used = [row for row in rows if row.id.startswith(FITTED_ON)]
    return calibrate(
        used, name=FITTED.stem, blocks=False, progress=lambda text: print(text, file=sys.stderr)
    ).profile


def print_rows(rows: Sequence[PredictedCost]) -> None:
    """The runs, a line each, and below it those that miss with what is missing."""

    def number(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"

    lines = [
        (
            row.title,
            str(row.figure),
            number(row.published),
            number(row.predicted),
            f"{row.error:+.0%}",
            number(row.fitted_predicted),
            f"{row.fitted_error:+.0%}",
            "-" if row.mfu is None else f"{row.mfu:.0%}",
            "steps" if row.steps_only else f"{row.goodput:.1%}",
            str(row.verdict),
            row.layout,
        )
        for row in rows
    ]
    header = ("run", "of", "published", "predicted", "error", "fitted", "error")
    header += ("MFU", "goodput", "memory", "layout")
    print(table(header, lines, numbers=(2, 3, 4, 5, 6, 7, 8)))
    for index, name in enumerate(("as shipped", "with a fit to other runs")):
        within = sum(row.within[index] for row in rows)
        inside = sum(row.inside[index] for row in rows)
        print(f"{name}: {within} of {len(rows)} within {WITHIN:.0%}, {inside} inside the interval")
    for row in rows:
        if not all(row.within):
            print(
                f"  {row.title} {row.error:+.0%}, {row.fitted_error:+.0%}: {row.miss or 'no reason is known'}"
            )


@click.command()
@click.option("--only", multiple=True, help="Ids of runs.")
@click.option("--search", is_flag=True, help="Choose degrees that are not published anew, and print them.")
@click.option("--calibrate", "fits", is_flag=True, help="Fit the constants anew and write them.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the result.")
def main(only: tuple[str, ...], search: bool, fits: bool, out: Path | None) -> None:
    """Predict what published runs cost and print the list."""
    if fits:
        write_atomic(FITTED, json.dumps(encode(fit()), indent=1) + "\n")
    on = bases()
    rows = []
    for cost in load_costs():
        if only and cost.id not in only:
            continue
        if search and any(name not in cost.run for name in OPEN):
            cost = dataclasses.replace(cost, chosen=choose(cost, on.shipped))
            print(f"{cost.id}: chosen {cost.chosen}", file=sys.stderr)
        rows.append(predict(cost, on))
    print_rows(rows)
    now = datetime.now(UTC)
    path = out or Path(__file__).parent / "results" / f"{now.date().isoformat()}-published-cost.json"
    document = {"bench": "published_cost", "date": now.isoformat(), "runs": [encode(row) for row in rows]}
    if not only or out is not None:
        write_atomic(path, json.dumps(document, indent=1) + "\n")
        print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
