"""Replay of an action table with real durations: when every pass starts and ends.

A forward waits for the same micro-batch's forward on the stage before (and its message), a backward or an
input gradient for that of the stage after; a weight gradient waits for nothing but its turn. A pipeline
rank does one action at a time, in the order of its row. Where devices have cores of their own this is the
longest path of that graph. Where they share cores, the work of all active ranks slows down by the measured
contention, and is replayed event by event.

The step ends with each rank's gradient reduction, then, all together, clipping and the optimizer.

The critical path of a replay: what decides when the last rank has reduced its gradients.

Of the same table, it is a path under any other durations too, so that its length bounds every replay from
below:

    unshard of its first rank + sum over stages and kinds of count x seconds + hops x message
        + reduction of its last rank  <=  end of the last reduction
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from planner.cost.layer import Pass
from planner.cost.stage.stage import StageCost
from planner.foundation.arrays import smaller
from planner.foundation.frozen import frozen
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import TimelineEvent
from planner.strategy.schedule.longest_path import Durations, action_order
from planner.strategy.schedule.table import KINDS, Action, ActionKind, Table

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints

SPLIT_RECOMPUTES = 8
"""Times that a block is recomputed where torch splits its backward into input and weight gradients: each
group of weights walks the graph by itself. Measured with torch 2.13 on gloo (2 ranks, Llama blocks): 6.6
to 11 forwards of each layer and micro-batch under zbv and the interleaved zero bubble, 2.08 under 1f1b
(github.com/pytorch/pytorch/issues/136766)."""


Span = tuple[float, float]
"""When an action started and ended."""


@frozen
class PathTimes:
    """When the actions of a longest path ran: the ends of the places in the table's order, and of rows."""

    table: Table
    durations: Durations
    begin_s: Sequence[float]
    ends_s: Floats
    row_ends_s: list[float]
    cell_s: list[float]

    def without_messages(self) -> PathTimes:
        """The same where messages take no time."""
        ends_s, row_ends_s = self.durations.ends_s(self.begin_s, 0.0)
        return dataclasses.replace(self, ends_s=ends_s, row_ends_s=row_ends_s)

    def end_s(self, rank: int) -> float:
        """When the last action of a rank ended."""
        return self.row_ends_s[rank]

    def spans(self, rank: int) -> list[Span]:
        """The span of each action of a rank; those without a place follow the action before at once."""
        spans: list[Span] = []
        end_s = self.begin_s[rank]
        cells = self.table.codes[rank] // self.table.num_micro_batches
        places = action_order(self.table).rows[rank]
        ends = self.ends_s[places].tolist()
        for place, placed_s, number in zip(places.tolist(), ends, cells.tolist(), strict=True):
            end_s = placed_s if place else end_s + self.cell_s[number]
            spans.append((end_s - self.cell_s[number], end_s))
        return spans


@frozen
class RecordedTimes:
    """When actions ran, as they were recorded."""

    rows: tuple[list[Span], ...]

    def end_s(self, rank: int) -> float:
        """When the last action of a rank ended."""
        return self.rows[rank][-1][1]

    def spans(self, rank: int) -> list[Span]:
        """The span of each action of a rank."""
        return self.rows[rank]


