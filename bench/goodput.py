"""Goodput of published runs, predicted with what runs usually suffer: `python -m bench.goodput --out FILE`.

Nodes, failures and checkpoints are the published ones where they are known; the rest is what
planner.sizing.usual_overheads fills in. Also the time of one such prediction.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import click

from planner.commands.shared.text import table
from planner.cost.goodput import Job, figures_of
from planner.foundation.decode import write_atomic
from planner.foundation.units import DAY_S, format_seconds
from planner.hardware.failures import failure_file
from planner.job.problem import JobOverheads
from planner.sizing.usual_overheads import usual_overheads

HOUR_S = 3600.0
REPEATS = 2000


class Published(NamedTuple):
    """A run: its nodes of 8 devices, its checkpoint, the goodput that was published, what is known of it."""

    name: str
    device: str
    nodes: int
    checkpoint_bytes: float
    goodput: tuple[float, float]
    said: JobOverheads
    source: str


RUNS = (
    Published(
        "Llama 3.1 405B", "h100-sxm-80gb", 2048, 12 * 405e9, (0.90, 1.0),
        JobOverheads(storage_bytes_per_s=2e12),
        "over 90 % of 54 days (arXiv 2407.21783)",
    ),
    Published(
        "ByteRobust, dense", "h800-sxm-80gb", 1200, 12 * 175e9, (0.97, 0.97), JobOverheads(),
        "97 % of three months on 9,600 GPUs; the model is not named, 175B taken (arXiv 2509.16293)",
    ),
    Published(
        "OPT-175B, no repair", "a100-sxm-80gb", 124, 1.6e12, (33 / 56, 33 / 56),
        JobOverheads(failures_per_1000_node_days=105 / 33 / 124 * 1000),
        "33 days of computing in 56, 105 restarts (arXiv 2205.01068 and its chronicles)",
    ),
    Published(
        "OPT-175B, 4 h a machine", "a100-sxm-80gb", 124, 1.6e12, (33 / 56, 33 / 56),
        JobOverheads(failures_per_1000_node_days=105 / 33 / 124 * 1000, repair_s=4 * HOUR_S),
        "replacing a machine took hours (chronicles, 3 December 2021)",
    ),
    Published(
        "BLOOM 176B", "a100-sxm-80gb", 48, 2.3e12, (0.978, 0.987),
        JobOverheads(
            checkpoint_every=100,
            storage_bytes_per_s=2.3e12 / 40,
            failures_per_1000_node_days=1.5 / 7 / 48 * 1000,
        ),
        "from 0.37 % for checkpoints and 1.5 h of steps 1 to 2 times a week; without outages of 5 to 10 h",
    ),
)  # fmt: skip


def job_of(run: Published) -> Job:
    """The run in plain numbers, with steps of 20 s (BLOOM: 108 s, 100 in 3 h)."""
    rate = failure_file().of(run.device).per_1000_node_days * run.nodes / (1000 * DAY_S)
    step_s = 108.0 if run.said.checkpoint_every else 20.0
    return Job(
        step_s=step_s,
        compute_s=step_s,
        tokens_per_step=1,
        tokens=None,
        devices=8 * run.nodes,
        nodes=run.nodes,
        rated_nodes=float(run.nodes),
        usual_failures_per_s=rate,
        checkpoint_bytes=run.checkpoint_bytes,
        staging_s=run.checkpoint_bytes / (8 * run.nodes) / 25e9,
    )


def microseconds(job: Job, overheads: JobOverheads) -> float:
    """The time of one prediction, the least of five series."""
    best_s = float("inf")
    for _ in range(5):
        begun_s = time.perf_counter()
        for _ in range(REPEATS):
            figures_of(job, overheads)
        best_s = min(best_s, time.perf_counter() - begun_s)
    return 1e6 * best_s / REPEATS


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
def main(out: Path) -> None:
    """Predict the goodput of published runs, and time it."""
    rows, found = [], []
    for run in RUNS:
        job, overheads = job_of(run), usual_overheads(8 * run.nodes, run.said)
        figures = figures_of(job, overheads)
        low, high = run.goodput
        published = f"{low:.1%}" if low == high else f"{low:.1%} to {high:.1%}"
        every = format_seconds((figures.checkpoint_every or 0) * job.step_s)
        rows.append((run.name, published, f"{figures.goodput:.1%}", every, run.source))
        found.append(
            {
                "run": run.name,
                "published": run.goodput,
                "predicted": round(figures.goodput, 4),
                "between_failures_h": round((figures.between_failures_s or 0.0) / HOUR_S, 2),
                "upkeep": {
                    field.name: getattr(overheads, field.name)
                    for field in dataclasses.fields(overheads)
                    if getattr(overheads, field.name) is not None
                },
                "source": run.source,
            }
        )
    taken_us = round(microseconds(job_of(RUNS[0]), usual_overheads(16_384)), 1)
    write_atomic(out, json.dumps({"runs": found, "prediction_us": taken_us}, indent=1) + "\n")
    click.echo(table(("run", "published", "predicted", "checkpoints", "source"), rows))
    click.echo(f"\none prediction takes {taken_us:g} us")


if __name__ == "__main__":
    main()
