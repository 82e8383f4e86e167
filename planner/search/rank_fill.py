"""Whether ranks, one after the other, can hold all blocks of a model within a step time.

With N_r the blocks of rank r, n_r those of its first stage, R_r what it takes for each of m micro-batches
(planner.search.rank_floor), and e_r what a path to a later rank meets on it:

    m R_r(N_r, n_r) + sum_{j<r} e_j(n_j) <= T   for every rank r,      sum_r N_r = L

A path enters each rank at its first stage. Under schedules with whole backward passes it leaves there too; e
has both passes then, else the forward. The least prefix sums, by the blocks placed so far, follow rank after
rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Way(NamedTuple):
    """Blocks that a rank may hold, what it takes with them for all micro-batches, and what a path to a later
    rank meets on it."""

    blocks: int
    own_s: float
    enter_s: float


def can_hold(layers: int, most: Sequence[int], ranks: Iterable[Iterable[Way]], within_s: float) -> bool:
    """Whether one way of each rank, of `layers` blocks together, keeps `within_s`.

    `most` are the most blocks of each rank's ways. Ranks are asked for their ways one after the other, and
    none once those before cannot be done in time.
    """
    least_s, later = {0: 0.0}, sum(most)
    for ways, high in zip(ranks, most, strict=True):
        later -= high
        after_s: dict[int, float] = {}
        for blocks, own_s, enter_s in ways:
            latest_s = within_s - own_s
            for before, before_s in least_s.items():
                placed, entered_s = before + blocks, before_s + enter_s
                if before_s > latest_s or not layers - later <= placed <= layers:
                    continue
                if entered_s < after_s.get(placed, float("inf")):
                    after_s[placed] = entered_s
        if not after_s:
            return False
        least_s = after_s
    return layers in least_s
