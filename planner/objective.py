"""Objective: what a plan was chosen for, within which limits, and what each number of nodes would do."""

from __future__ import annotations

from enum import StrEnum

from planner.codec import noun
from planner.units import DAY_S


class Minimise(StrEnum):
    """What the best plan has least of: seconds of the whole run, or dollars for it."""

    TIME = "time"
    COST = "cost"


@noun
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


@noun
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


@noun
class Objective:
    """The goal, the nodes that the plan uses of those offered, and how good that choice is.

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


def in_days(seconds: float | None) -> float | None:
    """Seconds as days, where there are any."""
    return None if seconds is None else seconds / DAY_S
