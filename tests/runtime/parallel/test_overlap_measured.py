"""The measurement of overlap on a device that is made up: two queues that slow each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")

from runtime.profiler.device import Beside
from runtime.profiler.timing import Effort

WORK_S, MESSAGE_S = 2e-3, 3e-4
WORK_SLOWER, MESSAGE_SLOWER = 1.25, 1.6


class Queue:
    """A stream: until when it is busy."""

    def __init__(self, device: object = None) -> None:
        self.until_s = 0.0


class Device:
    """Kernels take longer while the other queue has some to run. The host takes no time."""

    def __init__(self) -> None:
        self.queues: list[Queue] = []
        self.current: Queue | None = None
        self.now_s = 0.0

    def make(self, device: object) -> Queue:
        self.queues.append(Queue())
        return self.queues[-1]

    @contextmanager
    def stream(self, queue: Queue) -> Iterator[None]:
        self.current, before = queue, self.current
        yield
        self.current = before

    def synchronize(self, device: object = None) -> None:
        self.now_s = max([self.now_s, *(queue.until_s for queue in self.queues)])

    def kernel(self, alone_s: float, slower: float) -> None:
        assert self.current is not None
        begin_s = max(self.now_s, self.current.until_s)
        beside = any(other is not self.current and other.until_s > begin_s for other in self.queues)
        self.current.until_s = begin_s + alone_s * (slower if beside else 1.0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at_s = 0.0

        def record(self) -> None:
            assert made.current is not None
            self.at_s = max(made.now_s, made.current.until_s)

        def synchronize(self) -> None:
            made.now_s = max(made.now_s, self.at_s)

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at_s - self.at_s)

    for name, what in (("Stream", made.make), ("stream", made.stream), ("Event", Event)):
        monkeypatch.setattr(torch.cuda, name, what)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    return made


def test_each_is_slowed_as_the_device_slows_it(device: Device) -> None:
    pair = Beside(
        torch.device("cpu"),
        lambda: device.kernel(WORK_S, WORK_SLOWER),
        lambda: device.kernel(MESSAGE_S, MESSAGE_SLOWER),
    )
    work, message = pair.slowdowns(Effort(warmup=1, least=3, most=3, budget_s=0.0))
    assert work == pytest.approx(WORK_SLOWER, rel=1e-6)
    assert message == pytest.approx(MESSAGE_SLOWER, rel=1e-6)
