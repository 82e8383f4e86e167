"""Trades of recomputation between the stages of a rank: one block of a stage recomputes less, one of another
more.

A rank's time does not tell which of its stages should recompute: the longest path may go through one of them
more often, or at an hour at which others wait.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from planner.search.recipes import Column, RecipeBook
from planner.strategy import RecomputeCounts, Stage

LESS = (("full", "selective"), ("selective", "none"), ("full", "none"))
"""Options of a block that recomputes less: from, to."""


def trades(
    columns: tuple[Column, ...], ranks: Sequence[Sequence[int]], books: Sequence[RecipeBook]
) -> Iterator[tuple[int, tuple[Column, ...]]]:
    """The recipes of an assignment after each trade, with the rank that trades; whether they fit is not
    asked. Where no stage recomputes, or ranks hold one stage each, there is none."""
    for rank, (stages, book) in enumerate(zip(ranks, books, strict=True)):
        if not any(columns[s].stage.recompute.none < columns[s].layers for s in stages):
            continue
        for one, other in itertools.permutations(stages, 2):
            for less, more in itertools.product(LESS, LESS):
                spared = _changed(columns[one], less, book)
                spent = _changed(columns[other], more[::-1], book)
                if spared is not None and spent is not None:
                    changed = list(columns)
                    changed[one], changed[other] = spared, spent
                    yield rank, tuple(changed)


def _changed(column: Column, options: tuple[str, ...], book: RecipeBook) -> Column | None:
    """A stage's recipe with one block of an option that has another instead; None where it has no such."""
    before, after = options
    stage, counts = column.stage, column.stage.recompute
    each = {"none": counts.none, "selective": counts.selective, "full": counts.full}
    if not each[before] or after not in (option.value for option in book.options):
        return None
    each[before], each[after] = each[before] - 1, each[after] + 1
    return book.column(Stage(first=stage.first, end=stage.end, recompute=RecomputeCounts(**each)))
