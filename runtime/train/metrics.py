"""What a run measures while it goes: metrics.jsonl, timeline.json, and the steps that are probed.

Where a step's time goes, by cause: measured on one recorded step, and as it was predicted.

Steps that are recorded: their memory, the timeline of all ranks, a profiler's trace, the allocations.

Recording slows a step down, so recorded steps are not timed (`runtime.train.metrics.Probes`).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.profiler import ProfilerActivity, profile

from planner.foundation.decode import encode, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.run_files import METRICS, TIMELINE
from planner.strategy.plan import Plan
from runtime.check.measured_memory import measure_peak
from runtime.launch.rank import gather_json, own_rank
from runtime.parallel.pipeline import Record

GRADIENT_SUMS, OPTIMIZER = "gradient sums", "optimizer"
Span = tuple[str, float, float]
"""Name, begin and end of what a rank did."""


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


def causes_of(spans: Sequence[Span], step_s: float) -> StepCauses:
    """The causes of a rank's step of `step_s` seconds, from its recorded spans."""
    seconds = {GRADIENT_SUMS: 0.0, OPTIMIZER: 0.0}
    compute_s = 0.0
    for name, begin, end in spans:
        if name in seconds:
            seconds[name] += end - begin
        else:
            compute_s += end - begin
    recorded_s = compute_s + sum(seconds.values())
    return StepCauses(
        compute_s=compute_s,
        wait_s=max(0.0, step_s - recorded_s),
        gradient_sums_s=seconds[GRADIENT_SUMS],
        optimizer_s=seconds[OPTIMIZER],
    )


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
class TimelineEvent:
    """What one rank did in the recorded step. Times of all ranks of a machine are of one clock."""

    rank: int
    name: str
    start_s: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class Probes:
    """Which steps of a launch are recorded, counted from 0 at its start; the rest are timed.

    A profiler's trace, where asked for, is of the `profile` steps, and the snapshot of allocations of step
    `snapshot`.

    The first step pays for allocations and shape inference. Memory is recorded in the first and again in
    the second, whose figure is that of every later step. The timeline is that of the third.
    """

    memory: frozenset[int]
    timeline: int | None
    timed_from: int
    profile: range = range(0)
    snapshot: int | None = None

    @classmethod
    def over(cls, steps: int, *, profile_steps: int = 0, snapshot: bool = False) -> Probes:
        """Probes for a launch of `steps` steps; short ones record less so that something is timed."""
        memory, timeline, timed_from = (
            (frozenset({0, 1}), 2, 3)
            if steps >= 5
            else (frozenset({0}), 1, 2)
            if steps >= 3
            else (frozenset({0}), None, 1)
        )
        return cls(
            memory,
            timeline,
            timed_from,
            range(timed_from, min(timed_from + profile_steps, steps)),
            max(memory) if snapshot else None,
        )

    def recorded(self, offset: int) -> bool:
        """Whether memory, timeline or trace of this step are recorded."""
        return offset in self.memory or offset == self.timeline or offset in self.profile

    def timed(self, offset: int) -> bool:
        """Whether the time of this step counts."""
        return offset >= self.timed_from and offset not in self.profile


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


def write_timeline(run_dir: Path, events: Sequence[TimelineEvent]) -> None:
    """Writes timeline.json: a list of events in the order of rank and start."""
    ordered = sorted(events, key=lambda event: (event.rank, event.start_s))
    text = json.dumps([encode(event) for event in ordered], indent=0, allow_nan=False)
    write_atomic(run_dir / TIMELINE, text + "\n")


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


PROFILES, SNAPSHOTS = "profile", "memory"
MAX_CUDA_ENTRIES = 100_000
"""Allocations that a snapshot on CUDA goes back over."""


