"""The least memory of a device under which a problem has a plan, and the strategy that needs no more.

A shape is a choice of degrees; a strategy of it cuts the layers into stages and gives each block a recompute
option. Of one stage a rank:

- A stage with one option for all its blocks is never larger than one that mixes it with options that keep
  more: all that it keeps is the least of the mix, all that it holds for a moment at most the largest. So the
  least of a stage is that of its pure options.
- That least rises with the stage's layers, so a limit can be kept if and only if every stage in turn, taking
  as many layers as fit, leaves none over. The least limit of a shape is found by bisection on that, down to
  the last byte.

1F1B keeps no more alive than GPipe and interleaved with the same degrees, so those are left out beside it.
Shapes are taken in order of a lower bound of what they need, and the rest left when it exceeds the least
found. Where a schedule deals several stages to a rank, even stages are an upper bound: nothing is exact where
such a shape may need less still.

What must be there is more than the predicted peak, by the error band that a verdict of SAFE asks for:
limit = peak (1 + upper).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

from planner.codec import noun
from planner.cost import constants
from planner.cost.evaluate import CostModel, memory_of_ranks
from planner.cost.flight import InFlight
from planner.cost.memory_constants import fitted_constant
from planner.cost.moments import StageMemory
from planner.cost.offload import with_offload
from planner.cost.verdict import memory_band
from planner.estimate import Coverage, MemoryBreakdown, Rejected
from planner.problem import PlanningProblem
from planner.rules import broken_rules
from planner.search.bounds import least_state_bytes
from planner.search.space import Pins, Space, space_of
from planner.strategy import (
    Degrees,
    Offload,
    Recompute,
    Schedule,
    Stage,
    Strategy,
    Zero,
    even_stages,
    offloaded,
    sized_stages,
)
from planner.units import MIB

ROUNDED_BYTES = 64
"""What rounding each tenant to whole bytes may hide from a search that adds them unrounded."""


@noun
class Need:
    """What the least demanding strategy of a problem needs of each device.

    `limit_bytes` is the least memory limit, in whole MiB, at which it is SAFE; `memory` are the tenants of
    its fullest device. `exact` says that no strategy of the space needs less.
    """

    strategy: Strategy
    limit_bytes: int
    memory: MemoryBreakdown
    exact: bool

    @property
    def peak_bytes(self) -> int:
        return self.memory.total_bytes

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.memory.weights_bytes + self.memory.grads_bytes + self.memory.optimizer_bytes


@noun
class Survey:
    """How many shapes a problem has, what they break, and the least that a legal one needs (None: none is).

    `nearest` is the first shape that breaks each rule. `least_state_bytes` is what weights, gradients and
    optimizer state take on a device at best, shared out as far as a legal shape can.
    """

    shapes: int
    legal: int
    rejected: dict[str, int]
    nearest: dict[str, Rejected]
    least_state_bytes: float
    need: Need | None

    def fits(self, limit_bytes: int) -> bool:
        """Whether some strategy is SAFE within a limit."""
        return self.need is not None and self.need.limit_bytes <= limit_bytes


def survey(problem: PlanningProblem, pins: Pins) -> Survey:
    """Every shape of a problem asked: what the others break, and the least that a legal one needs."""
    space = space_of(problem, pins)
    rejected = Counter(each.rule for each in space.rejected)
    nearest: dict[str, Rejected] = {}
    for each in space.rejected:
        nearest.setdefault(each.rule, each)
    count, legal, least = sum(map(len, space.pipes)), _undominated(space), _Least(problem, pins)
    return Survey(
        shapes=count + len(space.rejected),
        legal=count,
        rejected=dict(rejected.most_common()),
        nearest=nearest,
        least_state_bytes=min(map(least.state_bytes, legal), default=0.0),
        need=least.search(legal),
    )


def fitting(problem: PlanningProblem, pins: Pins) -> Need | None:
    """A strategy that keeps pins and rules and is SAFE within the problem's limit, if there is one."""
    least = _Least(problem, pins)
    spread = Degrees(dp_shard=problem.cluster.devices, zero=Zero.PARAMETERS)
    if least.state_bytes(spread) > problem.memory_limit_bytes:
        return None  # not even shared out over all devices
    return least.search(_undominated(space_of(problem, pins)), problem.memory_limit_bytes)


