"""Trades of recomputation between the stages of a rank: one block of a stage recomputes less, one of another
more.

A rank's time does not tell which of its stages should recompute: the longest path may go through one of them
more often, or at an hour at which others wait.

A good way to deal blocks to stages, found by moving one block at a time: the incumbent of a shape.

From an even deal, every deal that moves one block from one stage to another is replayed at once, the best
taken, and so on until none is better. Each stage has its fastest recipe that fits; where a rank holds
several stages, its blocks recompute as little as fits, those of the stage with most micro-batches alive
first. Nothing here is proven: the ILP, or a bound, says how far it may be from the best.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from planner.cost.replay import critical_path
from planner.search.programme.stage_options import Column, RecipeBook
from planner.search.programme.stages import Limits, Sizes, StageSpace
from planner.strategy.schedule.longest_path import action_order, many_row_ends_s
from planner.strategy.schedule.table import InFlight, total_count
from planner.strategy.strategy import RecomputeCounts, Stage

if TYPE_CHECKING:
    from planner.foundation.arrays import Ints


LESS = (("full", "selective"), ("selective", "none"), ("full", "none"))
"""Options of a block that recomputes less: before and after."""
MORE = tuple((after, before) for before, after in LESS)


class Trade(NamedTuple):
    """New recipes of two stages of a rank, by which the longest path gets shorter."""

    gain_s: float
    rank: int
    stages: tuple[int, int]
    columns: tuple[Column, Column]


def trades(
    columns: Sequence[Column], counts: Ints, ranks: Sequence[Sequence[int]], books: Sequence[RecipeBook]
) -> list[Trade]:
    """Trades that shorten the longest path of an assignment, those that do most first; `counts` [stage, kind]
    are the path's actions. Whether they fit is not asked, nor what becomes the longest path then."""
    found = []
    for rank, (stages, book) in enumerate(zip(ranks, books, strict=True)):
        if len(stages) == 1 or all(columns[s].stage.recompute.none == columns[s].layers for s in stages):
            continue
        less, more = (
            [(s, *one) for s in stages for one in _changed(columns[s], counts[s], ways, book)]
            for ways in (LESS, MORE)
        )
        for one, spared, gain_s in less:
            for other, spent, loss_s in more:
                if one != other and gain_s + loss_s > 0:
                    found.append(Trade(gain_s + loss_s, rank, (one, other), (spared, spent)))
    return sorted(found, key=lambda trade: (-trade.gain_s, trade.rank, trade.stages))


def _changed(
    column: Column, counts: Ints, ways: Sequence[tuple[str, str]], book: RecipeBook
) -> Iterator[tuple[Column, float]]:
    """A stage's recipes with one block of an option that has another instead, and how much less its actions
    on a path are then."""
    stage, own = column.stage, column.stage.recompute
    each = {"none": own.none, "selective": own.selective, "full": own.full}
    for before, after in ways:
        if each[before] and any(after == option.value for option in book.options):
            moved = each | {before: each[before] - 1, after: each[after] + 1}
            changed = book.column(Stage(first=stage.first, end=stage.end, recompute=RecomputeCounts(**moved)))
            pairs = zip(counts.tolist(), column.passes_s, changed.passes_s, strict=True)
            yield changed, sum(n * (old_s - new_s) for n, old_s, new_s in pairs)


MAX_PLACES = 8192
"""Actions of a table beyond which no deal but the first is tried: each round would take long."""
MAX_WORK = 1_000_000
"""Actions of one round's replays together."""
MAX_MOVES = 256
"""Moves of one round; of more, those between near stages, and to and from the ends."""
MAX_ROUNDS = 12
MAX_TRADES, LITTLE = 64, 1e-4
"""Trades that are replayed of a round, and the least share of a step time that is worth another."""
MAX_PAIRS = 24
"""Mixes of a rank that are tried, the fastest first, before its deal counts as too large."""

Span = tuple[int, int]
"""Blocks [first, end)."""
Deal = tuple[int, ...]
"""Blocks of each stage."""


def _spans(deal: Deal) -> list[Span]:
    """The blocks of each stage."""
    return list(itertools.pairwise(itertools.accumulate(deal, initial=0)))


