"""TODO."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from planner.foundation.decode import encode, write_atomic
from planner.foundation.frozen import frozen
from planner.foundation.run_files import TIMELINE
from runtime.check.memory import measure_peak
from runtime.launch.process_group import gather_json, own_rank
from runtime.parallel.pipeline import Record
from runtime.train.metrics import StepCauses

GRADIENT_SUMS, OPTIMIZER = "gradient sums", "optimizer"
Span = tuple[str, float, float]
"""Name, begin and end of what a rank did."""


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


def write_timeline(run_dir: Path, events: Sequence[TimelineEvent]) -> None:
    """Writes timeline.json: a list of events in the order of rank and start."""
    ordered = sorted(events, key=lambda event: (event.rank, event.start_s))
    text = json.dumps([encode(event) for event in ordered], indent=0, allow_nan=False)
    write_atomic(run_dir / TIMELINE, text + "\n")


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
