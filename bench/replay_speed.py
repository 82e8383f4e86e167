"""How long a full estimate takes at 64 stages and 512 micro-batches, and the bound of 10,000 shapes.

python -m bench.replay_speed [--out bench/results/NAME.json]

An estimate is CostModel.evaluate from nothing: the layers' costs, the table, its replay with and without
messages, the memory of every rank. Both are best and median of several runs in one process, imports done.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path

import click

from planner.catalog import load_model
from planner.cluster_grammar import parse_cluster
from planner.codec import write_atomic
from planner.commands.text import table
from planner.cost.evaluate import CostModel
from planner.problem import PlanningProblem
from planner.search.quick_bounds import quick_bounds_s
from planner.search.space import Pins, shapes
from planner.strategy import Degrees, Schedule, Strategy, even_stages
from planner.workload import Precision, Workload

STAGES, MICRO_BATCHES, SHAPES, RUNS = 64, 512, 10_000, 9
ESTIMATE_MS, BOUND_MS = 50.0, 100.0
"""What the two are to stay under."""


def problem_of(model: str, cluster: str, *, seq: int, batch: int) -> PlanningProblem:
    """A problem without a profile."""
    on = parse_cluster(cluster)
    return PlanningProblem(
        model=load_model(model),
        workload=Workload(seq=seq, batch=batch, precision=Precision.BF16),
        cluster=on,
        profile=None,
        memory_limit_bytes=on.groups[0].device.usable_memory_bytes,
    )


def milliseconds(run: Callable[[], object]) -> tuple[float, float]:
    """The best and the median time of RUNS runs, after one that is not counted."""
    run()
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begun))
    return min(times), statistics.median(times)


def estimates() -> list[dict[str, object]]:
    """One estimate with every schedule."""
    problem = problem_of("gpt3-175b", "64x8:h100-sxm-80gb", seq=2048, batch=MICRO_BATCHES)
    rows: list[dict[str, object]] = []
    for schedule in Schedule:
        degrees = Degrees(
            tp=8,
            pp=STAGES // schedule.least_chunks,
            dp_replicate=schedule.least_chunks,
            chunks=schedule.least_chunks,
            schedule=schedule,
            num_micro_batches=MICRO_BATCHES,
        )
        strategy = Strategy(degrees=degrees, stages=even_stages(problem.model.layers, STAGES))
        best, median = milliseconds(lambda s=strategy: CostModel(problem).evaluate(s))  # type: ignore[misc]
        rows.append(
            {"case": f"estimate {schedule}", "best_ms": best, "median_ms": median, "aim": ESTIMATE_MS}
        )
    return rows


def bounds() -> list[dict[str, object]]:
    """The bound of SHAPES legal shapes of two models, the layers' costs included."""
    rows: list[dict[str, object]] = []
    for name in ("llama-3.3-70b", "gemma-3-27b-text"):
        problem = problem_of(name, "4x8:h100-sxm-80gb", seq=4096, batch=256)
        legal = [shape for shape in shapes(problem, Pins()) if isinstance(shape, Degrees)]
        many = list(islice(cycle(legal), SHAPES))
        best, median = milliseconds(
            lambda p=problem, d=many: quick_bounds_s(CostModel(p), d, Pins().recomputes)  # type: ignore[misc]
        )
        rows.append({"case": f"bounds {name}", "best_ms": best, "median_ms": median, "aim": BOUND_MS})
    return rows


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the result.")
def main(out: Path | None) -> None:
    """Time both and print the table."""
    rows = estimates() + bounds()
    texts = [(r["case"], f"{r['best_ms']:.1f}", f"{r['median_ms']:.1f}", f"{r['aim']:.0f}") for r in rows]
    print(table(("case", "best ms", "median ms", "aim"), texts))
    if out is not None:
        document = {"bench": "replay_speed", "date": datetime.now(UTC).isoformat(), "rows": rows}
        write_atomic(out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
