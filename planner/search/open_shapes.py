"""The shapes of a search whose gap stayed open, and the least of their bounds.

What bounds a shape beyond what its search said (ShapeSearch.bound) takes longer than to see that it cannot be
ruled out: it is worked out only for shapes that may have the least bound of all.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

BESIDE = 4
"""Shapes whose bounds are worked out beside each other."""


class _Open(NamedTuple):
    bound_s: float
    number: int
    final: bool


class OpenShapes:
    """Shapes by number with their bounds, of which some are known to be all that can be said.

    `bounds_s` works out the bounds of some shapes, up to a step time.
    """

    def __init__(self, bounds_s: Callable[[list[int], float], list[float]]) -> None:
        self._heap: list[_Open] = []
        self._bounds_s, self._least_s = bounds_s, float("inf")

    def add(self, number: int, bound_s: float) -> None:
        """Adds a shape that may have strategies as fast as `bound_s`."""
        heapq.heappush(self._heap, _Open(bound_s, number, final=False))

    def least_s(self, most_s: float, to_beat_s: float) -> float:
        """The least bound, or `most_s` if none is less. Bounds up to `to_beat_s` are worked out.

        No further than the least that is known: others matter only where they are less.
        """
        while self._heap and self._heap[0].bound_s < most_s:
            if self._heap[0].final:
                return self._heap[0].bound_s
            asked: list[_Open] = []
            while self._heap and len(asked) < BESIDE and not self._heap[0].final:
                asked.append(heapq.heappop(self._heap))
            known = self._bounds_s([each.number for each in asked], min(to_beat_s, self._least_s))
            for each, more_s in zip(asked, known, strict=True):
                bound_s = max(each.bound_s, more_s)
                heapq.heappush(self._heap, _Open(bound_s, each.number, final=True))
                self._least_s = min(self._least_s, bound_s)
        return most_s
