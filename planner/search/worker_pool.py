"""A piece of a search that can be worked out apart from the others.

Processes that search shapes beside each other, one for each core.

A search gives its tasks and takes their results in an order of its own, so that nothing depends on how many
processes there are, or which was faster. They are forked, and so know the problem and all that was
worked out before; tasks and results go through pipes as JSON text. Where there is one core, or no fork, or
there are threads (a fork has one), or little to do, tasks are worked out here, when their result is taken.

A process that dies costs nothing but time: its task is done again here. One that works for longer than the
search may take is ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, NamedTuple

from planner.foundation.decode import decode, encode
from planner.search.layout_search import Budget, Found, ShapeResult
from planner.strategy.strategy import Strategy

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess


class TaskKind(StrEnum):
    """What is asked of a shape: an even split, something better, the best with a proof, or a bound."""

    GREEDY = "greedy"
    BETTER = "better"
    BEST = "best"
    BOUND = "bound"


class Task(NamedTuple):
    """What is asked of the shape with a number, and what that may use."""

    kind: TaskKind
    number: int
    budget: Budget

    def to_json(self) -> bytes:
        """As text for another process; what is infinite stays so."""
        return json.dumps(self).encode()

    @staticmethod
    def of_json(text: bytes) -> Task:
        """The task of such a text."""
        kind, number, budget = json.loads(text)
        return Task(TaskKind(kind), number, Budget(*budget))


MOST = 4
"""Processes at most: more wait for each other's results."""
MANY_SHAPES = 200
"""Shapes of a space from which on forking pays."""
AHEAD = 2
"""Tasks that a process has at most: one that it works at, and one to go on with before anybody looks."""
GLANCE_S = 0.05
"""Seconds between looks at the clock while a process works."""


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processes_for(shapes: int) -> int:
    """How many processes to search so many shapes with; 0: search them here."""
    each = min(cores(), MOST)
    if each == 1 or shapes < MANY_SHAPES or sys.platform != "linux" or threading.active_count() > 1:
        return 0
    import multiprocessing

    return 0 if multiprocessing.current_process().daemon else each  # a daemon may have no children


class Crew:
    """Works out tasks by `work`, in `processes` of its own or (0) here.

    Tasks that are not begun when `expired` have an empty result, which says nothing of their shape; so have
    those that a process still works at when `overdue`. Tasks of one `kin` go to one process if it is not busy
    while another idles: what it worked out for one is there for the next.
    """

    def __init__(
        self,
        work: Callable[[Task], ShapeResult],
        processes: int,
        expired: Callable[[], bool],
        overdue: Callable[[], bool],
        kin: Callable[[Task], int] = lambda task: task.number,
    ) -> None:
        self._work, self._expired, self._overdue, self._kin = work, expired, overdue, kin
        self._waiting: deque[Task] = deque()  # not begun
        self._results: dict[Task, ShapeResult] = {}
        self._given: dict[Connection, deque[Task]] = {}
        self._processes: list[ForkProcess] = []
        if processes:
            self._fork(processes)

    def _fork(self, processes: int) -> None:
        import multiprocessing

        context = multiprocessing.get_context("fork")
        for _ in range(processes):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, here, self._work), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._given[here] = deque()

    def add(self, task: Task) -> None:
        """Has a task worked out; no other like it may be under way."""
        self._waiting.append(task)
        self._feed()

    def take(self, task: Task) -> ShapeResult:
        """The result of a task that was added, which can be taken once."""
        while task not in self._results:
            if any(task in given for given in self._given.values()):
                self._listen()
            elif self._given and not self._expired():
                self._feed()
                if task in self._waiting:
                    self._listen()
            else:
                self._waiting.remove(task)
                self._results[task] = ShapeResult(None, 0.0, 0) if self._expired() else self._work(task)
        return self._results.pop(task)

    def _feed(self) -> None:
        """Gives waiting tasks to the process of their kin, or to one that has nothing to do."""
        while self._waiting and self._given and not self._expired():
            each = list(self._given)
            process = each[self._kin(self._waiting[0]) % len(each)]
            if len(self._given[process]) >= AHEAD:
                process = min(each, key=lambda other: len(self._given[other]))
                if self._given[process]:
                    return
            task = self._waiting.popleft()
            try:
                process.send_bytes(task.to_json())
                self._given[process].append(task)
            except OSError:
                self._waiting.appendleft(task)
                self._lose(process)

    def _listen(self) -> None:
        """Takes what processes have sent, waiting for one at least or until all are overdue."""
        ready = wait([process for process, given in self._given.items() if given], GLANCE_S)
        for process in ready:
            assert isinstance(process, Connection)
            try:
                result = _result(process.recv_bytes())
            except (OSError, EOFError):
                self._lose(process)
                continue
            self._results[self._given[process].popleft()] = result
        self._feed()
        if not ready and self._overdue():
            given = (task for tasks in self._given.values() for task in tasks)
            self._results |= dict.fromkeys(given, ShapeResult(None, 0.0, 0))
            self.close()

    def _lose(self, process: Connection) -> None:
        """Takes back the tasks of a process that is no more."""
        self._waiting.extendleft(reversed(self._given.pop(process)))
        process.close()

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        for connection in self._given:
            connection.close()
        self._processes, self._given = [], {}


def _serve(there: Connection, here: Connection, work: Callable[[Task], ShapeResult]) -> None:
    """What a process does: it works out one task after another until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever forked it ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    here.close()
    try:
        while True:
            result = work(Task.of_json(there.recv_bytes()))
            there.send_bytes(_text(result))
    except (OSError, EOFError):
        return
    except Exception:  # it is raised where the task is done again
        os._exit(1)


def _text(result: ShapeResult) -> bytes:
    found = None
    if result.found is not None:
        found = {"strategy": encode(result.found.strategy), "step_time_s": result.found.step_time_s}
    return json.dumps({**result._asdict(), "found": found}).encode()


def _result(text: bytes) -> ShapeResult:
    data = json.loads(text)
    if data["found"] is not None:
        strategy = decode(Strategy, data["found"]["strategy"], source="a process of the search")
        data["found"] = Found(strategy, data["found"]["step_time_s"])
    return ShapeResult(**data)
