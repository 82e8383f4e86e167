"""Proofs that a shape cannot beat a time, tried on other shapes with the same table.

The dual of a relaxation (planner.search.relaxation) is a weight for each of some paths, which sum to 1, and a
price for the memory of some moments. With a_so what weighted paths take for a block of stage s of kind o, and
what it holds by these prices,

    T  >=  sum_so a_so x_so + what paths take besides - prices

for all blocks x, whatever the shape that weights and prices were found for; and the least of it over all x
within limits is a sum over stages, each block going where it costs least. Shapes with one table differ in
how long actions take, but what rules out one of them rules out most of the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from planner.search.sizes import Sizes
from planner.strategy.strategy import Degrees

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints

EACH, MOST = 3, 4096
"""Proofs that are remembered of one table, and tables."""


class Proof(NamedTuple):
    """Weights of paths along rows by their numbers, and prices of moments (rank and number, of so many) as
    shares of the time that was ruled out."""

    paths: Ints
    weights: Floats
    moments: list[tuple[int, int]]
    moment_count: int
    prices: Floats


class Proofs:
    """Proofs of one problem by table, the last ones of each."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], deque[Proof]] = {}

    def of(self, degrees: Degrees, kinds: int) -> Iterator[Proof]:
        """Those of shapes with the table of this one, and so many kinds of blocks."""
        return iter(self._known.get(_table(degrees, kinds), ()))

    def add(self, degrees: Degrees, kinds: int, proof: Proof) -> None:
        """Remembers what ruled out a shape."""
        if len(self._known) >= MOST:
            self._known.clear()
        self._known.setdefault(_table(degrees, kinds), deque(maxlen=EACH)).appendleft(proof)


def _table(d: Degrees, kinds: int) -> tuple[object, ...]:
    return d.schedule, d.pp, d.chunks, d.num_micro_batches, d.device_order, kinds


def least_sum(each: Floats, sizes: Sizes, rank_of: list[int], layers: int) -> float:
    """The least that `layers` blocks cost whose stages and ranks lie within limits, at each[stage]; infinite
    where there is no way. Of a rank's blocks the next goes to its cheapest stage that has room, so that each
    costs no less than the one before: then the cheapest of all ranks that have room is best."""
    held = [low for low, _ in sizes.stages]
    ranks = [0] * len(sizes.ranks)
    for rank, low in zip(rank_of, held, strict=True):
        ranks[rank] += low
    left = layers - sum(held)
    order = sorted(range(len(held)), key=each.__getitem__)
    for needed in (True, False):  # what ranks hold at least, then what is left
        for stage in order:
            rank = rank_of[stage]
            room = sizes.ranks[rank][0 if needed else 1] - ranks[rank]
            more = max(0, min(room, sizes.stages[stage][1] - held[stage], left))
            held[stage] += more
            ranks[rank] += more
            left -= more
    kept = all(low <= own <= high for own, (low, high) in zip(ranks, sizes.ranks, strict=True))
    if left or not kept:
        return float("inf")
    return float(sum(n * own for n, own in zip(held, each, strict=True)))
