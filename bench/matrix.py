"""Plans over every axis, each executed on real ranks and compared with one process.

    python -m bench.matrix [--model NAME ...] [--first N] [--documents] [-o FILE]

For each plan of `tests.runtime.matrix`: the losses and global gradient norms of STEPS steps beside those of
one process in fp32, the largest relative difference, and whether what was executed (degrees, stages,
recomputation, the table of actions) is what the plan says. With --documents attention stays within the
documents of packed sequences, in both.

AdamW divides by the root of a second moment and eps (1e-3 here), so that it enlarges what rounding left of
small gradients, up to a thousand times. A plan that differs by more than TOLERANCE is therefore trained by
SGD as well: an error of the plan would be in its gradients, and be seen there; rounding is not enlarged, and
stays below SGD_TOLERANCE.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from planner.commands.shared.text import table
from planner.foundation.decode import write_atomic
from tests.runtime.matrix import MODELS, SGD_TOLERANCE, TOLERANCE, Case, execute, matrix, under_sgd

RESULTS = Path(__file__).parent / "results"


def _measure(case: Case, documents: bool) -> dict[str, Any]:
    begin_s = time.monotonic()
    try:
        outcome = execute(case.plan, documents=documents)
        beyond = outcome.difference > TOLERANCE
        by_sgd = execute(under_sgd(case.plan), documents=documents).difference if beyond else None
    except Exception as error:
        text = " ".join(str(error).split())[-300:]
        return {"plan": case.name, "error": f"{type(error).__name__}: {text}"}
    return {
        "plan": case.name,
        "ranks": case.plan.strategy.degrees.world,
        "difference": outcome.difference,
        "difference_sgd": by_sgd,
        "not_as_planned": outcome.not_as_planned,
        "wall_s": round(time.monotonic() - begin_s, 2),
    }


def _good(row: dict[str, Any]) -> bool:
    if "difference" not in row or row["not_as_planned"]:
        return False
    by_sgd = row["difference_sgd"]
    return bool(row["difference"] <= TOLERANCE if by_sgd is None else by_sgd <= SGD_TOLERANCE)


def _told(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    by_sgd = row["difference_sgd"]
    told = f"{row['difference']:.1e}" + (f", {by_sgd:.1e} under SGD" if by_sgd is not None else "")
    return told + " NOT AS PLANNED" * bool(row["not_as_planned"])


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="Only these.")
@click.option("--first", type=int, default=None, help="Only so many of the plans.")
@click.option("--only", default="", help="Only plans whose name holds this text.")
@click.option("--documents", is_flag=True, help="Attention within documents.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=None, help="Where to write JSON.")
def main(models: tuple[str, ...], first: int | None, only: str, documents: bool, output: Path | None) -> None:
    """Runs the plans and prints a line for each."""
    cases = [case for case in matrix(models or tuple(MODELS)) if only in case.name][:first]
    rows = []
    for number, case in enumerate(cases, start=1):
        row = _measure(case, documents)
        rows.append(row)
        click.echo(f"{number:3d}/{len(cases)} {case.name}: {_told(row)}", err=True)
    good = sum(map(_good, rows))
    worst = max((row["difference"] for row in rows if "difference" in row), default=0.0)
    click.echo(
        table(("plans", "equal and as planned", "largest difference"), [(len(rows), good, f"{worst:.1e}")])
    )
    summary = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "tolerance": TOLERANCE,
        "sgd_tolerance": SGD_TOLERANCE,
        "documents": documents,
        "plans": len(rows),
        "equal": good,
        "rows": rows,
    }
    write_atomic(
        output or RESULTS / f"{summary['date']}-matrix{'-documents' * documents}.json",
        json.dumps(summary, indent=1) + "\n",
    )
    raise SystemExit(0 if good == len(rows) else 4)


if __name__ == "__main__":
    main()
