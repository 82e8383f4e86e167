"""Objective: what a plan was chosen for, within which limits, and what each number of nodes would do."""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.errors import InfeasibleError
from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S, format_seconds


class Minimise(StrEnum):
    """What the best plan has least of: seconds of the whole run, or dollars for it."""

    TIME = "time"
    COST = "cost"


@frozen
class Goal:
    """What is asked for. Seconds and dollars are of the whole run: all tokens, at the job's goodput."""

    minimise: Minimise = Minimise.TIME
    deadline_s: float | None = None
    budget_usd: float | None = None

    @property
    def plain(self) -> bool:
        """Whether the fastest step on the whole cluster is all that is asked for."""
        return self == Goal()

    @property
    def counts_dollars(self) -> bool:
        return self.minimise is Minimise.COST or self.budget_usd is not None

    def meets(self, seconds: float, usd: float) -> bool:
        """Whether a run of so long and so much keeps deadline and budget."""
        late = self.deadline_s is not None and seconds > self.deadline_s
        return not late and not (self.budget_usd is not None and usd > self.budget_usd)


class Searched(StrEnum):
    """What became of a number of nodes: a plan was found, none fits, its bound rules it out, time ran out."""

    SOLVED = "solved"
    INFEASIBLE = "infeasible"
    RULED_OUT = "ruled_out"
    NOT_SEARCHED = "not_searched"


@frozen
class NodesTried:
    """A part of the cluster: no plan on it takes less than the bounds; figures of its best plan, if one was
    searched for and found."""

    nodes: int
    status: Searched
    bound_days: float
    bound_usd: float | None
    days: float | None = None
    cost_usd: float | None = None
    step_time_s: float | None = None


@frozen
class Rest:
    """The last `tokens` of a run that has taken so long and so much: a plan that it goes on by is chosen for
    these alone. `spent_usd` is None where a price was not known."""

    tokens: int
    spent_days: float
    spent_usd: float | None


@frozen
class Objective:
    """The goal, the nodes that the plan uses of those offered, and how good that choice is.

    Days and dollars are of all the workload's tokens, or of the `rest` of a run.
    `lower_bound` is of what is minimised, in days or dollars; `gap` is (figure - lower bound) / figure.
    `status` is optimal, gap, or time_limit where the time limit ended the search.
    """

    minimise: Minimise
    deadline_days: float | None
    budget_usd: float | None
    offered: str
    nodes: int
    nodes_unused: int
    days: float | None
    cost_usd: float | None
    lower_bound: float
    gap: float
    status: str
    tried: tuple[NodesTried, ...] = ()
    rest: Rest | None = None


def goal_left(goal: Goal, rest: Rest) -> Goal:
    """What a goal of the whole run leaves for its rest. Raises InfeasibleError where nothing is left.

    Dollars that are not known are not taken off.
    """
    spent_s, spent_usd = rest.spent_days * DAY_S, rest.spent_usd or 0.0
    faults = []
    if goal.deadline_s is not None and goal.deadline_s <= spent_s:
        words = f"--deadline {format_seconds(goal.deadline_s)}: the run has taken {format_seconds(spent_s)}"
        faults.append(f"{words} already. What would help: a later --deadline.")
    if goal.budget_usd is not None and goal.budget_usd <= spent_usd:
        words = f"--budget ${goal.budget_usd:,.2f}: the run has cost ${spent_usd:,.2f} already"
        faults.append(f"{words}. What would help: a larger --budget.")
    if faults:
        raise InfeasibleError("\n".join(faults))
    return Goal(
        minimise=goal.minimise,
        deadline_s=None if goal.deadline_s is None else goal.deadline_s - spent_s,
        budget_usd=None if goal.budget_usd is None else goal.budget_usd - spent_usd,
    )


def goal_of(objective: Objective | None) -> Goal:
    """The goal of the whole run that a plan was chosen for: with what was spent, where it is of a rest."""
    if objective is None:
        return Goal()
    days, usd, rest = objective.deadline_days, objective.budget_usd, objective.rest
    spent_days, spent_usd = (rest.spent_days, rest.spent_usd or 0.0) if rest is not None else (0.0, 0.0)
    return Goal(
        minimise=objective.minimise,
        deadline_s=None if days is None else (days + spent_days) * DAY_S,
        budget_usd=None if usd is None else usd + spent_usd,
    )


def in_days(seconds: float | None) -> float | None:
    """Seconds as days, where there are any."""
    return None if seconds is None else seconds / DAY_S
