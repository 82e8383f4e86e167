"""Shapes in order of their bound, each modelled only when none that is left can come before it.

Modelling a shape takes many times as long as its quick bound, which lies below its bound. So a heap holds
those that are modelled, beside the others in order of their quick bound: the least is taken, and where that
is a quick bound its shape is modelled and put on the heap with its bound.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from planner.strategy.strategy import Degrees

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints

DUST = 1e-9
"""Share by which a quick bound may exceed the bound, by adding floats in another order."""


class Candidate(NamedTuple):
    """A shape that may fit, its bound and its place among all shapes."""

    bound_s: float
    order: int
    degrees: Degrees


class Frontier:
    """Candidates by rising bound, ties in order of shapes.

    `quick_s` are the quick bounds of the shapes `numbers`; `model` gives the candidate of a shape by its
    number, or None where it cannot fit. Once time has expired none is modelled, and there is no next one.
    """

    def __init__(
        self,
        quick_s: Floats,
        numbers: Ints,
        model: Callable[[int], Candidate | None],
        expired: Callable[[], bool] = lambda: False,
    ) -> None:
        import numpy as np

        order = np.lexsort((numbers, quick_s))
        self._quick_s = quick_s[order] * (1 - DUST)
        self._numbers = numbers[order].tolist()
        self._taken, self._expired = 0, expired
        self._heap: list[Candidate] = []
        self._model, self._known = model, list[Candidate]()

    def __iter__(self) -> Iterator[Candidate]:
        index = 0
        while index < len(self._known) or self._advance():
            yield self._known[index]
            index += 1

    def _advance(self) -> bool:
        """Finds the next candidate; whether there is one."""
        while self._heap or self._taken < len(self._numbers):
            if self._expired():
                return False
            if self._taken < len(self._numbers):
                number, quick_s = self._numbers[self._taken], float(self._quick_s[self._taken])
                if not self._heap or (quick_s, number) < self._heap[0][:2]:
                    self._taken += 1
                    candidate = self._model(number)
                    if candidate is not None:
                        heapq.heappush(self._heap, candidate)
                    continue
            self._known.append(heapq.heappop(self._heap))
            return True
        return False

    @property
    def next_bound_s(self) -> float:
        """What no shape beats that did not come up yet; infinite where all did."""
        left = [float(self._quick_s[self._taken])] if self._taken < len(self._numbers) else []
        return min([*left, *(candidate.bound_s for candidate in self._heap[:1])], default=float("inf"))

    def count_unmodelled(self, least_s: float) -> int:
        """Shapes that were never modelled, of which no strategy is faster than `least_s`."""
        return int((self._quick_s[self._taken :] >= least_s).sum())
