"""How good memory predictions are: peaks by source, and verdicts on layouts that were left out.

Peaks: every source with measured ones, from priors alone, and with each group of runs predicted from the
others of its framework. Verdicts: the layout sweeps, each part judged by constants and band of the rest,
split by model, by set of kernels, and by large against small micro-batches and degrees.

    python -m bench.memory_accuracy [--out bench/results/DATE-memory-accuracy.json]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from planner.calibration.memory_fit import calibrate_memory
from planner.calibration.predict import with_constants
from planner.calibration.runs import Run, Status, read_runs
from planner.calibration.validate import validate
from planner.commands.shared.text import table
from planner.foundation.decode import write_atomic
from planner.profile.profile import PROFILE_SCHEMA, Profile

DATA = Path(__file__).parent / "data"
FILES = ("h100_reference.csv", "tables.csv")

EMPTY = Profile(
    schema_version=PROFILE_SCHEMA, name="bench", device="", device_title="", backend="", created="",
    versions={}, devices_per_node=8, slots_per_node=None, layers=(), comms=(), contention=(), constants=(),
)  # fmt: skip
"""A profile that says nothing: constants are fitted from their priors."""

Part = Callable[[Run], object]
SPLITS: dict[str, Part] = {
    "model": lambda run: run.model,
    "kernels": lambda run: run.fused_kernels,
}
"""What is left out wholly, in turn."""

LARGE: dict[str, Callable[[Run], bool]] = {
    "micro-batch above 2": lambda run: (run.micro_batch or 0) > 2,
    "tp above 2": lambda run: (run.tp or 0) > 2,
    "pp above 2": lambda run: (run.pp or 0) > 2,
}
"""What is left out once: layouts beyond those that are fitted."""


def by_source() -> list[dict[str, Any]]:
    """Errors of measured peaks by source."""
    runs = [run for name in FILES for run in read_runs([DATA / name]).runs if run.peak_memory_gib]
    sources: dict[str, list[Run]] = {}
    for run in runs:
        sources.setdefault(run.id.partition("-")[0], []).append(run)
    return [_source(name, own) for name, own in sources.items()]


def _source(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    rows = validate(runs, lambda device: None).rows
    prior = [row.memory_error for row in rows if row.memory_error is not None]
    reserved = [abs(row.reserved_error) for row in rows if row.reserved_error is not None]
    fitted = [error for fit in calibrate_memory(runs, EMPTY) for error in fit.peak_errors]
    return {
        "source": name,
        "kinds": dict(Counter(str(run.memory_kind) for run in runs)),
        "rows": len(runs),
        "predicted": len(prior),
        "unpredicted": dict(Counter(row.reason for row in rows if row.reason)),
        "prior_mape": _mean([abs(error) for error in prior]),
        "prior_bias": _mean(prior),
        "reserved_mape": _mean(reserved),
        "left_out": len(fitted),
        "left_out_mape": _mean([abs(error) for error in fitted]),
        "left_out_bias": _mean(fitted),
    }


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def verdicts() -> Iterator[dict[str, Any]]:
    """What became of verdicts on layouts that were left out."""
    runs = [run for run in read_runs([DATA / "layout_sweeps.csv"]).runs if run.status is not Status.ERROR]
    for name, part in SPLITS.items():
        total: Counter[str] = Counter()
        for key in dict.fromkeys(part(run) for run in runs):
            total.update(_judged(runs, {run.id for run in runs if part(run) == key}))
        yield _shares(name, total)
    for name, chosen in LARGE.items():
        yield _shares(name, _judged(runs, {run.id for run in runs if chosen(run)}))


def _judged(runs: Sequence[Run], held: set[str]) -> Counter[str]:
    (found,) = calibrate_memory([run for run in runs if run.id not in held], EMPTY)
    profile = with_constants(EMPTY, found.constants)
    return Counter(validate([run for run in runs if run.id in held], lambda device: profile).verdicts)


def _shares(name: str, counts: Counter[str]) -> dict[str, Any]:
    total = sum(counts.values())
    return {
        "left_out": name,
        "rows": total,
        **counts,
        "no_ran_share": counts["no_ran"] / total,
        "risky_share": (counts["risky_ran"] + counts["risky_oom"]) / total,
    }


def print_tables(sources: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]) -> None:
    """Both tables."""

    def share(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.1%}"

    rows = [
        (
            found["source"],
            found["predicted"],
            found["rows"],
            share(found["prior_mape"]),
            share(found["prior_bias"], "+"),
            share(found["reserved_mape"]),
            share(found["left_out_mape"]),
            share(found["left_out_bias"], "+"),
        )
        for found in sources
    ]
    header = ("source", "n", "of", "prior", "bias", "reserved", "left out", "bias")
    print(table(header, rows, numbers=range(1, 8)))
    names = ("safe_ran", "safe_oom", "risky_ran", "risky_oom", "no_ran", "no_oom")
    ends = [
        (
            found["left_out"],
            *(found[name] for name in names),
            share(found["no_ran_share"]),
            share(found["risky_share"]),
        )
        for found in judged
    ]
    columns = tuple(name.replace("_", " ") for name in names)
    print("\n" + table(("left out", *columns, "NO that ran", "RISKY"), ends, numbers=range(1, 9)))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the result.")
def main(out: Path | None) -> None:
    """Predict the published peaks and outcomes and print the tables."""
    sources, judged = by_source(), list(verdicts())
    print_tables(sources, judged)
    now = datetime.now(UTC)
    path = out or Path(__file__).parent / "results" / f"{now.date().isoformat()}-memory-accuracy.json"
    document = {
        "bench": "memory_accuracy",
        "date": now.isoformat(),
        "sources": sources,
        "verdicts": judged,
    }
    write_atomic(path, json.dumps(document, indent=1) + "\n")
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
