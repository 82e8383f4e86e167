"""The best strategy of one shape: columns, ILP, replay, and again until the bound meets the replay.

The ILP's optimum is a lower bound of the replay of every assignment. An assignment that is found is
replayed and cut off, and the ILP solved again, until its bound is no better than the best replay.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from planner.cost.evaluate import CostModel
from planner.cost.memory import in_flight_vectors
from planner.cost.schedule import Table, build_table, peak_in_flight
from planner.cost.stage import ShapeModel
from planner.search.ilp import StageProgramme, solve_stages
from planner.search.recipes import Column, pareto, recipe
from planner.strategy import Degrees, Recompute, Stage, Strategy


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
        self.table: Table = build_table(
            degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches
        )

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
        layers, stages = self.model.problem.model.layers, self.degrees.stages
        sizes = [layers // stages + (s < layers % stages) for s in range(stages)]
        columns = [self._recipe(s, size, self._share_bytes()) for s, size in enumerate(sizes)]
        if any(column is None for column in columns):
            return None
        return self.replayed(tuple(column for column in columns if column is not None))

    def replayed(self, columns: tuple[Column, ...]) -> Found:
        """The strategy of an assignment and its replayed step time."""
        stages, first = [], 0
        for column in columns:
            stages.append(Stage(first=first, end=first + column.layers, recompute=column.counts))
            first += column.layers
        costs = tuple(column.cost for column in columns)
        step_s = self.model.replay(self.shape, self.table, costs).step_time_s
        return Found(Strategy(degrees=self.degrees, stages=tuple(stages)), step_s)

    def _without_pipeline(self) -> ShapeResult:
        column = self._recipe(0, self.model.problem.model.layers, self.limit_bytes)
        if column is None:
            return ShapeResult(None, float("inf"), 0)
        found = self.replayed((column,))
        return ShapeResult(found, found.step_time_s, 0)

    def _share_bytes(self) -> float:
        """What one of a rank's stages may use in the greedy plan: an equal part."""
        shared = self.shape.runtime_bytes
        return (self.limit_bytes - shared) / self.degrees.chunks + shared

    def _recipe(self, stage: int, layers: int, limit_bytes: float) -> Column | None:
        row = self.table[self.degrees.pp_rank_of_stage(stage)]
        in_flight = peak_in_flight(row)[stage]
        return recipe(self.shape, stage, layers, in_flight, limit_bytes, self.options)

    def programme(self, to_beat_s: float = float("inf")) -> StageProgramme:
        """The data of the ILP: columns of every size that can still beat a step time."""
        degrees, sharing = self.degrees, self.model.sharing
        per_rank = degrees.world // degrees.pp
        return StageProgramme(
            degrees=degrees,
            layers=self.model.problem.model.layers,
            columns=tuple(tuple(self._columns(s, to_beat_s)) for s in range(degrees.stages)),
            in_flight=tuple(tuple(in_flight_vectors(row)) for row in self.table),
            hop_s=self.shape.p2p_s(),
            limit_bytes=self.limit_bytes - self.shape.runtime_bytes,
            to_beat_s=to_beat_s,
            work_scale=sharing.slowdown(per_rank) if sharing else 1.0,
            optimizer_scale=sharing.slowdown(degrees.world) if sharing else 1.0,
            throughput=sharing.best_throughput(degrees.world) if sharing else None,
            devices_per_rank=per_rank,
        )

    def _columns(self, stage: int, to_beat_s: float) -> list[Column]:
        """Recipes of a stage by size; sizes whose rank's work alone takes too long are left out."""
        most = self.model.problem.model.layers - (self.degrees.stages - 1)
        others_s = (self.degrees.chunks - 1) * self._least_s()
        columns: list[Column] = []
        least, most = self._sizes(most)
        for layers in range(least, most + 1):
            if self.degrees.chunks > 1 and not self._roomy(stage, layers):
                found = pareto(self.shape, stage, layers, self.options)
            else:
                single = self._recipe(stage, layers, self.limit_bytes)
                found = [] if single is None else [single]
            found = [column for column in found if self._own_s(column) + others_s < to_beat_s]
            if not found:
                break
            columns += found
        return columns

    def _sizes(self, most: int) -> tuple[int, int]:
        """Sizes of a stage: any; with several stages a rank, from half to twice the even share."""
        if self.degrees.chunks == 1:
            return 1, most
        even = self.model.problem.model.layers / self.degrees.stages
        return max(1, int(even / 2)), min(most, math.ceil(2 * even))

    def _roomy(self, stage: int, layers: int) -> bool:
        """Whether the fastest recipe of this size fits in an equal part of the rank's memory."""
        return self._recipe(stage, layers, self._share_bytes()) == self._recipe(stage, layers, float("inf"))

    def _least_s(self) -> float:
        """All micro-batches of the smallest stage there can be: one block, cheapest option."""
        passes = (self.shape.block_passes[option] for option in self.options)
        return self.degrees.num_micro_batches * min(f.total_s + b.total_s for f, b in passes)

    def _own_s(self, column: Column) -> float:
        """All micro-batches of a column's stage."""
        return self.degrees.num_micro_batches * (column.cost.forward.total_s + column.cost.backward.total_s)
