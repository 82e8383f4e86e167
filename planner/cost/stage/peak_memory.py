"""Bytes of one device at its worst moment of a step, by tenant.

States (weights, gradients, optimizer) are planner.cost.memory.parameter_state', moments
planner.cost.stage.memory_timeline'. Activations:
what micro-batches in flight keep at the worst moment of the schedule's row
(planner.strategy.schedule.table). Transient:
what that moment holds besides. Allocator: what it reserves beyond tensors, pools and a slack
(reserved_bytes). Runtime: communicators. The driver's own context lies outside the memory that a program can
allocate.

Memory at five moments of a run, on the fullest device and in the memory of its node.

    moment            device                               host, for each device of the node
    load              weights and one unit in fp32         a process, and that unit
    forward_backward  planner.cost.stage.memory_timeline                 a process
    optimizer_step    weights, gradients, optimizer, the   a process
                      step's temporaries
    checkpoint_save   weights, optimizer (and gradients    a process, and a copy of the state that it
                      where buffers keep them)             writes: 4 bytes a weight and the optimizer's
    resume            weights, optimizer, one unit         a process, and that state as it is read

Weights are made and loaded unit by unit, so that no device holds a whole model besides its shards.
Allocator and communicators count at every moment; what is offloaded is in host memory at every moment, and is
written from there without a copy.

Whether a predicted peak fits: SAFE, RISKY or NO, by a band of errors.

The band is of measured over predicted, less 1: from -lower to +upper. Where a calibration left quantiles of
its residuals in the profile (memory_error_lower, memory_error_upper), they are the band; else the priors by
origin, weighted by how much of an estimate rests on each.

    SAFE    peak (1 + upper) <= limit
    NO      peak (1 - lower) > limit
    RISKY   between

The memory of pipeline ranks against their limits: which rank is nearest to its own, and the verdict.

Ranks on equal devices are judged together. The answer is that of the worst verdict, and among equal ones of
the rank that takes the largest part of its limit: in a mixed cluster not always that of the most bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from planner.cost.constants import fitted_constant, memory_constants
from planner.cost.stage.memory_timeline import StageMemory, idle_apart, resident, step_temporaries_bytes
from planner.cost.stage.stage import LayoutModel, StageCost
from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.strategy.estimate import Coverage, MemoryBreakdown, MemoryFigures, MomentMemory, Verdict
from planner.strategy.schedule.table import Flights, InFlight

MEMORY_ERROR = {"measured": 0.05, "interpolated": 0.08, "fitted": 0.12, "datasheet": 0.15}
"""Half width of the memory band by origin, as a share; the verdict is SAFE only beyond it."""

REHEARSED_MEMORY_ERROR = {"device": 0.02, "processor": 0.02, "fake tensors": 0.05}
"""Half width of the memory band of a rehearsed rank, as a share, by what it ran on. Tensors of a rank alone
and of the same rank among others differ by less than 0.1 % (bench/results/*-rehearsal.json); the rest is what
other ranks or another allocator add. Shapes alone are traced with a CPU's kernels, which keep other bytes
than an accelerator's."""


def rank_memory(
    layout: LayoutModel, vectors: Flights, held: dict[int, StageCost]
) -> dict[int, MemoryBreakdown]:
    """Memory by stage of one pipeline rank; their sum is the rank's peak.

    `vectors` are what is in flight at the fullest moments of the rank's row, `held` its stages. Transients
    and runtime are counted once, with the stage that has the larger transient at the worst of these moments.
    Where that depends on what is in flight, as the moments of FSDP2's engines and offloaded activations do, a
    stage with nothing in flight runs no pass.
    """
    idle = idle_apart(layout) or any(stage.hosted for stage in held.values())
    each = {index: StageMemory(layout, stage) for index, stage in held.items()}
    moments = [
        _Moment(vector, each, [index for index in held if not idle or vector[index].alive])
        for vector in vectors
    ]
    return max(moments, key=lambda moment: moment.reserved_bytes).divided(layout)


def host_bytes(vectors: Flights, held: dict[int, StageCost]) -> float:
    """What one device of a pipeline rank has in host memory: states, and the most activations in flight."""
    hosted = {index: stage.hosted for index, stage in held.items() if stage.hosted is not None}
    states = sum(stage.state_bytes for stage in hosted.values())
    kept = (sum(v[index].alive * stage.saved_bytes for index, stage in hosted.items()) for v in vectors)
    return states + max(kept)


class _Moment:
    """A rank's stages with what is in flight of each, one of `running` in a pass: that which needs most."""

    def __init__(
        self, flight: dict[int, InFlight], held: dict[int, StageMemory], running: Sequence[int]
    ) -> None:
        self.flight, self.held = flight, held
        beyond = {index: held[index].transient_bytes(flight[index]) for index in running}
        self.widest = max(running, key=beyond.__getitem__)
        self.beyond_bytes = beyond[self.widest]
        standing = (stage.held_bytes(flight[index]) for index, stage in held.items())
        self.reserved_bytes = self.beyond_bytes + sum(standing)

    def divided(self, layout: LayoutModel) -> dict[int, MemoryBreakdown]:
        """The rank's tenants by stage."""
        flight, held, widest = self.flight, self.held, self.widest
        most = held[widest]
        pools = most.reserved_bytes(flight[widest]) - most.peak_bytes(flight[widest])
        late = {index: stage.late_bytes * (not flight[index].begun) for index, stage in held.items()}
        # Below 0: gradients that do not exist yet at the worst moment.
        transient = self.beyond_bytes - pools - late[widest]
        late[widest] = max(-transient, 0.0)
        parts = {
            index: MemoryBreakdown(
                weights_bytes=round(each.kept.weights),
                grads_bytes=round(each.kept.grads - late[index]),
                optimizer_bytes=round(each.kept.optimizer),
                activations_bytes=round(
                    flight[index].kept_bytes(each.stage.saved_bytes, each.stage.waiting_bytes)
                ),
                transient_bytes=round(max(transient, 0.0)) if index == widest else 0,
            )
            for index, each in held.items()
        }
        allocator = round(pools + (layout.memory.allocator_slack - 1) * self.reserved_bytes)
        runtime = dataclasses.replace(
            parts[widest], allocator_bytes=allocator, runtime_bytes=layout.runtime_bytes
        )
        return {**parts, widest: runtime}


HOST_PROCESS_BYTES = 242_446_336
"""Resident bytes of a process that imported torch, where no profile measured it (torch 2.13 on a CPU)."""


class Moment(StrEnum):
    """When memory is looked at."""

    LOAD = "load"
    FORWARD_BACKWARD = "forward_backward"
    OPTIMIZER_STEP = "optimizer_step"
    CHECKPOINT_SAVE = "checkpoint_save"
    RESUME = "resume"


def memory_figures(
    layout: LayoutModel,
    held: dict[int, StageCost],
    parts: dict[int, MemoryBreakdown],
    hosted_bytes: float = 0.0,
) -> MemoryFigures:
    """The figures of one pipeline rank from its stages and their tenants.

    `hosted_bytes` is what each device of the rank that offloads most has in host memory.
    """
    total = sum((part for part in parts.values()), MemoryBreakdown())
    tensors = _tensors(layout, held, total)
    overhead = layout.runtime_bytes
    slack = layout.memory.allocator_slack
    peak = total.total_bytes
    device = {
        moment: peak if size >= total.allocated_bytes else min(peak, round(slack * size + overhead))
        for moment, size in tensors.items()
    }
    host = _host(layout, held, hosted_bytes)
    devices = _node_devices(layout)
    worst = max(tensors, key=lambda moment: tensors[moment])
    context = round(layout.memory.context_bytes) if layout.overlaps else 0
    return MemoryFigures(
        allocated_bytes=total.allocated_bytes,
        reserved_bytes=total.allocated_bytes + total.allocator_bytes,
        device_bytes=peak + context,
        host_bytes=max(host.values()),
        worst=str(worst),
        moments=tuple(
            MomentMemory(moment=str(moment), device_bytes=device[moment], host_bytes=host[moment])
            for moment in Moment
        ),
        hosted_bytes=round(devices * hosted_bytes),
    )


def _tensors(layout: LayoutModel, held: dict[int, StageCost], total: MemoryBreakdown) -> dict[Moment, float]:
    """Bytes of tensors at each moment."""
    kept = [resident(layout, stage) for stage in held.values()]
    weights, grads = sum(k.weights for k in kept), sum(k.grads for k in kept)
    optimizer, unit = sum(k.optimizer for k in kept), max(s.largest_unit_params for s in held.values())
    step = weights + grads + optimizer + max(step_temporaries_bytes(layout, s) for s in held.values())
    buffered = layout.problem.engine_settings.engine is Engine.MEGATRON
    saving = weights + optimizer + (grads if buffered else 0.0)
    return {
        Moment.LOAD: weights + 4 * unit,
        Moment.FORWARD_BACKWARD: float(total.allocated_bytes),
        Moment.OPTIMIZER_STEP: step,
        Moment.CHECKPOINT_SAVE: saving,
        Moment.RESUME: weights + optimizer + 4 * unit,
    }


def _node_devices(layout: LayoutModel) -> int:
    return min(layout.problem.cluster.devices_per_node, layout.degrees.world)


def _host(layout: LayoutModel, held: dict[int, StageCost], hosted_bytes: float) -> dict[Moment, int]:
    """Bytes of host memory of a node at each moment; on a CPU, what is staged lies in the devices' own."""
    profile = layout.problem.profile
    measured = profile.constant("runtime_bytes") if profile else None
    process = (measured or HOST_PROCESS_BYTES) + hosted_bytes
    devices = _node_devices(layout)
    unit = 4 * max(stage.largest_unit_params for stage in held.values())
    state = sum(state_bytes(layout, stage) for stage in held.values())
    staged = {Moment.LOAD: unit, Moment.CHECKPOINT_SAVE: state, Moment.RESUME: state}
    return {moment: round(devices * (process + staged.get(moment, 0.0))) for moment in Moment}


def state_bytes(layout: LayoutModel, stage: StageCost) -> float:
    """What one device writes of a checkpoint: its fp32 weights, and the optimizer's state with them."""
    kept, shards = resident(layout, stage), layout.degrees.weight_shards
    routed = stage.routed_params
    engine = layout.problem.engine_settings.engine
    if layout.problem.workload.adapters is not None:
        return kept.grads + kept.optimizer  # the adapters and their state; the base is not written
    if engine in (Engine.MEGATRON, Engine.DEEPSPEED) and layout.problem.workload.precision.compute_bytes < 4:
        return kept.optimizer  # masters are part of it
    there = stage.hosted.state_params if stage.hosted is not None else 0.0
    own = (stage.params - routed - there) / shards + routed / layout.degrees.expert_shards
    return 4 * own + kept.optimizer


ORIGINS = ("measured", "interpolated", "fitted", "datasheet")


@frozen
class ErrorBand:
    """How far a measured peak may lie below and above its prediction, as shares of the prediction."""

    lower: float
    upper: float


def band(errors: dict[str, float], coverage: Coverage) -> float:
    """The error of a mixture of origins: their errors weighted by share."""
    return float(sum(errors[origin] * getattr(coverage, origin) for origin in ORIGINS))


@frozen
class MemoryLimits:
    """What a problem says of peaks: its limit, the band where runs left one, the allocator's slack."""

    limit_bytes: int
    lower: float | None
    upper: float | None
    slack: float

    def band(self, coverage: Coverage) -> ErrorBand:
        """The band of its predictions that rest on such origins."""
        return _band(self.lower, self.upper, coverage)

    def safe_tensor_bytes(self, coverage: Coverage, runtime_bytes: float) -> float:
        """What tensors and pools may take for a peak that is still SAFE, `runtime_bytes` of it included.

        The allocator's slack multiplies all but the runtime: peak = slack x tensors + runtime.
        """
        peak = safe_peak_bytes(self.limit_bytes, self.band(coverage))
        return (peak - runtime_bytes) / self.slack + runtime_bytes


def memory_limits(problem: PlanningProblem) -> MemoryLimits:
    """Those of a problem."""
    lower, upper = _fitted_errors(problem)
    slack = memory_constants(problem).allocator_slack
    return MemoryLimits(limit_bytes=problem.memory_limit_bytes, lower=lower, upper=upper, slack=slack)


def memory_band(problem: PlanningProblem, coverage: Coverage) -> ErrorBand:
    """The band of a problem's memory predictions."""
    return _band(*_fitted_errors(problem), coverage)


def _fitted_errors(problem: PlanningProblem) -> tuple[float | None, float | None]:
    lower, upper = (fitted_constant(problem, f"memory_error_{name}") for name in ("lower", "upper"))
    return lower, upper


def _band(lower: float | None, upper: float | None, coverage: Coverage) -> ErrorBand:
    prior = band(MEMORY_ERROR, coverage)
    return ErrorBand(
        lower=prior if lower is None else lower,
        upper=prior if upper is None else upper,
    )


def verdict(peak_bytes: float, limit_bytes: float, error: ErrorBand) -> Verdict:
    """SAFE where even the upper end of the band fits, NO where even the lower end does not."""
    if peak_bytes * (1 + error.upper) <= limit_bytes:
        return Verdict.SAFE
    return Verdict.RISKY if peak_bytes * (1 - error.lower) <= limit_bytes else Verdict.NO


def safe_peak_bytes(limit_bytes: float, error: ErrorBand) -> float:
    """The largest predicted peak that is still judged SAFE."""
    return limit_bytes / (1 + error.upper)


def safe_tensor_bytes(problem: PlanningProblem, coverage: Coverage, runtime_bytes: float) -> float:
    """The same of a problem that is asked once (MemoryLimits)."""
    return memory_limits(problem).safe_tensor_bytes(coverage, runtime_bytes)


class RankMemory(NamedTuple):
    """The stages that a pipeline rank holds, their tenants, and what of them lies in host memory."""

    held: dict[int, StageCost]
    parts: dict[int, MemoryBreakdown]
    host_bytes: float = 0.0

    @property
    def peak_bytes(self) -> int:
        return sum(part.total_bytes for part in self.parts.values())


class JudgedMemory(NamedTuple):
    """The peak of a rank, its limit, the interval around it, what it is made of, and whether it fits."""

    peak_bytes: int
    limit_bytes: int
    interval_bytes: tuple[int, int]
    figures: MemoryFigures
    verdict: Verdict

    @property
    def pressure(self) -> tuple[int, float]:
        """How bad the verdict is, then the part of the limit that is taken."""
        return list(Verdict).index(self.verdict), self.peak_bytes / max(self.limit_bytes, 1)


def most_pressed(
    layouts: Sequence[LayoutModel], ranks: Sequence[RankMemory], known: Iterable[tuple[LayoutModel, Coverage]]
) -> JudgedMemory:
    """The judged memory of the worst of some ranks. `known` are the distinct layouts and their coverage."""
    judged = []
    for layout, coverage in known:
        own = [rank for rank, other in zip(ranks, layouts, strict=True) if other is layout]
        judged.append(_judged(layout, own, coverage))
    return max(judged, key=lambda each: each.pressure)


def _judged(layout: LayoutModel, ranks: Sequence[RankMemory], coverage: Coverage) -> JudgedMemory:
    """Equal devices: the rank of the largest peak, and the node whose ranks offload most."""
    fullest = max(ranks, key=lambda rank: rank.peak_bytes)
    hosted = max(rank.host_bytes for rank in ranks)
    figures = memory_figures(layout, fullest.held, fullest.parts, hosted)
    problem, peak = layout.problem, fullest.peak_bytes
    error = memory_band(problem, coverage)
    fits = verdict(peak, problem.memory_limit_bytes, error)
    return JudgedMemory(
        peak_bytes=peak,
        limit_bytes=problem.memory_limit_bytes,
        interval_bytes=(round(peak * (1 - error.lower)), round(peak * (1 + error.upper))),
        figures=figures,
        verdict=fits if _host_holds(problem, figures) else Verdict.NO,
    )


def _host_holds(problem: PlanningProblem, figures: MemoryFigures) -> bool:
    """Whether the memory of a node, if known, holds what is offloaded to it."""
    share = problem.cluster.host_memory_bytes_per_device
    if not figures.hosted_bytes or share is None:
        return True
    return figures.host_bytes <= share * problem.cluster.devices_per_node
