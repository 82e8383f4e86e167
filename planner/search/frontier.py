"""Shapes in order of their bound, each modelled only when none that is left can come before it.

Modelling a shape takes many times as long as its quick bound, which lies below its bound. So a heap holds
both: the least is taken, and where that is a quick bound its shape is modelled and put back with its bound.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from planner.search.shape_search import ShapeSearch
from planner.strategy import Degrees

DUST = 1e-9
"""Share by which a quick bound may exceed the bound, by adding floats in another order."""


class Candidate(NamedTuple):
    """A shape that may fit, its bound and its place among all shapes."""

    bound_s: float
    order: int
    search: ShapeSearch


class Legal(NamedTuple):
    """A legal shape that is not modelled yet, its quick bound and its place among all shapes."""

    quick_s: float
    order: int
    degrees: Degrees


class Frontier:
    """Candidates by rising bound, ties in order of shapes. `model` gives None for a shape that cannot fit."""

    def __init__(self, legal: Iterable[Legal], model: Callable[[Legal], Candidate | None]) -> None:
        self._heap: list[tuple[float, int, Legal | Candidate]] = [
            (shape.quick_s * (1 - DUST), shape.order, shape) for shape in legal
        ]
        heapq.heapify(self._heap)
        self._model, self._known = model, list[Candidate]()

    def __iter__(self) -> Iterator[Candidate]:
        index = 0
        while index < len(self._known) or self._advance():
            yield self._known[index]
            index += 1

    def _advance(self) -> bool:
        """Finds the next candidate; whether there is one."""
        while self._heap:
            _, order, item = heapq.heappop(self._heap)
            if isinstance(item, Candidate):
                self._known.append(item)
                return True
            candidate = self._model(item)
            if candidate is not None:
                heapq.heappush(self._heap, (candidate.bound_s, order, candidate))
        return False

    def count_unmodelled(self, least_s: float) -> int:
        """Shapes that were never modelled, of which no strategy is faster than `least_s`."""
        return sum(isinstance(item, Legal) and item.quick_s >= least_s for _, _, item in self._heap)
