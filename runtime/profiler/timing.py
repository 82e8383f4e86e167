"""Repeated timing: warm up, run until there is enough, report the median and the spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from planner.foundation.frozen import frozen


@frozen
class Effort:
    """How long to repeat: at least `least` runs, at most `most`, between them until `budget_s` is used."""

    warmup: int
    least: int
    most: int
    budget_s: float


@frozen
class Timing:
    """Median seconds of `samples` runs; `spread` is the interquartile range over the median."""

    median_s: float
    spread: float
    samples: int


def summarize(seconds: Sequence[float]) -> Timing:
    """The median and relative interquartile range of some timings (at least one)."""
    median = statistics.median(seconds)
    if len(seconds) < 2 or median <= 0:
        return Timing(median_s=median, spread=0.0, samples=len(seconds))
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median_s=median, spread=(high - low) / median, samples=len(seconds))


def synchronize(device: torch.device) -> None:
    """Waits for the device's queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock that tells how long a device computes: of one thread the seconds that it had of the CPU.

    What other processes take of a shared machine is not in them. On an idle one both clocks agree; of several
    threads the seconds would be added up.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def time_phases(phases: Sequence[Callable[[], object]], effort: Effort, device: torch.device) -> list[Timing]:
    """Times phases that run one after another (forward, backward) as often as the effort says."""
    return [summarize(taken) for taken in run_phases(phases, effort, device)]


def run_phases(
    phases: Sequence[Callable[[], object]], effort: Effort, device: torch.device
) -> list[list[float]]:
    """The seconds of each phase in every run."""
    for _ in range(effort.warmup):
        for phase in phases:
            phase()
    clock, seconds = clock_of(device), [list[float]() for _ in phases]
    started = time.perf_counter()
    while len(seconds[0]) < effort.least or (
        len(seconds[0]) < effort.most and time.perf_counter() - started < effort.budget_s
    ):
        for phase, taken in zip(phases, seconds, strict=True):
            synchronize(device)
            begun = clock()
            phase()
            synchronize(device)
            taken.append(clock() - begun)
    return seconds


class Reference:
    """A fixed piece of work, products and memory traffic, that tells how fast the machine is just now.

    A shared machine changes its speed by tens of percent within seconds. Timed beside each sample, the
    reference lets samples taken at different times be compared.
    """

    def __init__(self) -> None:
        self._factor = torch.randn(384, 384)
        self._long = torch.randn(1 << 20)

    def __call__(self) -> None:
        self._factor @ self._factor
        self._factor @ self._factor
        torch.nn.functional.silu(self._long)


def reference_s(times: int = 30) -> float:
    """Median seconds of the reference, now."""
    return time_call(Reference(), Effort(warmup=2, least=times, most=times, budget_s=0.0), CPU).median_s


CPU = torch.device("cpu")


def time_call(call: Callable[[], object], effort: Effort, device: torch.device) -> Timing:
    """Times one call as often as the effort says."""
    return time_phases([call], effort, device)[0]
