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
limit = peak (1 + upper). Where kinds of devices have limits of their own, all are told by the least of them:
a rank's is that and what its devices have more.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from planner.cost.constants import fitted_constant
from planner.cost.evaluate import CostModel, memory_of_ranks
from planner.cost.stage.memory_timeline import StageMemory
from planner.cost.stage.offload import with_offload
from planner.cost.stage.peak_memory import MEMORY_ERROR, RankMemory, memory_band
from planner.cost.stage.stage import LayoutModel
from planner.foundation.frozen import frozen
from planner.foundation.units import MIB
from planner.job.problem import PlanningProblem
from planner.model.sublayer import Recompute
from planner.search.bounds.layout_bounds import Recomputing, least_state_bytes, live_under
from planner.search.space import Space, space_of
from planner.strategy.estimate import Coverage, MemoryBreakdown, Rejected
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.placement import rank_limits_bytes
from planner.strategy.rules import broken_rules
from planner.strategy.schedule.table import InFlight
from planner.strategy.strategy import (
    Degrees,
    Offload,
    Schedule,
    Stage,
    Strategy,
    Zero,
    even_stages,
    offloaded,
    sized_stages,
)

ROUNDED_BYTES = 64
"""What rounding each tenant to whole bytes may hide from a search that adds them unrounded."""


@frozen
class Need:
    """What the least demanding strategy of a problem needs of each device.

    `limit_bytes` is the least memory limit, in whole MiB, at which it is SAFE; `memory` are the tenants of
    its fullest device, whose kind has `more_bytes` more than that. `exact` says that no strategy of the space
    needs less.
    """

    strategy: Strategy
    limit_bytes: int
    memory: MemoryBreakdown
    exact: bool
    more_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return self.memory.total_bytes

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.memory.weights_bytes + self.memory.grads_bytes + self.memory.optimizer_bytes


@frozen
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


Over = Callable[[], bool]
"""Whether time is over: nothing more is looked for then."""


def never() -> bool:
    """Time that is never over."""
    return False


def survey(problem: PlanningProblem, pins: FixedChoices, over: Over = never) -> Survey:
    """Every shape of a problem asked: what the others break, and the least that a legal one needs; of those
    that were looked at before time is `over`, one at least."""
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
        need=least.search(legal, over=over),
    )


def fitting(problem: PlanningProblem, pins: FixedChoices, over: Over = never) -> Need | None:
    """A strategy that keeps pins and rules and is SAFE within the problem's limit, if there is one, and is
    found before time is `over`."""
    least = _Least(problem, pins)
    spread = Degrees(dp_shard=problem.cluster.devices, zero=Zero.PARAMETERS)
    if least.state_bytes(spread) > problem.memory_limit_bytes + least.most_more_bytes:
        return None  # not even shared out over all devices
    return least.search(_undominated(space_of(problem, pins, over)), problem.memory_limit_bytes, over)


class _Least:
    """The search over shapes by rising bound."""

    def __init__(self, problem: PlanningProblem, pins: FixedChoices) -> None:
        self.problem, self.pins = problem, pins
        self.model = CostModel(problem)
        fitted = fitted_constant(problem, "memory_error_upper")
        self._least_error = min(MEMORY_ERROR.values()) if fitted is None else fitted
        self._states: dict[tuple[object, ...], float] = {}
        self._more: dict[tuple[int, tuple[int, ...]], float] = {}
        self.most_more_bytes = max(self.model.limits_bytes) - problem.memory_limit_bytes

    def search(
        self, legal: list[Degrees], enough_bytes: int | None = None, over: Over = never
    ) -> Need | None:
        """The least need, of those found until time is `over` if there is one by then; with `enough_bytes`,
        any need of at most that, or None, also when time is over."""
        heap: list[tuple[float, int, int, Degrees | ShapeNeed]] = [
            (self._cheap_bound(degrees), degrees.micro_batch, order, degrees)
            for order, degrees in enumerate(legal)
        ]
        heapq.heapify(heap)
        best: Need | None = None
        to_beat = math.inf if enough_bytes is None else enough_bytes + MIB
        unknown = math.inf  # from here on shapes may need less than was found of them
        while heap and heap[0][0] < to_beat - MIB:
            if over():
                unknown = min(unknown, heap[0][0])
                if best is not None or enough_bytes is not None:
                    break
                heap = sorted(each for each in heap if isinstance(each[-1], ShapeNeed)) or heap
            bound, micro_batch, order, item = heapq.heappop(heap)
            if isinstance(item, Degrees):
                modelled = ShapeNeed(self.model, item, self.pins)
                heapq.heappush(heap, (modelled.bound(), micro_batch, order, modelled))
                continue
            if item.degrees.chunks > 1:
                unknown = min(unknown, bound)
            found = item.need(to_beat)
            if found is not None and found.limit_bytes < to_beat:
                best, to_beat = found, found.limit_bytes
                if enough_bytes is not None and best.limit_bytes <= enough_bytes:
                    return best
        if best is None or enough_bytes is not None:
            return None
        return dataclasses.replace(best, exact=best.exact and unknown >= to_beat)

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
        whole = (self.state_bytes(degrees) * slack + runtime) * (1 + self._least_error)
        return whole - self._mean_more_bytes(degrees)

    def _mean_more_bytes(self, degrees: Degrees) -> float:
        """What ranks' devices have more than the least limit, on average."""
        if not self.most_more_bytes:
            return 0.0
        key = degrees.pp, degrees.device_order
        if key not in self._more:
            limits = rank_limits_bytes(self.problem, degrees)
            self._more[key] = sum(limits) / len(limits) - self.problem.memory_limit_bytes
        return self._more[key]


