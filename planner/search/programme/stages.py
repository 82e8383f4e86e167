"""What the stages of one shape may hold, on which devices, and what rules some of it out.

Every pipeline rank has the recipes and the memory of its own devices: in a mixed cluster they differ from
rank to rank. Which numbers of blocks can still beat a step time follows from the bounds of
planner.search.sizes, with what a rank's memory makes it recompute (planner.search.bounds.rank_bounds).
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from planner.cost.evaluate import CostModel
from planner.cost.replay import Replay
from planner.cost.stage.stage import LayoutModel
from planner.search.programme.rank_options import Held, RankFloor, RankMixes, Span
from planner.search.programme.stage_options import Column, RecipeBook, least_once_s
from planner.strategy.schedule.schedules import Table
from planner.strategy.schedule.table import ActionKind, Flights, InFlight

Spans = list[list[tuple[int, int]]]
"""Blocks [first, end) that a stage may hold: for each first layer, ends in ascending order."""


Limits = tuple[tuple[int, int], ...]
"""Least and most of each of some parts."""


class Sizes(NamedTuple):
    """Blocks that each stage, and each rank with all its stages, may hold: least and most."""

    stages: Limits
    ranks: Limits


def narrowed(limits: Sequence[tuple[int, int]], total: int) -> Limits | None:
    """Limits of parts of a total, less what the others' limits rule out. None where there is no way."""
    least, most = sum(low for low, _ in limits), sum(high for _, high in limits)
    if any(low > high for low, high in limits) or not least <= total <= most:
        return None
    return tuple((max(low, total - (most - high)), min(high, total - (least - low))) for low, high in limits)


MAX_REACH = 4
"""Layers that a boundary of stages may lie from the even split, in a model of several layer classes: this
narrows the space that the certificate speaks of."""
DUST = 1e-9


def _placed(column: Column, span: tuple[int, int]) -> Column:
    """A recipe at the layers where it stands, not at those that stand for them."""
    stage = dataclasses.replace(column.stage, first=span[0], end=span[1])
    return dataclasses.replace(column, stage=stage)


