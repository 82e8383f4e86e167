"""PlanningProblem: the inputs that every command of the planner works on."""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.hardware.cluster import ClusterSpec, Device
from planner.job.engine_settings import NATIVE, Stack
from planner.job.limits import NO_LIMITS, Limits
from planner.job.overheads import NOTHING_SAID, Upkeep
from planner.model.spec import ModelSpec
from planner.model.workload import Workload
from planner.profile.profile import Profile


@frozen
class PlanningProblem:
    """A model, a workload, a cluster, what is known of the device, its memory, the software, the upkeep, and
    what plans are held to by choice.

    Where the cluster has several kinds of devices, `profile` is that of the slowest and `memory_limit_bytes`
    the least limit; `device_profiles` and `device_limits_bytes` are those of each kind, by its name. For a
    kind that is not named there the one limit holds, and of the one profile what was not measured on
    another kind (planner.strategy.placement).
    """

    model: ModelSpec
    workload: Workload
    cluster: ClusterSpec
    profile: Profile | None
    memory_limit_bytes: int
    stack: Stack = NATIVE
    upkeep: Upkeep = NOTHING_SAID
    limits: Limits = NO_LIMITS
    device_profiles: tuple[tuple[str, Profile | None], ...] = ()
    device_limits_bytes: tuple[tuple[str, int], ...] = ()

    @property
    def device(self) -> Device:
        """The kind of device that sets the pace: of several, the slowest, for which all others wait."""
        return min((group.device for group in self.cluster.groups), key=self._pace)

    def _pace(self, device: Device) -> tuple[float, float, str]:
        peak, bandwidth = device.peak_flops(self.workload.precision), device.memory_bandwidth_bytes_per_s
        return peak or 0.0, bandwidth or 0.0, device.name
