"""What a given cluster can do, as text and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.commands.hardware.sizing_text import days_text
from planner.commands.shared.objective_text import money
from planner.commands.shared.text import WIDTH, pairs

if TYPE_CHECKING:
    from planner.commands.hardware.sizing_options import OnCluster
    from planner.job.objective import Goal
    from planner.sizing.ability import Ability


def ability_text(found: Ability, given: OnCluster) -> str:
    """The run on the cluster, then what else fits there."""
    from planner.foundation.units import format_count

    model, workload = given.problem.model, given.problem.workload
    lines = [
        f"{model.name} ({format_count(model.params_total)} parameters), {workload.method} on "
        f"{format_count(workload.tokens or 0)} tokens"
        + (f" ({given.tokens_note})" if given.tokens_note else "")
        + f"\n  {workload.batch} x {workload.seq} tokens a step, on {found.cluster}",
        pairs([*_run(found, given.goal), *_most(found)], WIDTH),
    ]
    return "\n\n".join(lines)


def _run(found: Ability, goal: Goal) -> list[tuple[str, str]]:
    from planner.foundation.units import DAY_S, format_count, format_seconds

    plan, losses = found.plan, found.losses
    if plan is None:
        return [("this run", "does not fit; the largest that does stands below")]
    estimate = plan.estimate
    days = estimate.days if losses is None else losses.days
    usd = estimate.cost_usd if losses is None else losses.cost_usd
    rows = [
        ("plan", f"{plan.strategy.degrees.label()}, {estimate.verdict}"),
        (
            "step",
            f"{format_seconds(estimate.step_time_s)}, {format_count(round(estimate.tokens_per_s))} tokens/s",
        ),
        ("days", "none: no step is kept" if days is None else days_text(days)),
        ("dollars", money(usd)),
        ("kept", "" if losses is None else f"{losses.goodput:.1%} of the time goes into kept steps"),
    ]
    if goal.deadline_s is not None and days is not None:
        rows.append(("deadline", _against(days * DAY_S, goal.deadline_s, format_seconds(goal.deadline_s))))
    if goal.budget_usd is not None and usd is not None:
        rows.append(("budget", _against(usd, goal.budget_usd, money(goal.budget_usd))))
    return rows


def _against(value: float, limit: float, told: str) -> str:
    return f"{told}: {'kept' if value <= limit else f'missed by {value / limit - 1:.0%}'}"


def _most(found: Ability) -> list[tuple[str, str]]:
    from planner.foundation.units import format_count

    longest, largest = found.longest, found.largest
    return [
        (
            "longest sequence",
            "not even 1,024 tokens fit"
            if longest is None
            else f"{longest.seq:,} tokens, {longest.batch} a step; beyond: {longest.bound}",
        ),
        (
            "largest model",
            "no model of the catalog fits"
            if largest is None
            else f"{largest.name} ({format_count(largest.params_total)} parameters)",
        ),
    ]


def ability_document(found: Ability, given: OnCluster) -> dict[str, Any]:
    """The answer as JSON; `options` has the cluster itself where the run fits on it."""
    from planner.foundation.decode import encode
    from planner.foundation.units import DAY_S
    from planner.strategy.plan import degrees_document

    plan, losses, cluster = found.plan, found.losses, given.problem.cluster
    rented = cluster.name.partition("*")[2] if "+" not in cluster.name else ""
    provider, _, instance = rented.partition("/")
    options = []
    if plan is not None:
        estimate = plan.estimate
        low, high = (end / estimate.step_time_s for end in estimate.step_time_interval_s)
        usd = estimate.cost_usd if losses is None else losses.cost_usd
        days = estimate.days if losses is None else losses.days
        options.append(
            {
                "cluster": cluster.name,
                "instance": instance,
                "provider": provider,
                "nodes": sum(group.nodes for group in cluster.groups),
                "devices": cluster.devices,
                "plan": {
                    "label": plan.strategy.degrees.label(),
                    "strategy": degrees_document(plan.strategy.degrees),
                    "verdict": str(estimate.verdict),
                    "peak_memory_bytes": estimate.peak_memory_bytes,
                    "memory_limit_bytes": estimate.memory_limit_bytes,
                    "mfu": estimate.mfu,
                },
                "step_time_s": estimate.step_time_s,
                "days": days,
                "cost_usd": usd,
                "cost_interval_usd": None if usd is None else [usd * low, usd * high],
                "goodput": None if losses is None else losses.goodput,
                "pareto": True,
                "meets": days is not None
                and given.goal.meets(days * DAY_S, float("inf") if usd is None else usd),
            }
        )
    return {
        "options": options,
        "why_not": found.why_not,
        "model": given.problem.model.name,
        "workload": encode(given.problem.workload),
        "tokens_note": given.tokens_note,
        "longest": None if found.longest is None else encode(found.longest),
        "largest": None if found.largest is None else encode(found.largest),
    }