class Dealer:
    """Deals of one shape.

    Where layers are of several classes, or cores are shared, the stages of a rank have the recipes that are
    fastest together where these are few, else each its own within an equal part of the memory.
    """

    def __init__(self, space: StageSpace) -> None:
        self.space, self.ranks = space, space.stages_of
        self._known: dict[tuple[int, tuple[Span, ...]], tuple[Column, ...] | None] = {}
        self._kept_least: dict[tuple[int, Span], Column] = {}

    def columns(self, deal: Deal) -> tuple[Column, ...] | None:
        """The recipes of a deal; None where some rank has none."""
        return self._columns(deal, range(len(self.ranks)), [None] * len(deal))

    def moved(self, deal: Deal, near: Deal, columns: tuple[Column, ...]) -> tuple[Column, ...] | None:
        """The same, from the recipes of a deal that differs from it in few stages."""
        one = self.space.one_class  # then blocks between the same ends cost the same, wherever they lie
        pairs = zip(deal, near, strict=True) if one else zip(_spans(deal), _spans(near), strict=True)
        ranks = {self.space.rank_of[s] for s, (own, other) in enumerate(pairs) if own != other}
        return self._columns(deal, sorted(ranks), columns)

    def _columns(
        self, deal: Deal, ranks: Iterable[int], known: Sequence[Column | None]
    ) -> tuple[Column, ...] | None:
        """The recipes of a deal, which are `known` but for those of some ranks."""
        chosen, space = list(known), self.space
        spans = None if space.one_class else _spans(deal)
        for rank in ranks:
            stages = self.ranks[rank]
            own = (space.span(s, deal[s]) if spans is None else spans[s] for s in stages)
            key = rank, tuple(own)
            if key not in self._known:
                self._known[key] = self._of_rank(rank, key[1])
            found = self._known[key]
            if found is None:
                return None
            for s, column in zip(stages, found, strict=True):
                chosen[s] = column
        return tuple(column for column in chosen if column is not None)

    def _of_rank(self, rank: int, spans: tuple[Span, ...]) -> tuple[Column, ...] | None:
        space, stages, book = self.space, self.ranks[rank], self.space.books[rank]
        if len(stages) == 1:
            only = space.recipe(stages[0], spans[0])
            return None if only is None else (only,)
        least = self._smallest(rank, spans)
        if not self._fits(rank, least):
            return None
        if not space.one_class or space.model.sharing is not None:
            return space.fastest(rank, spans) or self._apart(rank, spans) or least
        fastest = (space.recipe(s, span, float("inf")) for s, span in zip(stages, spans, strict=True))
        chosen = tuple(column for column in fastest if column is not None)
        if self._fits(rank, chosen):
            return chosen
        most, sizes = [self._fullest[s] for s in stages], [end - first for first, end in spans]
        fullest = max(space.in_flight[rank], key=total_count)
        # What fits at the fullest moment may not at another, at which as many are alive on other stages: then
        # as if all stages had most alive at once.
        for live in ([fullest[s] for s in stages], most):
            free_bytes = self._free_bytes(rank, live, spans)
            for mix in space.floors[rank].fastest_mixes(sizes, live, free_bytes, MAX_PAIRS):
                mixed = tuple(
                    book.column(Stage(first=first, end=end, recompute=counts))
                    for (first, end), counts in zip(spans, mix, strict=True)
                )
                if self._fits(rank, mixed):
                    return mixed
        return least

    def _apart(self, rank: int, spans: tuple[Span, ...]) -> tuple[Column, ...] | None:
        """The recipes of a rank's stages, each within an equal part of its memory."""
        space, stages = self.space, self.ranks[rank]
        each = [space.recipe(s, span, space.share_bytes(s)) for s, span in zip(stages, spans, strict=True)]
        found = tuple(column for column in each if column is not None)
        return found if len(found) == len(each) else None

    def _smallest(self, rank: int, spans: tuple[Span, ...]) -> tuple[Column, ...]:
        """The columns that keep least, each stage's blocks having one option."""
        book = self.space.books[rank]
        for span in spans:
            if (id(book), span) not in self._kept_least:
                least = min(book.pure(*span), key=lambda column: column.cost.saved_bytes)
                self._kept_least[id(book), span] = least
        return tuple(self._kept_least[id(book), span] for span in spans)

    @cached_property
    def _fullest(self) -> list[InFlight]:
        """Of each stage what is in flight at the moment that has most."""
        return [max(each, key=lambda flight: (flight.micro_batches, flight)) for each in self.space.flights]

    def _free_bytes(self, rank: int, live: list[InFlight], spans: tuple[Span, ...]) -> float:
        """What blocks' activations may take at most at the rank's fullest moment, with `live` in flight."""
        space, book = self.space, self.space.books[rank]
        smallest = self._smallest(rank, spans)
        most = (self._fullest[s] for s in self.ranks[rank])
        standing = book.shape.runtime_bytes + sum(c.resident_bytes for c in smallest)
        standing += max(book.transient_bytes(c, own) for c, own in zip(smallest, most, strict=True))
        ends = (c.cost.saved_bytes - c.cost.block_saved_bytes for c in smallest)
        kept = sum(own.alive * end for own, end in zip(live, ends, strict=True))
        return float(space.limits_bytes[rank] - standing - kept)

    def _fits(self, rank: int, columns: Sequence[Column]) -> bool:
        return self._used_bytes(rank, columns) <= self.space.limits_bytes[rank]

    def _used_bytes(self, rank: int, columns: Sequence[Column]) -> float:
        """What a rank takes at its fullest moment."""
        space, book, most = self.space, self.space.books[rank], 0.0
        for moment in space.in_flight[rank]:
            each = [(column, moment[s]) for column, s in zip(columns, self.ranks[rank], strict=True)]
            held = sum(column.held_bytes(flight) for column, flight in each)
            passing = max(book.transient_bytes(column, flight) for column, flight in each)
            most = max(most, book.shape.runtime_bytes + held + passing)
        return most

    def steps_s(self, deals: Sequence[tuple[Column, ...]]) -> list[float]:
        """The replayed step time of each."""
        import numpy as np

        space, shape = self.space, self.space.shape
        cells = np.array([[seconds for column in each for seconds in column.passes_s] for each in deals]).T
        once = np.array(
            [[[c.cost.unshard_s, c.cost.reduce_s, c.cost.optimizer_s] for c in each] for each in deals]
        )
        unshard_s, reduce_s, optimizer_s = (
            np.array([once[:, stages, figure].sum(axis=1) for stages in self.ranks]) for figure in range(3)
        )
        ends_s = many_row_ends_s(action_order(space.table), cells, unshard_s, shape.messages.p2p_s())
        steps = (ends_s + reduce_s).max(axis=0) + optimizer_s.max(axis=0) + shape.constants.step_s
        return [float(step) for step in steps]

    def best(self, start: Deal, within_s: float) -> tuple[tuple[Column, ...], float] | None:
        """The deal at which no move of one block helps, and its step time.

        The first deal where that takes longer than `within_s`: it is not worth the moves.
        """
        first = self.columns(start)
        if first is None:
            first, start = self._any(start)
        if first is None:
            return None
        step_s = self.space.replay(first).step_time_s
        best, deal = first, start
        if self.space.table.actions > MAX_PLACES or step_s > within_s:
            return best, step_s
        most = max(1, min(MAX_MOVES, MAX_WORK // self.space.table.actions))
        for _ in range(MAX_ROUNDS):
            tried = itertools.islice(self._moves(deal), most)
            moves = [(d, c) for d in tried if (c := self.moved(d, deal, best)) is not None]
            if not moves:
                break
            steps = self.steps_s([columns for _, columns in moves])
            number = min(range(len(steps)), key=steps.__getitem__)
            if steps[number] >= step_s * (1 - 1e-12):
                break
            (deal, best), step_s = moves[number], steps[number]
        return self._traded(best, step_s)

    def _traded(self, best: tuple[Column, ...], step_s: float) -> tuple[tuple[Column, ...], float]:
        """The recipes at which no trade of recomputation within a rank helps, and their step time."""
        space = self.space
        if space.degrees.chunks == 1:
            return best, step_s
        for _ in range(MAX_ROUNDS):
            path = critical_path(space.replay(best), space.hop_s)
            tried = [
                self._after(best, trade)
                for trade in trades(best, path.counts, self.ranks, space.books)[:MAX_TRADES]
            ]
            fitting = [columns for columns in tried if columns is not None]
            steps = self.steps_s(fitting) if fitting else [step_s]
            number = min(range(len(steps)), key=steps.__getitem__)
            if steps[number] >= step_s * (1 - LITTLE):
                break
            best, step_s = fitting[number], steps[number]
        return best, step_s

    def _after(self, columns: tuple[Column, ...], trade: Trade) -> tuple[Column, ...] | None:
        """The recipes after a trade; None where they do not fit."""
        chosen = dict(enumerate(columns)) | dict(zip(trade.stages, trade.columns, strict=True))
        fits = self._fits(trade.rank, [chosen[s] for s in self.ranks[trade.rank]])
        return tuple(chosen[s] for s in range(len(columns))) if fits else None

    def _any(self, start: Deal) -> tuple[tuple[Column, ...] | None, Deal]:
        """A deal near the first that fits where that does not: one block after another leaves the rank that
        is fullest for the one that has most room."""
        deal, limits = start, self._limits
        for _ in range(self.space.layers):
            over = [self.over_bytes(rank, deal) for rank in range(len(self.ranks))]
            fullest, emptiest = (over.index(end) for end in (max(over), min(over)))
            if over[fullest] <= 0:
                return self.columns(deal), deal
            givers = [s for s in self.ranks[fullest] if deal[s] > limits[s][0]]
            takers = [s for s in self.ranks[emptiest] if deal[s] < limits[s][1]]
            if over[emptiest] >= 0 or not givers or not takers:
                break
            moved = list(deal)
            moved[max(givers, key=lambda s: deal[s])] -= 1
            moved[min(takers, key=lambda s: deal[s])] += 1
            deal = tuple(moved)
        return None, start

    def over_bytes(self, rank: int, deal: Deal) -> float:
        """What a rank's stages take beyond its memory if they keep as little as they can."""
        space, spans = self.space, _spans(deal)
        own = [space.span(s, deal[s]) if space.one_class else spans[s] for s in self.ranks[rank]]
        return self._used_bytes(rank, self._smallest(rank, tuple(own))) - space.limits_bytes[rank]

    @cached_property
    def _limits(self) -> Limits:
        """Blocks that a stage may hold: of several classes as many as boundaries near the even ones let."""
        if self.space.one_class or self.space.degrees.chunks == 1:
            return self.space.size_limits
        pairs = itertools.pairwise(self.space.near)
        return tuple(
            (max(1, ends.start - firsts.stop + 1), ends.stop - 1 - firsts.start) for firsts, ends in pairs
        )

    def _chunk_moves(self, deal: Deal) -> Iterator[Deal]:
        """Deals in which every rank moves a block from one of its stages to another, the same on all."""
        degrees, limits = self.space.degrees, self._limits
        chunks = [range(degrees.pp * c, degrees.pp * (c + 1)) for c in range(degrees.chunks)]
        for a, b in itertools.permutations(chunks, 2):
            moved = list(deal)
            for stages in self.ranks:
                (one,), (other,) = set(stages) & set(a), set(stages) & set(b)
                if deal[one] > limits[one][0] and deal[other] < limits[other][1]:
                    moved[one], moved[other] = deal[one] - 1, deal[other] + 1
            if tuple(moved) != deal:
                yield tuple(moved)

    def _moves(self, deal: Deal) -> Iterator[Deal]:
        """Deals that move one block: by distance of the stages, so that cut lists keep the near ones."""
        limits = self._limits
        yield from self._chunk_moves(deal)
        stages = len(deal)
        pairs = sorted(
            ((a, b) for a in range(stages) for b in range(stages) if a != b),
            key=lambda pair: (
                abs(pair[0] - pair[1]) if 0 not in pair and stages - 1 not in pair else 0,
                pair,
            ),
        )
        for a, b in pairs:
            if deal[a] > limits[a][0] and deal[b] < limits[b][1]:
                moved = list(deal)
                moved[a], moved[b] = deal[a] - 1, deal[b] + 1
                yield tuple(moved)


TRIES = 20
"""Partial ways that are looked at for each way that is asked for, before there are too many."""


def whole(parts: Sequence[float], total: int) -> list[int]:
    """Whole numbers near some parts that add up to a total."""
    found = [int(part) for part in parts]
    order = sorted(range(len(found)), key=lambda n: (found[n] - parts[n], n))
    for number in range(total - sum(found)):
        found[order[number % len(order)]] += 1
    for number in range(sum(found) - total):
        found[order[-1 - number % len(order)]] -= 1
    return found


def splits(sizes: Sizes, total: int, rank_of: Sequence[int], most: int) -> list[tuple[int, ...]] | None:
    """Every way to deal `total` blocks to stages within limits; None where there are more than `most`."""
    stages = sizes.stages
    after = [(0, 0)]
    for low, high in reversed(stages):
        after.append((after[-1][0] + low, after[-1][1] + high))
    after.reverse()
    last_of = {rank: stage for stage, rank in enumerate(rank_of)}
    found: list[tuple[int, ...]] = []
    held = [0] * len(sizes.ranks)
    chosen: list[int] = []

    tried = 0

    def extend(stage: int, left: int) -> bool:
        nonlocal tried
        tried += 1
        if stage == len(stages):
            found.append(tuple(chosen))
        if len(found) > most or tried > TRIES * most:
            return False
        if stage == len(stages):
            return True
        rank = rank_of[stage]
        least_after, most_after = after[stage + 1]
        low, high = max(stages[stage][0], left - most_after), min(stages[stage][1], left - least_after)
        rank_low, rank_high = sizes.ranks[rank]
        high = min(high, rank_high - held[rank])
        if last_of[rank] == stage:
            low = max(low, rank_low - held[rank])
        for size in range(low, high + 1):
            chosen.append(size)
            held[rank] += size
            going = extend(stage + 1, left - size)
            held[rank] -= size
            chosen.pop()
            if not going:
                return False
        return True

    return found if extend(0, total) else None
