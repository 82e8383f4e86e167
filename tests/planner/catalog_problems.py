"""Problems of catalog models on known clusters, read as the commands read them, and their plans."""

from __future__ import annotations

from functools import cache
from typing import Any

from planner.commands.shared.options import ProblemOptions
from planner.commands.shared.problem import read_problem
from planner.job.problem import PlanningProblem
from planner.search.engine_search import solve_for_engine
from planner.search.solve import SolveOptions
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.plan import Plan

GAP = 0.01


@cache
def problem(model: str, cluster: str, seq: int, batch: int, **more: Any) -> PlanningProblem:
    """What `plan solve --model MODEL --cluster CLUSTER --seq SEQ --batch BATCH` works on."""
    values: dict[str, Any] = dict.fromkeys(ProblemOptions.__dataclass_fields__)
    values |= {"optimizer": "adamw", "method": "pretrain", "on_premises": False, "checkpoint_async": False}
    values |= {"model": model, "cluster": cluster, "seq": seq, "batch": batch, **more}
    return read_problem(ProblemOptions(**values)).problem


def solved(of: PlanningProblem, *pins: str) -> Plan:
    """The best plan to within GAP with some choices pinned, by work and not by the clock."""
    return solve_for_engine(
        of, SolveOptions(pins=parse_fixed_choices(pins), gap_tolerance=GAP, reproducible=True)
    )


def solved_s(of: PlanningProblem, *pins: str) -> float:
    """The step time of the best plan with some choices pinned."""
    return solved(of, *pins).estimate.step_time_s
