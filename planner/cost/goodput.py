"""Goodput: the share of a job's time that goes into kept steps, from plain numbers alone. Pure and cheap.

With a step of t seconds, T tokens in it, n devices, a checkpoint of B bytes of which the device that takes
longest copies b over its host link (c seconds), and of which storage takes S bytes a second:

    data            max(0, T / loader - t)
    stragglers      spread x E_n x compute        E_n: the mean of the largest of n standard normals
    evaluation      its time / its interval
    busy            u = t and the three above
    checkpoint      every k steps they wait w = max(B / S, c)
                    behind the steps: w = c + max(0, B / S - k u), so that k u is not shorter than the writing

Interruptions come at random, independently: failures at a rate f, preemptions at p (Poisson). Each stops all,
takes R seconds until the job runs, and loses what was done since the last whole checkpoint; restarts are
interrupted as well. A period of P = k u + w then takes exp(sum of rate x R) x (exp(L P) - 1) / L on average,
where L = f + p, less what is saved in time (Daly 2006: his complete cost function, for two kinds; 1 / (f + p)
is the mean time between interruptions, p being nodes over the time between preemptions of one):

    share kept      L P / (exp(L P) - 1) x exp(-f R_f - p R_p)
    restart R_f     as stated, or time until it is started again + B / S (or c, if longer) + warm-up
                    written behind the steps, a checkpoint is whole B / S later: so much more is lost
    preemption      where the notice lasts for saving, it loses no steps, and saving is part of R_p
    a node is free  1 - E(N + 1, f x repair)      N spares, E(m, a) Erlang's loss formula

    goodput = t / (u + w / k) x share kept x (a node is free)
    seconds = steps x t / goodput + ramp-up

Erlang: N + 1 servers repair nodes; with N out the job runs and the next failure stops it, so that it waits
while all N + 1 are busy, a share of time that any distribution of repairs gives. N = 0: M / (M + repair).

The interval that loses least solves exp(-x) = 1 + L w - x, where x = L P: the minimum of Daly's complete cost
function, of which his series sqrt(2 w M) (1 + sqrt(w / 2 M) / 3 + ...) - w is the expansion, and Young's
sqrt(2 w M) (1974) the first term, too short by w where checkpoints are dear. It costs a few Newton steps, and
holds where failures are so frequent that neither expansion does. Of the two whole numbers of steps beside it,
the better is taken. Behind the steps w is c, down to the shortest interval that writing allows; below that
each period is equally long and holds fewer steps.

Steps lost by failures need an interval to be counted. An interval longer than the run is as long as the run.
E_n is Blom's approximation, the quantile (n - 0.375) / (n + 0.25).

From a plan's costs to the plain numbers of its job.

They are the state that a checkpoint holds, how long devices take to copy theirs, and the nodes that may fail.
What the job loses is computed from them in planner.cost.goodput.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from planner.cost.stage.peak_memory import state_bytes
from planner.cost.stage.stage import LayoutModel, StageCost
from planner.foundation.frozen import frozen
from planner.foundation.units import DAY_S
from planner.hardware.cluster import ClusterSpec
from planner.hardware.failures import failure_file, rated_nodes, usual_failures_per_s
from planner.job.problem import BEST, JobOverheads, PlanningProblem
from planner.strategy.estimate import JobFigures, TimeBreakdown
from planner.strategy.placement import Groups, rank_groups, seen_from

NEWTON_STEPS = 60
"""More than it ever took: it converges from one side, doubling its digits."""


@frozen
class Job:
    """One plan's job in plain numbers, before anything is lost.

    `compute_s` of the step is what a slow device stretches, `staging_s` the time until the last device has
    copied its part of a checkpoint to its host. `devices` wait for each other; `nodes` are rented, and count
    as `rated_nodes` of 8 devices, which fail `usual_failures_per_s` where nobody says otherwise.
    """

    step_s: float
    compute_s: float
    tokens_per_step: int
    tokens: int | None
    devices: int
    nodes: int
    rated_nodes: float
    usual_failures_per_s: float
    checkpoint_bytes: float
    staging_s: float
    usd_per_hour: float | None = None

    @property
    def steps(self) -> float:
        """Steps of the whole run; endless where its tokens are not known."""
        return math.inf if self.tokens is None else self.tokens / self.tokens_per_step


class Interruptions(NamedTuple):
    """Rates of failures and preemptions, those of them that lose steps, and the sums of rate x restart."""

    failures_per_s: float
    preemptions_per_s: float
    losing_per_s: float
    failed: float
    preempted: float

    def kept(self, period_s: float) -> float:
        """The share of time that is kept, where checkpoints are so far apart."""
        return _kept(self.losing_per_s * period_s) * math.exp(-self.failed - self.preempted)

    def kept_of_failures(self, period_s: float) -> float:
        """The same if nothing was preempted."""
        return _kept(self.failures_per_s * period_s) * math.exp(-self.failed)


def figures_of(job: Job, overheads: JobOverheads) -> JobFigures:
    """The job's losses under these overheads, its goodput, and days and dollars of the whole run."""
    data_s, straggler_s, evaluation_s = between_steps(job, overheads)
    busy_s = job.step_s + data_s + straggler_s + evaluation_s
    stops = interruptions(job, overheads)
    best = best_every(job, overheads, busy_s, stops)
    every = best if overheads.checkpoint_every == BEST else _given(overheads)
    wait_s = _wait_s(job, overheads, every, busy_s)
    steps = None if every is None else min(float(every), job.steps)
    checkpoint_s = wait_s / steps if wait_s is not None and steps is not None else 0.0
    whole_s = busy_s + checkpoint_s
    unfailed = kept = 1.0
    waiting = 0.0
    if overheads.checkpoint_every is not None:
        period_s = whole_s * (steps or 0.0)
        unfailed, kept = stops.kept_of_failures(period_s), stops.kept(period_s)
        waiting = no_node_free(stops.failures_per_s, overheads)
    goodput = _with_ramp_up(job, overheads, job.step_s / whole_s * kept * (1 - waiting))
    return JobFigures(
        data_stall_s=data_s,
        straggler_s=straggler_s,
        checkpoint_stall_s=checkpoint_s,
        checkpoint_bytes=round(job.checkpoint_bytes),
        checkpoint_wait_s=wait_s,
        failure_share=1 - unfailed,
        between_failures_s=_between_s(stops.failures_per_s),
        best_checkpoint_every=best,
        goodput=goodput,
        checkpoint_every=every,
        evaluation_s=evaluation_s,
        restart_s=restart_s(job, overheads),
        preemption_share=unfailed - kept,
        between_preemptions_s=_between_s(stops.preemptions_per_s),
        waiting_share=kept * waiting,
        spares=overheads.spares,
        ramp_up_s=overheads.ramp_up_s or 0.0,
        **_whole(job, overheads, goodput),
    )


