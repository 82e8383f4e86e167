"""The step time of a run as a function of the constants, in closed form: what a fit evaluates many times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.calibration.run_setup import RunSetup
from planner.calibration.runs import Run
from planner.cost.evaluate import CostModel
from planner.foundation.arrays import larger
from planner.hardware.cluster import ClusterSpec, Device
from planner.job.engine_settings import EngineSettings
from planner.model.spec import ModelSpec
from planner.model.workload import Workload
from planner.profile.profile import Constant, Profile
from planner.strategy.schedule.makespan_paths import makespan_bound
from planner.strategy.strategy import Strategy

ProblemKey = tuple[ModelSpec, Workload, ClusterSpec, EngineSettings]
"""What tells problems apart that one profile speaks of: a profile holds a dict and has no hash."""


LayersKey = tuple[ModelSpec, Workload, Device, str, EngineSettings]


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """A run with its setup and its measured step time."""

    run: Run
    setup: RunSetup
    step_time_s: float

    @property
    def kernels(self) -> str:
        return self.setup.problem.engine_settings.kernels

    @property
    def group(self) -> str:
        return self.run.group_name

    @property
    def problem_key(self) -> ProblemKey:
        problem = self.setup.problem
        return problem.model, problem.workload, problem.cluster, problem.engine_settings

    @property
    def layers_key(self) -> LayersKey:
        """What the costs of its layers depend on."""
        problem = self.setup.problem
        one = dataclasses.replace(problem.workload, batch=1, tokens=None)
        return problem.model, one, problem.device, problem.cluster.network, problem.engine_settings


def step_time_s(model: CostModel, strategy: Strategy) -> float:
    """The longest bounding path of the schedule, between the once-a-step work at both ends.

    For even stages this is the replay's step time; for uneven ones a little less. An array where a constant
    of the model's constants is one.
    """
    degrees = strategy.degrees
    shape = model.layout(degrees)
    costs = model.stage_costs(shape, strategy)
    forward = [cost.forward.total_s for cost in costs]
    backward = [cost.backward.total_s for cost in costs]
    if degrees.pp == 1:
        span_s = degrees.num_micro_batches * (forward[0] + backward[0])
    else:
        span_s = makespan_bound(degrees, forward, backward, shape.messages.p2p_s())
    held = costs[:: degrees.pp]
    ends_s = sum(cost.unshard_s + cost.reduce_s for cost in held)
    optimizers = [sum(cost.optimizer_s for cost in costs[rank :: degrees.pp]) for rank in range(degrees.pp)]
    return span_s + ends_s + larger(*optimizers) + shape.constants.step_s


def with_constants(base: Profile, constants: Sequence[Constant]) -> Profile:
    """The profile with these constants in place of its own of the same name and scope."""
    own = {
        (c.name, c.device, c.network, c.engine, c.framework, c.kernels): c
        for c in (*base.constants, *constants)
    }
    return dataclasses.replace(base, constants=tuple(own.values()))
