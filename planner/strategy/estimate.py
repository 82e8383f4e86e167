"""Estimate: what a strategy costs, in time by cause and in memory by tenant. Both add up."""

from __future__ import annotations

import dataclasses
from enum import StrEnum

from planner.foundation.frozen import frozen


@frozen
class TimeBreakdown:
    """Seconds of a step by cause. The sum is the step time."""

    compute_s: float = 0.0
    recompute_s: float = 0.0
    tp_comm_s: float = 0.0
    cp_comm_s: float = 0.0
    ep_comm_s: float = 0.0
    dp_comm_s: float = 0.0
    pp_comm_s: float = 0.0
    bubble_s: float = 0.0
    optimizer_s: float = 0.0
    host_s: float = 0.0

    @property
    def total_s(self) -> float:
        return float(sum(getattr(self, cause) for cause in TIME_CAUSES))

    def __add__(self, other: TimeBreakdown) -> TimeBreakdown:
        return TimeBreakdown(**{name: getattr(self, name) + getattr(other, name) for name in TIME_CAUSES})

    def __mul__(self, factor: float) -> TimeBreakdown:
        return TimeBreakdown(**{name: getattr(self, name) * factor for name in TIME_CAUSES})


TIME_CAUSES = tuple(field.name for field in dataclasses.fields(TimeBreakdown))


@frozen
class MemoryBreakdown:
    """Bytes of one device by tenant, at the worst moment of a step. The sum is the peak.

    `transient_bytes` is what lives for a moment (logits, gathered weights, communication buffers);
    `runtime_bytes` is what the device's context and communicators take; `allocator_bytes` what a caching
    allocator holds without a tensor in it.
    """

    weights_bytes: int = 0
    grads_bytes: int = 0
    optimizer_bytes: int = 0
    activations_bytes: int = 0
    transient_bytes: int = 0
    runtime_bytes: int = 0
    allocator_bytes: int = 0

    @property
    def allocated_bytes(self) -> int:
        """What tensors take."""
        return self.total_bytes - self.runtime_bytes - self.allocator_bytes

    @property
    def total_bytes(self) -> int:
        return sum(getattr(self, name) for name in MEMORY_TENANTS)

    def __add__(self, other: MemoryBreakdown) -> MemoryBreakdown:
        return MemoryBreakdown(
            **{name: getattr(self, name) + getattr(other, name) for name in MEMORY_TENANTS}
        )


MEMORY_TENANTS = tuple(field.name for field in dataclasses.fields(MemoryBreakdown))


class Verdict(StrEnum):
    """Whether a strategy fits: surely, within the error band, or not."""

    SAFE = "SAFE"
    RISKY = "RISKY"
    NO = "NO"


@frozen
class Coverage:
    """Share of the compute and communication time by origin of its figures. Sums to 1."""

    measured: float = 0.0
    interpolated: float = 0.0
    fitted: float = 0.0
    datasheet: float = 0.0


@frozen
class StageEstimate:
    """One stage's memory on each of its devices, and its time for all micro-batches of a step.

    `device` names its devices, joined with `+` where it has several kinds, and `memory_limit_bytes` is what
    each has; plans that were written before these were known have neither.
    """

    memory: MemoryBreakdown
    time_s: float
    forward_s: float
    backward_s: float
    device: str = ""
    memory_limit_bytes: int | None = None


@frozen
class MomentMemory:
    """What one device holds at a moment of a run, and what its node holds in host memory."""

    moment: str
    device_bytes: int
    host_bytes: int


@frozen
class MemoryFigures:
    """The peak of the fullest device as three observers see it, and the moments it is made of.

    `allocated_bytes` are tensors, `reserved_bytes` what the allocator took for them, `device_bytes` what the
    driver shows: context and communicators besides. `worst` names the moment of the largest, and
    `host_bytes` is the most that a node needs in host memory, `hosted_bytes` of it what is offloaded.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    host_bytes: int
    worst: str
    moments: tuple[MomentMemory, ...]
    hosted_bytes: int = 0


@frozen
class JobFigures:
    """What a job loses between its steps: seconds a step by cause, and the shares lost to interruptions.

    `checkpoint_every` is the interval that was counted with, `best_checkpoint_every` the one that loses
    least, where that is known. `checkpoint_wait_s` is what steps wait for one checkpoint, None where the
    storage's rate was not said. `goodput` is the share of the job's time that goes into steps that are kept;
    `days` and `cost_usd` are of the whole run at it, with its ramp-up and its spare nodes.
    `between_failures_s` is None where failures were said not to happen. Shares are of all time: lost to
    failures, to preemptions, and to waiting for a node while more are out than there are spares. Plans that
    were written before these were known have none of them.
    """

    data_stall_s: float
    straggler_s: float
    checkpoint_stall_s: float
    checkpoint_bytes: int
    checkpoint_wait_s: float | None
    failure_share: float
    between_failures_s: float | None
    best_checkpoint_every: int | None
    goodput: float
    days: float | None
    cost_usd: float | None
    checkpoint_every: int | None = None
    evaluation_s: float = 0.0
    restart_s: float | None = None
    preemption_share: float = 0.0
    between_preemptions_s: float | None = None
    waiting_share: float = 0.0
    spares: int = 0
    ramp_up_s: float = 0.0


@frozen
class Estimate:
    """The answer of the cost model for one strategy.

    `peak_memory_bytes` is that of the fullest device, as compared with the limit: what the allocator
    reserves, and communicators; the driver's context lies outside the limit. Its interval decides the
    verdict. `memory` says more of it, and
    `job` what is lost between steps, where something was said of that; `days` and `cost_usd` are without it.
    `days` and `cost_usd` are None where tokens or a price are unknown; `mfu` is None where the device's
    peak is unknown.
    """

    step_time_s: float
    step_time_interval_s: tuple[float, float]
    tokens_per_s: float
    mfu: float | None
    days: float | None
    cost_usd: float | None
    breakdown: TimeBreakdown
    peak_memory_bytes: int
    memory_limit_bytes: int
    verdict: Verdict
    coverage: Coverage
    memory: MemoryFigures | None = None
    job: JobFigures | None = None
    peak_memory_interval_bytes: tuple[int, int] | None = None


@frozen
class TimelineEvent:
    """One piece of work of a pipeline rank. `kind`: forward, backward, unshard, reduce or optimizer."""

    rank: int
    name: str
    kind: str
    start_s: float
    duration_s: float


@frozen
class Rejected:
    """A strategy that breaks a rule: which one, the numbers, the nearest legal values, the cure."""

    rule: str
    detail: str
    legal: str = ""
    fix: str = ""
