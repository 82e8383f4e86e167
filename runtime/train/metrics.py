"""What a run measures while it goes: metrics.jsonl, timeline.json, and the steps that are probed.

Where a step's time goes, by cause: measured on one recorded step, and as it was predicted.

Steps that are recorded: their memory, the timeline of all ranks, a profiler's trace, the allocations.

Recording slows a step down, so recorded steps are not timed (`runtime.train.metrics.Probes`).

TrainSummary: summary.json, how a run ended and how far the prediction was from it.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from planner.foundation.decode import encode, to_json, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.run_files import METRICS, SUMMARY
from planner.strategy.plan import Plan, cost_usd, predicted_memory_by_rank, predicted_usd, sum_usd


@frozen
class StepCauses:
    """Seconds of one step of one rank, by cause; the sum is the step.

    `compute_s` are forward and backward passes, with the collectives inside them (tensor parallelism,
    gathered weights). `wait_s` is what lies between the recorded spans: waiting for other stages, and host
    work. `gradient_sums_s` are sums after the passes, with the wait for the slowest rank.
    """

    compute_s: float
    wait_s: float
    gradient_sums_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.wait_s + self.gradient_sums_s + self.optimizer_s


def mean_causes(ranks: Sequence[StepCauses]) -> StepCauses:
    """The mean of all ranks, which all take the same time for a step."""
    count = len(ranks)
    return StepCauses(
        compute_s=sum(rank.compute_s for rank in ranks) / count,
        wait_s=sum(rank.wait_s for rank in ranks) / count,
        gradient_sums_s=sum(rank.gradient_sums_s for rank in ranks) / count,
        optimizer_s=sum(rank.optimizer_s for rank in ranks) / count,
    )


def predicted_causes(plan: Plan) -> StepCauses:
    """The plan's breakdown in the same four causes.

    Data-parallel communication counts as gradient sums, though with sharded weights a part of it is hidden
    in the passes when it is measured; time on the host counts as waiting.
    """
    parts = plan.estimate.breakdown
    return StepCauses(
        compute_s=parts.compute_s + parts.recompute_s + parts.tp_comm_s + parts.cp_comm_s + parts.ep_comm_s,
        wait_s=parts.pp_comm_s + parts.bubble_s + parts.host_s,
        gradient_sums_s=parts.dp_comm_s,
        optimizer_s=parts.optimizer_s,
    )


@frozen
class StepMetrics:
    """One line of metrics.jsonl. Steps count from 1.

    `step_time_s` is that of the slowest rank. `timed` is false for steps that were slowed down on
    purpose: the first ones, and those whose memory or timeline was recorded. `peak_memory_bytes` holds
    the allocated peak of every rank, in rank order, as last recorded. `mfu` is None where the device's peak
    is unknown. `wall_s` is the time that the run has taken so far, all its launches together, `cost_usd` what
    that cost, each launch on its own plan's cluster, where all prices are known, `predicted_cost_usd` what
    their plans said of the steps so far, `left_s` what its remaining steps take at the pace of this launch,
    and `expected_cost_usd` what the run will have cost with them.
    `loss_scale` is that of fp16; a step whose gradients overflowed is `skipped`: nothing was updated.
    `checkpoint_wait_s` is what training waited for checkpoints between the step before and this one.
    `causes` is where the time went, the mean of all ranks; only in the step whose timeline was recorded.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    step_time_s: float
    tokens_per_s: float
    mfu: float | None
    peak_memory_bytes: tuple[int, ...]
    timed: bool
    wall_s: float
    checkpoint_wait_s: float
    predicted_step_time_s: float
    left_s: float
    cost_usd: float | None
    causes: StepCauses | None = None
    loss_scale: float | None = None
    skipped: bool = False
    expected_cost_usd: float | None = None
    predicted_cost_usd: float | None = None


@frozen
class Earlier:
    """What earlier launches took, lost steps included, and what that cost; None: a price is not known.

    `steps_s` is the part that went into the steps that are kept, `predicted_cost_usd` what the plans by which
    they ran said of these.
    """

    wall_s: float = 0.0
    steps_s: float = 0.0
    cost_usd: float | None = 0.0
    predicted_cost_usd: float | None = 0.0


NOTHING_BEFORE = Earlier()


def _earlier(lines: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> Earlier:
    spent: list[Any] = [line.get("cost_usd") for line in lines]
    return Earlier(
        wall_s=max((line.get("wall_s", 0.0) for line in lines), default=0.0),
        steps_s=sum(line["step_time_s"] for line in kept),
        cost_usd=None if None in spent else max(spent, default=0.0),
        predicted_cost_usd=kept[-1].get("predicted_cost_usd") if kept else 0.0,
    )


class MetricsLog:
    """metrics.jsonl, open for appending. Lines after `last_step` are dropped: those steps come again."""

    def __init__(self, run_dir: Path, *, last_step: int) -> None:
        self._path = run_dir / METRICS
        lines = [line for line in map(_parse, _lines(self._path)) if line is not None] if last_step else []
        kept = [line for line in lines if line["step"] <= last_step]
        self.earlier = _earlier(lines, kept)
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file: TextIO = self._path.open("a", encoding="utf-8")

    def write(self, line: StepMetrics) -> None:
        """Appends one line, at once. Raises InputError where the disk is full."""
        values = {name: _finite(value) for name, value in encode(line).items()}
        try:
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                Problem(where=str(self._path), fault=f"cannot be written: {error.strerror}.")
            ) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was reported by `write`
            self._file.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def _parse(line: str) -> dict[str, Any] | None:
    """A line's values; None for one that a killed run did not finish."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and {"step", "step_time_s"} <= values.keys() else None


def peak_flops(plan: Plan) -> float | None:
    """Dense peak FLOP/s of all devices that the plan uses together, or None where one is unknown."""
    precision = plan.workload.precision
    peaks = [
        group.device.peak_flops(precision) for group in plan.cluster.groups for _ in range(group.devices)
    ]
    used = peaks[: plan.strategy.degrees.world]
    return None if None in used else sum(peak for peak in used if peak is not None)


def model_flops(plan: Plan) -> float:
    """Model FLOPs of one step: forward once and backward twice; recomputation does not count."""
    return 3 * plan.model.flops_per_token_forward(plan.workload.seq) * plan.workload.tokens_per_step


def mfu(plan: Plan, step_time_s: float) -> float | None:
    """Model FLOPs utilisation of a step: model FLOPs / (time x peak of all devices)."""
    peak = peak_flops(plan)
    return None if peak is None else model_flops(plan) / (step_time_s * peak)


def prepare_run_dir(run_dir: Path) -> None:
    """Makes the run folder and tries that it can be written. Raises InputError if not."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".write-test"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise InputError(
            Problem(
                where=f"--run-dir {run_dir}",
                fault=f"cannot be written: {error.strerror}.",
                fix="name a folder on a disk with room that you may write",
            )
        ) from None


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
        return sum_usd(self.earlier.cost_usd, cost_usd(plan, wall_s - self.earlier.wall_s))

    def predicted_cost_usd(self, plan: Plan, steps: int) -> float | None:
        """Dollars that were predicted of the steps before, and of `steps` of this launch."""
        return sum_usd(self.earlier.predicted_cost_usd, predicted_usd(plan, steps))

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
