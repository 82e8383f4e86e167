"""The least seconds of a pipeline rank that holds several stages, over all mixes of recomputation that fit.

Every mix of one stage is set beside every mix of the others: at each moment of the schedule

    runtime + sum over stages s of (states_s + kept_s) + the largest transient <= limit

with what micro-batches in flight on each keep (planner.strategy.schedule.table), and transients of
stages that have some.
Where blocks are of one class this is exact for given sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from planner.cost.replay import kind_passes
from planner.cost.stage.memory_timeline import StageMemory, idle_apart
from planner.search.recipes import Column, RecipeBook
from planner.strategy.schedule.table import KINDS, ActionKind, InFlight
from planner.strategy.strategy import Offload

if TYPE_CHECKING:
    import numpy as np

    from planner.foundation.arrays import Floats, Ints

MOST_MIXES = 60_000
"""Mixes of all stages of a rank together beyond which it is left to planner.search.rank_floor."""

UNSHARD, REDUCE, OPTIMIZER = (len(KINDS) + number for number in range(3))
FIGURES = len(KINDS) + 3
"""What a recipe is known by: seconds of its passes by kind, of gathering, reduction and optimizer."""

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


def undominated(figures: Floats) -> Ints:
    """Rows of an array, least sum first, but those that are no less than one before them in every column."""
    import numpy as np

    left = np.argsort(figures.sum(axis=1), kind="stable")
    kept: list[int] = []
    while len(left):
        kept.append(int(left[0]))
        left = left[~(figures[left] >= figures[left[0]]).all(axis=1)]
    return np.asarray(kept, dtype=np.int64)


class RankMixes:
    """The ranks of one shape on one kind of device."""

    def __init__(self, book: RecipeBook, limit_bytes: float) -> None:
        self.book, self.limit_bytes = book, limit_bytes
        self.apart = idle_apart(book.shape)
        self._known: dict[tuple[Held, ...], tuple[float, tuple[int, ...]]] = {}
        self._seconds: dict[tuple[Span, tuple[tuple[ActionKind, int], ...]], Floats] = {}
        self._memories: dict[Span, StageMemory] = {}
        self._bytes: dict[tuple[Span, InFlight], tuple[Floats, Floats]] = {}
        self._figures: dict[Span, Floats] = {}
        self._useful: dict[Held, Ints] = {}

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
        moments = self._moments(held)
        if all(
            sum(kept[0] for kept, _ in each) + max(passing[0] for _, passing in each) <= self._free_bytes
            for each in moments
        ):
            return float(sum(seconds[0] for seconds in each_s)), (0,) * len(held)
        total_s = self._total_s(each_s, moments)
        best = np.unravel_index(total_s.argmin(), total_s.shape)
        return float(total_s[best]), tuple(map(int, best))

    def fitting(self, held: tuple[Held, ...], within_s: float) -> tuple[Ints, Floats]:
        """The numbers [n, stage] of mixes that fit together and take less than a time, and what they take.

        Of each stage without those that another beats in every figure and in memory at all times.
        """
        import numpy as np

        useful = [self.useful(own) for own in held]
        each_s = [self._all_seconds(own)[kept] for own, kept in zip(held, useful, strict=True)]
        moments = [
            [
                (kept_bytes[kept], passing[kept])
                for (kept_bytes, passing), kept in zip(each, useful, strict=True)
            ]
            for each in self._moments(held)
        ]
        total_s = self._total_s(each_s, moments)
        places = np.nonzero(total_s < within_s)
        numbers = np.stack([kept[place] for kept, place in zip(useful, places, strict=True)], axis=1)
        return numbers, total_s[places]

    def useful(self, held: Held) -> Ints:
        """The numbers of a stage's mixes, without those that another beats in all."""
        import numpy as np

        if held not in self._useful:
            each = [self.figures(held.span)]
            for flight in held.flights:
                kept, passing = self._all_bytes(held.span, flight)
                each.append(np.stack([kept, np.nan_to_num(passing, neginf=0.0)], axis=1))  # no pass: of none
            self._useful[held] = undominated(np.concatenate(each, axis=1))
        return self._useful[held]

    def figures(self, span: Span) -> Floats:
        """The figures of every mix of the blocks of a span: [n, FIGURES]."""
        import numpy as np

        if span not in self._figures:
            every = self.book.mixes(*span)
            cost, passes = every.cost, kind_passes(every.cost)
            columns = [passes[kind].total_s for kind in KINDS]
            columns += [cost.unshard_s, cost.reduce_s, cost.optimizer_s]
            self._figures[span] = np.stack([column + 0.0 * every.full for column in columns], axis=1)
        return self._figures[span]

    @property
    def _free_bytes(self) -> float:
        return self.limit_bytes - self.book.shape.runtime_bytes

    def _moments(self, held: tuple[Held, ...]) -> list[list[tuple[Floats, Floats]]]:
        """Of each moment and stage, what its mixes keep, and what a pass needs."""
        return [
            [self._all_bytes(own.span, flight) for own, flight in zip(held, moment, strict=True)]
            for moment in zip(*(own.flights for own in held), strict=True)
        ]

    def _total_s(self, each_s: list[Floats], moments: list[list[tuple[Floats, Floats]]]) -> Floats:
        """The seconds of every mix of every stage beside each other, infinite for those that do not fit."""
        import numpy as np

        total_s = _outer(np.add, each_s).copy()
        for each in moments:
            used = _outer(np.add, [kept for kept, _ in each])
            used = used + _outer(np.maximum, [passing for _, passing in each])
            total_s[used > self._free_bytes] = np.inf
        return total_s

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
            mixes = self.book.mixes(*span)
            if span not in self._memories:
                self._memories[span] = StageMemory(self.book.shape, mixes.cost)
            memory = self._memories[span]
            kept, passing = np.zeros(len(mixes.full)), np.full(len(mixes.full), -np.inf)
            kept += memory.held_bytes(flight)
            if flight.alive or not self.apart:
                passing[:] = memory.transient_bytes(flight)
            self._bytes[key] = kept, passing
        return self._bytes[key]
