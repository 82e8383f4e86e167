"""Checkpoints of every plan under every other plan of the same model.

    python -m bench.reshard [--model NAME ...] [--most N] [--steps 20] [-o FILE]

Of every ordered pair the whole state (weights, optimizer, step; gathered from all ranks) after loading has
the SHA-256 that it had before saving, and the losses and gradient norms of the next three steps are those
of the run that went on: to 1e-5, and every bit where the plan is the same. Then, under each plan, STEPS
steps straight are half of them, a checkpoint, a new executor and the other half, bit for bit. Plans that
this version of the runtime does not execute are left out, and named.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from planner.commands.shared.text import table
from planner.foundation.decode import write_atomic
from planner.foundation.errors import InputError
from planner.model.attention import CpExchange
from planner.model.spec import ModelSpec
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Schedule, Zero
from runtime.parallel.parallelize import check_supported
from tests.plans import make_plan, split, tiny_gpt2, tiny_llama
from tests.runtime.resharding import AFTER, BEFORE, TOLERANCE, reshard, resumes_exactly

RESULTS = Path(__file__).parent / "results"
BATCH, MICRO_BATCH = 8, 2
ONE_F_ONE_B, GPIPE, INTERLEAVED = Schedule.ONE_F_ONE_B, Schedule.GPIPE, Schedule.INTERLEAVED
MODELS: Mapping[str, ModelSpec] = {"llama": tiny_llama(), "gpt2": tiny_gpt2()}

PLANS: Mapping[str, Sequence[tuple[Degrees, tuple[int, ...]]]] = {
    "llama": (
        (Degrees(), ()),
        (Degrees(tp=2), ()),
        (Degrees(tp=4, sequence_parallel=True), ()),
        (Degrees(pp=2, schedule=ONE_F_ONE_B), ()),
        (Degrees(pp=2, schedule=GPIPE), (3, 1)),
        (Degrees(pp=2, chunks=2, schedule=INTERLEAVED), ()),
        (Degrees(pp=4, schedule=ONE_F_ONE_B), ()),
        (Degrees(pp=2, schedule=Schedule.ZB_H1), ()),
        (Degrees(pp=2, chunks=2, schedule=Schedule.ZBV), ()),
        (Degrees(pp=2, chunks=2, schedule=Schedule.DUALPIPEV), ()),
        (Degrees(dp_replicate=2), ()),
        (Degrees(dp_shard=2, zero=Zero.OPTIMIZER), ()),
        (Degrees(dp_shard=2, zero=Zero.GRADIENTS), ()),
        (Degrees(dp_shard=4, zero=Zero.PARAMETERS), ()),
        (Degrees(dp_replicate=2, dp_shard=2, zero=Zero.PARAMETERS), ()),
        (Degrees(tp=2, sequence_parallel=True, dp_shard=2, zero=Zero.GRADIENTS), ()),
        (Degrees(tp=2, pp=2, schedule=ONE_F_ONE_B), ()),
        (Degrees(pp=2, dp_shard=2, zero=Zero.PARAMETERS, schedule=ONE_F_ONE_B), (1, 3)),
        (Degrees(tp=2, pp=2, dp_shard=2, zero=Zero.OPTIMIZER, sequence_parallel=True), ()),
        (Degrees(cp=2, cp_exchange=CpExchange.RING), ()),
        (Degrees(cp=2, cp_exchange=CpExchange.GATHER, dp_shard=2, zero=Zero.PARAMETERS), ()),
        (Degrees(cp=2, cp_exchange=CpExchange.ALL_TO_ALL, tp=2), ()),
    ),
    "gpt2": (
        (Degrees(), ()),
        (Degrees(tp=2, sequence_parallel=True), ()),
        (Degrees(pp=2, schedule=ONE_F_ONE_B), (3, 1)),
        (Degrees(pp=4, schedule=GPIPE), ()),
        (Degrees(pp=2, chunks=2, schedule=INTERLEAVED), ()),
        (Degrees(dp_shard=4, zero=Zero.PARAMETERS), ()),
        (Degrees(dp_replicate=2, dp_shard=2, zero=Zero.OPTIMIZER), ()),
        (Degrees(tp=2, pp=2, schedule=ONE_F_ONE_B), ()),
        (Degrees(pp=2, dp_shard=2, zero=Zero.GRADIENTS, schedule=ONE_F_ONE_B), ()),
    ),
}
"""Degrees, and the layers of each stage where they are uneven."""


def plans_of(model: str) -> tuple[dict[str, Plan], list[str]]:
    """The plans of a model by name, and the names of those that the runtime refuses."""
    found: dict[str, Plan] = {}
    refused: list[str] = []
    for degrees, layers in PLANS[model]:
        given = replace(
            degrees, micro_batch=MICRO_BATCH, num_micro_batches=BATCH // (MICRO_BATCH * degrees.dp)
        )
        plan = make_plan(MODELS[model], given, split(*layers) if layers else None)
        name = given.label()
        if degrees.dp_replicate > 1 and degrees.dp_shard > 1:
            name += f" hsdp {degrees.dp_replicate}x{degrees.dp_shard}"
        if layers:
            name += f" layers {'+'.join(map(str, layers))}"
        try:
            check_supported(plan)
        except InputError:
            refused.append(name)
        else:
            assert name not in found, name
            found[name] = plan
    return found, refused


def measure(plans: dict[str, Plan], steps: int, told: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The pairs of one model as rows, and whether each plan resumes exactly."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = reshard(plans, Path(folder), told=told)
    for pair in pairs:
        yield {"kind": "pair", **asdict(pair), "good": pair.good}
    for name, plan in plans.items() if steps else ():
        with tempfile.TemporaryDirectory() as folder:
            exact = resumes_exactly(plan, Path(folder), steps)
        told(f"resumed {name}: {'exact' if exact else 'NOT EXACT'}")
        yield {"kind": "resume", "plan": name, "good": exact}


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="Only these.")
@click.option("--most", type=int, default=None, help="At most so many plans of a model.")
@click.option("--steps", default=20, show_default=True, help="Steps of a resumed run; 0: pairs alone.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=None, help="Where to write JSON.")
def main(models: tuple[str, ...], most: int | None, steps: int, output: Path | None) -> None:
    """Runs all pairs; exit code 4 where one is not as it should be."""
    begin_s, rows, refused = time.monotonic(), [], []
    for model in models or tuple(MODELS):
        plans, out = plans_of(model)
        refused += [f"{model} {name}" for name in out]
        for row in measure(dict(list(plans.items())[:most]), steps, _teller(model)):
            rows.append({"model": model, **row})
    summary = _summary(rows, refused, steps, time.monotonic() - begin_s)
    click.echo(table(("kind", "all", "good"), [(k, summary[k], summary[f"{k}_good"]) for k in KINDS]))
    click.echo(f"largest difference after loading: {summary['largest_difference']:.1e}")
    click.echo(f"left out, not executed by this version: {', '.join(refused) or 'none'}")
    write_atomic(output or RESULTS / f"{summary['date']}-reshard.json", json.dumps(summary, indent=1) + "\n")
    raise SystemExit(0 if all(row["good"] for row in rows) else 4)


KINDS = ("pair", "resume")


def _teller(model: str) -> Callable[[str], None]:
    return lambda text: click.echo(f"{model}: {text}", err=True)


def _summary(rows: list[dict[str, Any]], refused: list[str], steps: int, wall_s: float) -> dict[str, Any]:
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
        "left_out": refused,
        "wall_s": round(wall_s, 1),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
