"""The best strategy of one shape: columns, then all ways to deal blocks, or the ILP with critical paths.

Sizes of stages that cannot beat the incumbent are left out first. Where few ways to deal the blocks remain,
all are replayed at once. Else the ILP's optimum is a lower bound of every replay; what it finds is replayed,
its critical path becomes a row of the programme, and the ILP is solved again, until the replay is no longer
than its optimum. Where devices share cores a replay is no longest path: the assignment is cut off instead,
and what the bound leaves open stays open after a few rounds.
"""

from __future__ import annotations

import dataclasses
import math
import time
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from planner.cost.critical_path import critical_path
from planner.cost.evaluate import CostModel
from planner.cost.schedule import Table
from planner.cost.simulate import Replay
from planner.cost.stage import ShapeModel
from planner.search.deal import Dealer
from planner.search.ilp import StageIlp, StageProgramme
from planner.search.rank_floor import RankFloor
from planner.search.recipes import Column, RecipeBook
from planner.search.sizes import Sizes, narrowed, splits
from planner.strategy import Schedule, Strategy

MAX_REACH = 4
"""Layers that a boundary of stages may lie from the even split, in a model of several layer classes: this
narrows the space that the certificate speaks of."""
MAX_SPLITS = 400
"""Ways to deal the blocks that are all replayed; of more, the ILP finds the best."""
MAX_REPLAYED = 2_000_000
"""Actions of all these replays together."""
MAX_COLUMNS = 80
"""Columns of a programme beyond which it is not solved: where several stages share a rank's tight memory,
their many mixes make relaxations loose. The shape's bound is then that of its sizes, its gap stays open."""
DEALT_WITHIN = 1.1
"""Blocks are dealt better where an even split is within this of the step time to beat."""
MIXES_EACH = 5
"""Columns that a stage and size have about, where memory is tight."""
FLOOR_REACH, FLOOR_HALVINGS = 0.2, 7
"""How far below a step time the bound of sizes is looked for, as a share of it, and halvings of that."""
SHARED_ROUNDS = 3
"""ILPs that are solved for one shape where devices share cores."""


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
    """What the search of a shape may use: the clock's time at which it ends (None: no clock), and ILPs.

    `to_beat_s` is the step time that is worth beating, `nodes` the branch-and-bound nodes of one ILP. A gap
    of `tolerance` or less may stay open.
    """

    deadline_s: float | None
    to_beat_s: float
    rounds: int
    nodes: int | None
    tolerance: float = 0.0

    @property
    def seconds(self) -> float | None:
        """What is left of the time."""
        return None if self.deadline_s is None else self.deadline_s - time.monotonic()


