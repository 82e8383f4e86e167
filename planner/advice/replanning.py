"""A run that goes on by another plan: what is left of it, and what each rank reads of its checkpoint.

A run keeps its model and workload, so that the order of its data and the schedule of its learning rate, both
functions of the step, go on as they were. Where it is chosen for dollars or a deadline, only what is left of
it counts: the search sees a workload of the tokens that are left, and its answer is evaluated again under the
whole workload, which is what plan.json says.
"""

from __future__ import annotations

import dataclasses

from planner.cost.evaluate import CostModel
from planner.cost.goodput import checkpoint_bytes
from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S
from planner.job.objective import Goal, Rest
from planner.job.problem import PlanningProblem
from planner.search.solve import SolveOptions, make_plan
from planner.search.solve_for import solve_for
from planner.strategy.plan import Plan, cost_usd
from planner.strategy.strategy import Strategy


@frozen
class Left:
    """The steps that are left of a run by a plan, at the job's goodput. None: not known."""

    steps: int
    tokens: int
    seconds: float | None
    cost_usd: float | None

    @property
    def days(self) -> float | None:
        return None if self.seconds is None else self.seconds / DAY_S


def left_of(plan: Plan, steps: int, pace: float = 1.0) -> Left:
    """What `steps` steps take by a plan, whose step takes `pace` times as long as it says."""
    job = plan.estimate.job
    goodput = 1.0 if job is None else job.goodput
    seconds = steps * plan.estimate.step_time_s * pace / goodput if goodput > 0 else None
    usd = None if seconds is None else cost_usd(plan, seconds)
    return Left(steps=steps, tokens=steps * plan.workload.tokens_per_step, seconds=seconds, cost_usd=usd)


def solve_rest(problem: PlanningProblem, options: SolveOptions, goal: Goal, rest: Rest | None) -> Plan:
    """The best plan for the rest of a run; `goal` is what is left of its own.

    `rest` may be None under a plain goal alone, for which the length of a run does not count. Raises
    InfeasibleError.
    """
    if goal.plain:
        return solve_for(problem, options, goal)
    assert rest is not None, "a goal counts tokens"
    found = solve_for(with_tokens(problem, rest.tokens), options, goal)
    assert found.objective is not None
    whole = dataclasses.replace(problem, cluster=found.cluster)
    again = make_plan(
        whole, CostModel(whole).evaluate(found.strategy), found.solver, found.rejected, found.alternatives
    )
    objective = dataclasses.replace(found.objective, rest=rest)
    return dataclasses.replace(again, engine=found.engine, objective=objective)


def with_tokens(problem: PlanningProblem, tokens: int) -> PlanningProblem:
    """The problem of a run of so many tokens."""
    return dataclasses.replace(problem, workload=dataclasses.replace(problem.workload, tokens=tokens))


def read_bytes_by_stage_rank(problem: PlanningProblem, strategy: Strategy) -> tuple[int, ...]:
    """Bytes that a device of each pipeline rank reads of a checkpoint: its shard of all stages it holds.

    Replicas read the same. These are the fp32 weights and the optimizer's state
    (planner.cost.stage.peak_memory).
    """
    model = CostModel(problem)
    shape = model.layout(strategy.degrees)
    _, own = checkpoint_bytes(shape, model.stage_costs(shape, strategy))
    return tuple(round(size) for size in own)
