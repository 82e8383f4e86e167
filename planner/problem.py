"""PlanningProblem: the inputs that every command of the planner works on."""

from __future__ import annotations

from planner.cluster import ClusterSpec
from planner.codec import noun
from planner.model import ModelSpec
from planner.profile import Profile
from planner.stack import NATIVE, Stack
from planner.upkeep import NOTHING_SAID, Upkeep
from planner.workload import Workload


@noun
class PlanningProblem:
    """A model, a workload, a cluster, what is known of the device, its memory, the software, the upkeep."""

    model: ModelSpec
    workload: Workload
    cluster: ClusterSpec
    profile: Profile | None
    memory_limit_bytes: int
    stack: Stack = NATIVE
    upkeep: Upkeep = NOTHING_SAID
