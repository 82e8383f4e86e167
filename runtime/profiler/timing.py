"""Repeated timing: warm up, run until there is enough, report the median and the spread.

Seconds that an accelerator works apart from those in which the host tells it to.

The device first waits in a kernel that does nothing, long enough for the host to begin all phases behind it.
Then nothing stands between their kernels, and events around a phase tell the device's time alone; the host's
is that of the calls. A phase in which the host itself waits for the device (sizes that are only known there)
cannot be begun ahead: its time is the wall's, and the host's is not known.

Measuring processes: forked from this one, each reporting JSON lines through a pipe as it goes.

Every measurement runs in a child, so that a sample that runs out of memory or is killed costs that child
and not the profile, and this process never touches a device itself (which would forbid forking on CUDA).
torch is imported before the fork: a child starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import selectors
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

from planner.foundation.frozen import frozen
from runtime.launch.local_ranks import fork_child


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


Emit = Callable[[dict[str, Any]], None]
Body = Callable[[int, Emit], None]


class ChildFailed(Exception):  # noqa: N818  # an event to report, caught and turned into a skipped sample
    """A measuring process ended before its work did. The text says how."""


class TimeUp(Exception):  # noqa: N818  # the end of the time that was given, not a fault
    """The time that `ended_at` gave is over: the measuring processes were ended."""


_ENDS_S: ContextVar[float] = ContextVar("ends_s", default=math.inf)


@contextlib.contextmanager
def ended_at(ends_s: float) -> Iterator[None]:
    """Within it, `run_children` waits for nobody beyond this time of `time.monotonic`."""
    before = _ENDS_S.set(ends_s)
    try:
        yield
    finally:
        _ENDS_S.reset(before)


def run_children(body: Body, count: int = 1, *, silence_s: float = 120.0) -> Iterator[dict[str, Any]]:
    """Runs `body(rank, emit)` in `count` forked processes and yields what they emit, as it comes.

    Raises ChildFailed when a child raises, is killed, or when none has emitted anything for `silence_s`
    seconds, and TimeUp where the time is limited. However the iteration ends, no child is left running.
    """
    children: dict[int, int] = {}  # read end of its pipe -> process id
    try:
        for rank in range(count):
            reader, process = _fork(body, rank, list(children))
            children[reader] = process
        yield from _read(children, silence_s)
        for process in children.values():
            _expect_success(process)
    finally:
        for reader, process in children.items():
            os.close(reader)
            _end(process)


def _fork(body: Body, rank: int, inherited: list[int]) -> tuple[int, int]:
    """Fork a measuring process; return the read end of its pipe and its process id."""

    def run(emit: Emit) -> int:
        _die_first()
        for ending in (signal.SIGINT, signal.SIGTERM):  # the parent, which gets them too, ends us
            signal.signal(ending, signal.SIG_IGN)
        try:
            body(rank, emit)
            return 0
        except BaseException as error:
            text = " ".join(str(error).split())[:500]
            emit({"failed": f"{type(error).__name__}: {text}"})
            return 1

    process, reader = fork_child(run, inherited)
    return reader, process


def _die_first() -> None:
    """Where memory runs out, the system is to kill the measuring process and not the one that gathers."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _read(children: dict[int, int], silence_s: float) -> Iterator[dict[str, Any]]:
    buffers = dict.fromkeys(children, b"")
    with selectors.DefaultSelector() as selector:
        for reader in children:
            selector.register(reader, selectors.EVENT_READ)
        while selector.get_map():
            left_s = _ENDS_S.get() - time.monotonic()
            ready = selector.select(timeout=max(0.0, min(silence_s, left_s)))
            if not ready and left_s <= silence_s:
                raise TimeUp
            if not ready:
                raise ChildFailed(f"no sign of life for {silence_s:.0f} s")
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                *lines, buffers[key.fd] = (buffers[key.fd] + chunk).split(b"\n")
                for line in lines:
                    message: dict[str, Any] = json.loads(line)
                    if "failed" in message:
                        raise ChildFailed(message["failed"])
                    yield message
                if not chunk:
                    _raise_if_killed(children[key.fd])


def _raise_if_killed(process: int) -> None:
    """A child that was killed closes its pipe without a word: the others would wait for it in vain."""
    state = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    if state is not None and state.si_code != os.CLD_EXITED:
        raise ChildFailed(f"was killed by {signal.Signals(state.si_status).name}")


def _expect_success(process: int) -> None:
    state = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    if state is not None and state.si_status != 0:
        raise ChildFailed(f"ended with code {state.si_status}")


def _end(process: int) -> None:
    """Reaps a child; one that still runs is killed first."""
    finished, _ = os.waitpid(process, os.WNOHANG)
    if finished == 0:
        os.kill(process, signal.SIGKILL)
        while True:
            try:
                os.waitpid(process, 0)
                return
            except InterruptedError:
                time.sleep(0.01)