def between_steps(job: Job, overheads: JobOverheads) -> tuple[float, float, float]:
    """Seconds a step for data, for the slowest device, and for evaluation."""
    data_s = 0.0
    if overheads.data_tokens_per_s is not None:
        data_s = max(0.0, job.tokens_per_step / overheads.data_tokens_per_s - job.step_s)
    spread = overheads.device_spread
    straggler_s = spread * largest_of(job.devices) * job.compute_s if spread else 0.0
    return data_s, straggler_s, evaluation_s(overheads)


def evaluation_s(overheads: JobOverheads) -> float:
    """Seconds a step for evaluation."""
    return (
        0.0
        if overheads.eval_s is None or overheads.eval_every is None
        else overheads.eval_s / overheads.eval_every
    )


def largest_of(n: int) -> float:
    """The mean of the largest of n standard normals; 0 for one."""
    from statistics import NormalDist

    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0


def failures_per_s(overheads: JobOverheads, rated_nodes: float, usual: float) -> float:
    """Failures a second of the whole job: as stated for nodes of 8 devices, or as usual for its devices."""
    stated = overheads.failures_per_1000_node_days
    return usual if stated is None else stated * rated_nodes / (1000 * DAY_S)


def least_restart_s(overheads: JobOverheads) -> float:
    """Seconds of a restart without the loading of the checkpoint."""
    if overheads.restart_s is not None:
        return overheads.restart_s
    return failure_file().restart.fixed_s + (overheads.ramp_up_s or 0.0)


def restart_s(job: Job, overheads: JobOverheads) -> float:
    """Seconds from a failure until the job runs again, where a node is free.

    Storage gives a checkpoint at the rate at which it takes one: it is usually faster, and replicas that read
    the same bytes are served from its caches. Where no rate is known, loading is not counted.
    """
    if overheads.restart_s is not None:
        return overheads.restart_s
    write_s = _write_s(job, overheads)
    return least_restart_s(overheads) + (0.0 if write_s is None else max(write_s, job.staging_s))


