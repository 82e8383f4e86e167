"""The objective of a plan as text: what was asked, the nodes used, and what each number of nodes would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.commands.shared.text import pairs, table

if TYPE_CHECKING:
    from planner.job.objective import NodesTried, Objective

MOST_ROWS = 12
"""Numbers of nodes that the table shows: the cheapest or fastest first."""

STATUS = {
    "solved": "solved",
    "infeasible": "no plan fits",
    "ruled_out": "its bound rules it out",
    "not_searched": "not searched: time ran out",
}


def objective_text(objective: Objective | None) -> str:
    """The section of a plan's text; empty where the fastest step was all that was asked."""
    if objective is None:
        return ""
    return "\n\n".join([_summary(objective), *([_nodes(objective)] if len(objective.tried) > 1 else [])])


def money(usd: float | None) -> str:
    """Dollars, with cents where they count; unknown where there is no price."""
    if usd is None:
        return "unknown"
    return f"${usd:,.2f}" if usd < 1000 else f"${usd:,.0f}"


def _summary(o: Objective) -> str:
    cost = o.minimise == "cost"
    limits = [f"within {_days(o.deadline_days)}"] if o.deadline_days is not None else []
    limits += [f"for {money(o.budget_usd)} at most"] if o.budget_usd is not None else []
    used = f"{o.nodes} of {o.nodes + o.nodes_unused} of {o.offered}"
    bound = money(o.lower_bound) if cost else _days(o.lower_bound)
    left = o.rest
    spent = "" if left is None else f", after {_days(left.spent_days)} and {money(left.spent_usd)}"
    ended = "; the time limit ended the search" if o.status == "time_limit" else ""
    return pairs(
        [
            ("objective", ", ".join([f"least {'cost' if cost else 'time'}", *limits])),
            ("nodes", used + (f"; {o.nodes_unused} left unused" if o.nodes_unused else "; all used")),
            ("whole run" if left is None else "what is left", f"{_days(o.days)}, {money(o.cost_usd)}{spent}"),
            ("no plan below", f"{bound} ({o.status}, gap {o.gap:.2%}){ended}"),
        ]
    )


def _nodes(o: Objective) -> str:
    shown = sorted(o.tried, key=lambda t: (t.days is None, t.cost_usd if o.minimise == "cost" else t.days))
    rows = [
        (
            each.nodes,
            _days(each.days) if each.days is not None else f"at least {_days(each.bound_days)}",
            money(each.cost_usd) if each.days is not None else f"at least {money(each.bound_usd)}",
            _status(o, each),
        )
        for each in shown[:MOST_ROWS]
    ]
    left = len(shown) - len(rows)
    more = f"\n({left} more numbers of nodes in --json)" if left else ""
    return table(("nodes", "whole run", "dollars", "status"), rows, numbers=(0,)) + more


def _status(o: Objective, each: NodesTried) -> str:
    if each.nodes == o.nodes:
        return "chosen"
    if o.deadline_days is not None and (each.days or 0.0) > o.deadline_days:
        return "too late"
    if o.budget_usd is not None and (each.cost_usd or 0.0) > o.budget_usd:
        return "too dear"
    return STATUS[each.status]


def _days(days: float | None) -> str:
    from planner.foundation.units import DAY_S, format_seconds

    return "unknown" if days is None else format_seconds(days * DAY_S)
