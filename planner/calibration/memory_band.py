"""The band of a memory verdict: how far peaks lie from predictions that were made without them.

Every run is predicted twice: from the runs of the other groups, and, where there are two models or more, from
those of the other models. Errors are of measured over predicted, less 1; a run that ran out needed at least
its limit, and one that ran at most that:

    upper    the largest error above, and MARGIN
    lower    what QUANTILE of the errors below stay within

A plan that is called safe and runs out loses its run, one that is called impossible and is not loses a
choice: hence the largest on one side and a quantile on the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.cost import constants
from planner.profile.profile import Constant

MARGIN = 0.02
"""Added above: limits themselves are known to about this, as what else is on a device differs."""

QUANTILE = 0.98
"""Share of the runs whose peaks may lie at most the band's lower end below their prediction."""


def memory_band(
    above: Sequence[float], below: Sequence[float], framework: str, told: str
) -> tuple[Constant, ...]:
    """The band from errors of left-out runs, 0 where a run says no more; `told` names the runs."""
    ends = {}
    if above:
        ends["upper"] = max(above) + MARGIN
    if below:
        ends["lower"] = _quantile(below)
    widest = constants.MEMORY_ERROR["datasheet"]  # few groups never teach less than no calibration
    origin = f"{told}, each predicted from the other groups and from the other models"
    return tuple(
        Constant(name=f"memory_error_{name}", value=min(value, widest), origin=origin, framework=framework)
        for name, value in ends.items()
    )


def _quantile(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(QUANTILE * len(ordered)) - 1)]
