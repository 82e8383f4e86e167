"""What the ranks of a pipeline may hold and how it is chosen: one choice of each, of all blocks together.

A choice has a place: so many blocks, which lie anywhere where blocks are of one class, and begin at a layer
where they are of several. The least sums over ranks follow from those of fewer ranks, by the layer at which
they end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from planner.search.recipes import Column

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats

Place = tuple[int | None, int]
"""The first layer (None: any) and the number of blocks."""
Fastest = dict[Place, tuple[float, int]]
"""Of each place of a rank the least seconds, and the choice that takes them."""
INFINITE = float("inf")


class Choices(NamedTuple):
    """Ways of a rank to hold its blocks: their places and figures [n, stages x FIGURES]; `columns` gives the
    recipes of a choice by its number among `numbers`."""

    places: list[Place]
    figures: Floats
    numbers: list[int]
    columns: Callable[[int], tuple[Column, ...]]

    def picked(self, place: int) -> tuple[Column, ...]:
        """The recipes of a choice by where it stands."""
        return self.columns(self.numbers[place])

    def only(self, kept: Sequence[int]) -> Choices:
        """Those that stand at some places alone."""
        places = [self.places[n] for n in kept]
        return Choices(places, self.figures[list(kept)], [self.numbers[n] for n in kept], self.columns)


def fastest_of(own_s: Floats, choices: Choices) -> Fastest:
    """The fastest choice for each place, when choices take these seconds."""
    fastest: Fastest = {}
    for number, (place, seconds) in enumerate(zip(choices.places, own_s.tolist(), strict=True)):
        if place not in fastest or seconds < fastest[place][0]:
            fastest[place] = seconds, number
    return fastest


def sums_before(ranks: Sequence[Fastest], layers: int) -> list[dict[int, float]]:
    """The least sums of the first 0, 1, ... ranks, by the layers that they hold."""
    return _sums(ranks, layers, lambda held, blocks: held)


def sums_after(ranks: Sequence[Fastest], layers: int) -> list[dict[int, float]]:
    """The least sums of all ranks, all but the first, ..., none, by the layers that they hold."""
    return _sums(ranks[::-1], layers, lambda held, blocks: layers - held - blocks)[::-1]


def _sums(ranks: Sequence[Fastest], layers: int, begins: Callable[[int, int], int]) -> list[dict[int, float]]:
    """Sums rank after rank, as far as the ranks that come can hold the rest; `begins` is the first layer of
    blocks behind layers that are held."""
    low, high = (sum(most(blocks for _, blocks in each) for each in ranks) for most in (min, max))
    sums: list[dict[int, float]] = [{0: 0.0}]
    for each in ranks:
        low -= min(blocks for _, blocks in each)
        high -= max(blocks for _, blocks in each)
        after: dict[int, float] = {}
        for held, held_s in sums[-1].items():
            for (first, blocks), (own_s, _) in each.items():
                placed, total_s = held + blocks, held_s + own_s
                if not layers - high <= placed <= layers - low or total_s >= after.get(placed, INFINITE):
                    continue
                if first is None or first == begins(held, blocks):
                    after[placed] = total_s
        sums.append(after)
    return sums


def least(ranks: Sequence[Fastest], layers: int) -> tuple[float, list[int] | None]:
    """The least sum over ranks that hold all layers, and the choice of each; None where none do."""
    before_s = sums_before(ranks, layers)
    if layers not in before_s[-1]:
        return INFINITE, None
    chosen, placed = [], layers
    for held, each in zip(reversed(before_s[:-1]), reversed(ranks), strict=True):
        left = placed
        place = min(each, key=lambda at: _with(held, at, left) + each[at][0])
        chosen.append(each[place][1])
        placed -= place[1]
    return before_s[-1][layers], chosen[::-1]


def _with(before_s: dict[int, float], place: Place, end: int) -> float:
    """The least sum of the ranks before blocks that end at a layer."""
    first, blocks = place
    return before_s.get(end - blocks, INFINITE) if first in (None, end - blocks) else INFINITE


def least_with(ranks: Sequence[Fastest], layers: int) -> list[dict[Place, float]]:
    """For each place of every rank, the least sum of all others, with which they hold all layers."""
    before_s, after_s = sums_before(ranks, layers), sums_after(ranks, layers)
    return [
        {place: _joined(before, after, place, layers) for place in each}
        for each, before, after in zip(ranks, before_s[:-1], after_s[1:], strict=True)
    ]


def _joined(before_s: dict[int, float], after_s: dict[int, float], place: Place, layers: int) -> float:
    """The least sum of the ranks before and after blocks at a place."""
    first, blocks = place
    held = before_s if first is None else {first: before_s.get(first, INFINITE)}
    return min((s + after_s.get(layers - n - blocks, INFINITE) for n, s in held.items()), default=INFINITE)