class Recorder:
    """Runs the steps of one rank, and records those that the probes name."""

    def __init__(self, probes: Probes, record: Record, device: torch.device, run_dir: Path) -> None:
        self.probes, self.record, self.device, self.run_dir = probes, record, device, run_dir
        self.peak_bytes = 0
        self.causes: list[StepCauses] = []
        """Of every rank in the step whose timeline was recorded, once it was."""
        self._profiler: Any = None

    def run(self, offset: int, step: Callable[[], object]) -> float:
        """Runs step `offset` of the launch; returns its seconds on this rank."""
        if self.probes.profile and offset == self.probes.profile.start:
            self._profiler = self._start_profiler()
        record = self.record
        record.clock = self.clock if offset == self.probes.timeline else None
        begin_s = self.clock()
        if offset in self.probes.memory:
            self._measure_memory(step, snapshot=offset == self.probes.snapshot)
        else:
            step()
        own_s = self.clock() - begin_s
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        if record.clock is not None:
            self._keep_timeline(list(record.spans), begin_s, own_s)
        if self._profiler is not None and offset == self.probes.profile.stop - 1:
            self._keep_profile()
        return own_s

    def clock(self) -> float:
        """Seconds of the machine's monotonic clock, which all its processes share."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def _keep_timeline(self, spans: list[Span], begin_s: float, own_s: float) -> None:
        """Gathers the recorded step of all ranks; the first writes it. Collective."""
        parts = gather_json({"spans": spans, "begin_s": begin_s, "own_s": own_s})
        self.causes = [causes_of(part["spans"], part["own_s"]) for part in parts]
        if own_rank() != 0:
            return
        start_s = min(part["begin_s"] for part in parts)
        events = [
            TimelineEvent(rank=rank, name=name, start_s=begin - start_s, duration_s=end - begin)
            for rank, part in enumerate(parts)
            for name, begin, end in part["spans"]
        ]
        write_timeline(self.run_dir, events)

    def _start_profiler(self) -> Any:
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        profiler = profile(activities=activities, acc_events=True)
        profiler.start()
        return profiler

    def _keep_profile(self) -> None:
        """Writes RUN_DIR/profile/rank-N.json.gz, a trace for Perfetto or chrome://tracing."""
        self._profiler.stop()
        path = self.run_dir / PROFILES / f"rank-{own_rank()}.json"
        path.parent.mkdir(exist_ok=True)
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        path.with_suffix(".json.gz").write_bytes(gzip.compress(path.read_bytes(), compresslevel=3))
        path.unlink()

    def _measure_memory(self, step: Callable[[], object], *, snapshot: bool) -> None:
        if not snapshot:
            self.peak_bytes = measure_peak(step, self.device).allocated_bytes
        elif self.device.type == "cuda":
            self._snapshot_cuda(step)
        else:
            timeline: list[tuple[float, int]] = []
            peak = measure_peak(step, self.device, timeline=timeline)
            self.peak_bytes = peak.allocated_bytes
            facts = {"start_bytes": peak.start_bytes, "peak_bytes": peak.allocated_bytes}
            self._keep_snapshot({**facts, "live_bytes": timeline})

    def _snapshot_cuda(self, step: Callable[[], object]) -> None:
        """torch's own snapshot: segments, blocks and the history of allocations with their stacks."""
        history: Any = torch.cuda.memory._record_memory_history
        history(max_entries=MAX_CUDA_ENTRIES)
        try:
            self.peak_bytes = measure_peak(step, self.device).allocated_bytes
            snapshot: Any = torch.cuda.memory._snapshot  # as plain data; _dump_snapshot would pickle it
            self._keep_snapshot({"peak_bytes": self.peak_bytes, "snapshot": snapshot(self.device)})
        finally:
            history(enabled=None)

    def _keep_snapshot(self, facts: dict[str, Any]) -> None:
        """Writes RUN_DIR/memory/rank-N.json.gz."""
        path = self.run_dir / SNAPSHOTS / f"rank-{own_rank()}.json.gz"
        path.parent.mkdir(exist_ok=True)
        facts = {"rank": own_rank(), "device": str(self.device), "process": os.getpid(), **facts}
        with gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as file:
            json.dump(facts, file, default=str)
