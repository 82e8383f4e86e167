"""What lies between attention's projections, by the kernel and the heads' width."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from planner.calibration.runs import Run, read_runs
from planner.calibration.validate import validate

DATA = Path(__file__).parents[3] / "bench" / "data"


def mean_error(runs: list[Run]) -> float:
    errors = [row.error for row in validate(runs, lambda device: None).rows if row.error is not None]
    assert len(errors) == len(runs) > 1
    return fmean(errors)


def test_heads_that_miss_the_matrix_units_are_as_slow_as_was_measured() -> None:
    """BLOOM's team tried GPTs of one width and depth with 96 and 128 heads, of 144 and 108 values: 216 bytes
    are no multiple of 16. Steps with 128 heads took a third longer."""
    trials = [run for run in read_runs([DATA / "tables.csv"]).runs if run.id.startswith("bloom")]
    trials = [run for run in trials if (run.hidden, run.layers, run.micro_batch) == (13824, 78, 4)]
    aligned, unaligned = ([run for run in trials if run.heads == heads] for heads in (96, 128))
    assert abs(mean_error(unaligned) - mean_error(aligned)) < 0.08
