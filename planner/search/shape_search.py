"""The best strategy of one shape: columns, ILP, replay, and again until the bound meets the replay.

The ILP's optimum is a lower bound of the replay of every assignment. An assignment that is found is
replayed and cut off, and the ILP solved again, until its bound is no better than the best replay.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from planner.cost.evaluate import CostModel
from planner.cost.schedule import Table
from planner.cost.stage import ShapeModel
from planner.search.ilp import StageProgramme, solve_stages
from planner.search.recipes import Column, pareto, recipe
from planner.strategy import Degrees, Recompute, Strategy

MAX_REACH = 4
"""Layers that a boundary of stages may lie from the even split, in a model of several layer classes: this
narrows the space that the certificate speaks of."""


class Found(NamedTuple):
    """A strategy and its replayed step time."""

    strategy: Strategy
    step_time_s: float


class ShapeResult(NamedTuple):
    """The best strategy of a shape (None: no recipe fits), the proven bound, and the ILPs solved."""

    found: Found | None
    bound_s: float
    milps: int


class Budget(NamedTuple):
    """What the search of a shape may use: seconds (None: no clock), and ILPs before its gap stays open.

    `to_beat_s` is the step time that is worth beating, `nodes` the branch-and-bound nodes of one ILP.
    """

    seconds: float | None
    to_beat_s: float
    rounds: int
    nodes: int | None


class ShapeSearch:
    """Searches one shape of a problem."""

    def __init__(
        self, model: CostModel, degrees: Degrees, limit_bytes: float, options: tuple[Recompute, ...]
    ) -> None:
        self.model, self.degrees = model, degrees
        self.limit_bytes, self.options = limit_bytes, options
        self.shape: ShapeModel = model.shape(degrees)
        self.one_class = len(self.shape.classes) == 1
        self.even = self._even()

    @cached_property
    def table(self) -> Table:
        """The shape's table, made when it is first asked for: most shapes are never searched."""
        return self.model.table(self.degrees)

    @cached_property
    def in_flight(self) -> tuple[tuple[dict[int, int], ...], ...]:
        """For every rank, the counts of live micro-batches by stage at its fullest moments."""
        return tuple(tuple(self.table.in_flight(rank)) for rank in range(self.degrees.pp))

    def run(self, budget: Budget) -> ShapeResult:
        """The best strategy of the shape that can beat the incumbent, or proof that none does."""
        if self.degrees.pp == 1:
            return self._without_pipeline()
        best: Found | None = None
        seen: list[tuple[Column, ...]] = []
        to_beat_s, bound_s, milps = budget.to_beat_s, 0.0, 0
        while milps < budget.rounds:
            answer = solve_stages(self.programme(to_beat_s), seen, budget.seconds, budget.nodes)
            milps += 1
            if answer.status == "infeasible":
                bound_s = to_beat_s
                break
            bound_s = max(bound_s, answer.bound_s)
            if not answer.columns:
                break
            found = self.replayed(answer.columns)
            if best is None or found.step_time_s < best.step_time_s:
                best = found
            seen.append(answer.columns)
            to_beat_s = min(best.step_time_s, to_beat_s)
            if bound_s >= to_beat_s or answer.status == "limit":
                break
        return ShapeResult(best, min(bound_s, to_beat_s), milps)

    def greedy(self) -> Found | None:
        """An even split, each stage with its own recipe. None where one of them does not fit."""
        ranges = pairwise(self.even)
        columns = [self._recipe(s, a, b, self._share_bytes()) for s, (a, b) in enumerate(ranges)]
        if any(column is None for column in columns):
            return None
        return self.replayed(tuple(column for column in columns if column is not None))

    def replayed(self, columns: tuple[Column, ...]) -> Found:
        """The strategy of an assignment and its replayed step time."""
        stages, first = [], 0
        for column in columns:
            stages.append(dataclasses.replace(column.stage, first=first, end=first + column.layers))
            first += column.layers
        costs = tuple(column.cost for column in columns)
        step_s = self.model.replay(self.shape, self.table, costs).step_time_s
        return Found(Strategy(degrees=self.degrees, stages=tuple(stages)), step_s)

    def _without_pipeline(self) -> ShapeResult:
        column = self._recipe(0, 0, self.model.problem.model.layers, self.limit_bytes)
        if column is None:
            return ShapeResult(None, float("inf"), 0)
        found = self.replayed((column,))
        return ShapeResult(found, found.step_time_s, 0)

    def _share_bytes(self) -> float:
        """What one of a rank's stages may use in the greedy plan: an equal part."""
        shared = self.shape.runtime_bytes
        return (self.limit_bytes - shared) / self.degrees.chunks + shared

    def _recipe(self, index: int, first: int, end: int, limit_bytes: float) -> Column | None:
        alive = self._in_flight(index)
        return recipe(self.shape, index, first, end, alive, limit_bytes, self.options)

    def _in_flight(self, index: int) -> int:
        """The most micro-batches that are alive on a stage."""
        rank = self.degrees.pp_rank_of_stage(index)
        return max(alive.get(index, 0) for alive in self.in_flight[rank])

    def programme(self, to_beat_s: float = float("inf")) -> StageProgramme:
        """The data of the ILP: columns of every size that can still beat a step time."""
        degrees, sharing = self.degrees, self.model.sharing
        per_rank = degrees.world // degrees.pp
        return StageProgramme(
            degrees=degrees,
            layers=self.model.problem.model.layers,
            one_class=self.one_class,
            columns=tuple(tuple(self._columns(s, to_beat_s)) for s in range(degrees.stages)),
            in_flight=self.in_flight,
            hop_s=self.shape.messages.p2p_s(),
            limit_bytes=self.limit_bytes - self.shape.runtime_bytes,
            to_beat_s=to_beat_s,
            work_scale=sharing.slowdown(per_rank) if sharing else 1.0,
            optimizer_scale=sharing.slowdown(degrees.world) if sharing else 1.0,
            throughput=sharing.best_throughput(degrees.world) if sharing else None,
            devices_per_rank=per_rank,
        )

    def _even(self) -> list[int]:
        """Where stages begin, and the end: equal numbers of blocks, or of their time where classes differ."""
        layers, stages = self.model.problem.model.layers, self.degrees.stages
        if self.one_class:
            return [0, *accumulate(layers // stages + (s < layers % stages) for s in range(stages))]
        each = {key: self._least_block_s(key) for key in self.shape.classes}
        done = [0.0, *accumulate(each[key] for key in self.shape.layer_model.keys)]
        bounds = [0]
        for stage in range(1, stages):
            wanted = done[-1] * stage / stages
            nearest = min(range(layers + 1), key=lambda layer: abs(done[layer] - wanted))
            bounds.append(min(max(nearest, bounds[-1] + 1), layers - (stages - stage)))
        return [*bounds, layers]

    def _least_block_s(self, key: str) -> float:
        """A micro-batch's passes of a block of a class with its cheapest option."""
        passes = (self.shape.passes(key, option) for option in self.options)
        return min(forward.total_s + backward.total_s for forward, backward in passes)

    def _columns(self, index: int, to_beat_s: float) -> list[Column]:
        """Recipes of a stage by its blocks; those whose rank's work alone takes too long are left out."""
        others_s = (self.degrees.chunks - 1) * self._least_s()
        columns: list[Column] = []
        for ranges in self._ranges(index):
            for first, end in ranges:
                if self.degrees.chunks > 1 and not self._roomy(index, first, end):
                    found = pareto(self.shape, index, first, end, self._in_flight(index), self.options)
                else:
                    single = self._recipe(index, first, end, self.limit_bytes)
                    found = [] if single is None else [single]
                found = [column for column in found if self._own_s(column) + others_s < to_beat_s]
                if not found:
                    break  # longer ranges from the same layer take more time and memory
                columns += found
        return columns

    def _ranges(self, index: int) -> list[list[tuple[int, int]]]:
        """The blocks [first, end) that a stage may hold: for each first layer, ends in ascending order.

        Of one class, blocks between the same ends cost the same: only their number matters.
        """
        layers, last = self.model.problem.model.layers, self.degrees.stages - 1
        if not self.one_class:
            firsts = [0] if index == 0 else self._near(index)
            ends = [layers] if index == last else self._near(index + 1)
            return [[(first, end) for end in ends if end > first] for first in firsts]
        least, most = self._sizes(layers - last)
        sizes = range(least, most + 1)
        if index == 0:
            return [[(0, size) for size in sizes]]
        return [[(layers - size, layers) if index == last else (1, 1 + size) for size in sizes]]

    def _near(self, boundary: int) -> list[int]:
        """Layers near an even boundary where a stage may begin instead: an even stage to either side."""
        layers, stages = self.model.problem.model.layers, self.degrees.stages
        reach = min(MAX_REACH, math.ceil(layers / stages))
        middle = self.even[boundary]
        low, high = max(boundary, middle - reach), min(layers - (stages - boundary), middle + reach)
        return list(range(low, high + 1))

    def _sizes(self, most: int) -> tuple[int, int]:
        """Sizes of a stage: any; with several stages a rank, from half to twice the even share."""
        if self.degrees.chunks == 1:
            return 1, most
        even = self.model.problem.model.layers / self.degrees.stages
        return max(1, int(even / 2)), min(most, math.ceil(2 * even))

    def _roomy(self, index: int, first: int, end: int) -> bool:
        """Whether the fastest recipe of these blocks fits in an equal part of the rank's memory."""
        share = self._recipe(index, first, end, self._share_bytes())
        return share == self._recipe(index, first, end, float("inf"))

    def _least_s(self) -> float:
        """All micro-batches of the smallest stage there can be: one block, cheapest class and option."""
        return self.degrees.num_micro_batches * min(self._least_block_s(key) for key in self.shape.classes)

    def _own_s(self, column: Column) -> float:
        """All micro-batches of a column's stage."""
        return self.degrees.num_micro_batches * (column.cost.forward.total_s + column.cost.backward.total_s)
