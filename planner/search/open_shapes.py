"""The shapes of a search whose gap stayed open, and the least of their bounds.

What bounds a shape beyond its first bound (StageSpace.floor_bound_s) takes longer than to see that it cannot
be ruled out: it is worked out only for shapes that may have the least bound of all.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from planner.search.frontier import Candidate


class OpenShapes:
    """Shapes with their bounds, of which some are known to be all that can be said."""

    def __init__(self, expired: Callable[[], bool]) -> None:
        self._heap: list[tuple[float, int, bool, Candidate]] = []
        self._expired = expired

    def add(self, candidate: Candidate, bound_s: float, *, final: bool) -> None:
        """Adds a shape that may have strategies as fast as `bound_s`."""
        heapq.heappush(self._heap, (bound_s, candidate.order, final, candidate))

    def least_s(self, most_s: float, to_beat_s: float) -> float:
        """The least bound, or `most_s` if none is less. Bounds up to `to_beat_s` are worked out."""
        while self._heap and self._heap[0][0] < most_s:
            bound_s, order, final, candidate = self._heap[0]
            if final or self._expired():
                return bound_s
            floor_s = candidate.search.space.floor_bound_s(to_beat_s)
            candidate.search.space.forget()
            heapq.heapreplace(self._heap, (max(bound_s, floor_s), order, True, candidate))
        return most_s
