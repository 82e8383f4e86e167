"""Overlap: what a message shows that runs beside work, and how much both are slowed by each other.

Work slows by the share w while both run (arXiv 2507.03114), a message by the share c. Of a message of t
seconds, work of s seconds hides as much as it lasts; what is left goes on alone at its own rate:

    shown(t, s) = (t' - h) / (1 + c) + w h,    t' = (1 + c) t,    h = min(t', s)

A profile may hold both shares, measured by products beside copies; else w is usual and c 0.
"""

from __future__ import annotations

from typing import Any

from planner.cost import constants
from planner.cost.seconds import smaller
from planner.foundation.frozen import frozen
from planner.profile.profile import Profile


@frozen
class Overlap:
    """How much longer work and messages take while both run, as shares."""

    work_slowdown: float
    message_slowdown: float

    def shown_s(self, message_s: Any, work_s: Any) -> Any:
        """Seconds that a message adds to the work beside it; of one or, as arrays, of many."""
        slowed_s = (1 + self.message_slowdown) * message_s
        hidden_s = smaller(slowed_s, work_s)
        return (slowed_s - hidden_s) / (1 + self.message_slowdown) + self.work_slowdown * hidden_s


def overlap_of(profile: Profile | None) -> Overlap:
    """The shares of a profile, where it measured them."""
    work = profile.constant("overlap_slowdown") if profile else None
    message = profile.constant("overlap_message_slowdown") if profile else None
    return Overlap(
        work_slowdown=constants.OVERLAP_SLOWDOWN if work is None else work,
        message_slowdown=message or 0.0,
    )
