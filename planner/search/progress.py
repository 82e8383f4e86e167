"""How far a search has come: the best step time, and how long ago it was found."""

from __future__ import annotations

from planner.search.shape_search import Found

PATIENCE = 250
"""Shapes that are searched without a better plan, once the gap of one stays open below the bound of the next:
more could not close it, only find a better plan."""
WIDE = 0.1
"""Gap from which on more are searched, in proportion: the better plan is likely there."""


class Progress:
    """Of a search that began with a plan of `incumbent_s` (infinite: with none).

    A gap of `tolerance` or less may stay open.
    """

    def __init__(self, incumbent_s: float, tolerance: float) -> None:
        self.incumbent_s, self.tolerance = incumbent_s, tolerance
        self._stale = 0

    @property
    def to_beat_s(self) -> float:
        """The step time that is worth beating."""
        return self.incumbent_s * (1 - self.tolerance)

    @property
    def stale(self) -> bool:
        """Whether many shapes were searched since a better plan was found."""
        return self.incumbent_s < float("inf") and self._stale >= PATIENCE

    def spent(self, least_s: float) -> bool:
        """Whether they are as many as are worth it where no plan is faster than `least_s`."""
        gap = 1 - least_s / self.incumbent_s
        return self.stale and self._stale >= PATIENCE * gap / WIDE

    def add(self, found: Found | None) -> None:
        """Counts the search of a shape."""
        self._stale += 1
        if found is not None and found.step_time_s < self.incumbent_s:
            self.incumbent_s, self._stale = found.step_time_s, 0
