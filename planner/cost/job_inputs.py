"""From a plan's costs to the plain numbers of its job.

They are the state that a checkpoint holds, how long devices take to copy theirs, and the nodes that may fail.
What the job loses is computed from them in planner.cost.goodput.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.cost.fit.run_memory import state_bytes
from planner.cost.goodput import Job, figures_of, interruptions, no_node_free
from planner.cost.stage.stage import ShapeModel
from planner.cost.stage.stage_cost import StageCost
from planner.hardware.cluster import ClusterSpec
from planner.hardware.failures import rated_nodes, usual_failures_per_s
from planner.job.overheads import BEST, Upkeep
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import JobFigures, TimeBreakdown
from planner.strategy.placement import Groups, rank_groups, seen_from


def job_figures(
    shape: ShapeModel, stages: Sequence[StageCost], step_s: float, breakdown: TimeBreakdown
) -> JobFigures | None:
    """What is lost beside steps of `step_s` seconds; None where nothing was said of it."""
    upkeep = shape.problem.upkeep
    return None if upkeep.silent else figures_of(job_of(shape, stages, step_s, breakdown), upkeep)


def job_of(shape: ShapeModel, stages: Sequence[StageCost], step_s: float, breakdown: TimeBreakdown) -> Job:
    """The job of a plan in plain numbers. Another upkeep, or another price, needs nothing else."""
    workload, cluster = shape.problem.workload, shape.problem.cluster
    written, own = checkpoint_bytes(shape, stages)
    return Job(
        step_s=step_s,
        compute_s=breakdown.compute_s + breakdown.recompute_s + breakdown.host_s,
        tokens_per_step=workload.tokens_per_step,
        tokens=workload.tokens,
        devices=shape.degrees.world,
        nodes=sum(group.nodes for group in cluster.groups),
        rated_nodes=rated_nodes(cluster),
        usual_failures_per_s=usual_failures_per_s(cluster),
        checkpoint_bytes=written,
        staging_s=_staging_s(shape, own),
        usd_per_hour=cluster.price_usd_per_hour,
    )


def most_kept(cluster: ClusterSpec, upkeep: Upkeep, steps: float, busy_s: float) -> float:
    """A share of time that no plan keeps more than, of steps that take `busy_s` at least with what is between
    them: a checkpoint takes no time to write and to load."""
    if upkeep.checkpoint_every is None:
        return 1.0
    every = 1 if upkeep.checkpoint_every == BEST else upkeep.checkpoint_every
    job = Job(
        step_s=busy_s,
        compute_s=0.0,
        tokens_per_step=1,
        tokens=None,
        devices=cluster.devices,
        nodes=sum(group.nodes for group in cluster.groups),
        rated_nodes=rated_nodes(cluster),
        usual_failures_per_s=usual_failures_per_s(cluster),
        checkpoint_bytes=0.0,
        staging_s=0.0,
    )
    stops = interruptions(
        job, dataclasses.replace(upkeep, storage_bytes_per_s=1.0)
    )  # any: there are no bytes
    return stops.kept(min(every, steps) * busy_s) * (1 - no_node_free(stops.failures_per_s, upkeep))


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
    """One device's link to its host, nominal, of the slowest kind of the cluster; None: one is not known."""
    rates = [group.device.host_link_bytes_per_s for group in problem.cluster.groups]
    known = [rate for rate in rates if rate is not None]
    return min(known) if known and len(known) == len(rates) else None


def _staging_s(shape: ShapeModel, own: Sequence[float]) -> float:
    """Seconds until the last device has copied what it writes to its host; links that are not known: none."""
    largest: dict[Groups, float] = {}
    for groups, size in zip(rank_groups(shape.problem.cluster, shape.degrees), own, strict=True):
        largest[groups] = max(size, largest.get(groups, 0.0))
    return max(
        size / link if (link := host_link_bytes_per_s(seen_from(shape.problem, groups))) else 0.0
        for groups, size in largest.items()
    )
