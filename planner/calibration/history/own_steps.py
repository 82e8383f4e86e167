"""Which steps of a log ran by the plan that lies beside it: a run may go on under another plan."""

from __future__ import annotations

import math

from planner.strategy.plan import Plan


def ran_by(plan: Plan, ranks: int, predicted_step_time_s: float | None) -> bool:
    """Whether a step that reports the memory of so many ranks (0: of none) may have run by `plan`.

    Each line of a log says what its own plan predicted; of lines that do not, the ranks alone tell.
    """
    if ranks not in (0, plan.strategy.degrees.world):
        return False
    own_s = plan.estimate.step_time_s
    return predicted_step_time_s is None or math.isclose(predicted_step_time_s, own_s, rel_tol=1e-9)
