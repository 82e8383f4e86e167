"""Trades of recomputation between the stages of a rank: one block of a stage recomputes less, one of another
more.

A rank's time does not tell which of its stages should recompute: the longest path may go through one of them
more often, or at an hour at which others wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from planner.search.recipes import Column, RecipeBook
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
