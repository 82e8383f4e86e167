"""What the ranks of one shape take at least, by the blocks that they hold and how they recompute.

Ranks with one stage have its fastest recipe. Of two stages all mixes are looked at, and of the more stages of
an even split too where they are few (planner.search.rank_mixes); else planner.search.rank_floor tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from planner.search.rank_fill import Way, can_hold
from planner.search.rank_floor import DUST, RankFloor
from planner.search.rank_mixes import Held, RankMixes
from planner.search.rank_parts import RankParts
from planner.search.recipes import Column
from planner.search.sizes import Limits
from planner.strategy.schedule.table import ActionKind, InFlight

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats
    from planner.search.stage_space import StageSpace

Span = tuple[int, int]


class RankWays:
    """The ranks of a space."""

    def __init__(self, space: StageSpace) -> None:
        self.space, self.degrees = space, space.degrees
        self._known: dict[tuple[int, int], dict[int, float]] = {}

    def can_hold(self, by_rank: Limits, left_s: float) -> bool:
        """Whether ranks that are entered one after the other can hold all blocks in time if memory has room
        for all."""
        space = self.space
        entered = {name: space.enter_s(book) for name, book in {id(b): b for b in space.books}.items()}

        def ways(rank: int) -> Iterator[Way]:
            low, high = by_rank[rank]
            fixed_s, block_s = entered[id(space.books[rank])]
            for blocks in range(low, high + 1):
                for first, own_s in self._roomy_ways(rank, blocks).items():
                    yield Way(blocks, own_s, fixed_s + block_s * first)

        most = [high for _, high in by_rank]
        return can_hold(space.layers, most, map(ways, range(self.degrees.pp)), left_s)

    def parts_s(self, most: int) -> Floats:
        """What every rank takes at least for a micro-batch with 0, 1, ... `most` blocks, found in next to no
        time [rank, blocks]."""
        import numpy as np

        held_s: Floats = np.asarray(self.space.held_s)[:, None]
        return (self.parts.least_s(most) + held_s) * (1 - DUST)

    def done(self, rank: int, blocks: int, own_s: float) -> bool:
        """Whether a rank may hold so many blocks and take less than `own_s` for a micro-batch."""
        if self.degrees.chunks == 1:
            column = self.space.recipe(rank, self.space.span(rank, blocks))
            return column is not None and column.whole_s(self.degrees.schedule) < own_s
        all_s = own_s * self.degrees.num_micro_batches
        if (rank, blocks) not in self._known and self._mixed(rank, blocks):
            firsts = self._firsts(rank, blocks)
            return any(
                self._mixed_s(rank, blocks, n) < all_s
                for n in sorted(firsts, key=lambda n: abs(2 * n - blocks))
            )
        return min(self.ways(rank, blocks).values(), default=float("inf")) < all_s

    def ways(self, rank: int, blocks: int) -> dict[int, float]:
        """What a rank that holds so many blocks takes at least for all micro-batches, by how many of them its
        first stage has."""
        key = rank, blocks
        if key not in self._known:
            self._known[key] = self._all_ways(rank, blocks)
        return self._known[key]

    def _roomy_ways(self, rank: int, blocks: int) -> dict[int, float]:
        """The same where memory has room for all, with as few blocks on the first stage as can be."""
        own_s = self.degrees.num_micro_batches * (blocks * self.space.block_s[rank] + self.space.held_s[rank])
        return dict.fromkeys(self._firsts(rank, blocks)[:1], own_s)

    def _firsts(self, rank: int, blocks: int) -> range:
        """How many of a rank's blocks its first stage may hold."""
        low, high, least, most = self._limits[rank]
        return range(max(low, blocks - most), min(high, blocks - least) + 1)

    @cached_property
    def _limits(self) -> list[tuple[int, int, int, int]]:
        """Of each rank, the least and the most blocks of its first stage, and of the others together."""
        limits = []
        for stages in self.space.stages_of:
            (low, high), *others = (self.space.size_limits[s] for s in stages)
            limits.append((low, high, sum(least for least, _ in others), sum(most for _, most in others)))
        return limits

    def _all_ways(self, rank: int, blocks: int) -> dict[int, float]:
        m, firsts = self.degrees.num_micro_batches, self._firsts(rank, blocks)
        if self._mixed(rank, blocks):
            found = {n: self._mixed_s(rank, blocks, n) for n in firsts}
        else:
            held_s = self.space.held_s[rank]
            floors = self.floors[rank].least_by_first_s(rank, blocks, firsts)
            found = {first: m * (least_s + held_s) for first, least_s in floors.items()}
        return {first: own_s for first, own_s in found.items() if own_s < float("inf")}

    def _mixed(self, rank: int, blocks: int) -> bool:
        """Whether all mixes of a rank's stages are looked at."""
        two = len(self.space.stages_of[rank]) == 2
        return two and self.mixes[rank].few((blocks // 2, blocks - blocks // 2))

    def _mixed_s(self, rank: int, blocks: int, first: int) -> float:
        """What a rank of two stages takes at least for all micro-batches, the first with so many blocks."""
        one, other = self.space.stages_of[rank]
        spans = self.space.span(one, first), self.space.span(other, blocks - first)
        return self.mixes[rank].least_s(self.all_held(rank, spans))

    def fastest(self, rank: int, spans: Sequence[Span]) -> tuple[Column, ...] | None:
        """The fastest recipes of a rank's stages that hold these blocks; None where none fit, or where their
        mixes are too many to look at."""
        if not self.mixes[rank].few([end - first for first, end in spans]):
            return None
        return self.mixes[rank].fastest(self.all_held(rank, spans))

    def all_held(self, rank: int, spans: Sequence[Span]) -> tuple[Held, ...]:
        """The stages of a rank that hold the blocks of these spans."""
        return tuple(self._held(s, span) for s, span in zip(self.space.stages_of[rank], spans, strict=True))

    def _held(self, stage: int, span: Span) -> Held:
        return Held(self.space.books[self.space.rank_of[stage]].blocks(*span), *self._runs[stage])

    @cached_property
    def _runs(self) -> list[tuple[tuple[tuple[ActionKind, int], ...], tuple[InFlight, ...]]]:
        """How often each stage runs each kind of action, and what is in flight at its rank's moments."""
        each = []
        for stage, rank in enumerate(self.space.rank_of):
            counts = self.space.table.counts(rank)
            actions = tuple((kind, n) for (s, kind), n in counts.items() if s == stage)
            each.append((actions, tuple(moment[stage] for moment in self.space.in_flight[rank])))
        return each

    @cached_property
    def mixes(self) -> list[RankMixes]:
        """Of each rank, one for ranks on equal devices."""
        known: dict[int, RankMixes] = {}
        for book, limit in zip(self.space.books, self.space.limits_bytes, strict=True):
            known.setdefault(id(book), RankMixes(book, limit))
        return [known[id(book)] for book in self.space.books]

    def even_own_s(self, rank: int, spans: Sequence[Span]) -> float:
        """What a rank of the even split takes at least for all micro-batches."""
        stages, book = self.space.stages_of[rank], self.space.books[rank]
        if self.mixes[rank].few([spans[s][1] - spans[s][0] for s in stages]):
            return self.mixes[rank].least_s(self.all_held(rank, [spans[s] for s in stages]))
        fastest = [min(c.whole_s(self.degrees.schedule) for c in book.pure(*spans[s])) for s in stages]
        return self.degrees.num_micro_batches * sum(fastest)

    @cached_property
    def floors(self) -> list[RankFloor]:
        """The floors of each rank."""
        known: dict[int, RankFloor] = {}
        for book, limit in zip(self.space.books, self.space.limits_bytes, strict=True):
            if id(book) not in known:
                known[id(book)] = RankFloor(
                    book, limit, self.degrees, self.space.in_flight, self.space.size_limits, self._split
                )
        return [known[id(book)] for book in self.space.books]

    @cached_property
    def parts(self) -> RankParts:
        """The floors of all ranks at once, if blocks recompute in parts."""
        return RankParts(self.space, split=self._split, bounded=self.space.books[0].bounded)

    @cached_property
    def _split(self) -> float:
        """The least share of a stage's backward passes that are split."""
        if not self.degrees.schedule.splits_backward:
            return 0.0
        counts = [self.space.table.counts(rank) for rank in range(self.degrees.pp)]
        weights = (
            counts[rank].get((s, ActionKind.WEIGHT_GRAD), 0) for s, rank in enumerate(self.space.rank_of)
        )
        return min(weights) / self.degrees.num_micro_batches
