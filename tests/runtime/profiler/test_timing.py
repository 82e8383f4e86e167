"""What a CPU is timed by: the seconds that the process had of it."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")

from runtime.profiler.timing import Effort, clock_of, time_call

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    count: int = request.param
    return count


def test_seconds_of_several_threads_are_not_added_up(threads: int) -> None:
    assert clock_of(CPU) is (time.process_time if threads == 1 else time.perf_counter)
    assert clock_of(torch.device("cuda")) is time.perf_counter


def test_waiting_for_others_is_not_work() -> None:
    """A phase that sleeps stands for one that other processes keep from the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = time_call(lambda: time.sleep(0.05), Effort(warmup=0, least=2, most=2, budget_s=0.0), CPU)
    torch.set_num_threads(before)
    assert taken.median_s < 0.05
