"""Seconds that an accelerator works apart from those in which the host tells it to.

The device first waits in a kernel that does nothing, long enough for the host to begin all phases behind it.
Then nothing stands between their kernels, and events around a phase tell the device's time alone; the host's
is that of the calls. A phase in which the host itself waits for the device (sizes that are only known there)
cannot be begun ahead: its time is the wall's, and the host's is not known.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from runtime.profiler.timing import Effort, Timing, summarize

AHEAD = 2.0
"""How often the host time of the run before the device waits at first: runs differ."""
LONGEST_S = 1.0
"""A host that is not through within this many seconds of waiting waits for the device itself."""

Phase = Callable[[], object]


class Apart(NamedTuple):
    """The device's time of a phase, and the median of the host's; None where the host waits."""

    device: Timing
    host_s: float | None


class Run(NamedTuple):
    """One run of all phases: seconds of host and device of each, and whether the host was through first."""

    host_s: list[float]
    device_s: list[float]
    ahead: bool


def time_apart(phases: Sequence[Phase], effort: Effort, device: torch.device) -> list[Apart]:
    """Times phases that run one after another as often as the effort says."""
    waiter = Waiter(device)
    for _ in range(max(effort.warmup, 1)):
        latest = run_behind(phases, 0.0, waiter)
    wait_s = AHEAD * sum(latest.host_s)
    runs: list[Run] = []
    began = time.perf_counter()
    while len(runs) < effort.least or (
        len(runs) < effort.most and time.perf_counter() - began < effort.budget_s
    ):
        run = run_behind(phases, wait_s, waiter)
        if not run.ahead and wait_s and not runs:
            wait_s = 2 * wait_s if wait_s < LONGEST_S else 0.0  # no wait: it cannot be begun ahead
            continue
        runs.append(run)
    return summaries(runs, ahead=wait_s > 0)


def summaries(runs: Sequence[Run], *, ahead: bool) -> list[Apart]:
    """Of each phase, from runs; those where the device waited for the host are left out if others remain."""
    kept = [run for run in runs if run.ahead] or list(runs)
    return [
        Apart(summarize(device_s), statistics.median(host_s) if ahead else None)
        for host_s, device_s in zip(
            zip(*(run.host_s for run in kept), strict=True),
            zip(*(run.device_s for run in kept), strict=True),
            strict=True,
        )
    ]


def run_behind(phases: Sequence[Phase], wait_s: float, waiter: Waiter) -> Run:
    """Runs the phases once, begun while the device waits `wait_s`."""
    waiter.synchronize()
    waiter.wait(wait_s)
    events, host_s = [waiter.event()], []
    for phase in phases:
        began = time.perf_counter()
        phase()
        host_s.append(time.perf_counter() - began)
        events.append(waiter.event())
    ahead = not events[0].query()  # type: ignore[no-untyped-call]
    waiter.synchronize()
    device_s = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    return Run(host_s, device_s, ahead)


class Waiter:
    """Has a CUDA device wait, and marks moments in its queue."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cycles_per_s = 0.0
        cycles = 10**7
        self._sleep(cycles)  # the first one is loaded
        begin = self.event()
        self._sleep(cycles)
        end = self.event()
        self.synchronize()
        self.cycles_per_s = cycles / (begin.elapsed_time(end) / 1e3)

    def wait(self, seconds: float) -> None:
        """Queues a kernel of this many seconds that leaves memory and multipliers alone."""
        if seconds > 0:
            self._sleep(round(seconds * self.cycles_per_s))

    def event(self) -> torch.cuda.Event:
        """A moment in the queue, which tells how long after another it was reached."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def synchronize(self) -> None:
        """Waits for the queue."""
        torch.cuda.synchronize(self.device)

    def _sleep(self, cycles: int) -> None:
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
