"""How far a search has come: the best step time, the bound of what was searched, and when to give up."""

from __future__ import annotations

from planner.search.shape_search import ShapeResult

PATIENCE = 250
"""Shapes that are searched without a better plan, once the gap of one stays open below the bound of the next:
more could not close it, only find a better plan."""


class Progress:
    """Of a search that began with a plan of `incumbent_s` (infinite: with none).

    `bound_s` is what no strategy of the searched shapes beats; a gap of `tolerance` or less may stay open.
    """

    def __init__(self, incumbent_s: float, tolerance: float) -> None:
        self.incumbent_s, self.tolerance = incumbent_s, tolerance
        self.bound_s = float("inf")
        self._stale = 0

    @property
    def to_beat_s(self) -> float:
        """The step time that is worth beating."""
        return self.incumbent_s * (1 - self.tolerance)

    def add(self, bound_s: float, result: ShapeResult) -> None:
        """Counts the search of a shape with a bound."""
        self.bound_s = min(self.bound_s, max(bound_s, result.bound_s))
        self._stale += 1
        if result.found is not None and result.found.step_time_s < self.incumbent_s:
            self.incumbent_s, self._stale = result.found.step_time_s, 0

    def patient(self, next_bound_s: float) -> bool:
        """Whether to search a shape with this bound, and those that come after it."""
        return self._stale < PATIENCE or self.bound_s >= next_bound_s
