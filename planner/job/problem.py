"""PlanningProblem: the inputs that every command of the planner works on.

Limits: what a plan is held to by choice, besides what the model, the batch and the cluster allow.

JobOverheads: what a job does between its steps and suffers from outside. What nobody said is not counted.
"""

from __future__ import annotations

from typing import Literal

from planner.foundation.frozen import frozen
from planner.hardware.cluster import ClusterSpec, Device
from planner.job.engine_settings import NATIVE, Engine, EngineSettings
from planner.model.spec import ModelSpec
from planner.model.workload import Workload
from planner.profile.profile import Profile


@frozen
class Limits:
    """The engine that must be able to run the plan (None: any), and the largest tensor-parallel degree.

    Without `whole`, the engine's rules hold for degrees alone, not for stages and their options: a search of
    that larger space gives a bound of the smaller one.
    """

    engine: Engine | None = None
    max_tp: int | None = None
    whole: bool = True


NO_LIMITS = Limits()


BEST: Literal["best"] = "best"
"""The interval between checkpoints that loses least (planner.cost.goodput)."""


@frozen
class JobOverheads:
    """Rates are of the whole job. `checkpoint_every` counts steps, or is BEST; `checkpoint_async` writes
    behind the steps, which wait only for the copy to host memory. `device_spread` is a device's standard
    deviation of compute time, from device to device and step to step, over its mean: equal V100s of one
    cluster were found to differ by 8 % on average (arXiv 2208.11035).

    Failures count by devices: their rate is that of a node of 8. Where none is stated, devices have their own
    (profiles/failures.toml), and where no restart is, it is made of detection, loading and warm-up. A failed
    node is out for `repair_s`, for which the job waits where none of its `spares` stands in: idle nodes, paid
    like the others. None: it is replaced while the job restarts.

    Preemptions are the provider's: it takes back a whole node, `preemption_notice_s` after it said so, and
    the job goes on `preemption_restart_s` later. `ramp_up_s` passes before the first step, and again at each
    restart that is not stated. Every `eval_every` steps an evaluation takes `eval_s`.
    """

    data_tokens_per_s: float | None = None
    storage_bytes_per_s: float | None = None
    checkpoint_every: int | Literal["best"] | None = None
    checkpoint_async: bool = False
    device_spread: float | None = None
    failures_per_1000_node_days: float | None = None
    restart_s: float | None = None
    repair_s: float | None = None
    spares: int = 0
    preemptions_per_1000_node_days: float | None = None
    preemption_notice_s: float | None = None
    preemption_restart_s: float | None = None
    ramp_up_s: float | None = None
    eval_every: int | None = None
    eval_s: float | None = None

    @property
    def silent(self) -> bool:
        """Whether nothing was said that counts."""
        said = (
            self.data_tokens_per_s,
            self.checkpoint_every,
            self.device_spread,
            self.ramp_up_s,
            self.eval_s,
        )
        return all(value is None for value in said) and not self.spares


NO_OVERHEADS = JobOverheads()


@frozen
class PlanningProblem:
    """The inputs of every estimate and every search: a model, a workload, a cluster, the device's profile and
    memory limit, the engine settings, the job's overheads, and the limits that the user sets.

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
    engine_settings: EngineSettings = NATIVE
    overheads: JobOverheads = NO_OVERHEADS
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