class ShapeSearch:
    """Searches one shape of a problem; `book` has the recipes of its stages."""

    def __init__(self, model: CostModel, shape: ShapeModel, limit_bytes: float, book: RecipeBook) -> None:
        self.model, self.shape, self.degrees = model, shape, shape.degrees
        self.limit_bytes, self.book = limit_bytes, book
        self.layers = model.problem.model.layers
        self.one_class = book.one_class

    @cached_property
    def table(self) -> Table:
        """The shape's table, made when it is first asked for: most shapes are never searched."""
        return self.model.table(self.degrees)

    @cached_property
    def in_flight(self) -> tuple[tuple[dict[int, int], ...], ...]:
        """For every rank, the counts of live micro-batches by stage at its fullest moments."""
        return self.model.in_flight(self.degrees)

    @cached_property
    def alive(self) -> list[int]:
        """The most micro-batches that are alive on each stage."""
        ranks = map(self.degrees.pp_rank_of_stage, range(self.degrees.stages))
        return [max(v.get(s, 0) for v in self.in_flight[rank]) for s, rank in enumerate(ranks)]

    def run(self, budget: Budget) -> ShapeResult:
        """The best strategy of the shape that can beat the incumbent, or proof that none does."""
        if self.degrees.pp == 1:
            return self._without_pipeline()
        if not self.one_class or self.model.sharing is not None:
            columns = [self._columns(s, budget.to_beat_s, None) for s in range(self.degrees.stages)]
            return self._by_programme(columns, budget)
        if self._sizes(budget.to_beat_s) is None:
            return ShapeResult(None, budget.to_beat_s, 0)
        dealt = self.dealt(DEALT_WITHIN * budget.to_beat_s)
        to_beat_s = budget.to_beat_s
        if dealt is not None and dealt.step_time_s < to_beat_s:
            to_beat_s = dealt.step_time_s * (1 - budget.tolerance)
        else:
            dealt = None
        result = self._one_class(budget._replace(to_beat_s=to_beat_s))
        each = [found for found in (result.found, dealt) if found is not None]
        return result._replace(found=min(each, key=lambda found: found.step_time_s, default=None))

    def dealt(self, within_s: float = float("inf")) -> Found | None:
        """The best deal near an even one, found by moves where that takes at most `within_s`.

        None where none fits, or none is tried.
        """
        if self.degrees.pp == 1 or not self.one_class or self.model.sharing is not None:
            return None
        deal = self.dealer.best(tuple(b - a for a, b in pairwise(self.even)), within_s)
        return None if deal is None else self._found(deal[0], self.replay(deal[0]).step_time_s)

    def _one_class(self, budget: Budget) -> ShapeResult:
        """The best deal that can beat the incumbent, or proof that none does."""
        sizes = self._sizes(budget.to_beat_s)
        if sizes is None:
            return ShapeResult(None, budget.to_beat_s, 0)
        if self._mixes_are_many(sizes):
            return ShapeResult(None, self._floor_bound_s(budget.to_beat_s), 0)
        columns = [self._columns(s, budget.to_beat_s, sizes) for s in range(self.degrees.stages)]
        if not all(columns):
            return ShapeResult(None, budget.to_beat_s, 0)
        every = self._all_splits(sizes, columns, budget.to_beat_s)
        if every is not None:
            return every
        return self._by_programme(columns, budget)

    def _mixes_are_many(self, sizes: Sizes) -> bool:
        """Whether stages that share a rank's tight memory would make a programme of too many columns."""
        if self.degrees.chunks == 1:
            return False
        spans = [span for s in range(self.degrees.stages) for span in self._ranges(s, sizes)[0]]
        if len(spans) * MIXES_EACH <= MAX_COLUMNS:
            return False
        return not all(
            self._roomy(s, *span) for s in range(self.degrees.stages) for span in self._ranges(s, sizes)[0]
        )

    def _floor_bound_s(self, to_beat_s: float) -> float:
        """The greatest step time, up to one, that no sizes of stages can beat by planner.search.sizes."""
        low_s, high_s = to_beat_s * (1 - FLOOR_REACH), to_beat_s
        if self._sizes(low_s) is not None:
            return 0.0
        for _ in range(FLOOR_HALVINGS):
            middle_s = (low_s + high_s) / 2
            if self._sizes(middle_s) is None:
                low_s = middle_s
            else:
                high_s = middle_s
        return low_s

    def _by_programme(self, columns: list[list[Column]], budget: Budget) -> ShapeResult:
        if not all(columns):
            return ShapeResult(None, budget.to_beat_s, 0)
        programme = self._programme(columns, budget.to_beat_s)
        ilp = StageIlp(programme, budget.nodes)
        best: Found | None = None
        to_beat_s, bound_s, milps = budget.to_beat_s, 0.0, 0
        rounds = budget.rounds if self.model.sharing is None else min(budget.rounds, SHARED_ROUNDS)
        while milps < rounds:
            left = budget.seconds
            if left is not None and left <= 0:
                break
            answer = ilp.solve(left)
            milps += 1
            if answer.status == "infeasible":
                bound_s = to_beat_s
                break
            bound_s = max(bound_s, answer.bound_s)
            if not answer.columns:
                break
            replayed = self.replay(answer.columns)
            if best is None or replayed.step_time_s < best.step_time_s:
                best = self._found(answer.columns, replayed.step_time_s)
            to_beat_s = min(best.step_time_s, to_beat_s)
            if bound_s >= to_beat_s * (1 - budget.tolerance) or answer.status == "limit":
                break
            if self.model.sharing is None:
                ilp.add_path(critical_path(replayed, programme.hop_s))
            else:
                ilp.exclude(answer.columns)
        return ShapeResult(best, min(bound_s, to_beat_s), milps)

    def greedy(self) -> Found | None:
        """An even split, each stage with its own recipe. None where one of them does not fit."""
        if self.degrees.chunks > 1 and self.one_class and self.model.sharing is None:
            return self.dealt(0.0)
        columns = [self._recipe(s, a, b, self._share_bytes()) for s, (a, b) in enumerate(pairwise(self.even))]
        if any(column is None for column in columns):
            return None
        chosen = tuple(column for column in columns if column is not None)
        return self._found(chosen, self.replay(chosen).step_time_s)

    def replay(self, columns: tuple[Column, ...]) -> Replay:
        """The replay of an assignment."""
        return self.model.replay(self.shape, self.table, tuple(column.cost for column in columns))

    def _found(self, columns: tuple[Column, ...], step_time_s: float) -> Found:
        stages, first = [], 0
        for column in columns:
            stages.append(dataclasses.replace(column.stage, first=first, end=first + column.layers))
            first += column.layers
        return Found(Strategy(degrees=self.degrees, stages=tuple(stages)), step_time_s)

    def _without_pipeline(self) -> ShapeResult:
        column = self._recipe(0, 0, self.layers, self.limit_bytes)
        if column is None:
            return ShapeResult(None, float("inf"), 0)
        found = self._found((column,), self.replay((column,)).step_time_s)
        return ShapeResult(found, found.step_time_s, 0)

    def _share_bytes(self) -> float:
        """What one of a rank's stages may use in the greedy plan: an equal part."""
        shared = self.shape.runtime_bytes
        return (self.limit_bytes - shared) / self.degrees.chunks + shared

    def _recipe(self, index: int, first: int, end: int, limit_bytes: float) -> Column | None:
        return self.book.recipe(first, end, self.alive[index], limit_bytes)

    # All ways to deal the blocks

    def _all_splits(self, sizes: Sizes, columns: list[list[Column]], to_beat_s: float) -> ShapeResult | None:
        """The best of all ways to deal the blocks; None where there are too many, or memory is shared."""
        each = [{column.layers: column for column in found} for found in columns]
        alone = all(len(by_size) == len(found) for by_size, found in zip(each, columns, strict=True))
        if not alone or (self.degrees.chunks > 1 and not self._all_roomy(columns)):
            return None
        ranks = [self.degrees.pp_rank_of_stage(s) for s in range(self.degrees.stages)]
        limits = [
            (max(low, min(by_size)), min(high, max(by_size)))
            for (low, high), by_size in zip(sizes.stages, each, strict=True)
        ]
        most = min(MAX_SPLITS, MAX_REPLAYED // self.table.actions)
        ways = splits(Sizes(tuple(limits), sizes.ranks), self.layers, ranks, most)
        if ways is None:
            return None
        if not ways:
            return ShapeResult(None, to_beat_s, 0)
        chosen = [tuple(each[s][size] for s, size in enumerate(way)) for way in ways]
        steps_s = self.dealer.steps_s(chosen)
        best = min(range(len(ways)), key=steps_s.__getitem__)
        found = self._found(chosen[best], self.replay(chosen[best]).step_time_s)
        return ShapeResult(found, min(found.step_time_s, to_beat_s), 0)

    def _all_roomy(self, columns: list[list[Column]]) -> bool:
        return all(
            self._roomy(s, column.stage.first, column.stage.end)
            for s, found in enumerate(columns)
            for column in found
        )

    def _sizes(self, to_beat_s: float) -> Sizes | None:
        """Blocks that stages and ranks may hold where a step is shorter; None where no cut is.

        By the bounds of planner.search.sizes.
        """
        degrees, stages = self.degrees, self.degrees.stages
        ranks = [degrees.pp_rank_of_stage(s) for s in range(stages)]
        limits = self.size_limits
        fixed_s = self._fixed_s()
        held_s = [
            sum(f for f, rank in zip(fixed_s, ranks, strict=True) if rank == r) for r in range(degrees.pp)
        ]
        if self.model.sharing is not None or to_beat_s == float("inf"):
            every = ((degrees.chunks, self.layers),) * degrees.pp
            by_stage = narrowed(limits, self.layers)
            return None if by_stage is None else Sizes(by_stage, every)
        block_s = min(self._least_block_s(key) for key in self.shape.classes)
        m, p = degrees.num_micro_batches, degrees.pp
        left_s = to_beat_s - self._optimizer_s()
        most = [int((left_s / m - own_s) / block_s + 1e-9) for own_s in held_s]
        if degrees.schedule is Schedule.ONE_F_ONE_B and m > p + 1:
            whole_s = self.layers * block_s + sum(fixed_s)
            slack_s = left_s - 2 * whole_s - 2 * (p - 1) * self.shape.messages.p2p_s()
            most = [
                min(n, int((slack_s / (m - p - 1) - own_s) / block_s + 1e-9)) if slack_s > 0 else 0
                for n, own_s in zip(most, held_s, strict=True)
            ]
        held = [[limit for limit, r in zip(limits, ranks, strict=True) if r == rank] for rank in range(p)]
        least = [sum(low for low, _ in each) for each in held]
        highest = [sum(high for _, high in each) for each in held]
        capped = (min(n, high) for n, high in zip(most, highest, strict=True))
        by_rank = narrowed(list(zip(least, capped, strict=True)), self.layers)
        if by_rank is None:
            return None
        within = self._with_memory if degrees.chunks > 1 else self._with_recipes
        by_rank = within(by_rank, held_s, left_s)
        if by_rank is None:
            return None
        by_stage = narrowed(
            [
                (low, min(high, by_rank[r][1] - least[r] + low))
                for (low, high), r in zip(limits, ranks, strict=True)
            ],
            self.layers,
        )
        return None if by_stage is None else Sizes(by_stage, by_rank)

    def _with_recipes(
        self, by_rank: tuple[tuple[int, int], ...], held_s: list[float], left_s: float
    ) -> tuple[tuple[int, int], ...] | None:
        """The limits of stages, one a rank, less what takes too long with its recipe or has none."""
        degrees, m, p = self.degrees, self.degrees.num_micro_batches, self.degrees.pp
        layers, enter_s, result = self.layers, self._enter_s(), []
        evenly = degrees.schedule is Schedule.ONE_F_ONE_B and m > p + 1
        block_s = self._least_block_s(next(iter(self.shape.classes)))
        twice_s = 2 * (layers * block_s + sum(held_s)) + 2 * (p - 1) * self.shape.messages.p2p_s()
        for s, (least, most) in enumerate(by_rank):
            while most >= least:
                first = 0 if s == 0 else layers - most if s == p - 1 else 1
                column = self._recipe(s, first, first + most, self.limit_bytes)
                if column is not None:
                    whole_s = column.whole_s(degrees.schedule)
                    own_s = m * whole_s + max(0, s - 1) * enter_s
                    if max(own_s, (m - p - 1) * whole_s + twice_s if evenly else 0.0) < left_s:
                        break
                most -= 1
            result.append((least, most))
        return narrowed(result, layers)

    def _with_memory(
        self, by_rank: tuple[tuple[int, int], ...], held_s: list[float], left_s: float
    ) -> tuple[tuple[int, int], ...] | None:
        """The limits of ranks, less what takes too long with what memory makes them recompute."""
        m, enter_s, result = self.degrees.num_micro_batches, self._enter_s(), []
        for rank, (least, most) in enumerate(by_rank):
            while most >= least:
                own_s = self._floor.least_s(rank, most) + held_s[rank]
                if m * own_s + max(0, rank - 1) * enter_s < left_s:
                    break
                most -= 1
            result.append((least, most))
        return narrowed(result, self.layers)

    @cached_property
    def dealer(self) -> Dealer:
        """Deals of the shape's blocks."""
        return Dealer(self, self._floor)

    @cached_property
    def _floor(self) -> RankFloor:
        return RankFloor(self.book, self.limit_bytes, self.degrees, self.in_flight, self.size_limits)

    def _enter_s(self) -> float:
        """What each of the ranks before adds, before a rank's first forward and after its last backward."""
        low = self.size_limits[min(1, self.degrees.stages - 1)][0]
        shape, (key,) = self.shape, self.shape.classes
        forward_s = shape.action.total_s + low * shape.passes(key, self.book.options[0])[0].total_s
        hop_s = shape.messages.p2p_s()
        if self.degrees.schedule.splits_backward:
            return forward_s + hop_s
        backward_s = min(shape.passes(key, option)[1].total_s for option in self.book.options)
        return forward_s + shape.action.total_s + low * backward_s + 2 * hop_s

    def _fixed_s(self) -> list[float]:
        """What each stage's passes of a micro-batch take besides its blocks."""
        fixed_s = [2 * self.shape.action.total_s] * self.degrees.stages
        fixed_s[0] += sum(passing.total_s for passing in self.shape.embedding_passes)
        fixed_s[-1] += sum(passing.total_s for passing in self.shape.head_passes)
        return fixed_s

    def _optimizer_s(self) -> float:
        """The slowest rank's optimizer step is no faster than the mean over ranks."""
        return self.shape.physics.step_s + self.shape.optimizer_s(self.shape.all_units()) / self.degrees.pp

    # Columns

    def _programme(self, columns: list[list[Column]], to_beat_s: float) -> StageProgramme:
        """The data of the ILP."""
        degrees, sharing = self.degrees, self.model.sharing
        per_rank = degrees.world // degrees.pp
        return StageProgramme(
            degrees=degrees,
            layers=self.layers,
            one_class=self.one_class,
            columns=tuple(map(tuple, columns)),
            in_flight=self.in_flight,
            hop_s=self.shape.messages.p2p_s(),
            limit_bytes=self.limit_bytes - self.shape.runtime_bytes,
            step_s=self.shape.physics.step_s,
            to_beat_s=to_beat_s,
            work_scale=sharing.slowdown(per_rank) if sharing else 1.0,
            optimizer_scale=sharing.slowdown(degrees.world) if sharing else 1.0,
            throughput=sharing.best_throughput(degrees.world) if sharing else None,
            devices_per_rank=per_rank,
        )

    @cached_property
    def even(self) -> list[int]:
        """Where stages begin, and the end: equal numbers of blocks, or of their time where classes differ."""
        layers, stages = self.layers, self.degrees.stages
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
        passes = (self.shape.passes(key, option) for option in self.book.options)
        return min(forward.total_s + backward.total_s for forward, backward in passes)

    def _columns(self, index: int, to_beat_s: float, sizes: Sizes | None) -> list[Column]:
        """Recipes of a stage by its blocks; those whose rank's work alone takes too long are left out."""
        others_s = (self.degrees.chunks - 1) * self._least_s()
        columns: list[Column] = []
        for ranges in self._ranges(index, sizes):
            for first, end in ranges:
                if self.degrees.chunks > 1 and not self._roomy(index, first, end):
                    found = self.book.pareto(first, end, self.alive[index])
                else:
                    single = self._recipe(index, first, end, self.limit_bytes)
                    found = [] if single is None else [single]
                found = [
                    column
                    for column in found
                    if self.degrees.num_micro_batches * column.whole_s(self.degrees.schedule) + others_s
                    < to_beat_s
                ]
                if not found:
                    break  # longer ranges from the same layer take more time and memory
                columns += found
        return columns

    def _ranges(self, index: int, sizes: Sizes | None) -> list[list[tuple[int, int]]]:
        """The blocks [first, end) that a stage may hold: for each first layer, ends in ascending order.

        Of one class, blocks between the same ends cost the same: only their number matters.
        """
        layers, last = self.layers, self.degrees.stages - 1
        if sizes is None:
            firsts = [0] if index == 0 else self._near(index)
            ends = [layers] if index == last else self._near(index + 1)
            return [[(first, end) for end in ends if end > first] for first in firsts]
        least, most = sizes.stages[index]
        if index == 0:
            return [[(0, size) for size in range(least, most + 1)]]
        return [[(layers - n, layers) if index == last else (1, 1 + n) for n in range(least, most + 1)]]

    def _near(self, boundary: int) -> list[int]:
        """Layers near an even boundary where a stage may begin instead: an even stage to either side."""
        layers, stages = self.layers, self.degrees.stages
        reach = min(MAX_REACH, math.ceil(layers / stages))
        middle = self.even[boundary]
        low, high = max(boundary, middle - reach), min(layers - (stages - boundary), middle + reach)
        return list(range(low, high + 1))

    @cached_property
    def size_limits(self) -> list[tuple[int, int]]:
        """Sizes of each stage: any; with several stages a rank, within a block of the even share.

        Then the first and the last, which hold embedding and head besides, may hold fewer.
        """
        layers, stages = self.layers, self.degrees.stages
        if self.degrees.chunks == 1:
            return [(1, layers - stages + 1)] * stages
        low, high = max(1, layers // stages - 1), math.ceil(layers / stages) + 1
        return [(1, high), *[(low, high)] * (stages - 2), (1, high)]

    def _roomy(self, index: int, first: int, end: int) -> bool:
        """Whether the fastest recipe of these blocks fits in an equal part of the rank's memory."""
        share = self._recipe(index, first, end, self._share_bytes())
        return share is self._recipe(index, first, end, float("inf"))

    def _least_s(self) -> float:
        """All micro-batches of the smallest stage there can be: one block, cheapest class and option."""
        least_s = min(self._least_block_s(key) for key in self.shape.classes)
        return self.degrees.num_micro_batches * least_s
