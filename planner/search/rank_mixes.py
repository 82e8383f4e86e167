"""The least seconds of a pipeline rank that holds two stages, over all mixes of recomputation that fit.

Every mix of one stage is set beside every mix of the other: at each moment of the schedule

    runtime + resident_1 + resident_2 + a_1 saved_1 + a_2 saved_2 + the larger transient <= limit

with a_s the micro-batches alive on each, and transients of stages that have some. Where blocks are of one
class this is exact for given sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.cost.action import ActionKind
from planner.cost.memory import idle_apart, transient_bytes
from planner.cost.moments import resident
from planner.cost.simulate import kind_passes
from planner.search.recipes import RecipeBook
from planner.strategy import Offload

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

MOST_PAIRS = 60_000
"""Pairs of mixes beyond which a rank is left to planner.search.rank_floor."""

Span = tuple[int, int]


class Held(NamedTuple):
    """A stage of a rank: the blocks [first, end) that stand for it, how often it runs each kind of action,
    and the micro-batches alive at each of the rank's moments."""

    span: Span
    actions: tuple[tuple[ActionKind, int], ...]
    alive: tuple[int, ...]


class RankMixes:
    """The ranks of one shape on one kind of device."""

    def __init__(self, book: RecipeBook, limit_bytes: float) -> None:
        self.book, self.limit_bytes = book, limit_bytes
        self.apart = idle_apart(book.shape)
        self._known: dict[tuple[Held, ...], float] = {}
        self._seconds: dict[tuple[Span, tuple[tuple[ActionKind, int], ...]], Floats] = {}
        self._bytes: dict[tuple[Span, int], tuple[Floats, Floats]] = {}

    def few(self, sizes: Sequence[int]) -> bool:
        """Whether all mixes of stages of these sizes can be looked at; with offloading they are others."""
        if self.book.offload is not Offload.NONE:
            return False
        pairs = 1
        for size in sizes:
            pairs *= (size + 1) * (size + 2) // 2
        return pairs <= MOST_PAIRS

    def least_s(self, held: tuple[Held, Held]) -> float:
        """What the rank takes at least for all micro-batches; infinite where no mix fits."""
        if held not in self._known:
            self._known[held] = self._least_s(*held)
        return self._known[held]

    def _least_s(self, one: Held, other: Held) -> float:
        import numpy as np

        seconds = self._all_seconds(one)[:, None] + self._all_seconds(other)[None]
        fits = np.ones(seconds.shape, dtype=bool)
        limit = self.limit_bytes - self.book.shape.runtime_bytes
        for moment in zip(one.alive, other.alive, strict=True):
            (kept, passing), (others, beside) = (
                self._all_bytes(each.span, alive) for each, alive in zip((one, other), moment, strict=True)
            )
            fits &= kept[:, None] + others[None] + np.maximum(passing[:, None], beside[None]) <= limit
        return float(seconds[fits].min()) if fits.any() else float("inf")

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

    def _all_bytes(self, span: Span, alive: int) -> tuple[Floats, Floats]:
        """Of each mix of a stage, what it keeps with so many micro-batches alive, and what a pass needs."""
        import numpy as np

        key = span, alive
        if key not in self._bytes:
            mixes, shape = self.book.mixes(*span), self.book.shape
            kept, passing = np.zeros(len(mixes.full)), np.full(len(mixes.full), -np.inf)
            kept += resident(shape, mixes.cost).total + alive * mixes.cost.saved_bytes
            if alive or not self.apart:
                passing[:] = transient_bytes(shape, mixes.cost, alive)
            self._bytes[key] = kept, passing
        return self._bytes[key]
