"""Runners-up: which are worth telling, and why each lost."""

from __future__ import annotations

from planner.cost.evaluate import Evaluation
from planner.search.layout_search import Found


def distinct(found: list[Found]) -> list[Found]:
    """One strategy for each choice of tp, pp, dp, ZeRO and schedule, so that runners-up differ."""
    seen = set()
    result = []
    for item in found:
        degrees = item.strategy.degrees
        key = (degrees.tp, degrees.pp, degrees.dp, degrees.zero, degrees.schedule)
        if key not in seen:
            seen.add(key)
            result.append(item)
    return result


def why_slower(best: Evaluation, other: Evaluation) -> str:
    """The cause in which the other strategy loses most, in words and numbers."""
    ours, theirs = best.estimate.breakdown, other.estimate.breakdown
    extra = {
        name.removesuffix("_s").replace("_", " "): getattr(theirs, name) - getattr(ours, name)
        for name in type(ours).__dataclass_fields__
    }
    cause, seconds = max(extra.items(), key=lambda item: item[1])
    total = other.estimate.step_time_s - best.estimate.step_time_s
    return f"{total / best.estimate.step_time_s:+.1%} step time, mostly {cause} ({seconds * 1e3:+.3g} ms)"