@frozen
class Replay:
    """The outcome: the step time, and by rank when its actions ran and what came before and after them.

    `stretch` is wall time over nominal work time, by rank; 1 where cores are not shared. Events are made
    when they are asked for: a large table has a hundred thousand.
    """

    table: Table
    times: PathTimes | RecordedTimes
    stretch: tuple[float, ...]
    unshard_s: tuple[float, ...]
    reduce_s: tuple[float, ...]
    copied_s: tuple[float, ...]
    optimizer_s: tuple[float, ...]

    @property
    def reduced_s(self) -> float:
        """When the last rank has reduced its gradients."""
        return max(self.times.end_s(rank) + more for rank, more in enumerate(self.reduce_s))

    @property
    def step_time_s(self) -> float:
        return self.reduced_s + max(self.optimizer_s)

    @property
    def event_count(self) -> int:
        """How many events there are."""
        each = (*self.unshard_s, *self.reduce_s)
        return self.table.actions + len(self.optimizer_s) + sum(seconds > 0 for seconds in each)

    @property
    def events(self) -> tuple[TimelineEvent, ...]:
        """Every piece of work, rank by rank, then the optimizer steps."""
        events = [event for rank in range(len(self.table)) for event in self.rank_events(rank)]
        for rank, seconds in enumerate(self.optimizer_s):
            events.append(_event(rank, "optimizer", "optimizer", self.reduced_s, seconds))
        return tuple(events)

    def rank_events(self, rank: int) -> list[TimelineEvent]:
        """What a rank does before the optimizer, in order."""
        events: list[TimelineEvent] = []
        if self.unshard_s[rank]:
            events.append(_event(rank, "unshard", "unshard", 0.0, self.unshard_s[rank]))
        for action, (start, end) in zip(self.table[rank], self.times.spans(rank), strict=True):
            kind = "forward" if action.kind is ActionKind.FORWARD else "backward"
            events.append(_event(rank, str(action), kind, start, end - start))
        if self.reduce_s[rank]:
            events.append(_event(rank, "reduce", "reduce", self.times.end_s(rank), self.reduce_s[rank]))
        return events


def _event(rank: int, name: str, kind: str, start_s: float, duration_s: float) -> TimelineEvent:
    return TimelineEvent(rank=rank, name=name, kind=kind, start_s=start_s, duration_s=duration_s)


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
    table: Table,
    stages: Sequence[StageCost],
    p2p_s: float,
    sharing: Sharing | None,
    devices_per_rank: int,
    step_s: float = 0.0,
    cell_s: list[float] | None = None,
) -> Replay:
    """Runs `table` with the passes of `stages`; `step_s` is what a rank's optimizer step takes besides.

    `cell_s` are the seconds of every stage's passes by kind (planner.strategy.schedule.table.KINDS), where
    they are known.
    Raises ValueError if its order cannot be executed.
    """
    held = [table.stages_of(rank) for rank in range(len(table))]
    unshard_s = tuple(sum(stages[s].unshard_s for s in each) for each in held)
    stretch, slow = (1.0,) * len(table), 1.0
    times: PathTimes | RecordedTimes
    if sharing is None:
        cell_s = [s for each in _by_stage(stages, _totals_s) for s in each] if cell_s is None else cell_s
        durations = action_order(table).durations(cell_s)
        ends_s, row_ends_s = durations.ends_s(unshard_s, p2p_s)
        times = PathTimes(
            table=table,
            durations=durations,
            begin_s=unshard_s,
            ends_s=ends_s,
            row_ends_s=row_ends_s,
            cell_s=cell_s,
        )
    else:
        passes = _by_stage(stages, kind_passes)
        times, stretch = _Shared(table, passes, p2p_s, sharing, devices_per_rank, unshard_s).run()
        slow = sharing.slowdown(devices_per_rank * len(table))
    return Replay(
        table=table,
        times=times,
        stretch=stretch,
        unshard_s=unshard_s,
        reduce_s=tuple(sum(stages[s].reduce_s for s in each) for each in held),
        copied_s=tuple(sum(stages[s].copied_s for s in each) for each in held),
        optimizer_s=tuple((step_s + sum(stages[s].optimizer_s for s in each)) * slow for each in held),
    )


T = TypeVar("T")


def _by_stage(stages: Sequence[StageCost], of: Callable[[StageCost], T]) -> list[T]:
    """A figure of every stage, worked out once for those that are the same: few differ."""
    each = {id(stage): stage for stage in stages}
    known = {name: of(stage) for name, stage in each.items()}
    return [known[id(stage)] for stage in stages]


def _totals_s(stage: StageCost) -> list[float]:
    passes = kind_passes(stage)
    return [passes[kind].total_s for kind in KINDS]