def interruptions(job: Job, overheads: JobOverheads) -> Interruptions:
    """Failures and preemptions of the whole job, and what each costs besides lost steps."""
    failures = failures_per_s(overheads, job.rated_nodes, job.usual_failures_per_s)
    preemptions = (overheads.preemptions_per_1000_node_days or 0.0) * job.nodes / (1000 * DAY_S)
    own_s = restart_s(job, overheads)
    again_s = own_s + failure_file().spot.wait_s
    if overheads.preemption_restart_s is not None:
        again_s = overheads.preemption_restart_s
    write_s = _write_s(job, overheads)
    late_s = (write_s or 0.0) if overheads.checkpoint_async else 0.0
    saving_s = math.inf if write_s is None else max(write_s, job.staging_s)
    notice_s = overheads.preemption_notice_s
    saved = saving_s <= (failure_file().spot.notice_s if notice_s is None else notice_s)
    return Interruptions(
        failures_per_s=failures,
        preemptions_per_s=preemptions,
        losing_per_s=failures if saved else failures + preemptions,
        failed=failures * (own_s + late_s),
        preempted=preemptions * (again_s + (saving_s if saved else late_s)),
    )


def best_every(job: Job, overheads: JobOverheads, busy_s: float, stops: Interruptions) -> int | None:
    """Steps between checkpoints that lose least; None where the wait for one is unknown, or nothing fails."""
    write_s = _write_s(job, overheads)
    if write_s is None or stops.losing_per_s <= 0:
        return None
    wait_s, least = max(write_s, job.staging_s), 1
    if overheads.checkpoint_async:
        wait_s, least = job.staging_s, max(1, math.floor(write_s / busy_s))
    most = max(1, math.ceil(min(job.steps, 2**62)))
    ideal = (_best_period(stops.losing_per_s * wait_s) / stops.losing_per_s - wait_s) / busy_s
    low = min(max(least, math.floor(min(ideal, 2.0**62))), most)

    def kept_steps(every: int) -> float:
        steps = min(float(every), job.steps)
        whole_s = steps * busy_s + (_wait_s(job, overheads, every, busy_s) or 0.0)
        return steps / whole_s * _kept(stops.losing_per_s * whole_s)

    return max((min(low + more, most) for more in (0, 1)), key=kept_steps)


def no_node_free(failures: float, overheads: JobOverheads) -> float:
    """The share of time in which more nodes are out than there are spares: Erlang's loss formula."""
    if not overheads.repair_s:
        return 0.0
    return erlang_loss(overheads.spares + 1, failures * overheads.repair_s)


def erlang_loss(servers: int, load: float) -> float:
    """The share of time in which all servers are busy: load^m / m! over the sum of load^i / i!, i to m."""
    lost = 1.0
    for count in range(1, servers + 1):
        lost = load * lost / (count + load * lost)
    return lost


def spares_factor(overheads: JobOverheads, nodes: int) -> float:
    """What is paid over the nodes in use: a spare costs as much as the mean of them."""
    return 1 + overheads.spares / nodes


def _kept(x: float) -> float:
    """x / (exp(x) - 1): 1 for 0, and beyond the exponential's range what is left of it."""
    if x == 0.0:
        return 1.0
    return x / math.expm1(x) if x < 700 else x * math.exp(-x)


def _best_period(waiting: float) -> float:
    """x where exp(-x) = 1 + waiting - x, by Newton from Young's first term."""
    x = math.sqrt(2 * waiting)
    for _ in range(NEWTON_STEPS):
        if x == 0.0:
            return 0.0
        step = (x + math.expm1(-x) - waiting) / -math.expm1(-x)
        x -= step
        if abs(step) <= 1e-12 * x:
            break
    return x


def _given(overheads: JobOverheads) -> int | None:
    return None if overheads.checkpoint_every == BEST else overheads.checkpoint_every


def _write_s(job: Job, overheads: JobOverheads) -> float | None:
    """Seconds that storage takes for one checkpoint; None where its rate was not said."""
    rate = overheads.storage_bytes_per_s
    return None if rate is None else job.checkpoint_bytes / rate


def _wait_s(job: Job, overheads: JobOverheads, every: int | None, busy_s: float) -> float | None:
    """Seconds that steps wait for one checkpoint; None where the storage's rate was not said."""
    write_s = _write_s(job, overheads)
    if write_s is None:
        return None
    if not overheads.checkpoint_async:
        return max(write_s, job.staging_s)
    return job.staging_s + max(0.0, write_s - (math.inf if every is None else every) * busy_s)