class StageSpace:
    """The stages of a shape.

    `shape` has the messages between stages; `books` are the recipes of each pipeline rank's stages and
    `limits_bytes` what is safe there, the same for ranks on equal devices.
    """

    def __init__(
        self,
        model: CostModel,
        shape: LayoutModel,
        limits_bytes: Sequence[float],
        books: Sequence[RecipeBook],
    ) -> None:
        self.model, self.shape, self.degrees = model, shape, shape.degrees
        self.limits_bytes, self.books = limits_bytes, books
        self.layers, self.one_class = model.problem.model.layers, books[0].one_class
        self._roomy: dict[tuple[int, Sizes | None], bool] = {}
        self.rank_of = [self.degrees.pp_rank_of_stage(s) for s in range(self.degrees.stages)]

    @cached_property
    def table(self) -> Table:
        """The shape's table, made when it is first asked for: most shapes are never searched."""
        return self.model.table(self.degrees)

    @cached_property
    def hop_s(self) -> float:
        """A message between neighbouring stages."""
        return self.shape.messages.p2p_s()

    @cached_property
    def stages_of(self) -> list[list[int]]:
        """The stages of each rank."""
        stages: list[list[int]] = [[] for _ in range(self.degrees.pp)]
        for stage, rank in enumerate(self.rank_of):
            stages[rank].append(stage)
        return stages

    @cached_property
    def in_flight(self) -> tuple[Flights, ...]:
        """For every rank, what is in flight by stage at its fullest moments."""
        return self.model.in_flight(self.degrees)

    @cached_property
    def flights(self) -> list[tuple[InFlight, ...]]:
        """What is in flight on each stage at its rank's fullest moments."""
        return [tuple({v[s]: None for v in self.in_flight[rank]}) for s, rank in enumerate(self.rank_of)]

    def replay(self, columns: tuple[Column, ...]) -> Replay:
        """The replay of an assignment."""
        cell_s = [seconds for column in columns for seconds in column.passes_s]
        return self.model.replay(self.shape, self.table, tuple(column.cost for column in columns), cell_s)

    # Recipes

    def recipe(self, index: int, span: tuple[int, int], limit_bytes: float | None = None) -> Column | None:
        """The fastest recipe of a stage that holds the blocks of a span, within its rank's memory or less."""
        rank = self.rank_of[index]
        limit = self.limits_bytes[rank] if limit_bytes is None else limit_bytes
        return self.books[rank].recipe(*span, self.flights[index], limit)

    def span(self, index: int, size: int) -> tuple[int, int]:
        """Blocks that stand for any `size` of a stage, where all are of one class."""
        if index == 0:
            return 0, size
        return (self.layers - size, self.layers) if index == self.degrees.stages - 1 else (1, 1 + size)

    def share_bytes(self, index: int) -> float:
        """An equal part of a rank's memory for each of its stages."""
        rank = self.rank_of[index]
        shared = self.books[rank].shape.runtime_bytes
        return (self.limits_bytes[rank] - shared) / self.degrees.chunks + shared

    def roomy(self, index: int, span: tuple[int, int]) -> bool:
        """Whether the fastest recipe of these blocks fits in an equal part of the rank's memory."""
        share = self.recipe(index, span, self.share_bytes(index))
        return share is self.recipe(index, span, float("inf"))

    def rank_roomy(self, rank: int, sizes: Sizes | None) -> bool:
        """Whether that holds for all stages of a rank, whatever they hold: then none has to make room."""
        key = rank, sizes
        if key not in self._roomy:
            self._roomy[key] = all(
                self.roomy(s, span)
                for s in self.stages_of[rank]
                for spans in self.spans(s, sizes)
                for span in spans
            )
        return self._roomy[key]

    def columns(
        self, index: int, to_beat_s: float, sizes: Sizes | None, within: Spans | None = None
    ) -> list[Column]:
        """Recipes of a stage by its blocks, or those `within` some; those whose rank's work alone takes too
        long are left out."""
        m, schedule, rank = self.degrees.num_micro_batches, self.degrees.schedule, self.rank_of[index]
        others_s = (self.degrees.chunks - 1) * m * min(self.block_s)
        columns: list[Column] = []
        mixed = self.degrees.chunks > 1 and not self.rank_roomy(rank, sizes)
        for spans in self.spans(index, sizes) if within is None else within:
            for span in spans:
                if mixed:
                    found = self.books[rank].pareto(*span)
                else:
                    single = self.recipe(index, span)
                    found = [] if single is None else [single]
                found = [column for column in found if m * column.whole_s(schedule) + others_s < to_beat_s]
                if not found:
                    break  # longer spans from the same layer take more time and memory
                columns += found if self.one_class else [_placed(column, span) for column in found]
        return columns

    def spans(self, index: int, sizes: Sizes | None) -> Spans:
        """The blocks [first, end) that a stage may hold: for each first layer, ends in ascending order.

        Of one class, blocks between the same ends cost the same: only their number matters.
        """
        if sizes is None:
            firsts, ends = self.near[index : index + 2]
            return [[(first, end) for end in ends if end > first] for first in firsts]
        least, most = sizes.stages[index]
        return [[self.span(index, size) for size in range(least, most + 1)]]

    @cached_property
    def near(self) -> list[range]:
        """Of each boundary the layers near the even one where a stage may begin: an even stage to either
        side."""
        layers, stages = self.layers, self.degrees.stages
        reach = min(MAX_REACH, math.ceil(layers / stages))
        between = [
            range(max(boundary, middle - reach), min(layers - (stages - boundary), middle + reach) + 1)
            for boundary, middle in enumerate(self.even[1:-1], 1)
        ]
        return [range(1), *between, range(layers, layers + 1)]

    @cached_property
    def near_spans(self) -> int:
        """How many spans near the even ones all stages may hold."""
        return sum(
            max(0, ends.stop - max(first + 1, ends.start))
            for firsts, ends in pairwise(self.near)
            for first in firsts
        )

    # Sizes

    @cached_property
    def even(self) -> list[int]:
        """Where stages begin, and the end: as many blocks as the speed of devices allows, or as much time."""
        layers, stages = self.layers, self.degrees.stages
        if self.one_class:
            return [0, *accumulate(self._even_sizes())]
        each = {key: self.books[0].least_block_s(key) for key in self.shape.classes}
        done = [0.0, *accumulate(each[key] for key in self.shape.layer_model.keys)]
        speeds = list(accumulate((1 / self.block_s[rank] for rank in self.rank_of), initial=0.0))
        bounds = [0]
        for stage in range(1, stages):
            wanted = done[-1] * speeds[stage] / speeds[-1]
            behind = bisect.bisect_left(done, wanted, 1, layers)
            nearest = behind - (wanted - done[behind - 1] <= done[behind] - wanted)
            bounds.append(min(max(nearest, bounds[-1] + 1), layers - (stages - stage)))
        return [*bounds, layers]

    def _even_sizes(self) -> list[int]:
        sizes = [
            min(max(low, int(n)), high) for n, (low, high) in zip(self._wanted, self.size_limits, strict=True)
        ]
        while sum(sizes) != self.layers:
            step = 1 if sum(sizes) < self.layers else -1
            free = [s for s, (low, high) in enumerate(self.size_limits) if low <= sizes[s] + step <= high]
            sizes[max(free, key=lambda s: (step * (self._wanted[s] - sizes[s]), -s))] += step
        return sizes

    @cached_property
    def _wanted(self) -> list[float]:
        """Blocks of each stage in proportion to the speed of its devices, not rounded."""
        speeds = [1 / self.block_s[rank] for rank in self.rank_of]
        return [self.layers * speed / sum(speeds) for speed in speeds]

    @cached_property
    def size_limits(self) -> Limits:
        """Sizes of each stage: any; with several stages a rank, within a block of its share.

        Then the first and the last, which hold embedding and head besides, may hold fewer.
        """
        layers, stages = self.layers, self.degrees.stages
        if self.degrees.chunks == 1:
            return ((1, layers - stages + 1),) * stages
        each = [(max(1, math.floor(n) - 1), math.ceil(n) + 1) for n in self._wanted]
        return (1, each[0][1]), *each[1:-1], (1, each[-1][1])

    def within_s(self, to_beat_s: float) -> float:
        """What the passes of a rank may take in a step that is shorter."""
        return to_beat_s - self.optimizer_s - self.once_s

    # Least seconds

    @cached_property
    def once_s(self) -> float:
        """What a rank gathers before and reduces after all passes takes at least."""
        if self.model.sharing is not None:
            return 0.0
        shapes = {id(book): book.shape for book in self.books}.values()
        return self.degrees.chunks * min(map(least_once_s, shapes))

    @cached_property
    def block_s(self) -> list[float]:
        """A micro-batch's passes of the fastest block with its cheapest option, on each rank."""
        books = {id(book): book for book in self.books}
        known = {name: min(map(book.least_block_s, book.shape.classes)) for name, book in books.items()}
        return [known[id(book)] for book in self.books]

    @cached_property
    def held_s(self) -> list[float]:
        """What each rank's passes of a micro-batch take besides its blocks."""
        held_s, last = [0.0] * self.degrees.pp, self.degrees.stages - 1
        for stage, rank in enumerate(self.rank_of):
            shape = self.books[rank].shape
            ends = [shape.embedding_passes] * (stage == 0) + [shape.head_passes] * (stage == last)
            held_s[rank] += 2 * shape.action.total_s + sum(p.total_s for passes in ends for p in passes)
        return held_s

    def enter_s(self, book: RecipeBook) -> tuple[float, float]:
        """Of one stage: besides its blocks, and for each of them."""
        shape, (key,) = book.shape, book.shape.classes
        hop_s, action_s = self.hop_s, shape.action.total_s
        forward_s = shape.passes(key, book.options[0])[0].total_s
        if self.degrees.schedule.splits_backward:
            return action_s + hop_s, forward_s
        backward_s = min(shape.passes(key, option)[1].total_s for option in book.options)
        return 2 * action_s + 2 * hop_s, forward_s + backward_s

    @cached_property
    def optimizer_s(self) -> float:
        """The slowest rank's optimizer step is no faster than the mean over ranks."""
        shapes = {id(book): book.shape for book in self.books}.values()
        least_s = min(shape.optimizer_s(shape.all_units()) for shape in shapes)
        return self.shape.constants.step_s + least_s / self.degrees.pp

    # Ranks

    def fastest(self, rank: int, spans: Sequence[Span]) -> tuple[Column, ...] | None:
        """The fastest recipes of a rank's stages that hold these blocks; None where none fit, or where their
        mixes are too many to look at."""
        if not self.mixes[rank].few([end - first for first, end in spans]):
            return None
        return self.mixes[rank].fastest(self.all_held(rank, spans))

    def all_held(self, rank: int, spans: Sequence[Span]) -> tuple[Held, ...]:
        """The stages of a rank that hold the blocks of these spans."""
        return tuple(self._held(s, span) for s, span in zip(self.stages_of[rank], spans, strict=True))

    def _held(self, stage: int, span: Span) -> Held:
        return Held(self.books[self.rank_of[stage]].blocks(*span), *self._runs[stage])

    @cached_property
    def _runs(self) -> list[tuple[tuple[tuple[ActionKind, int], ...], tuple[InFlight, ...]]]:
        """How often each stage runs each kind of action, and what is in flight at its rank's moments."""
        each = []
        for stage, rank in enumerate(self.rank_of):
            counts = self.table.counts(rank)
            actions = tuple((kind, n) for (s, kind), n in counts.items() if s == stage)
            each.append((actions, tuple(moment[stage] for moment in self.in_flight[rank])))
        return each

    @cached_property
    def mixes(self) -> list[RankMixes]:
        """Of each rank, one for ranks on equal devices."""
        known: dict[int, RankMixes] = {}
        for book, limit in zip(self.books, self.limits_bytes, strict=True):
            known.setdefault(id(book), RankMixes(book, limit))
        return [known[id(book)] for book in self.books]

    def even_own_s(self, rank: int, spans: Sequence[Span]) -> float:
        """What a rank of the even split takes at least for all micro-batches."""
        stages, book = self.stages_of[rank], self.books[rank]
        if self.mixes[rank].few([spans[s][1] - spans[s][0] for s in stages]):
            return self.mixes[rank].least_s(self.all_held(rank, [spans[s] for s in stages]))
        fastest = [min(c.whole_s(self.degrees.schedule) for c in book.pure(*spans[s])) for s in stages]
        return self.degrees.num_micro_batches * sum(fastest)

    @cached_property
    def floors(self) -> list[RankFloor]:
        """The floors of each rank."""
        known: dict[int, RankFloor] = {}
        for book, limit in zip(self.books, self.limits_bytes, strict=True):
            if id(book) not in known:
                known[id(book)] = RankFloor(
                    book, limit, self.degrees, self.in_flight, self.size_limits, self.split_share
                )
        return [known[id(book)] for book in self.books]

    @cached_property
    def split_share(self) -> float:
        """The least share of a stage's backward passes that are split."""
        if not self.degrees.schedule.splits_backward:
            return 0.0
        counts = [self.table.counts(rank) for rank in range(self.degrees.pp)]
        weights = (counts[rank].get((s, ActionKind.WEIGHT_GRAD), 0) for s, rank in enumerate(self.rank_of))
        return min(weights) / self.degrees.num_micro_batches