class _Least:
    """The search over shapes by rising bound."""

    def __init__(self, problem: PlanningProblem, pins: Pins) -> None:
        self.problem, self.pins = problem, pins
        self.model = CostModel(problem)
        fitted = fitted_constant(problem, "memory_error_upper")
        self._least_error = min(constants.MEMORY_ERROR.values()) if fitted is None else fitted
        self._states: dict[tuple[object, ...], float] = {}

    def search(self, legal: list[Degrees], enough_bytes: int | None = None) -> Need | None:
        """The least need; with `enough_bytes`, any need of at most that, or None."""
        heap: list[tuple[float, int, int, Degrees | _ShapeNeed]] = [
            (self._cheap_bound(degrees), degrees.micro_batch, order, degrees)
            for order, degrees in enumerate(legal)
        ]
        heapq.heapify(heap)
        best: Need | None = None
        to_beat = math.inf if enough_bytes is None else enough_bytes + MIB
        while heap and heap[0][0] < to_beat - MIB:
            _, micro_batch, order, item = heapq.heappop(heap)
            if isinstance(item, Degrees):
                modelled = _ShapeNeed(self.model, item, self.pins)
                heapq.heappush(heap, (modelled.bound(), micro_batch, order, modelled))
                continue
            found = item.need(to_beat)
            if found is not None and found.limit_bytes < to_beat:
                best, to_beat = found, found.limit_bytes
                if enough_bytes is not None and best.limit_bytes <= enough_bytes:
                    return best
        if best is None or enough_bytes is not None:
            return None
        dealt = (self._cheap_bound(degrees) for degrees in legal if degrees.chunks > 1)
        return dataclasses.replace(best, exact=best.exact and min(dealt, default=math.inf) >= to_beat)

    def state_bytes(self, degrees: Degrees) -> float:
        """Weights, gradients and optimizer state of the mean device, remembered by what they depend on."""
        whole = (degrees.num_micro_batches == 1, degrees.replicas == 1, degrees.world == 1)
        shards = (degrees.weight_shards, degrees.expert_shards, degrees.expert_ranks)
        key = (degrees.tp, degrees.pp, degrees.zero, *shards, *whole)
        if key not in self._states:
            self._states[key] = least_state_bytes(self.model.layers, degrees, self.pins.offloaded)
        return self._states[key]

    def _cheap_bound(self, degrees: Degrees) -> float:
        """Below every need of a shape, without its model: state and communicators."""
        runtime = self.model.layers.runtime_bytes(degrees)
        slack = self.model.layers.memory.allocator_slack
        return (self.state_bytes(degrees) * slack + runtime) * (1 + self._least_error)


def _undominated(space: Space) -> list[Degrees]:
    """Legal shapes without those that 1F1B with the same degrees never exceeds in memory."""
    plain = (Schedule.ONE_F_ONE_B, 1)
    return [
        dataclasses.replace(base, schedule=schedule, chunks=chunks)
        for base, pipes in zip(space.bases, space.pipes, strict=True)
        for schedule, chunks in pipes
        if schedule not in (Schedule.GPIPE, Schedule.INTERLEAVED) or plain not in pipes
    ]


_Same = tuple[tuple[InFlight, ...], tuple[int, ...], bool, bool]
"""What a stage's need depends on: what is in flight, blocks of each class, the ends that it holds."""


