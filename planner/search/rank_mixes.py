"""The least seconds of a pipeline rank that holds several stages, over all mixes of recomputation that fit.

Every mix of one stage is set beside every mix of the others: at each moment of the schedule

    runtime + sum over stages s of (states_s + kept_s) + the largest transient <= limit

with what micro-batches in flight on each keep (planner.cost.flight), and transients of stages that have some.
Where blocks are of one class this is exact for given sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.cost.action import ActionKind
from planner.cost.flight import InFlight
from planner.cost.memory import held_bytes, idle_apart, transient_bytes
from planner.cost.simulate import kind_passes
from planner.search.recipes import Column, RecipeBook
from planner.strategy import Offload

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

MOST_MIXES = 60_000
"""Mixes of all stages of a rank together beyond which it is left to planner.search.rank_floor."""

Span = tuple[int, int]


class Held(NamedTuple):
    """A stage of a rank: the blocks [first, end) that stand for it, how often it runs each kind of action,
    and what is in flight at each of the rank's moments."""

    span: Span
    actions: tuple[tuple[ActionKind, int], ...]
    flights: tuple[InFlight, ...]


def _outer(join: np.ufunc, each: Sequence[Floats]) -> Floats:
    """Every entry of an array joined with every one of the others, an axis for each array."""
    found = each[0]
    for other in each[1:]:
        found = join.outer(found, other)
    return found


class RankMixes:
    """The ranks of one shape on one kind of device."""

    def __init__(self, book: RecipeBook, limit_bytes: float) -> None:
        self.book, self.limit_bytes = book, limit_bytes
        self.apart = idle_apart(book.shape)
        self._known: dict[tuple[Held, ...], tuple[float, tuple[int, ...]]] = {}
        self._seconds: dict[tuple[Span, tuple[tuple[ActionKind, int], ...]], Floats] = {}
        self._bytes: dict[tuple[Span, InFlight], tuple[Floats, Floats]] = {}

    def few(self, sizes: Sequence[int]) -> bool:
        """Whether all mixes of stages of these sizes can be looked at; with offloading they are others."""
        if self.book.offload is not Offload.NONE:
            return False
        return math.prod((size + 1) * (size + 2) // 2 for size in sizes) <= MOST_MIXES

    def least_s(self, held: tuple[Held, ...]) -> float:
        """What the rank takes at least for all micro-batches; infinite where no mix fits."""
        return self._best(held)[0]

    def fastest(self, held: tuple[Held, ...]) -> tuple[Column, ...] | None:
        """The recipes of its stages that take least; None where none fit."""
        seconds, numbers = self._best(held)
        if seconds == float("inf"):
            return None
        return tuple(self.book.mix(each.span, n) for each, n in zip(held, numbers, strict=True))

    def _best(self, held: tuple[Held, ...]) -> tuple[float, tuple[int, ...]]:
        if held not in self._known:
            self._known[held] = self._searched(held)
        return self._known[held]

    def _searched(self, held: tuple[Held, ...]) -> tuple[float, tuple[int, ...]]:
        """The least seconds, and the numbers of the mixes that take them: the first of each if those fit."""
        import numpy as np

        each_s = [self._all_seconds(own) for own in held]
        limit = self.limit_bytes - self.book.shape.runtime_bytes
        moments = [
            [self._all_bytes(own.span, flight) for own, flight in zip(held, moment, strict=True)]
            for moment in zip(*(own.flights for own in held), strict=True)
        ]
        if all(
            sum(kept[0] for kept, _ in each) + max(passing[0] for _, passing in each) <= limit
            for each in moments
        ):
            return float(sum(seconds[0] for seconds in each_s)), (0,) * len(held)
        total_s = _outer(np.add, each_s)
        for each in moments:
            used = _outer(np.add, [kept for kept, _ in each])
            used += _outer(np.maximum, [passing for _, passing in each])
            total_s[used > limit] = np.inf
        best = np.unravel_index(total_s.argmin(), total_s.shape)
        return float(total_s[best]), tuple(map(int, best))

    def _all_seconds(self, held: Held) -> Floats:
        """Of each mix of a stage, all its actions."""
        import numpy as np

        key = held.span, held.actions
        if key not in self._seconds:
            mixes = self.book.mixes(*held.span)
            passes = kind_passes(mixes.cost)
            each = [count * passes[kind].total_s + 0.0 * mixes.full for kind, count in held.actions]
            self._seconds[key] = np.sum(each, axis=0)
        return self._seconds[key]

    def _all_bytes(self, span: Span, flight: InFlight) -> tuple[Floats, Floats]:
        """Of each mix of a stage, what it holds with what is in flight, and what a pass needs."""
        import numpy as np

        key = span, flight
        if key not in self._bytes:
            mixes, shape = self.book.mixes(*span), self.book.shape
            kept, passing = np.zeros(len(mixes.full)), np.full(len(mixes.full), -np.inf)
            kept += held_bytes(shape, mixes.cost, flight)
            if flight.alive or not self.apart:
                passing[:] = transient_bytes(shape, mixes.cost, flight)
            self._bytes[key] = kept, passing
        return self._bytes[key]