def split_backward(stage: StageCost) -> tuple[Pass, Pass]:
    """The backward pass in two: gradients of the stage's input, and of its weights.

    Weight gradients are the products that the forward did, once more: no messages, half of the kernels.
    Where weights are frozen, what little their adapters have is counted with the input's.

    The own runtime leaves those of blocks that recompute nothing for later, and the two add up to the
    backward. A block that recomputes does all in I; its W is charged all the same, so that recomputing never
    makes an action shorter, which the search relies on: too much by one product of its four. Without it a
    mix that recomputes could be the faster one, as the path that is longest may enter a rank's row between a
    micro-batch's I, in time that was idle, and its W: no order of a stage's mixes by time would then hold.

    torch splits all; then each of the passes over the graph that split autograd makes recomputes the blocks:
    SPLIT_RECOMPUTES times in all, once for the inputs.
    """
    backward, again_s = stage.backward, 0.0
    if stage.deferred_s is not None and stage.weights_s is not None:
        left_s, products_s = stage.deferred_s, stage.weights_s
    else:
        products_s = 0.0 if stage.frozen else smaller(backward.compute_s / 2, stage.forward.compute_s)
        left_s, again_s = products_s, backward.recompute_s * (SPLIT_RECOMPUTES - 1)
    later_s = 0.0 if stage.frozen else backward.host_s / 2
    inputs = dataclasses.replace(
        backward, compute_s=backward.compute_s - left_s, host_s=backward.host_s - later_s
    )
    return inputs, Pass(compute_s=products_s, recompute_s=again_s, host_s=later_s)


def kind_passes(stage: StageCost) -> dict[ActionKind, Pass]:
    """The pass that an action of each kind runs on a stage."""
    inputs, weights = split_backward(stage)
    return {
        ActionKind.FORWARD: stage.forward,
        ActionKind.BACKWARD: stage.backward,
        ActionKind.INPUT_GRAD: inputs,
        ActionKind.WEIGHT_GRAD: weights,
    }


Signal = tuple[int, bool, int]
"""What a stage sends of a micro-batch: (stage, activations or gradients, micro-batch)."""


def _signal(action: Action) -> Signal | None:
    """What an action sends to the next stage or the one before."""
    if action.kind is ActionKind.WEIGHT_GRAD:
        return None
    return action.stage, action.kind is ActionKind.FORWARD, action.micro_batch


def _needs(action: Action, stages: int) -> Signal | None:
    """What must have been sent before an action can start, or None."""
    if action.kind is ActionKind.FORWARD:
        return (action.stage - 1, True, action.micro_batch) if action.stage else None
    if action.kind is ActionKind.WEIGHT_GRAD or action.stage == stages - 1:
        return None
    return action.stage + 1, False, action.micro_batch


class _Shared:
    """Event-by-event replay on shared cores: work slows with the active devices, messages do not."""

    def __init__(
        self,
        table: Table,
        passes: Sequence[dict[ActionKind, Pass]],
        p2p_s: float,
        sharing: Sharing,
        devices_per_rank: int,
        begin_s: Sequence[float],
    ) -> None:
        self.rows, self.passes, self.sharing = tuple(table), passes, sharing
        self.rank_of = {stage: rank for rank in range(len(table)) for stage in table.stages_of(rank)}
        self.hop_s = p2p_s
        self.devices_per_rank = devices_per_rank
        self.now_s = 0.0
        self.sent_s: dict[Signal, float] = {}
        self.positions = [0] * len(table)
        self.free_s = list(begin_s)
        self.work_s = [0.0] * len(table)
        self.fixed_s = [0.0] * len(table)
        self.started_s: list[float | None] = [None] * len(table)
        self.wall_work_s, self.nominal_s = [0.0] * len(table), [0.0] * len(table)
        self.spans: tuple[list[Span], ...] = tuple([] for _ in self.rows)

    def run(self) -> tuple[RecordedTimes, tuple[float, ...]]:
        while any(position < len(row) for position, row in zip(self.positions, self.rows, strict=True)):
            wake_s = self._start_ready()
            self._advance(wake_s)
        stretch = tuple(
            wall / nominal if nominal > 0 else 1.0
            for wall, nominal in zip(self.wall_work_s, self.nominal_s, strict=True)
        )
        return RecordedTimes(rows=self.spans), stretch

    def _start_ready(self) -> float:
        """Starts what can start now; returns when the next waiting action may start."""
        wake_s = float("inf")
        for rank, row in enumerate(self.rows):
            if self.started_s[rank] is not None or self.positions[rank] == len(row):
                continue
            action = row[self.positions[rank]]
            ready_s = self._ready_s(rank, action)
            if ready_s is None:
                continue
            if ready_s > self.now_s + 1e-12:
                wake_s = min(wake_s, ready_s)
                continue
            passing = self.passes[action.stage][action.kind]
            self.work_s[rank], self.fixed_s[rank] = passing.work_s, passing.fixed_s
            self.started_s[rank] = self.now_s
            self.nominal_s[rank] += passing.work_s
        return wake_s

    def _ready_s(self, rank: int, action: Action) -> float | None:
        need = _needs(action, len(self.passes))
        if need is None:
            return self.free_s[rank]
        sent_s = self.sent_s.get(need)
        hop_s = 0.0 if self.rank_of.get(need[0]) == rank else self.hop_s
        return None if sent_s is None else max(self.free_s[rank], sent_s + hop_s)

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
        position, start = self.positions[rank], self.started_s[rank]
        assert start is not None
        row = self.rows[rank]
        senders = [row[position - 1]] if position and row[position - 1].paired else []
        senders += [] if row[position].paired else [row[position]]
        self.sent_s |= {signal: self.now_s for signal in map(_signal, senders) if signal is not None}
        self.spans[rank].append((start, self.now_s))
        self.positions[rank] += 1
        self.free_s[rank], self.started_s[rank] = self.now_s, None


