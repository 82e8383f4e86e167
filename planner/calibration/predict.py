"""The step time of a run as a function of the constants, in closed form: what a fit evaluates many times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.cost.evaluate import CostModel
from planner.cost.physics import Physics
from planner.cost.seconds import larger
from planner.profile import Constant, Profile
from planner.runs.run import Run
from planner.runs.setup import RunSetup
from planner.search.paths import makespan_bound


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """A run with its setup and its measured step time."""

    run: Run
    setup: RunSetup
    step_time_s: float

    @property
    def kernels(self) -> str:
        return self.setup.problem.stack.kernels

    @property
    def group(self) -> str:
        return self.run.group_name


def step_time_s(setup: RunSetup, physics: Physics) -> float:
    """The longest bounding path of the schedule, between the once-a-step work at both ends.

    For even stages this is the replay's step time; for uneven ones a little less. An array where a constant
    of `physics` is one.
    """
    model, degrees = CostModel(setup.problem, physics), setup.strategy.degrees
    shape = model.shape(degrees)
    costs = model.stage_costs(shape, setup.strategy)
    forward = [cost.forward.total_s for cost in costs]
    backward = [cost.backward.total_s for cost in costs]
    if degrees.pp == 1:
        span_s = degrees.num_micro_batches * (forward[0] + backward[0])
    else:
        span_s = makespan_bound(degrees, forward, backward, shape.messages.p2p_s())
    held = costs[:: degrees.pp]
    ends_s = sum(cost.unshard_s + cost.reduce_s for cost in held)
    optimizers = [sum(cost.optimizer_s for cost in costs[rank :: degrees.pp]) for rank in range(degrees.pp)]
    return span_s + ends_s + larger(*optimizers)


def with_constants(base: Profile, constants: Sequence[Constant]) -> Profile:
    """The profile with these constants in place of its own of the same name and scope."""
    own = {(c.name, c.device, c.framework, c.kernels): c for c in (*base.constants, *constants)}
    return dataclasses.replace(base, constants=tuple(own.values()))
