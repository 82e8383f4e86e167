"""Dollars of a plan: an hour of its cluster, and what is predicted for a number of steps. Unknown: None."""

from __future__ import annotations

from planner.strategy.plan import Plan


def usd_per_hour(plan: Plan) -> float | None:
    """Dollars an hour of the cluster, with the spare nodes that the estimate counts; None: no price."""
    estimate, price = plan.estimate, plan.cluster.price_usd_per_hour
    if price is None:  # a plan that was written elsewhere may state days and dollars alone
        if estimate.cost_usd is None or not estimate.days:
            return None
        return estimate.cost_usd / (24 * estimate.days)
    spares = estimate.job.spares if estimate.job is not None else 0
    return price * (1 + spares / sum(group.nodes for group in plan.cluster.groups))


def usd_of(plan: Plan, seconds: float) -> float | None:
    """Dollars of so much time on the plan's cluster."""
    price = usd_per_hour(plan)
    return None if price is None else price * seconds / 3600


def predicted_usd(plan: Plan, steps: int) -> float | None:
    """Dollars that so many steps should take, at the job's goodput where the plan states one."""
    job = plan.estimate.job
    goodput = 1.0 if job is None else job.goodput
    return usd_of(plan, steps * plan.estimate.step_time_s / goodput) if goodput > 0 else None


def added_usd(first: float | None, second: float | None) -> float | None:
    """Dollars together; unknown where one of them is."""
    return None if first is None or second is None else first + second


def told_usd(usd: float | None) -> str:
    """Dollars for people; what is not known says so, and is never 0."""
    return "unknown" if usd is None else f"${usd:,.2f}"
