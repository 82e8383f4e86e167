"""TrainSummary: summary.json, how a run ended and how far the prediction was from it."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from planner.foundation.decode import to_json, write_atomic
from planner.foundation.frozen import frozen
from planner.foundation.run_files import SUMMARY
from planner.strategy.plan import Plan, added_usd, predicted_memory_by_rank, predicted_usd, usd_of
from runtime.train.metrics import NOTHING_BEFORE, Earlier, StepCauses, StepMetrics, mfu, predicted_causes

SUMMARY_SCHEMA = 1


@frozen
class TrainSummary:
    """summary.json: predicted against measured, and how the run ended.

    `measured_step_time_s` is the median over the timed steps of the slowest rank's time;
    `measured_step_time_spread` its interquartile range over the median. Both are None without a timed
    step. `goodput` is the share of the run's wall time (`wall_s`, all launches) that went into steps that
    were kept. `cost_usd` is for that time, each launch on its own plan's cluster, `predicted_cost_usd` what
    these plans say of the steps up to the last, `expected_cost_usd` what the run costs with the steps that
    are left of those asked for, at this launch's pace; all are None where a price is not known.
    `causes_by_rank` is where the time of the recorded step went, empty where none was recorded; what a rank
    was busy with and what it waited for are sums of these. `checkpoint_wait_s` is what training waited for
    checkpoints in this launch. `executed_differences` lists where the running model differs from its plan.
    """

    schema_version: int
    status: str
    plan: str
    world: int
    device: str
    first_step: int
    last_step: int
    first_loss: float | None
    last_loss: float | None
    predicted_step_time_s: float
    predicted_step_time_interval_s: tuple[float, float]
    measured_step_time_s: float | None
    measured_step_time_spread: float | None
    step_time_error: float | None
    timed_steps: int
    tokens_per_s: float | None
    mfu: float | None
    predicted_peak_memory_bytes: int
    predicted_peak_memory_bytes_by_rank: tuple[int, ...]
    measured_peak_memory_bytes: int | None
    measured_peak_memory_bytes_by_rank: tuple[int, ...]
    peak_memory_error: float | None
    busy_s_by_rank: tuple[float, ...]
    wait_s_by_rank: tuple[float, ...]
    causes_by_rank: tuple[StepCauses, ...]
    predicted_causes: StepCauses
    goodput: float
    wall_s: float
    cost_usd: float | None
    predicted_cost_usd: float | None
    expected_cost_usd: float | None
    executed: dict[str, Any]
    executed_differences: tuple[str, ...]
    checkpoint: str | None
    checkpoint_wait_s: float
    data: str
    versions: dict[str, str]


@dataclass(slots=True)
class Seen:
    """What rank 0 has seen of a launch so far; `steps_s` includes `earlier` launches."""

    first_step: int
    losses: list[float] = field(default_factory=list)
    steps_s: float = 0.0
    earlier: Earlier = NOTHING_BEFORE
    timed_s: list[float] = field(default_factory=list)
    peaks: tuple[int, ...] = ()
    causes: tuple[StepCauses, ...] = ()
    status: str = "finished"
    checkpoint: str | None = None
    checkpoint_wait_s: float = 0.0
    executed: dict[str, Any] = field(default_factory=dict)
    executed_differences: tuple[str, ...] = ()

    def cost_usd(self, plan: Plan, wall_s: float) -> float | None:
        """Dollars of the run, which has taken `wall_s`: this launch on its plan's cluster."""
        return added_usd(self.earlier.cost_usd, usd_of(plan, wall_s - self.earlier.wall_s))

    def predicted_cost_usd(self, plan: Plan, steps: int) -> float | None:
        """Dollars that were predicted of the steps before, and of `steps` of this launch."""
        return added_usd(self.earlier.predicted_cost_usd, predicted_usd(plan, steps))

    def note(self, line: StepMetrics) -> None:
        """Takes in one step."""
        self.losses.append(line.loss)
        self.steps_s += line.step_time_s
        self.peaks = line.peak_memory_bytes
        if line.timed:
            self.timed_s.append(line.step_time_s)


def summarize(plan: Plan, seen: Seen, *, wall_s: float, left_s: float, data: str) -> TrainSummary:
    """The summary of a launch up to now. `wall_s` is the time of the run so far, all its launches, `left_s`
    what the steps that are left of it would take."""
    step_time_s = statistics.median(seen.timed_s) if seen.timed_s else None
    predicted_s = plan.estimate.step_time_s
    predicted = predicted_memory_by_rank(plan)
    peak = max(seen.peaks) if seen.peaks else None
    return TrainSummary(
        schema_version=SUMMARY_SCHEMA,
        status=seen.status,
        plan=plan.strategy.degrees.label(),
        world=plan.strategy.degrees.world,
        device="+".join(dict.fromkeys(group.device.name for group in plan.cluster.groups)),
        first_step=seen.first_step + 1,
        last_step=seen.first_step + len(seen.losses),
        first_loss=_finite(seen.losses[0]) if seen.losses else None,
        last_loss=_finite(seen.losses[-1]) if seen.losses else None,
        predicted_step_time_s=predicted_s,
        predicted_step_time_interval_s=plan.estimate.step_time_interval_s,
        measured_step_time_s=step_time_s,
        measured_step_time_spread=quartile_spread(seen.timed_s),
        step_time_error=_error(predicted_s, step_time_s),
        timed_steps=len(seen.timed_s),
        tokens_per_s=plan.workload.tokens_per_step / step_time_s if step_time_s else None,
        mfu=mfu(plan, step_time_s) if step_time_s else None,
        predicted_peak_memory_bytes=plan.estimate.peak_memory_bytes,
        predicted_peak_memory_bytes_by_rank=predicted,
        measured_peak_memory_bytes=peak,
        measured_peak_memory_bytes_by_rank=seen.peaks,
        peak_memory_error=_error(plan.estimate.peak_memory_bytes, peak),
        busy_s_by_rank=tuple(rank.compute_s + rank.optimizer_s for rank in seen.causes),
        wait_s_by_rank=tuple(rank.wait_s + rank.gradient_sums_s for rank in seen.causes),
        causes_by_rank=seen.causes,
        predicted_causes=predicted_causes(plan),
        goodput=min(1.0, seen.steps_s / wall_s),
        wall_s=wall_s,
        cost_usd=seen.cost_usd(plan, wall_s),
        predicted_cost_usd=seen.predicted_cost_usd(plan, len(seen.losses)),
        expected_cost_usd=seen.cost_usd(plan, wall_s + left_s),
        executed=seen.executed,
        executed_differences=seen.executed_differences,
        checkpoint=seen.checkpoint,
        checkpoint_wait_s=seen.checkpoint_wait_s,
        data=data,
        versions={"python": platform.python_version(), "torch": torch.__version__},
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _error(predicted: float, measured: float | None) -> float | None:
    """(predicted - measured) / measured; None where either is unknown."""
    return (predicted - measured) / measured if measured and predicted else None


def quartile_spread(values: Sequence[float]) -> float | None:
    """Interquartile range over the median; None for fewer than two values."""
    if len(values) < 2:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def write_summary(run_dir: Path, summary: TrainSummary) -> None:
    """Writes summary.json whole or not at all."""
    write_atomic(run_dir / SUMMARY, to_json(summary))
