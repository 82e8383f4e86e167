"""Comparison: several plans that were predicted and run, side by side; comparison.json."""

from __future__ import annotations

import itertools
from pathlib import Path

from planner.foundation.decode import decode_json, read_text, to_json, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen

DISTINCT = 0.10
"""Measured times closer than this count as equal: their order says nothing about the planner."""


@frozen
class ComparisonRow:
    """One plan that was run: what was predicted and what was measured.

    `label` is for people; `strategy` is `Degrees.label()`. Peaks are those of the fullest rank.
    """

    label: str
    strategy: str
    predicted_step_time_s: float
    measured_step_time_s: float
    predicted_peak_memory_bytes: int
    measured_peak_memory_bytes: int
    chosen: bool = False

    @property
    def time_error(self) -> float:
        """(predicted - measured) / measured step time."""
        return self.predicted_step_time_s / self.measured_step_time_s - 1

    @property
    def memory_error(self) -> float:
        """(predicted - measured) / measured peak."""
        return self.predicted_peak_memory_bytes / self.measured_peak_memory_bytes - 1


@frozen
class Ordering:
    """How many pairs of plans that truly differ were put in the right order, and the chosen's regret.

    `regret` is the chosen plan's measured time over the best measured time, minus 1.
    """

    pairs: int
    right: int
    regret: float


def judge_order(rows: tuple[ComparisonRow, ...]) -> Ordering:
    """Compares the predicted order of `rows` with the measured one, over pairs that differ by DISTINCT."""
    pairs = [
        (fast, slow)
        for fast, slow in itertools.permutations(rows, 2)
        if slow.measured_step_time_s > fast.measured_step_time_s * (1 + DISTINCT)
    ]
    right = sum(fast.predicted_step_time_s < slow.predicted_step_time_s for fast, slow in pairs)
    chosen = next((row for row in rows if row.chosen), min(rows, key=lambda row: row.predicted_step_time_s))
    best_s = min(row.measured_step_time_s for row in rows)
    return Ordering(pairs=len(pairs), right=right, regret=chosen.measured_step_time_s / best_s - 1)


def save_comparison(rows: tuple[ComparisonRow, ...], path: Path) -> None:
    """Writes comparison.json whole or not at all."""
    write_atomic(path, "[\n" + ",\n".join(to_json(row).strip() for row in rows) + "\n]\n")


def load_comparison(path: Path) -> tuple[ComparisonRow, ...]:
    """The rows in a file. Raises InputError for a wrong file and for times or peaks that are not positive."""
    rows: tuple[ComparisonRow, ...] = decode_json(
        tuple[ComparisonRow, ...], read_text(path), source=str(path)
    )
    fields = ("predicted_step_time_s", "measured_step_time_s", "measured_peak_memory_bytes")
    problems = [
        Problem(where=f"{path}: {index}.{field}", fault=f"is {getattr(row, field)}.", legal="above 0")
        for index, row in enumerate(rows)
        for field in fields
        if getattr(row, field) <= 0
    ]
    if not rows:
        problems.append(Problem(where=str(path), fault="holds no plan."))
    if problems:
        raise InputError(*problems)
    return rows
