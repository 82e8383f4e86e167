"""What a job loses between its steps, and its goodput: the share of its time that goes into kept steps.

With a step of t seconds, T tokens in it, a checkpoint of B bytes every k steps, of which the device that
takes longest copies b over its host link, n devices and a mean time M between failures:

    data            max(0, T / loader - t)
    stragglers      spread x E_n x compute        E_n: the mean of the largest of n standard normals
    checkpoint      max(B / storage, b / link) / k
                    behind the steps: (b / link + max(0, B / storage - k t)) / k
    failures        of every second (restart + k t' / 2) / M        t' = t and the three above

    goodput = t / t' x (1 - share lost to failures)

E_n is Blom's approximation, the quantile (n - 0.375) / (n + 0.25). Failures lose half an interval of steps on
average, and need an interval to be counted. The interval that loses least is sqrt(2 w M), w the wait for one
checkpoint (Young 1974).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from planner.catalog import device_names, load_device
from planner.cost.lifecycle import state_bytes
from planner.cost.stage import ShapeModel
from planner.cost.stage_cost import StageCost
from planner.estimate import JobFigures, TimeBreakdown
from planner.placement import Groups, rank_groups, seen_from
from planner.problem import PlanningProblem
from planner.units import DAY_S


def job_figures(
    shape: ShapeModel, stages: Sequence[StageCost], step_s: float, breakdown: TimeBreakdown
) -> JobFigures | None:
    """What is lost beside steps of `step_s` seconds; None where nothing was said of it."""
    problem = shape.problem
    upkeep, workload = problem.upkeep, problem.workload
    if upkeep.silent:
        return None
    data_s = 0.0
    if upkeep.data_tokens_per_s is not None:
        data_s = max(0.0, workload.tokens_per_step / upkeep.data_tokens_per_s - step_s)
    compute_s = breakdown.compute_s + breakdown.recompute_s + breakdown.host_s
    straggler_s = (upkeep.device_spread or 0.0) * largest_of(shape.degrees.world) * compute_s
    written, own = checkpoint_bytes(shape, stages)
    wait_s = _wait_s(problem, written, _staging_s(shape, own), step_s)
    every = upkeep.checkpoint_every
    checkpoint_s = wait_s / every if wait_s is not None and every is not None else 0.0
    whole_s = step_s + data_s + straggler_s + checkpoint_s
    between_s = between_failures_s(problem)
    lost = 0.0
    if every is not None:
        lost = min(1.0, (upkeep.restart_s + every * whole_s / 2) / between_s)
    goodput = step_s / whole_s * (1 - lost)
    return JobFigures(
        data_stall_s=data_s,
        straggler_s=straggler_s,
        checkpoint_stall_s=checkpoint_s,
        checkpoint_bytes=round(written),
        checkpoint_wait_s=wait_s,
        failure_share=lost,
        between_failures_s=None if math.isinf(between_s) else between_s,
        best_checkpoint_every=_best_every(wait_s, between_s, whole_s),
        goodput=goodput,
        **_whole(problem, step_s, goodput),
    )


def largest_of(n: int) -> float:
    """The mean of the largest of n standard normals; 0 for one."""
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0


def checkpoint_bytes(shape: ShapeModel, stages: Sequence[StageCost]) -> tuple[float, tuple[float, ...]]:
    """Bytes of a checkpoint, and those that a device of each pipeline rank writes of it.

    Replicas write once. Each device writes its shard of all stages that it holds.
    """
    degrees = shape.degrees
    each = [state_bytes(shape, stage) for stage in stages]
    own = [0.0] * degrees.pp
    for index, size in enumerate(each):
        own[degrees.pp_rank_of_stage(index)] += size
    return degrees.tp * degrees.dp_shard * sum(each), tuple(own)


def host_link_bytes_per_s(problem: PlanningProblem) -> float | None:
    """One device's link to its host, nominal, of the slowest kind of the cluster; None: none is known."""
    names = {group.device.name for group in problem.cluster.groups}
    facts = [load_device(name).pcie for name in sorted(names & set(device_names()))]
    rates = [pcie.gb_per_s * 1e9 for pcie in facts if pcie is not None]
    return min(rates) if rates and len(rates) == len(names) else None


def _staging_s(shape: ShapeModel, own: Sequence[float]) -> float:
    """Seconds until the last device has copied what it writes to its host; links that are not known: none."""
    largest: dict[Groups, float] = {}
    for groups, size in zip(rank_groups(shape.problem.cluster, shape.degrees), own, strict=True):
        largest[groups] = max(size, largest.get(groups, 0.0))
    return max(
        size / link if (link := host_link_bytes_per_s(seen_from(shape.problem, groups))) else 0.0
        for groups, size in largest.items()
    )


def _wait_s(problem: PlanningProblem, written: float, stage_s: float, step_s: float) -> float | None:
    """Seconds that steps wait for one checkpoint; None where the storage's rate was not said."""
    upkeep = problem.upkeep
    if upkeep.storage_bytes_per_s is None:
        return None
    write_s = written / upkeep.storage_bytes_per_s
    if not upkeep.checkpoint_async:
        return max(write_s, stage_s)
    return stage_s + max(0.0, write_s - (upkeep.checkpoint_every or math.inf) * step_s)


def between_failures_s(problem: PlanningProblem) -> float:
    """Mean time between failures of the whole job: failures count by node."""
    nodes = sum(group.nodes for group in problem.cluster.groups)
    rate = problem.upkeep.failures_per_1000_node_days * nodes / (1000 * DAY_S)
    return 1 / rate if rate > 0 else math.inf


def _best_every(wait_s: float | None, between_s: float, whole_s: float) -> int | None:
    """Steps between checkpoints that lose least, where the wait for one is known."""
    if not wait_s or math.isinf(between_s):
        return None
    return max(1, round(math.sqrt(2 * wait_s * between_s) / whole_s))


def _whole(problem: PlanningProblem, step_s: float, goodput: float) -> dict[str, float | None]:
    """Days and dollars of the whole run at this goodput, where tokens and a price are known."""
    workload, price = problem.workload, problem.cluster.price_usd_per_hour
    if workload.tokens is None or goodput <= 0:
        return {"days": None, "cost_usd": None}
    seconds = workload.tokens / workload.tokens_per_step * step_s / goodput
    return {"days": seconds / DAY_S, "cost_usd": None if price is None else price * seconds / 3600}
