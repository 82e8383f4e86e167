"""How long a full estimate takes at 64 stages and 512 micro-batches, and the bound of 10,000 shapes.

python -m bench.replay_speed [--out bench/results/NAME.json]

An estimate is CostModel.evaluate from nothing: the layers' costs, the table, its replay with and without
messages, the memory of every rank; "again" with a model that has seen the layers and the table. The custom
table is 1F1B's with backwards split at random, each W right behind its I: its order is found, too.

Each is best and median of several runs in one process, imports done.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path

import click

from planner.commands.shared.text import table
from planner.cost.evaluate import CostModel
from planner.foundation.decode import write_atomic
from planner.hardware.catalog import load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import PlanningProblem
from planner.model.workload import Precision, Workload
from planner.search.bounds.quick_bounds import space_bounds_s
from planner.search.space import Space, space_of
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.schedule.schedules import Action, ActionKind, Table, build_table
from planner.strategy.schedule.table import cell
from planner.strategy.strategy import Degrees, Schedule, Strategy, even_stages

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


def timed(case: str, run: Callable[[], object], aim_ms: float) -> dict[str, object]:
    """A row of the result."""
    best, median = milliseconds(run)
    return {"case": case, "best_ms": best, "median_ms": median, "aim": aim_ms}


def estimates() -> list[dict[str, object]]:
    """One estimate with every schedule, and with a custom table."""
    problem = problem_of("gpt3-175b", "64x8:h100-sxm-80gb", seq=2048, batch=MICRO_BATCHES)
    rows: list[dict[str, object]] = []
    for schedule in Schedule:
        strategy = strategy_of(problem, schedule)
        again = CostModel(problem)
        cases: dict[str, Callable[[], object]] = {
            f"estimate {schedule}": lambda s=strategy: CostModel(problem).evaluate(s),  # type: ignore[misc]
            f"again {schedule}": lambda s=strategy, a=again: a.evaluate(s),  # type: ignore[misc]
        }
        rows += [timed(case, run, ESTIMATE_MS) for case, run in cases.items()]
    strategy = strategy_of(problem, Schedule.ONE_F_ONE_B)
    codes, m = custom_codes(strategy.degrees), MICRO_BATCHES
    return [
        *rows,
        timed("estimate custom", lambda: CostModel(problem).evaluate(strategy, Table(codes, m)), ESTIMATE_MS),
    ]


def strategy_of(problem: PlanningProblem, schedule: Schedule) -> Strategy:
    """STAGES even stages, MICRO_BATCHES micro-batches."""
    degrees = Degrees(
        tp=8,
        pp=STAGES // schedule.least_chunks,
        dp_replicate=schedule.least_chunks,
        chunks=schedule.least_chunks,
        schedule=schedule,
        num_micro_batches=MICRO_BATCHES,
    )
    return Strategy(degrees=degrees, stages=even_stages(problem.model.layers, STAGES))


def custom_codes(degrees: Degrees) -> list[list[int]]:
    """The codes of 1F1B's rows, half of the backwards split in two."""
    draw, m = random.Random(0), degrees.num_micro_batches
    table = build_table(Schedule.ONE_F_ONE_B, degrees.pp, 1, m)
    rows = []
    for row in table:
        actions: list[Action] = []
        for action in row:
            split = action.kind is ActionKind.BACKWARD and draw.random() < 0.5
            kinds = (ActionKind.INPUT_GRAD, ActionKind.WEIGHT_GRAD) if split else (action.kind,)
            actions += [action._replace(kind=kind) for kind in kinds]
        rows.append([cell(a.stage, a.kind) * m + a.micro_batch for a in actions])
    return rows


def bounds() -> list[dict[str, object]]:
    """The bound of SHAPES legal shapes of two models, the layers' costs included."""
    rows: list[dict[str, object]] = []
    for name in ("llama-3.3-70b", "gemma-3-27b-text"):
        problem = problem_of(name, "4x8:h100-sxm-80gb", seq=4096, batch=256)
        legal = [
            (shape, ((shape.schedule, shape.chunks),)) for shape in space_of(problem, FixedChoices()).shapes()
        ]
        bases, pipes = zip(*islice(cycle(legal), SHAPES), strict=True)
        many = Space(bases=bases, pipes=pipes, rejected=())
        rows.append(
            timed(
                f"bounds {name}",
                lambda p=problem, d=many: space_bounds_s(CostModel(p), d, FixedChoices().recomputes),  # type: ignore[misc]
                BOUND_MS,
            )
        )
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
