"""The answers of `plan explain` as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner.commands.shared.infeasible import strategy_document

if TYPE_CHECKING:
    from planner.advice.explain import Explanation
    from planner.advice.resolve import Front
    from planner.advice.what_more import More
    from planner.advice.why_not import WhyNot
    from planner.cost.evaluate import Evaluation
    from planner.job.problem import PlanningProblem
    from planner.profile.choose import ProfileUse


def heading_document(
    problem: PlanningProblem, evaluation: Evaluation, basis: str, profiles: Sequence[ProfileUse]
) -> dict[str, Any]:
    """The plan explained, evaluated again, and what its figures rest on."""
    from planner.foundation.decode import encode

    estimate = evaluation.estimate
    return {
        "model": problem.model.name,
        "cluster": problem.cluster.name,
        "basis": basis,
        "profiles": [encode(use) for use in profiles],
        "strategy": strategy_document(evaluation.strategy),
        "step_time_s": estimate.step_time_s,
        "tokens_per_s": estimate.tokens_per_s,
        "breakdown": encode(estimate.breakdown),
        "peak_memory_bytes": estimate.peak_memory_bytes,
        "memory_limit_bytes": estimate.memory_limit_bytes,
        "verdict": str(estimate.verdict),
    }


def reasons_document(found: Explanation) -> dict[str, Any]:
    """What binds, what more buys, why runners-up lost."""
    from planner.foundation.decode import encode

    return {
        "binds": [encode(bind) for bind in found.binds],
        "stages": [
            {**encode(stage), "memory": {**encode(stage.memory), "total_bytes": stage.memory.total_bytes}}
            for stage in found.stages
        ],
        "solved_again": None
        if found.best is None
        else {
            "step_time_s": found.best.step_time_s,
            "gap": found.best.gap,
            "strategy": strategy_document(found.best.strategy),
        },
        "more": [_more_document(more) for more in found.more],
        "runners_up": [
            {**encode(each), "strategy": strategy_document(each.strategy)} for each in found.losers
        ],
    }


def _more_document(more: More) -> dict[str, Any]:
    from planner.foundation.decode import encode

    strategy = None if more.strategy is None else strategy_document(more.strategy)
    return {**encode(more), "strategy": strategy}


def why_not_document(answer: WhyNot) -> dict[str, Any]:
    """One answer to `--why-not`."""
    from planner.foundation.decode import encode

    strategy = None if answer.strategy is None else strategy_document(answer.strategy)
    return {**encode(answer), "answer": str(answer.answer), "strategy": strategy}


def front_document(found: Front) -> dict[str, Any]:
    """The front of step time against memory headroom."""
    from planner.foundation.decode import encode

    return {
        "plans": [{**encode(point), "strategy": strategy_document(point.strategy)} for point in found.points],
        "infeasible_below_bytes": found.least_bytes,
        "limits_solved": found.solved,
        "limits_asked": found.asked,
    }