class _ShapeNeed:
    """The least that strategies of one shape need."""

    def __init__(self, model: CostModel, degrees: Degrees, pins: Pins) -> None:
        self.model, self.degrees, self.pins = model, degrees, pins
        self.layers = model.problem.model.layers
        self.shape = model.shape(degrees)
        self._known: dict[_Same, tuple[float, Recompute]] = {}
        self._flights = self._in_flight()

    def _in_flight(self) -> tuple[tuple[InFlight, ...], ...]:
        """What is in flight on each stage at its fullest moments."""
        by_rank = self.model.in_flight(self.degrees)
        ranks = map(self.degrees.pp_rank_of_stage, range(self.degrees.stages))
        return tuple(tuple({v[s]: None for v in by_rank[rank]}) for s, rank in enumerate(ranks))

    @cached_property
    def _error(self) -> float:
        return memory_band(self.model.problem, self.model.coverage(self.shape)).upper

    def limit(self, used_bytes: float) -> float:
        """The memory limit at which tensors and runtime of `used_bytes` are SAFE."""
        slack, runtime = self.shape.memory.allocator_slack, self.shape.runtime_bytes
        return ((used_bytes - runtime) * slack + runtime) * (1 + self._error)

    def _within(self, limit_bytes: float) -> float:
        """The reverse: what tensors and runtime may take under a memory limit."""
        slack, runtime = self.shape.memory.allocator_slack, self.shape.runtime_bytes
        return (limit_bytes / (1 + self._error) - runtime) / slack + runtime

    def used(self, index: int, first: int, end: int) -> tuple[float, Recompute]:
        """Bytes of stage `index` with the blocks [first, end) at the option that takes least."""
        flights = self._flights[index]
        blocks = tuple(self.shape.count(key, first, end) for key in self.shape.classes)
        key = (flights, blocks, first == 0, end == self.layers)
        if key not in self._known:
            options = ((self._with(option, flights, first, end), option) for option in self.pins.recomputes)
            self._known[key] = min(options, key=lambda each: each[0])
        return self._known[key]

    def _with(self, option: Recompute, flights: Sequence[InFlight], first: int, end: int) -> float:
        stage = dataclasses.replace(sized_stages([end - first], option)[0], first=first, end=end)
        stage = offloaded((stage,), self.pins.offload or Offload.NONE)[0]
        cost = with_offload(self.shape, stage, self.shape.stage(stage))
        return self.shape.runtime_bytes + max(map(StageMemory(self.shape, cost).reserved_bytes, flights))

    def bound(self) -> float:
        """Below every need of the shape: a stage of one layer at either end, and the mean of states.

        Infinite where offloading breaks a rule, which is asked before its cost can be.
        """
        even = Strategy(degrees=self.degrees, stages=self._even(self.pins.recomputes[0]))
        if even.offloads and broken_rules(self.model.problem, even):
            return math.inf
        if self.degrees.chunks > 1:
            return 0.0
        layers, stages = self.layers, self.degrees.stages
        if stages == 1:
            return self.limit(self.used(0, 0, layers)[0])
        ends = (self.used(0, 0, 1), self.used(stages - 1, layers - 1, layers))
        states = least_state_bytes(self.model.layers, self.degrees, self.pins.offloaded)
        states += self.shape.runtime_bytes
        return self.limit(max(states, *(size for size, _ in ends)))

    def need(self, to_beat_bytes: float) -> Need | None:
        """The least demanding strategy; None where it does not beat a limit or offloading breaks a rule."""
        if self.degrees.chunks > 1:
            return self._least([self._even(option) for option in self.pins.recomputes], exact=False)
        if to_beat_bytes < math.inf and self._fitting(self._within(to_beat_bytes)) is None:
            return None
        bounds = self._cut()
        ranges = [(s, bounds[s], bounds[s + 1]) for s in range(self.degrees.stages)]
        stages = tuple(
            dataclasses.replace(
                sized_stages([end - first], self.used(s, first, end)[1])[0], first=first, end=end
            )
            for s, first, end in ranges
        )
        return self._least([offloaded(stages, self.pins.offload or Offload.NONE)], exact=True)

    def _even(self, option: Recompute) -> tuple[Stage, ...]:
        stages = even_stages(self.layers, self.degrees.stages, option)
        return offloaded(stages, self.pins.offload or Offload.NONE)

    def _least(self, choices: Iterable[tuple[Stage, ...]], *, exact: bool) -> Need | None:
        needs = (need_of(self.model, Strategy(degrees=self.degrees, stages=each), exact) for each in choices)
        return min(filter(None, needs), key=lambda need: need.limit_bytes, default=None)

    def _cut(self) -> list[int]:
        """Where stages begin, and the end, such that the fullest stage is least."""
        stages = self.degrees.stages
        bounds = [self.layers * stage // stages for stage in range(stages + 1)]
        high, low = self._fullest(bounds), 0.0
        while stages > 1:
            middle = (low + high) / 2 if high - low > 1e-3 * high else math.nextafter(high, 0.0)
            found = self._fitting(middle)
            if found is not None:
                bounds, high = found, self._fullest(found)
            elif middle == math.nextafter(high, 0.0):
                break
            else:
                low = middle
        return bounds

    def _fullest(self, bounds: list[int]) -> float:
        return max(self.used(s, bounds[s], bounds[s + 1])[0] for s in range(self.degrees.stages))

    def _fitting(self, limit_bytes: float) -> list[int] | None:
        """A cut whose stages all keep a limit: each in turn takes as many layers as fit."""
        bounds, stages = [0], self.degrees.stages
        for s in range(stages):
            first, most = bounds[-1], self.layers - (stages - 1 - s)
            low, high = (most if s == stages - 1 else first + 1), most
            if self.used(s, first, low)[0] > limit_bytes:
                return None
            while low < high:
                middle = (low + high + 1) // 2
                if self.used(s, first, middle)[0] <= limit_bytes:
                    low = middle
                else:
                    high = middle - 1
            bounds.append(low)
        return bounds


def need_of(model: CostModel, strategy: Strategy, exact: bool = False) -> Need | None:
    """What a strategy needs; None where it breaks a rule."""
    if broken_rules(model.problem, strategy):
        return None
    shape = model.shape(strategy.degrees)
    shapes = model.rank_shapes(strategy.degrees)
    ranks = memory_of_ranks(shapes, model.table(strategy.degrees), model.stage_costs(shape, strategy))
    fullest = max(ranks, key=lambda rank: rank.peak_bytes)
    total = sum(fullest.parts.values(), MemoryBreakdown())
    limit = safe_limit_bytes(model.problem, total.total_bytes, model.coverage(shape))
    return Need(strategy=strategy, limit_bytes=limit, memory=total, exact=exact)


def safe_limit_bytes(problem: PlanningProblem, peak_bytes: int, coverage: Coverage) -> int:
    """The least memory limit, in whole MiB, at which a predicted peak is SAFE for search and verdict."""
    error = memory_band(problem, coverage)
    return math.ceil((peak_bytes + ROUNDED_BYTES) * (1 + error.upper) / MIB) * MIB
