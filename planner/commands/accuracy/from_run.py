"""The part of `plan calibrate` that makes rows of runs' histories, and says what it could not find."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from planner.calibration.run_history import Converted


def converted_runs(
    paths: Sequence[Path], plan_file: Path | None, columns: Sequence[str], metrics: Sequence[str]
) -> tuple[Converted, ...]:
    """The rows of the runs; what was found and what was not goes to stderr. Raises InputError."""
    from planner.calibration.run_history import asked_of, convert_all
    from planner.strategy.plan import load_plan

    asked = asked_of(load_plan(plan_file) if plan_file else None, columns, metrics)
    found = convert_all(paths, asked)
    for each in found:
        click.echo(_found_text(each), err=True)
        for remark in (*each.remarks, *_unpredictable(each)):
            click.echo(f"warning: {each.run.id}: {remark}", err=True)
    return found


def _found_text(each: Converted) -> str:
    from planner.foundation.units import GIB, format_bytes, format_seconds

    peak = each.run.peak_memory_gib
    memory = "" if peak is None else f"; peak memory {format_bytes(peak * GIB)}, allocated"
    seconds = format_seconds(each.step_time.value)
    return f"{each.run.id}: step time {seconds} from {each.source}, {each.step_time.text}{memory}"


def _unpredictable(each: Converted) -> list[str]:
    """Why the row cannot be used for a prediction, where it cannot."""
    from planner.calibration.run_setup import run_problem
    from planner.strategy.estimate import Rejected

    if each.run.device == "cpu":
        return [
            "constants are fitted to accelerators; a CPU is predicted by what `plan profile` measures on it"
        ]
    setup = run_problem(each.run, None)
    if isinstance(setup, Rejected):
        return [f"the row cannot be predicted: {setup.detail}"]
    return []


def write_table(found: Sequence[Converted], output: Path | None, *, as_json: bool) -> None:
    """Writes the rows as runs.csv to a file, or to stdout where there is none."""
    from planner.calibration.runs import runs_csv
    from planner.commands.shared.text import print_json
    from planner.foundation.decode import write_atomic

    text = runs_csv(each.run for each in found)
    if output is not None:
        write_atomic(output, text)
    if as_json:
        print_json(_document(found, output))
    elif output is None:
        click.echo(text, nl=False)
    else:
        rows = "1 row" if len(found) == 1 else f"{len(found)} rows"
        click.echo(f"table  {output}  ({rows})")


def _document(found: Sequence[Converted], output: Path | None) -> dict[str, Any]:
    return {
        "table": None if output is None else str(output),
        "runs": [
            {
                "id": each.run.id,
                "step_time_s": each.run.step_time_s,
                "step_time_spread": each.step_time.spread,
                "steps": each.step_time.steps,
                "warmup_steps": each.step_time.left_out,
                "step_time_from": each.source,
                "peak_memory_gib": each.run.peak_memory_gib,
                "remarks": [*each.remarks, *_unpredictable(each)],
            }
            for each in found
        ],
    }
