"""Heads: counts of heads that the ranks of tensor parallelism share out."""

from __future__ import annotations

from planner.foundation.frozen import frozen


@frozen
class Heads:
    """A count of heads of which each rank has whole ones, as many as the others.

    Those that may be `repeated` can be fewer than the ranks: then neighbours have copies of one.
    """

    count: int
    what: str
    repeated: bool = False

    def split_over(self, tp: int) -> bool:
        """Whether `tp` ranks can share them out."""
        return self.count % tp == 0 or (self.repeated and tp % self.count == 0)
