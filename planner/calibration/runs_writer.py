"""Writer of runs.csv: the columns of the contract, then ours; what is unknown stays empty."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from planner.calibration.run import Run

COLUMNS = tuple(field.name for field in fields(Run) if field.name != "where")


def runs_csv(runs: Iterable[Run]) -> str:
    """Runs as the text of a table that `read_runs` reads back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(getattr(run, name)) for name in COLUMNS] for run in runs)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.9g}" if isinstance(value, float) else str(value)
