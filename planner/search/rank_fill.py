"""Whether ranks, one after the other, can hold all blocks of a model within a step time.

With N_r the blocks of rank r, n_r those of its first stage, R_r what it takes for each of m micro-batches
(planner.search.rank_floor), and e_r what a path to a later rank meets on it:

    m R_r(N_r, n_r) + sum_{j<r} e_j(n_j) <= T   for every rank r,      sum_r N_r = L

A path enters each rank at its first stage. Under schedules with whole backward passes it leaves there too; e
has both passes then, else the forward. The least prefix sums, by the blocks placed so far, follow rank after
rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Way(NamedTuple):
    """Blocks that a rank may hold, what it takes with them for all micro-batches, and what a path to a later
    rank meets on it."""

    blocks: int
    own_s: float
    enter_s: float


def can_hold(layers: int, ranks: Iterable[Iterable[Way]], within_s: float) -> bool:
    """Whether one way of each rank, of `layers` blocks together, keeps `within_s`."""
    import numpy as np

    least_s = np.full(layers + 1, np.inf)
    least_s[0] = 0.0
    for ways in ranks:
        after_s = np.full(layers + 1, np.inf)
        for blocks, own_s, enter_s in ways:
            if own_s > within_s or blocks > layers:
                continue
            before_s = least_s[: layers + 1 - blocks]
            entered_s = np.where(before_s <= within_s - own_s, before_s + enter_s, np.inf)
            np.minimum(after_s[blocks:], entered_s, out=after_s[blocks:])
        least_s = after_s
    return bool(np.isfinite(least_s[layers]))
