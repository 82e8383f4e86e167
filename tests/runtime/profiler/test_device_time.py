"""Host and device time apart, on a device that is made up: a queue, and a clock that only work moves on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from runtime.profiler import timing as device_time
from runtime.profiler.timing import Effort, time_apart

EFFORT = Effort(warmup=1, least=3, most=5, budget_s=0.0)


class Clock:
    """Seconds on the host, and when the device will have done what is queued."""

    def __init__(self) -> None:
        self.now, self.free = 0.0, 0.0

    def launch(self, host_s: float, device_s: float) -> None:
        self.now += host_s
        self.free = max(self.free, self.now) + device_s


class Moment:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.at = clock, max(clock.now, clock.free)

    def query(self) -> bool:
        return self.clock.now >= self.at

    def elapsed_time(self, later: Moment) -> float:
        return 1e3 * (later.at - self.at)


class Queue:
    """What `Waiter` is to a CUDA device."""

    clock: Clock

    def __init__(self, device: torch.device) -> None:
        self.waits = 0

    def wait(self, seconds: float) -> None:
        self.clock.launch(0.0, seconds)

    def event(self) -> Moment:
        return Moment(self.clock)

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.clock.free)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    queue = type("QueueOfTest", (Queue,), {"clock": made})
    monkeypatch.setattr(device_time, "Waiter", queue)
    monkeypatch.setattr(device_time.time, "perf_counter", lambda: made.now)
    return made


def kernels(clock: Clock, count: int, host_s: float, device_s: float) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            clock.launch(host_s, device_s)

    return run


@pytest.mark.parametrize("device_s", [1e-6, 1e-3])
def test_both_times_are_known_whichever_is_longer(clock: Clock, device_s: float) -> None:
    """Kernels shorter or longer than it takes to launch them."""
    first, second = kernels(clock, 10, 2e-5, device_s), kernels(clock, 20, 2e-5, device_s)
    found = time_apart([first, second], EFFORT, torch.device("cpu"))
    for apart, count in zip(found, (10, 20), strict=True):
        assert apart.device.median_s == pytest.approx(count * device_s)
        assert apart.host_s == pytest.approx(count * 2e-5)
        assert apart.device.samples == 3


def test_a_host_that_waits_for_the_device_has_no_time_of_its_own(clock: Clock) -> None:
    def waits() -> None:
        clock.launch(2e-5, 1e-3)
        clock.now = max(clock.now, clock.free)
        clock.launch(2e-5, 1e-3)

    (apart,) = time_apart([waits], EFFORT, torch.device("cpu"))
    assert apart.host_s is None
    assert apart.device.median_s == pytest.approx(2e-3 + 4e-5, rel=0.02)


def test_slow_first_runs_make_the_device_wait_longer(clock: Clock) -> None:
    """The wait begins at twice the latest run's host time and grows until the host is through first."""
    host_s = iter([1e-6, *[1e-4] * 99])

    def slower() -> None:
        clock.launch(next(host_s), 1e-5)

    (apart,) = time_apart([slower], EFFORT, torch.device("cpu"))
    assert apart.device.median_s == pytest.approx(1e-5)
    assert apart.host_s == pytest.approx(1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_on_an_accelerator() -> None:
    """Small kernels take the host longer than the device; a phase that reads a value back has one time."""
    device = torch.device("cuda")
    small = torch.ones(8, device=device)

    def many() -> None:
        for _ in range(200):
            small.add_(1)

    (launched,) = time_apart([many], EFFORT, device)
    assert launched.host_s is not None and launched.host_s > launched.device.median_s > 0
    waiting = time_apart([many, lambda: float(small.sum())], EFFORT, device)
    assert all(apart.host_s is None and apart.device.median_s > 0 for apart in waiting)
