"""Checkpoints of every plan under every other plan of the same model.

    python -m bench.reshard [--model NAME ...] [--steps 20] [-o FILE]

The plans are those of `tests.runtime.matrix`, grouped by model, with a few small ones. Of every ordered pair
the whole state (weights, optimizer, step; gathered from all ranks) after loading has the SHA-256 that it had
before saving, and the losses and gradient norms of the next three steps are those of the run that went on:
to 1e-5, and every bit where the plan is the same. Then, under each plan, STEPS steps straight are half of
them, a checkpoint, a new executor and the other half, bit for bit.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from planner.codec import write_atomic
from planner.commands.text import table
from planner.model import ModelSpec
from planner.plan import Plan
from planner.strategy import Degrees, Zero
from tests.plans import make_plan
from tests.runtime.matrix import BATCH, MODELS, SEQ, matrix
from tests.runtime.resharding import AFTER, BEFORE, TOLERANCE, reshard, resumes_exactly

RESULTS = Path(__file__).parent / "results"
SMALL = (
    Degrees(micro_batch=BATCH),
    Degrees(tp=2, micro_batch=4, num_micro_batches=2, sequence_parallel=True),
    Degrees(dp_shard=2, micro_batch=4, zero=Zero.PARAMETERS),
    Degrees(pp=2, micro_batch=2, num_micro_batches=4),
)
"""Plans of one and two ranks, which the matrix has few of."""


def groups(models: Sequence[str]) -> dict[str, dict[str, Plan]]:
    """Plans by name, grouped by the model that they train."""
    found: dict[ModelSpec, dict[str, Plan]] = {}
    for case in matrix(models):
        found.setdefault(case.plan.model, {})[case.name] = case.plan
    for spec, plans in found.items():
        plans |= {f"{spec.model_type} {d.label()}": make_plan(spec, d, seq=SEQ) for d in SMALL}
    return {f"{spec.name} of {spec.layers} layers": plans for spec, plans in found.items()}


def measure(plans: dict[str, Plan], steps: int, told: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The pairs of one model as rows, and whether each plan resumes exactly."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = reshard(plans, Path(folder), told=told)
    for pair in pairs:
        yield {"kind": "pair", **asdict(pair), "good": pair.good}
    for name, plan in plans.items():
        with tempfile.TemporaryDirectory() as folder:
            exact = resumes_exactly(plan, Path(folder), steps)
        told(f"resumed {name}: {'exact' if exact else 'NOT EXACT'}")
        yield {"kind": "resume", "plan": name, "good": exact}


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="Only these.")
@click.option("--most", type=int, default=None, help="At most so many plans of a model.")
@click.option("--steps", default=20, show_default=True, help="Steps of the comparison of a resumed run.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=None, help="Where to write JSON.")
def main(models: tuple[str, ...], most: int | None, steps: int, output: Path | None) -> None:
    """Runs all pairs and prints a line for each model."""
    begin_s, rows = time.monotonic(), []
    for model, plans in groups(models or tuple(MODELS)).items():
        chosen = dict(list(plans.items())[:most])
        told = lambda text, model=model: click.echo(f"{model}: {text}", err=True)  # noqa: E731
        rows += [{"model": model, **row} for row in measure(chosen, steps, told)]
    summary = _summary(rows, steps, time.monotonic() - begin_s)
    click.echo(table(("kind", "all", "good"), [(k, summary[k], summary[f"{k}_good"]) for k in KINDS]))
    click.echo(f"largest difference after loading: {summary['largest_difference']:.1e}")
    write_atomic(output or RESULTS / f"{summary['date']}-reshard.json", json.dumps(summary, indent=1) + "\n")
    raise SystemExit(0 if all(row["good"] for row in rows) else 4)


KINDS = ("pair", "resume")


def _summary(rows: list[dict[str, Any]], steps: int, wall_s: float) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    for kind in KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        counts |= {kind: len(of_kind), f"{kind}_good": sum(row["good"] for row in of_kind)}
    pairs = [row for row in rows if row["kind"] == "pair"]
    return {
        "bench": "reshard",
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "steps_before": BEFORE,
        "steps_after": AFTER,
        "steps_of_resume": steps,
        "tolerance": TOLERANCE,
        **counts,
        "same_state": sum(row["same_state"] for row in pairs),
        "exact": sum(row["difference"] == 0.0 for row in pairs),
        "largest_difference": max((row["difference"] for row in pairs), default=0.0),
        "wall_s": round(wall_s, 1),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
