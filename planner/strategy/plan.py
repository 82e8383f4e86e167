"""Plan: the self-contained answer of the planner, and plan.json.

`timeline` is the replay that the step time comes from; plans with very many actions leave it out. `engine` is
the one whose rules the plan keeps and whose software is priced; None: no particular one. `profiles` are those
that its figures rest on, by name; what was made without one, or before they were noted, has none. `rehearsal`
is what was measured of single ranks, where the plan was rehearsed.

Dollars of a plan: an hour of its cluster, and what is predicted for a number of steps. Unknown: None.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.foundation.decode import decode, encode, load_json_object, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.cluster import ClusterSpec
from planner.job.engine_settings import Engine, own_stack
from planner.job.objective import Objective
from planner.job.problem import Limits, PlanningProblem
from planner.model.attention import CpExchange
from planner.model.spec import ModelSpec
from planner.model.workload import Workload
from planner.profile.choose import ProfileUse
from planner.strategy.estimate import (
    MEMORY_TENANTS,
    Estimate,
    MemoryBreakdown,
    StageEstimate,
    TimelineEvent,
    Verdict,
)
from planner.strategy.rehearsal import Rehearsal
from planner.strategy.strategy import Degrees, OffloadCounts, RecomputeCounts, Stage, Strategy

PLAN_SCHEMA = 1


@frozen
class Certificate:
    """What the solver proves. `gap` is (objective - lower bound) / objective.

    `objective_s` is the predicted step time of the plan; `lower_bound_s` is below the predicted step time
    of every plan of the searched space.
    """

    status: str
    objective_s: float
    lower_bound_s: float
    gap: float
    wall_s: float
    shapes: int
    pruned: int
    milps: int
    verified: bool


@frozen
class Alternative:
    """A runner-up, with its whole strategy so that it can be run as well."""

    strategy: Strategy
    step_time_s: float
    peak_memory_bytes: int
    verdict: Verdict
    reason: str


@frozen
class Plan:
    """Everything needed to execute a strategy and to judge it, and nothing that is found elsewhere."""

    model: ModelSpec
    workload: Workload
    cluster: ClusterSpec
    strategy: Strategy
    stage_estimates: tuple[StageEstimate, ...]
    estimate: Estimate
    rank_axes: tuple[str, ...]
    rank_grid_shape: tuple[int, ...]
    schedule_table: tuple[tuple[str, ...], ...]
    solver: Certificate | None
    rejected: dict[str, int]
    alternatives: tuple[Alternative, ...]
    digests: dict[str, str]
    not_modelled: tuple[str, ...] = ()
    timeline: tuple[TimelineEvent, ...] = ()
    engine: Engine | None = None
    objective: Objective | None = None
    profiles: tuple[ProfileUse, ...] = ()
    rehearsal: Rehearsal | None = None

    @property
    def problem(self) -> PlanningProblem:
        """The problem that the plan answers, without the profiles, of which it has digests alone."""
        return PlanningProblem(
            model=self.model,
            workload=self.workload,
            cluster=self.cluster,
            profile=None,
            memory_limit_bytes=self.estimate.memory_limit_bytes,
            stack=own_stack(self.cluster),
            limits=Limits(engine=self.engine),
        )


@frozen
class _ModelDocument:
    name: str
    params_total: int
    params_active: int
    spec: ModelSpec


@frozen
class _StrategyDocument:
    tp: int
    pp: int
    chunks: int
    schedule: str
    dp: int
    dp_shard: int
    dp_replicate: int
    cp: int
    ep: int
    zero: int
    micro_batch: int
    num_micro_batches: int
    sequence_parallel: bool
    cp_exchange: str = CpExchange.RING
    etp: int | None = None
    device_order: tuple[int, ...] = ()


@frozen
class _MemoryDocument:
    weights_bytes: int
    grads_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    transient_bytes: int
    runtime_bytes: int
    total_bytes: int
    allocator_bytes: int = 0


@frozen
class _StageDocument:
    index: int
    layers: tuple[int, int]
    devices: tuple[int, ...]
    recompute: RecomputeCounts
    offload: OffloadCounts
    memory: _MemoryDocument
    time_s: float
    forward_s: float
    backward_s: float
    device: str = ""
    memory_limit_bytes: int | None = None


@frozen
class _RanksDocument:
    axes: tuple[str, ...]
    shape: tuple[int, ...]


@frozen
class _InputsDocument:
    digests: dict[str, str]
    profiles: tuple[ProfileUse, ...] = ()


@frozen
class _AlternativeDocument:
    strategy: _StrategyDocument
    stages: tuple[Stage, ...]
    step_time_s: float
    peak_memory_bytes: int
    verdict: Verdict
    reason: str


@frozen
class _PlanDocument:
    schema_version: int
    model: _ModelDocument
    workload: Workload
    cluster: ClusterSpec
    strategy: _StrategyDocument
    stages: tuple[_StageDocument, ...]
    estimate: Estimate
    ranks: _RanksDocument
    schedule_table: tuple[tuple[str, ...], ...]
    inputs: _InputsDocument
    not_modelled: tuple[str, ...] = ()
    timeline: tuple[TimelineEvent, ...] = ()
    engine: Engine | None = None
    objective: Objective | None = None
    rehearsal: Rehearsal | None = None
    solver: Certificate | None = None
    rejected: dict[str, int] | None = None
    alternatives: tuple[_AlternativeDocument, ...] | None = None


def degrees_document(degrees: Degrees) -> dict[str, Any]:
    return {
        "tp": degrees.tp,
        "pp": degrees.pp,
        "chunks": degrees.chunks,
        "schedule": str(degrees.schedule),
        "dp": degrees.dp,
        "dp_shard": degrees.dp_shard,
        "dp_replicate": degrees.dp_replicate,
        "cp": degrees.cp,
        "ep": degrees.ep,
        "zero": int(degrees.zero),
        "micro_batch": degrees.micro_batch,
        "num_micro_batches": degrees.num_micro_batches,
        "sequence_parallel": degrees.sequence_parallel,
        "cp_exchange": str(degrees.cp_exchange),
        "etp": degrees.etp,
        "device_order": list(degrees.device_order),
    }


def _stage_document(plan: Plan, index: int) -> dict[str, Any]:
    stage, estimate = plan.strategy.stages[index], plan.stage_estimates[index]
    degrees = plan.strategy.degrees
    return {
        "index": index,
        "layers": [stage.first, stage.end],
        "devices": list(degrees.ranks_of_pp_rank(degrees.pp_rank_of_stage(index))),
        "recompute": encode(stage.recompute),
        "offload": encode(stage.offload),
        "memory": {**encode(estimate.memory), "total_bytes": estimate.memory.total_bytes},
        "time_s": estimate.time_s,
        "forward_s": estimate.forward_s,
        "backward_s": estimate.backward_s,
        "device": estimate.device,
        "memory_limit_bytes": estimate.memory_limit_bytes,
    }


def encode_plan(plan: Plan) -> dict[str, Any]:
    """The plan as the JSON object of plan.json. Without solver: the answer of `plan estimate`."""
    document: dict[str, Any] = {
        "schema_version": PLAN_SCHEMA,
        "model": {
            "name": plan.model.name,
            "params_total": plan.model.params_total,
            "params_active": plan.model.params_active,
            "spec": encode(plan.model),
        },
        "workload": encode(plan.workload),
        "cluster": encode(plan.cluster),
        "strategy": degrees_document(plan.strategy.degrees),
        "stages": [_stage_document(plan, index) for index in range(len(plan.strategy.stages))],
        "estimate": encode(plan.estimate),
        "ranks": {"axes": list(plan.rank_axes), "shape": list(plan.rank_grid_shape)},
        "schedule_table": [list(row) for row in plan.schedule_table],
        "inputs": {"digests": plan.digests, "profiles": [encode(each) for each in plan.profiles]},
        "not_modelled": list(plan.not_modelled),
        "timeline": [encode(event) for event in plan.timeline],
    }
    if plan.engine is not None:
        document["engine"] = str(plan.engine)
    if plan.objective is not None:
        document["objective"] = encode(plan.objective)
    if plan.rehearsal is not None:
        document["rehearsal"] = encode(plan.rehearsal)
    if plan.solver is not None:
        document["solver"] = encode(plan.solver)
        document["rejected"] = plan.rejected
        document["alternatives"] = [
            {
                "strategy": degrees_document(other.strategy.degrees),
                "stages": [encode(stage) for stage in other.strategy.stages],
                "step_time_s": other.step_time_s,
                "peak_memory_bytes": other.peak_memory_bytes,
                "verdict": str(other.verdict),
                "reason": other.reason,
            }
            for other in plan.alternatives
        ]
    return document


def decode_plan(data: object, *, source: str) -> Plan:
    """A Plan from the JSON object of plan.json. Raises InputError with every fault."""
    document = decode(_PlanDocument, data, source=source)
    if document.schema_version != PLAN_SCHEMA:
        raise InputError(
            Problem(
                where=f"{source}: schema_version",
                fault=f"is {document.schema_version}; this version reads {PLAN_SCHEMA}.",
                fix="solve again with `plan solve`",
            )
        )
    return Plan(
        model=document.model.spec,
        workload=document.workload,
        cluster=document.cluster,
        strategy=Strategy(
            degrees=_degrees(document.strategy, f"{source}: strategy"),
            stages=tuple(
                Stage(first=s.layers[0], end=s.layers[1], recompute=s.recompute, offload=s.offload)
                for s in document.stages
            ),
        ),
        stage_estimates=tuple(
            StageEstimate(
                memory=MemoryBreakdown(**{name: getattr(s.memory, name) for name in MEMORY_TENANTS}),
                time_s=s.time_s,
                forward_s=s.forward_s,
                backward_s=s.backward_s,
                device=s.device,
                memory_limit_bytes=s.memory_limit_bytes,
            )
            for s in document.stages
        ),
        estimate=document.estimate,
        rank_axes=document.ranks.axes,
        rank_grid_shape=document.ranks.shape,
        schedule_table=document.schedule_table,
        solver=document.solver,
        rejected=document.rejected or {},
        alternatives=tuple(
            Alternative(
                strategy=Strategy(
                    degrees=_degrees(other.strategy, f"{source}: alternatives"), stages=other.stages
                ),
                step_time_s=other.step_time_s,
                peak_memory_bytes=other.peak_memory_bytes,
                verdict=other.verdict,
                reason=other.reason,
            )
            for other in document.alternatives or ()
        ),
        digests=document.inputs.digests,
        profiles=document.inputs.profiles,
        not_modelled=document.not_modelled,
        timeline=document.timeline,
        engine=document.engine,
        objective=document.objective,
        rehearsal=document.rehearsal,
    )


def _degrees(document: _StrategyDocument, where: str) -> Degrees:
    if document.dp != document.dp_replicate * document.dp_shard:
        raise InputError(
            Problem(
                where=f"{where}.dp",
                fault=f"is {document.dp}, but dp_replicate x dp_shard is "
                f"{document.dp_replicate} x {document.dp_shard}.",
            )
        )
    fields = {key: value for key, value in encode(document).items() if key != "dp"}
    return decode(Degrees, fields, source=where)


def save_plan(plan: Plan, path: Path) -> None:
    """Writes plan.json whole or not at all."""
    write_atomic(path, json.dumps(encode_plan(plan), indent=1, allow_nan=False) + "\n")


def load_plan(path: Path) -> Plan:
    """The plan in a file."""
    return decode_plan(load_json_object(path), source=str(path))


def predicted_memory_by_rank(plan: Plan) -> tuple[int, ...]:
    """Predicted peak bytes of every rank: weights and activations of all stages that it holds."""
    degrees = plan.strategy.degrees
    peaks = [0] * degrees.world
    for stage, estimate in enumerate(plan.stage_estimates):
        for rank in degrees.ranks_of_pp_rank(degrees.pp_rank_of_stage(stage)):
            peaks[rank] += estimate.memory.total_bytes
    return tuple(peaks)


def usd_per_hour(plan: Plan) -> float | None:
    """Dollars an hour of the cluster, with the spare nodes that the estimate counts; None: no price."""
    estimate, price = plan.estimate, plan.cluster.price_usd_per_hour
    if price is None:  # a plan that was written elsewhere may state days and dollars alone
        if estimate.cost_usd is None or not estimate.days:
            return None
        return estimate.cost_usd / (24 * estimate.days)
    spares = estimate.job.spares if estimate.job is not None else 0
    return price * (1 + spares / sum(group.nodes for group in plan.cluster.groups))


def usd_of(plan: Plan, seconds: float) -> float | None:
    """Dollars of so much time on the plan's cluster."""
    price = usd_per_hour(plan)
    return None if price is None else price * seconds / 3600


def predicted_usd(plan: Plan, steps: int) -> float | None:
    """Dollars that so many steps should take, at the job's goodput where the plan states one."""
    job = plan.estimate.job
    goodput = 1.0 if job is None else job.goodput
    return usd_of(plan, steps * plan.estimate.step_time_s / goodput) if goodput > 0 else None


def added_usd(first: float | None, second: float | None) -> float | None:
    """Dollars together; unknown where one of them is."""
    return None if first is None or second is None else first + second


def told_usd(usd: float | None) -> str:
    """Dollars for people; what is not known says so, and is never 0."""
    return "unknown" if usd is None else f"${usd:,.2f}"
