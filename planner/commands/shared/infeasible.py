"""The answer of `plan solve` where no plan is feasible: what binds, by how much, and what would help."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from planner.commands.shared.text import pairs, print_json, table

if TYPE_CHECKING:
    from planner.advice.repairs import Infeasible, Repair
    from planner.job.problem import PlanningProblem
    from planner.search.solve import SolveOptions
    from planner.strategy.strategy import Strategy

INFEASIBLE_EXIT = 3
REPAIRS_S = 20.0
"""Seconds for the answer; twice as many at most, where nothing was found that helps."""
LEAST_SHARE = 0.1
"""Share of the time limit that is given to it at least, however long the search took."""
ONE_REPAIR_S, OF_ALL = 1.0, 0.25
"""Seconds for one repair at most, and the share of the time for all."""
COLUMNS = 100


def tell_infeasible(
    problem: PlanningProblem, options: SolveOptions, begun_s: float, *, as_json: bool, goes_on: bool = False
) -> int:
    """Prints why a problem has no plan and what would give it one. Returns the exit code.

    The command began at `begun_s` of the monotonic clock, and its time limit goes on. `goes_on`: the problem
    is that of a run which goes on, and may change its place and its plan alone.
    """
    from planner.advice.repairs import for_a_run, why_infeasible
    from planner.advice.resolve import Effort

    click.echo("no feasible plan; looking for the cheapest changes that give one", err=True)
    effort = Effort(each_s=None, total_s=None)
    if not options.reproducible:
        limit_s = options.time_limit_s or REPAIRS_S
        total_s = min(REPAIRS_S, max(begun_s + limit_s - time.monotonic(), LEAST_SHARE * limit_s))
        effort = Effort(each_s=min(ONE_REPAIR_S, OF_ALL * total_s), total_s=total_s)
    answer = why_infeasible(problem, options.pins, effort)
    if goes_on:
        answer = for_a_run(answer)
    if as_json:
        print_json(infeasible_document(answer))
    else:
        click.echo(infeasible_text(problem, answer, NEW_RUN if goes_on else "also"))
    return INFEASIBLE_EXIT


def strategy_document(strategy: Strategy) -> dict[str, Any]:
    """The degrees of a strategy as in plan.json."""
    from planner.foundation.decode import encode

    return {"dp": strategy.degrees.dp, **encode(strategy.degrees)}


def infeasible_document(answer: Infeasible) -> dict[str, Any]:
    """The answer as the JSON document of exit code 3."""
    from planner.foundation.decode import encode

    return {
        "solver": {"status": "infeasible", "shapes": answer.shapes},
        "binding": encode(answer.binding),
        "repairs": [_repair_document(repair) for repair in answer.repairs],
        "other_repairs": [_repair_document(repair) for repair in answer.others],
        "rejected": answer.rejected,
    }


def _repair_document(repair: Repair) -> dict[str, Any]:
    return {
        "change": repair.change,
        "flag": repair.flag,
        "step_time_s": repair.step_time_s,
        "device_seconds_per_token": repair.device_seconds_per_token,
        "peak_memory_bytes": repair.peak_memory_bytes,
        "strategy": strategy_document(repair.strategy),
        "verified": repair.verified,
    }


NEW_RUN = "by a new run alone: this one keeps batch, sequence, precision, optimizer and method"


def infeasible_text(problem: PlanningProblem, answer: Infeasible, others: str = "also") -> str:
    """The answer for people, in 100 columns as far as flags allow; `others` is the title of other repairs."""
    binding = answer.binding
    sections = [
        f"no feasible plan among {answer.shapes} shapes for {problem.model.name} on {problem.cluster.name}",
        pairs(
            [
                ("binding", binding.rule),
                ("", binding.detail),
                ("rejected", ", ".join(f"{rule} {count}" for rule, count in answer.rejected.items())),
            ],
            COLUMNS,
        ),
        _repairs_text("what would help, cheapest first", answer.repairs)
        or "no single change of those tried gives a feasible plan",
        _repairs_text(others, answer.others),
    ]
    return "\n\n".join(section for section in sections if section)


def _repairs_text(title: str, repairs: tuple[Repair, ...]) -> str:
    from planner.foundation.units import format_seconds

    if not repairs:
        return ""
    rows = [
        (
            number,
            format_seconds(repair.step_time_s),
            f"{repair.device_seconds_per_token * 1e6:.4g}",
            repair.strategy.degrees.label(),
            "verified" if repair.verified else "not verified",
        )
        for number, repair in enumerate(repairs, 1)
    ]
    said = pairs(
        [(f"{n}.", f"{repair.change}: {repair.flag}") for n, repair in enumerate(repairs, 1)], COLUMNS
    )
    return f"{title}\n{said}\n\n" + table(
        ("", "step", "device-s/Mtoken", "plan", ""), rows, numbers=(0, 1, 2)
    )
