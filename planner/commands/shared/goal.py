"""`--objective`, `--deadline` and `--budget`: what a plan is chosen for, read and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.job.objective import Goal
    from planner.job.problem import PlanningProblem

PRICES = "name a cluster that has one (COUNT*INSTANCE), or give --prices FILE or --on-premises"


def read_goal(
    objective: str | None, deadline: str | None, budget: str | None, problem: PlanningProblem
) -> Goal:
    """The goal that the options name. Raises InputError with every fault, and what is missing for it."""
    from planner.commands.shared.quantities import Reading
    from planner.job.objective import Goal, Minimise

    reading = Reading()
    deadline_s = None if deadline is None else reading.read(lambda: read_deadline_s(deadline))
    budget_usd = None if budget is None else reading.read(lambda: read_usd(budget))
    minimise = Minimise(objective or Minimise.TIME)
    flag = "--objective cost" if minimise is Minimise.COST else "--budget"
    dollars = minimise is Minimise.COST or budget is not None
    if problem.workload.tokens is None and (dollars or deadline is not None):
        asked = flag if dollars else "--deadline"
        reading.add(
            asked, "counts the whole run, and its tokens are not known.", fix="add --tokens, such as 300B"
        )
    if problem.cluster.price_usd_per_hour is None and dollars:
        reading.add(flag, f"needs a price, and {problem.cluster.name} has none.", fix=PRICES)
    reading.finish()
    return Goal(minimise=minimise, deadline_s=deadline_s, budget_usd=budget_usd)


def read_deadline_s(text: str, flag: str = "--deadline") -> float:
    """Seconds of `30` (days), `30d`, `12h`. Raises InputError."""
    from planner.foundation.errors import InputError, Problem
    from planner.foundation.units import parse_duration

    plain = text.strip().replace(".", "", 1).isdigit()
    seconds = parse_duration(f"{text.strip()}d" if plain else text, flag)
    if seconds <= 0:
        raise InputError(Problem(where=flag, fault=f"'{text[:40]}' is no time at all.", legal="above 0"))
    return seconds


def read_usd(text: str, flag: str = "--budget") -> float:
    """Dollars of `50000`, `$50,000`, `1.5M`. Raises InputError."""
    from planner.commands.shared.quantities import read_number
    from planner.foundation.errors import InputError, Problem
    from planner.foundation.units import parse_count

    plain = text.strip().removeprefix("$").replace(",", "")
    try:
        return read_number(plain, flag, 0.0, 1e15, "50000")
    except InputError:
        pass
    try:
        value = float(parse_count(plain, flag))
    except InputError:
        value = 0.0
    if not 0 < value <= 1e15:
        legal = "dollars above 0, such as 50000, $50,000 or 1.5M"
        raise InputError(Problem(where=flag, fault=f"'{text[:40]}' is no amount of dollars.", legal=legal))
    return value
