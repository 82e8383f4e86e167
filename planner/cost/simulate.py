"""Replay of an action table with real durations: when every pass starts and ends.

A forward waits for the same micro-batch's forward on the stage before (and its message), a backward for
the backward on the stage after; a pipeline rank does one action at a time, in the order of its row. Where
devices have cores of their own this is the longest path of that graph. Where they share cores, the work of
all active ranks slows down by the measured contention, and is replayed event by event.

The step ends with each rank's gradient reduction, then, all together, clipping and the optimizer.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from planner.codec import noun
from planner.cost.schedule import Action, ActionKind, Table
from planner.cost.stage import Pass, StageCost
from planner.estimate import TimelineEvent
from planner.problem import PlanningProblem


@noun
class Replay:
    """The outcome: the step time, every event, and by rank how long it worked and communicated.

    `stretch` is wall time over nominal work time, by rank; 1 where cores are not shared.
    """

    step_time_s: float
    events: tuple[TimelineEvent, ...]
    stretch: tuple[float, ...]


class Sharing:
    """How compute slows down when `active` devices of a node compute at once."""

    def __init__(self, slowdowns: Sequence[tuple[int, float]], slots: int) -> None:
        self._points = sorted(slowdowns)
        self._slots = slots

    def slowdown(self, active: int) -> float:
        """Linear between measured points; beyond them time grows with the devices for each slot."""
        if active <= 0:
            return 1.0
        if not self._points:
            return max(1.0, active / self._slots)
        counts = [count for count, _ in self._points]
        high = bisect.bisect_left(counts, active)
        if high == len(counts):
            count, slowdown = self._points[-1]
            return slowdown * max(1.0, active / max(count, self._slots))
        if counts[high] == active or high == 0:
            return self._points[high][1]
        (a, slow_a), (b, slow_b) = self._points[high - 1], self._points[high]
        return slow_a + (slow_b - slow_a) * (active - a) / (b - a)

    def best_throughput(self, most: int) -> float:
        """The most device-seconds of work that a second can do with up to `most` devices active."""
        return max(active / self.slowdown(active) for active in range(1, most + 1))


def sharing_of(problem: PlanningProblem) -> Sharing | None:
    """The sharing of cores on this cluster, or None where every device has its own."""
    group = problem.cluster.groups[0]
    if group.slots_per_node is None:
        return None
    samples = problem.profile.contention if problem.profile else ()
    return Sharing([(s.active, s.slowdown) for s in samples], group.slots_per_node)


def replay(
    table: Table, stages: Sequence[StageCost], p2p_s: float, sharing: Sharing | None, devices_per_rank: int
) -> Replay:
    """Runs `table` with the passes of `stages`. Raises ValueError if its order cannot be executed."""
    if sharing is None:
        spans, stretch = _longest_path(table, stages, p2p_s), (1.0,) * len(table)
        slow = 1.0
    else:
        spans, stretch = _Shared(table, stages, p2p_s, sharing, devices_per_rank).run()
        slow = sharing.slowdown(devices_per_rank * len(table))
    return _finish(table, stages, spans, stretch, slow)


Spans = list[list[tuple[float, float]]]
"""For every row, the (start, end) of each of its actions."""


def action_pass(stages: Sequence[StageCost], action: Action) -> Pass:
    """The pass that an action runs."""
    stage = stages[action.stage]
    return stage.forward if action.kind is ActionKind.FORWARD else stage.backward


def unshards(table: Table, stages: Sequence[StageCost]) -> list[float]:
    """By rank, the seconds before its first action."""
    return [sum(stages[s].unshard_s for s in {action.stage for action in row}) for row in table]


def _needs(action: Action, stages: int) -> tuple[int, ActionKind, int] | None:
    """The action on another stage that must have ended before, or None."""
    if action.kind is ActionKind.FORWARD:
        return (action.stage - 1, action.kind, action.micro_batch) if action.stage else None
    last = action.stage == stages - 1
    return None if last else (action.stage + 1, action.kind, action.micro_batch)


def _longest_path(table: Table, stages: Sequence[StageCost], p2p_s: float) -> Spans:
    ends: dict[tuple[int, ActionKind, int], float] = {}
    clocks, positions = unshards(table, stages), [0] * len(table)
    spans: Spans = [[] for _ in table]
    seconds = {
        (s, kind): action_pass(stages, Action(s, kind, 0)).total_s
        for s in range(len(stages))
        for kind in ActionKind
    }
    hop_s = p2p_s if len(table) > 1 else 0.0
    remaining = sum(len(row) for row in table)
    while remaining:
        before = remaining
        for rank, row in enumerate(table):
            position, clock = positions[rank], clocks[rank]
            while position < len(row):
                action = row[position]
                need = _needs(action, len(stages))
                if need is not None:
                    arrived = ends.get(need)
                    if arrived is None:
                        break
                    clock = max(clock, arrived + hop_s)
                end = clock + seconds[(action.stage, action.kind)]
                spans[rank].append((clock, end))
                ends[tuple(action)] = end  # type: ignore[index]
                clock, position, remaining = end, position + 1, remaining - 1
            positions[rank], clocks[rank] = position, clock
        if remaining == before:
            raise ValueError("the schedule table waits for itself")
    return spans


class _Shared:
    """Event-by-event replay on shared cores: work slows with the active devices, messages do not."""

    def __init__(
        self,
        table: Table,
        stages: Sequence[StageCost],
        p2p_s: float,
        sharing: Sharing,
        devices_per_rank: int,
    ) -> None:
        self.table, self.stages, self.sharing = table, stages, sharing
        self.hop_s = p2p_s if len(table) > 1 else 0.0
        self.devices_per_rank = devices_per_rank
        self.now_s = 0.0
        self.ends: dict[tuple[int, ActionKind, int], float] = {}
        self.positions = [0] * len(table)
        self.free_s = unshards(table, stages)
        self.work_s = [0.0] * len(table)
        self.fixed_s = [0.0] * len(table)
        self.started_s: list[float | None] = [None] * len(table)
        self.wall_work_s, self.nominal_s = [0.0] * len(table), [0.0] * len(table)
        self.spans: Spans = [[] for _ in table]

    def run(self) -> tuple[Spans, tuple[float, ...]]:
        while any(position < len(row) for position, row in zip(self.positions, self.table, strict=True)):
            wake_s = self._start_ready()
            self._advance(wake_s)
        stretch = tuple(
            wall / nominal if nominal > 0 else 1.0
            for wall, nominal in zip(self.wall_work_s, self.nominal_s, strict=True)
        )
        return self.spans, stretch

    def _start_ready(self) -> float:
        """Starts what can start now; returns when the next waiting action may start."""
        wake_s = float("inf")
        for rank, row in enumerate(self.table):
            if self.started_s[rank] is not None or self.positions[rank] == len(row):
                continue
            action = row[self.positions[rank]]
            ready_s = self._ready_s(rank, action)
            if ready_s is None:
                continue
            if ready_s > self.now_s + 1e-12:
                wake_s = min(wake_s, ready_s)
                continue
            passing = action_pass(self.stages, action)
            self.work_s[rank], self.fixed_s[rank] = passing.work_s, passing.fixed_s
            self.started_s[rank] = self.now_s
            self.nominal_s[rank] += passing.work_s
        return wake_s

    def _ready_s(self, rank: int, action: Action) -> float | None:
        need = _needs(action, len(self.stages))
        if need is None:
            return self.free_s[rank]
        arrived = self.ends.get(need)
        return None if arrived is None else max(self.free_s[rank], arrived + self.hop_s)

    def _advance(self, wake_s: float) -> None:
        """Moves to the next moment at which an action changes phase, ends or may start."""
        running = [rank for rank, start in enumerate(self.started_s) if start is not None]
        working = [rank for rank in running if self.work_s[rank] > 0]
        slow = self.sharing.slowdown(len(working) * self.devices_per_rank)
        moments = [self.work_s[rank] * slow for rank in working]
        moments += [self.fixed_s[rank] for rank in running if self.work_s[rank] <= 0]
        if wake_s < float("inf"):
            moments.append(wake_s - self.now_s)
        if not moments:
            raise ValueError("the schedule table waits for itself")
        step_s = max(min(moments), 0.0)
        self.now_s += step_s
        for rank in running:
            if self.work_s[rank] > 0:
                self.wall_work_s[rank] += step_s
                self.work_s[rank] = _left(self.work_s[rank] - step_s / slow)
            else:
                self.fixed_s[rank] = _left(self.fixed_s[rank] - step_s)
            if self.work_s[rank] <= 0 and self.fixed_s[rank] <= 0:
                self._end(rank)

    def _end(self, rank: int) -> None:
        action, start = self.table[rank][self.positions[rank]], self.started_s[rank]
        assert start is not None
        self.ends[tuple(action)] = self.now_s  # type: ignore[index]
        self.spans[rank].append((start, self.now_s))
        self.positions[rank] += 1
        self.free_s[rank], self.started_s[rank] = self.now_s, None


def _left(seconds: float) -> float:
    """Remaining seconds, without the dust of floating point."""
    return seconds if seconds > 1e-12 else 0.0


def _finish(
    table: Table, stages: Sequence[StageCost], spans: Spans, stretch: tuple[float, ...], slow: float
) -> Replay:
    """Adds what comes before the first and after the last action of each rank."""
    events: list[TimelineEvent] = []
    reduced_s = 0.0
    optimizers = []
    for rank, row in enumerate(table):
        held = sorted({action.stage for action in row})
        unshard_s = sum(stages[s].unshard_s for s in held)
        reduce_s = sum(stages[s].reduce_s for s in held)
        optimizers.append(sum(stages[s].optimizer_s for s in held) * slow)
        if unshard_s:
            events.append(_event(rank, "unshard", "unshard", 0.0, unshard_s))
        for action, (start, end) in zip(row, spans[rank], strict=True):
            kind = "forward" if action.kind is ActionKind.FORWARD else "backward"
            events.append(_event(rank, str(action), kind, start, end - start))
        last = spans[rank][-1][1]
        if reduce_s:
            events.append(_event(rank, "reduce", "reduce", last, reduce_s))
        reduced_s = max(reduced_s, last + reduce_s)
    for rank, seconds in enumerate(optimizers):
        events.append(_event(rank, "optimizer", "optimizer", reduced_s, seconds))
    return Replay(step_time_s=reduced_s + max(optimizers), events=tuple(events), stretch=stretch)


def _event(rank: int, name: str, kind: str, start_s: float, duration_s: float) -> TimelineEvent:
    return TimelineEvent(rank=rank, name=name, kind=kind, start_s=start_s, duration_s=duration_s)
