"""Where a step's time goes, by cause: measured on one recorded step, and as it was predicted."""

from __future__ import annotations

from collections.abc import Sequence

from planner.foundation.frozen import frozen
from planner.strategy.plan import Plan

GRADIENT_SUMS, OPTIMIZER = "gradient sums", "optimizer"
Span = tuple[str, float, float]
"""Name, begin and end of what a rank did."""


@frozen
class StepCauses:
    """Seconds of one step of one rank, by cause; the sum is the step.

    `compute_s` are forward and backward passes, with the collectives inside them (tensor parallelism,
    gathered weights). `wait_s` is what lies between the recorded spans: waiting for other stages, and host
    work. `gradient_sums_s` are sums after the passes, with the wait for the slowest rank.
    """

    compute_s: float
    wait_s: float
    gradient_sums_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.wait_s + self.gradient_sums_s + self.optimizer_s


def causes_of(spans: Sequence[Span], step_s: float) -> StepCauses:
    """The causes of a rank's step of `step_s` seconds, from its recorded spans."""
    seconds = {GRADIENT_SUMS: 0.0, OPTIMIZER: 0.0}
    compute_s = 0.0
    for name, begin, end in spans:
        if name in seconds:
            seconds[name] += end - begin
        else:
            compute_s += end - begin
    recorded_s = compute_s + sum(seconds.values())
    return StepCauses(
        compute_s=compute_s,
        wait_s=max(0.0, step_s - recorded_s),
        gradient_sums_s=seconds[GRADIENT_SUMS],
        optimizer_s=seconds[OPTIMIZER],
    )


def mean_causes(ranks: Sequence[StepCauses]) -> StepCauses:
    """The mean of all ranks, which all take the same time for a step."""
    count = len(ranks)
    return StepCauses(
        compute_s=sum(rank.compute_s for rank in ranks) / count,
        wait_s=sum(rank.wait_s for rank in ranks) / count,
        gradient_sums_s=sum(rank.gradient_sums_s for rank in ranks) / count,
        optimizer_s=sum(rank.optimizer_s for rank in ranks) / count,
    )


def predicted_causes(plan: Plan) -> StepCauses:
    """The plan's breakdown in the same four causes.

    Data-parallel communication counts as gradient sums, though with sharded weights a part of it is hidden
    in the passes when it is measured; time on the host counts as waiting.
    """
    parts = plan.estimate.breakdown
    return StepCauses(
        compute_s=parts.compute_s + parts.recompute_s + parts.tp_comm_s + parts.cp_comm_s + parts.ep_comm_s,
        wait_s=parts.pp_comm_s + parts.bubble_s + parts.host_s,
        gradient_sums_s=parts.dp_comm_s,
        optimizer_s=parts.optimizer_s,
    )
