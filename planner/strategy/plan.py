"""Plan: the self-contained answer of the planner, and its file plan.json.

A Plan holds the model, workload and cluster, the chosen strategy, its estimate, its schedule and the solver's
certificate. The classes that end in `Document` declare the keys of plan.json; `encode_plan` and `decode_plan`
fill one side from the other by field name.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from planner.foundation.decode import decode, encode, load_json_object, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.hardware.cluster import ClusterSpec
from planner.job.engine_settings import Engine, native_settings
from planner.job.objective import Objective
from planner.job.problem import Limits, PlanningProblem
from planner.model.attention import CpExchange
from planner.model.spec import ModelSpec
from planner.model.workload import Workload
from planner.profile.choose import ProfileUse
from planner.strategy.estimate import Estimate, MemoryBreakdown, StageEstimate, TimelineEvent, Verdict
from planner.strategy.rehearsal import Rehearsal
from planner.strategy.schedule.table import Table, parse_table
from planner.strategy.strategy import (
    Degrees,
    OffloadCounts,
    RecomputeCounts,
    Schedule,
    Stage,
    Strategy,
    Zero,
)

T = TypeVar("T")
PLAN_SCHEMA = 1


@frozen
class Certificate:
    """What the solver proves about a plan.

    `objective_s` is the predicted step time of the plan, and `lower_bound_s` is at most the predicted step
    time of any plan in the searched space; `gap` is (objective - lower bound) / objective.
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
    """A strategy with everything that is needed to execute and to judge it.

    `engine` is the training engine whose rules the plan obeys and whose software is priced (None: any).
    `profiles` names the profiles that its figures rest on. `schedule_table` is the schedule as text, as in
    plan.json; `table` is the same parsed. `timeline` is the replay that the step time comes from (empty for
    plans with very many actions). `rehearsal` holds measurements of single ranks, if the plan was rehearsed.
    """

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
    def table(self) -> Table:
        """The schedule table. Raises InputError if its text cannot be parsed."""
        return parse_table(self.schedule_table)

    @property
    def problem(self) -> PlanningProblem:
        """The problem that the plan answers, without its profiles: a plan stores only their digests."""
        return PlanningProblem(
            model=self.model,
            workload=self.workload,
            cluster=self.cluster,
            profile=None,
            memory_limit_bytes=self.estimate.memory_limit_bytes,
            engine_settings=native_settings(self.cluster),
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
    schedule: Schedule
    dp: int
    dp_shard: int
    dp_replicate: int
    cp: int
    ep: int
    zero: Zero
    micro_batch: int
    num_micro_batches: int
    sequence_parallel: bool
    cp_exchange: CpExchange = CpExchange.RING
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
    allocator_bytes: int = 0
    total_bytes: int


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
    """Keys from `engine` on are left out of plan.json when they are None."""

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


def _filled(kind: type[T], *sources: Any, **given: Any) -> T:
    """Return a `kind` whose fields are `given`, or attributes of the first source that has them."""
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        source = next((each for each in sources if hasattr(each, field.name)), None)
        if field.name not in given and source is not None:
            given[field.name] = getattr(source, field.name)
    return kind(**given)


def degrees_document(degrees: Degrees) -> dict[str, Any]:
    """Return the `strategy` object of plan.json."""
    document: dict[str, Any] = encode(_filled(_StrategyDocument, degrees))
    return document


def _stage_document(plan: Plan, index: int) -> _StageDocument:
    stage, estimate, degrees = plan.strategy.stages[index], plan.stage_estimates[index], plan.strategy.degrees
    return _filled(
        _StageDocument,
        estimate,
        stage,
        index=index,
        layers=(stage.first, stage.end),
        devices=degrees.ranks_of_pp_rank(degrees.pp_rank_of_stage(index)),
        memory=_filled(_MemoryDocument, estimate.memory),
    )


def encode_plan(plan: Plan) -> dict[str, Any]:
    """Return the JSON object of plan.json. A plan without a solver gives the answer of `plan estimate`."""
    alternatives = tuple(
        _filled(
            _AlternativeDocument,
            other,
            strategy=_filled(_StrategyDocument, other.strategy.degrees),
            stages=other.strategy.stages,
        )
        for other in plan.alternatives
    )
    searched = plan.solver is not None
    document = _filled(
        _PlanDocument,
        plan,
        schema_version=PLAN_SCHEMA,
        model=_filled(_ModelDocument, plan.model, spec=plan.model),
        strategy=_filled(_StrategyDocument, plan.strategy.degrees),
        stages=tuple(_stage_document(plan, index) for index in range(len(plan.strategy.stages))),
        ranks=_RanksDocument(axes=plan.rank_axes, shape=plan.rank_grid_shape),
        inputs=_filled(_InputsDocument, plan),
        rejected=plan.rejected if searched else None,
        alternatives=alternatives if searched else None,
    )
    return {key: value for key, value in encode(document).items() if value is not None}


def decode_plan(data: object, *, source: str) -> Plan:
    """Return the Plan of a JSON object of plan.json. Raises InputError with every fault."""
    document = decode(_PlanDocument, data, source=source)
    if document.schema_version != PLAN_SCHEMA:
        raise InputError(
            Problem(
                where=f"{source}: schema_version",
                fault=f"is {document.schema_version}; this version reads {PLAN_SCHEMA}.",
                fix="solve again with `plan solve`",
            )
        )
    stages = tuple(_filled(Stage, each, first=each.layers[0], end=each.layers[1]) for each in document.stages)
    alternatives = tuple(
        _filled(
            Alternative,
            other,
            strategy=Strategy(
                degrees=_degrees(other.strategy, f"{source}: alternatives"), stages=other.stages
            ),
        )
        for other in document.alternatives or ()
    )
    return _filled(
        Plan,
        document,
        document.inputs,
        model=document.model.spec,
        strategy=Strategy(degrees=_degrees(document.strategy, f"{source}: strategy"), stages=stages),
        stage_estimates=tuple(
            _filled(StageEstimate, each, memory=_filled(MemoryBreakdown, each.memory))
            for each in document.stages
        ),
        rank_axes=document.ranks.axes,
        rank_grid_shape=document.ranks.shape,
        rejected=document.rejected or {},
        alternatives=alternatives,
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
    return _filled(Degrees, document)


def save_plan(plan: Plan, path: Path) -> None:
    """Write plan.json atomically."""
    write_atomic(path, json.dumps(encode_plan(plan), indent=1, allow_nan=False) + "\n")


def load_plan(path: Path) -> Plan:
    """Return the plan in a file. Raises InputError."""
    return decode_plan(load_json_object(path), source=str(path))


def predicted_memory_by_rank(plan: Plan) -> tuple[int, ...]:
    """Return the predicted peak memory of every global rank, over all stages that it holds, in bytes."""
    degrees = plan.strategy.degrees
    peaks = [0] * degrees.world
    for stage, estimate in enumerate(plan.stage_estimates):
        for rank in degrees.ranks_of_pp_rank(degrees.pp_rank_of_stage(stage)):
            peaks[rank] += estimate.memory.total_bytes
    return tuple(peaks)


def usd_per_hour(plan: Plan) -> float | None:
    """Return the price of the cluster and the estimate's spare nodes, in dollars an hour; None if unknown."""
    estimate, price = plan.estimate, plan.cluster.price_usd_per_hour
    if price is None:  # a plan.json written by other tools may state days and dollars without a price
        if estimate.cost_usd is None or not estimate.days:
            return None
        return estimate.cost_usd / (24 * estimate.days)
    spares = estimate.job.spares if estimate.job is not None else 0
    return price * (1 + spares / sum(group.nodes for group in plan.cluster.groups))


def cost_usd(plan: Plan, seconds: float) -> float | None:
    """Return the price of `seconds` on the plan's cluster, in dollars; None if unknown."""
    price = usd_per_hour(plan)
    return None if price is None else price * seconds / 3600


def predicted_usd(plan: Plan, steps: int) -> float | None:
    """Return the predicted cost of `steps` steps at the job's goodput, in dollars; None if unknown."""
    job = plan.estimate.job
    goodput = 1.0 if job is None else job.goodput
    return cost_usd(plan, steps * plan.estimate.step_time_s / goodput) if goodput > 0 else None


def sum_usd(first: float | None, second: float | None) -> float | None:
    """Return the sum of two amounts; None if either is unknown."""
    return None if first is None or second is None else first + second
