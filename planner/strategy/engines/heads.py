"""Key-value heads that are fewer than tensor-parallel ranks: engines that have no copies of them."""

from __future__ import annotations

from planner.foundation.divisors import divisors, legal_values
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import Rejected
from planner.strategy.strategy import Degrees


def without_copies(problem: PlanningProblem, degrees: Degrees, engine: str, why: str) -> Rejected | None:
    """The rule of an engine where tp must divide key-value heads, named by the engine; `why` it must."""
    few = [heads for heads in problem.model.heads_split if heads.repeated and heads.count % degrees.tp]
    if not few:
        return None
    heads = few[0]
    return Rejected(
        rule=f"{engine.lower().split('-')[0]}_heads",
        detail=f"tp={degrees.tp} over {heads.count} {heads.what}: {engine} {why}.",
        legal=legal_values(divisors(heads.count), degrees.tp),
        fix="--fix tp=",
    )