def _undominated(space: Space) -> list[Degrees]:
    """Legal shapes without those that 1F1B with the same degrees never exceeds in memory."""
    plain = (Schedule.ONE_F_ONE_B, 1)
    return [
        dataclasses.replace(base, schedule=schedule, chunks=chunks)
        for base, pipes in zip(space.bases, space.pipes, strict=True)
        for schedule, chunks in pipes
        if schedule not in (Schedule.GPIPE, Schedule.INTERLEAVED) or plain not in pipes
    ]


_Same = tuple[int, tuple[InFlight, ...], tuple[int, ...], bool, bool]
"""What a stage's need depends on: its rank's kind, what is in flight, blocks of each class, the ends that it
holds."""


class ShapeNeed:
    """The least that strategies of one shape need."""

    def __init__(self, model: CostModel, degrees: Degrees, pins: FixedChoices) -> None:
        self.model, self.degrees, self.pins = model, degrees, pins
        self.layers = model.problem.model.layers
        shapes = model.rank_layouts(degrees)
        self._shapes = [shapes[degrees.pp_rank_of_stage(stage)] for stage in range(degrees.stages)]
        self._known: dict[_Same, tuple[float, Recompute]] = {}
        self._flights = self._in_flight()

    def _in_flight(self) -> tuple[tuple[InFlight, ...], ...]:
        """What is in flight on each stage at its fullest moments."""
        by_rank = self.model.in_flight(self.degrees)
        ranks = map(self.degrees.pp_rank_of_stage, range(self.degrees.stages))
        return tuple(tuple({v[s]: None for v in by_rank[rank]}) for s, rank in enumerate(ranks))

    @cached_property
    def _errors(self) -> dict[int, float]:
        """The upper error of each kind of rank."""
        kinds = {id(shape): shape for shape in self._shapes}
        return {
            key: memory_band(shape.problem, self.model.coverage(shape)).upper for key, shape in kinds.items()
        }

    def limit(self, index: int, used_bytes: float) -> float:
        """The memory limit at which tensors and runtime of `used_bytes` on stage `index` are SAFE."""
        shape = self._shapes[index]
        slack, runtime = shape.memory.allocator_slack, shape.runtime_bytes
        whole = ((used_bytes - runtime) * slack + runtime) * (1 + self._errors[id(shape)])
        return whole - more_bytes(self.model.problem, shape)

    def needs(self, index: int, first: int, end: int) -> tuple[float, Recompute]:
        """The limit that stage `index` needs with the blocks [first, end) at the option that takes least."""
        flights, shape = self._flights[index], self._shapes[index]
        blocks = tuple(shape.count(key, first, end) for key in shape.classes)
        key = (id(shape), flights, blocks, first == 0, end == self.layers)
        if key not in self._known:
            options = (
                (self._with(shape, option, flights, first, end), option) for option in self.pins.recomputes
            )
            size, option = min(options, key=lambda each: each[0])
            self._known[key] = self.limit(index, size), option
        return self._known[key]

    def _with(
        self, shape: LayoutModel, option: Recompute, flights: Sequence[InFlight], first: int, end: int
    ) -> float:
        stage = dataclasses.replace(sized_stages([end - first], option)[0], first=first, end=end)
        stage = offloaded((stage,), self.pins.offload or Offload.NONE)[0]
        cost = with_offload(shape, stage, shape.stage(stage))
        return shape.runtime_bytes + max(map(StageMemory(shape, cost).reserved_bytes, flights))

    def bound(self) -> float:
        """Below every need of the shape: a stage of one layer at either end, and the mean of states.

        Infinite where offloading breaks a rule, which is asked before its cost can be.
        """
        even = Strategy(degrees=self.degrees, stages=self._even(self.pins.recomputes[0]))
        if even.offloads and broken_rules(self.model.problem, even):
            return math.inf
        mean = self._mean()
        if self.degrees.chunks > 1:
            return mean
        layers, stages = self.layers, self.degrees.stages
        if stages == 1:
            return self.needs(0, 0, layers)[0]
        ends = (self.needs(0, 0, 1), self.needs(stages - 1, layers - 1, layers))
        return max(mean, *(limit for limit, _ in ends))

    def _mean(self) -> float:
        """Below what ranks need on average, and so the fullest: states, what micro-batches in flight keep at
        least, what a block's pass back takes."""
        kinds = {id(shape): shape for shape in self._shapes}.values()
        slack = min(shape.memory.allocator_slack for shape in kinds)
        runtime = min(shape.runtime_bytes for shape in kinds)
        if self.pins.offloaded is Offload.NONE:
            live = live_under(self.model.problem.engine_settings, self.degrees, self.layers)
            used = min(Recomputing(shape, self.pins.recomputes).least_bytes(live) for shape in kinds)
        else:
            used = runtime + least_state_bytes(self.model.layers, self.degrees, self.pins.offloaded)
        whole = ((used - runtime) * slack + runtime) * (1 + min(self._errors.values()))
        more = sum(more_bytes(self.model.problem, shape) for shape in self._shapes)
        return whole - more / len(self._shapes)

    def need(self, to_beat_bytes: float) -> Need | None:
        """The least demanding strategy; None where it does not beat a limit or offloading breaks a rule."""
        if self.degrees.chunks > 1:
            return self._least([self._even(option) for option in self.pins.recomputes], exact=False)
        if to_beat_bytes < math.inf and self._fitting(to_beat_bytes) is None:
            return None
        bounds = self._cut()
        ranges = [(s, bounds[s], bounds[s + 1]) for s in range(self.degrees.stages)]
        stages = tuple(
            dataclasses.replace(
                sized_stages([end - first], self.needs(s, first, end)[1])[0], first=first, end=end
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
        high = self._fullest(bounds)
        low = min(0.0, high) - max(more_bytes(self.model.problem, shape) for shape in self._shapes)
        while stages > 1:
            middle = (low + high) / 2 if high - low > 1e-3 * abs(high) else math.nextafter(high, -math.inf)
            found = self._fitting(middle)
            if found is not None:
                bounds, high = found, self._fullest(found)
            elif middle == math.nextafter(high, -math.inf):
                break
            else:
                low = middle
        return bounds

    def _fullest(self, bounds: list[int]) -> float:
        return max(self.needs(s, bounds[s], bounds[s + 1])[0] for s in range(self.degrees.stages))

    def _fitting(self, limit_bytes: float) -> list[int] | None:
        """A cut whose stages all keep a limit: each in turn takes as many layers as fit."""
        bounds, stages = [0], self.degrees.stages
        for s in range(stages):
            first, most = bounds[-1], self.layers - (stages - 1 - s)
            low, high = (most if s == stages - 1 else first + 1), most
            if self.needs(s, first, low)[0] > limit_bytes:
                return None
            while low < high:
                middle = (low + high + 1) // 2
                if self.needs(s, first, middle)[0] <= limit_bytes:
                    low = middle
                else:
                    high = middle - 1
            bounds.append(low)
        return bounds


def more_bytes(problem: PlanningProblem, shape: LayoutModel) -> int:
    """What the devices of a rank have more than the least limit of a problem."""
    return shape.problem.memory_limit_bytes - problem.memory_limit_bytes


def need_of(model: CostModel, strategy: Strategy, exact: bool = False) -> Need | None:
    """What a strategy needs; None where it breaks a rule."""
    if broken_rules(model.problem, strategy):
        return None
    shape, shapes = model.layout(strategy.degrees), model.rank_layouts(strategy.degrees)
    ranks = memory_of_ranks(shapes, model.table(strategy.degrees), model.stage_costs(shape, strategy))
    fullest: dict[int, tuple[LayoutModel, RankMemory]] = {}
    for own, rank in zip(shapes, ranks, strict=True):
        known = fullest.get(id(own))
        if known is None or rank.peak_bytes > known[1].peak_bytes:
            fullest[id(own)] = own, rank
    needs = []
    for own, rank in fullest.values():
        total, more = sum(rank.parts.values(), MemoryBreakdown()), more_bytes(model.problem, own)
        limit = safe_limit_bytes(own.problem, total.total_bytes, model.coverage(own)) - more
        needs.append(Need(strategy=strategy, limit_bytes=limit, memory=total, exact=exact, more_bytes=more))
    return max(needs, key=lambda need: need.limit_bytes)


def safe_limit_bytes(problem: PlanningProblem, peak_bytes: int, coverage: Coverage) -> int:
    """The least memory limit, in whole MiB, at which a predicted peak is SAFE for search and verdict."""
    error = memory_band(problem, coverage)
    return math.ceil((peak_bytes + ROUNDED_BYTES) * (1 + error.upper) / MIB) * MIB