def _left(seconds: float) -> float:
    """Remaining seconds, without the dust of floating point."""
    return seconds if seconds > 1e-12 else 0.0


class CriticalPath(NamedTuple):
    """Where a path starts and ends, how many messages it takes, and its actions: counts[stage, kind]."""

    first_rank: int
    last_rank: int
    hops: int
    counts: Ints


def critical_path(replay: Replay, hop_s: float) -> CriticalPath:
    """The path that decides the end of a replay whose devices have cores of their own."""
    assert isinstance(replay.times, PathTimes), "shared cores have no longest path"
    return longest_path(replay.times, replay.reduce_s, hop_s)


def longest_path(times: PathTimes, reduce_s: Sequence[float], hop_s: float) -> CriticalPath:
    """The path that decides when the last rank has reduced its gradients, in `reduce_s` after its row."""
    import numpy as np

    order, durations = action_order(times.table), times.durations
    rows = len(times.table)
    last_rank = max(range(rows), key=lambda rank: times.row_ends_s[rank] + reduce_s[rank])
    before = _places_before(order.rows, len(order.needed))
    cells = np.zeros(times.table.stages * len(KINDS), dtype=np.int64)
    visited: list[int] = []
    along_rows = [len(order.needed) + last_rank]  # slots whose actions without a place are on the path
    own = order.rows[last_rank]
    place, hops, rank = int(own[own.nonzero()[0][-1]]), 0, last_rank
    while place:
        visited.append(place)
        rank, previous = int(order.ranks[place - 1]), int(before[place])
        begin_s = float(times.ends_s[previous]) if previous else times.begin_s[rank]
        arrived_s = float(times.ends_s[order.needed[place - 1]]) + hop_s
        if arrived_s > begin_s + float(durations.before_s[place - 1]):
            place, hops = int(order.needed[place - 1]), hops + 1
        else:
            along_rows.append(place - 1)
            place = previous
    np.add.at(cells, order.cells[np.asarray(visited) - 1], 1)
    passing = np.isin(order.passing_into, along_rows)
    np.add.at(cells, order.passing_cells[passing], 1)
    return CriticalPath(rank, last_rank, hops, cells.reshape(-1, len(KINDS)))


def _places_before(rows: tuple[Ints, ...], places: int) -> Ints:
    """For each place the place before it in its row, or 0."""
    import numpy as np

    before = np.zeros(places + 1, dtype=np.int64)
    for row in rows:
        placed = row[row > 0]
        before[placed[1:]] = placed[:-1]
    return before