def _between_s(rate: float) -> float | None:
    return 1 / rate if rate > 0 else None


def _with_ramp_up(job: Job, overheads: JobOverheads, steady: float) -> float:
    """The goodput of the whole run, which begins with the ramp-up; without it where tokens are unknown."""
    ramp_s = overheads.ramp_up_s or 0.0
    if not ramp_s or math.isinf(job.steps) or steady <= 0:
        return steady
    useful_s = job.steps * job.step_s
    return useful_s / (useful_s / steady + ramp_s)


def _whole(job: Job, overheads: JobOverheads, goodput: float) -> dict[str, float | None]:
    """Days and dollars of the whole run at this goodput, where tokens and a price are known."""
    if math.isinf(job.steps) or goodput <= 0:
        return {"days": None, "cost_usd": None}
    seconds = job.steps * job.step_s / goodput
    price = job.usd_per_hour
    usd = None if price is None else price * spares_factor(overheads, job.nodes) * seconds / 3600
    return {"days": seconds / DAY_S, "cost_usd": usd}


def job_figures(
    layout: LayoutModel, stages: Sequence[StageCost], step_s: float, breakdown: TimeBreakdown
) -> JobFigures | None:
    """What is lost beside steps of `step_s` seconds; None where nothing was said of it."""
    overheads = layout.problem.overheads
    return None if overheads.silent else figures_of(job_of(layout, stages, step_s, breakdown), overheads)


def job_of(layout: LayoutModel, stages: Sequence[StageCost], step_s: float, breakdown: TimeBreakdown) -> Job:
    """The job of a plan in plain numbers. Other overheads, or another price, need nothing else."""
    workload, cluster = layout.problem.workload, layout.problem.cluster
    written, own = checkpoint_bytes(layout, stages)
    return Job(
        step_s=step_s,
        compute_s=breakdown.compute_s + breakdown.recompute_s + breakdown.host_s,
        tokens_per_step=workload.tokens_per_step,
        tokens=workload.tokens,
        devices=layout.degrees.world,
        nodes=sum(group.nodes for group in cluster.groups),
        rated_nodes=rated_nodes(cluster),
        usual_failures_per_s=usual_failures_per_s(cluster),
        checkpoint_bytes=written,
        staging_s=_staging_s(layout, own),
        usd_per_hour=cluster.price_usd_per_hour,
    )


def most_kept(cluster: ClusterSpec, overheads: JobOverheads, steps: float, busy_s: float) -> float:
    """A share of time that no plan keeps more than, of steps that take `busy_s` at least with what is between
    them: a checkpoint takes no time to write and to load."""
    if overheads.checkpoint_every is None:
        return 1.0
    every = 1 if overheads.checkpoint_every == BEST else overheads.checkpoint_every
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
        job, dataclasses.replace(overheads, storage_bytes_per_s=1.0)
    )  # any: there are no bytes
    return stops.kept(min(every, steps) * busy_s) * (1 - no_node_free(stops.failures_per_s, overheads))


def checkpoint_bytes(layout: LayoutModel, stages: Sequence[StageCost]) -> tuple[float, tuple[float, ...]]:
    """Bytes of a checkpoint, and those that a device of each pipeline rank writes of it.

    Replicas write once. Each device writes its shard of all stages that it holds.
    """
    degrees = layout.degrees
    each = [state_bytes(layout, stage) for stage in stages]
    own = [0.0] * degrees.pp
    for index, size in enumerate(each):
        own[degrees.pp_rank_of_stage(index)] += size
    return degrees.tp * degrees.dp_shard * sum(each), tuple(own)


def host_link_bytes_per_s(problem: PlanningProblem) -> float | None:
    """One device's link to its host, nominal, of the slowest kind of the cluster; None: one is not known."""
    rates = [group.device.host_link_bytes_per_s for group in problem.cluster.groups]
    known = [rate for rate in rates if rate is not None]
    return min(known) if known and len(known) == len(rates) else None


def _staging_s(layout: LayoutModel, own: Sequence[float]) -> float:
    """Seconds until the last device has copied what it writes to its host; links that are not known: none."""
    largest: dict[Groups, float] = {}
    for groups, size in zip(rank_groups(layout.problem.cluster, layout.degrees), own, strict=True):
        largest[groups] = max(size, largest.get(groups, 0.0))
    return max(
        size / link if (link := host_link_bytes_per_s(seen_from(layout.problem, groups))) else 0.0
        for groups, size in largest.items()
    )
