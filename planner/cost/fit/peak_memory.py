"""Bytes of one device at its worst moment of a step, by tenant.

States (weights, gradients, optimizer) are planner.cost.memory.parameter_state', moments
planner.cost.fit.memory_timeline'. Activations:
what micro-batches in flight keep at the worst moment of the schedule's row
(planner.strategy.schedule.table). Transient:
what that moment holds besides. Allocator: what it reserves beyond tensors, pools and a slack
(reserved_bytes). Runtime: communicators. The driver's own context lies outside the memory that a program can
allocate.

Memory at five moments of a run, on the fullest device and in the memory of its node.

    moment            device                               host, for each device of the node
    load              weights and one unit in fp32         a process, and that unit
    forward_backward  planner.cost.fit.memory_timeline                 a process
    optimizer_step    weights, gradients, optimizer, the   a process
                      step's temporaries
    checkpoint_save   weights, optimizer (and gradients    a process, and a copy of the state that it
                      where buffers keep them)             writes: 4 bytes a weight and the optimizer's
    resume            weights, optimizer, one unit         a process, and that state as it is read

Weights are made and loaded unit by unit, so that no device holds a whole model besides its shards.
Allocator and communicators count at every moment; what is offloaded is in host memory at every moment, and is
written from there without a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import StrEnum

from planner.cost.fit.memory_timeline import StageMemory, idle_apart, resident, step_temporaries_bytes
from planner.cost.stage.stage import ShapeModel, StageCost
from planner.job.engine_settings import Engine
from planner.strategy.estimate import MemoryBreakdown, MemoryFigures, MomentMemory
from planner.strategy.schedule.table import Flights, InFlight


def rank_memory(
    shape: ShapeModel, vectors: Flights, held: dict[int, StageCost]
) -> dict[int, MemoryBreakdown]:
    """Memory by stage of one pipeline rank; their sum is the rank's peak.

    `vectors` are what is in flight at the fullest moments of the rank's row, `held` its stages. Transients
    and runtime are counted once, with the stage that has the larger transient at the worst of these moments.
    Where that depends on what is in flight, as the moments of FSDP2's engines and offloaded activations do, a
    stage with nothing in flight runs no pass.
    """
    idle = idle_apart(shape) or any(stage.hosted for stage in held.values())
    each = {index: StageMemory(shape, stage) for index, stage in held.items()}
    moments = [
        _Moment(vector, each, [index for index in held if not idle or vector[index].alive])
        for vector in vectors
    ]
    return max(moments, key=lambda moment: moment.reserved_bytes).divided(shape)


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

    def divided(self, shape: ShapeModel) -> dict[int, MemoryBreakdown]:
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
        allocator = round(pools + (shape.memory.allocator_slack - 1) * self.reserved_bytes)
        runtime = dataclasses.replace(
            parts[widest], allocator_bytes=allocator, runtime_bytes=shape.runtime_bytes
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
    shape: ShapeModel,
    held: dict[int, StageCost],
    parts: dict[int, MemoryBreakdown],
    hosted_bytes: float = 0.0,
) -> MemoryFigures:
    """The figures of one pipeline rank from its stages and their tenants.

    `hosted_bytes` is what each device of the rank that offloads most has in host memory.
    """
    total = sum((part for part in parts.values()), MemoryBreakdown())
    tensors = _tensors(shape, held, total)
    overhead = shape.runtime_bytes
    slack = shape.memory.allocator_slack
    peak = total.total_bytes
    device = {
        moment: peak if size >= total.allocated_bytes else min(peak, round(slack * size + overhead))
        for moment, size in tensors.items()
    }
    host = _host(shape, held, hosted_bytes)
    devices = _node_devices(shape)
    worst = max(tensors, key=lambda moment: tensors[moment])
    context = round(shape.memory.context_bytes) if shape.overlaps else 0
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


def _tensors(shape: ShapeModel, held: dict[int, StageCost], total: MemoryBreakdown) -> dict[Moment, float]:
    """Bytes of tensors at each moment."""
    kept = [resident(shape, stage) for stage in held.values()]
    weights, grads = sum(k.weights for k in kept), sum(k.grads for k in kept)
    optimizer, unit = sum(k.optimizer for k in kept), max(s.largest_unit_params for s in held.values())
    step = weights + grads + optimizer + max(step_temporaries_bytes(shape, s) for s in held.values())
    buffered = shape.problem.stack.engine is Engine.MEGATRON
    saving = weights + optimizer + (grads if buffered else 0.0)
    return {
        Moment.LOAD: weights + 4 * unit,
        Moment.FORWARD_BACKWARD: float(total.allocated_bytes),
        Moment.OPTIMIZER_STEP: step,
        Moment.CHECKPOINT_SAVE: saving,
        Moment.RESUME: weights + optimizer + 4 * unit,
    }


def _node_devices(shape: ShapeModel) -> int:
    return min(shape.problem.cluster.devices_per_node, shape.degrees.world)


def _host(shape: ShapeModel, held: dict[int, StageCost], hosted_bytes: float) -> dict[Moment, int]:
    """Bytes of host memory of a node at each moment; on a CPU, what is staged lies in the devices' own."""
    profile = shape.problem.profile
    measured = profile.constant("runtime_bytes") if profile else None
    process = (measured or HOST_PROCESS_BYTES) + hosted_bytes
    devices = _node_devices(shape)
    unit = 4 * max(stage.largest_unit_params for stage in held.values())
    state = sum(state_bytes(shape, stage) for stage in held.values())
    staged = {Moment.LOAD: unit, Moment.CHECKPOINT_SAVE: state, Moment.RESUME: state}
    return {moment: round(devices * (process + staged.get(moment, 0.0))) for moment in Moment}


def state_bytes(shape: ShapeModel, stage: StageCost) -> float:
    """What one device writes of a checkpoint: its fp32 weights, and the optimizer's state with them."""
    kept, shards = resident(shape, stage), shape.degrees.weight_shards
    routed = stage.routed_params
    engine = shape.problem.stack.engine
    if shape.problem.workload.adapters is not None:
        return kept.grads + kept.optimizer  # the adapters and their state; the base is not written
    if engine in (Engine.MEGATRON, Engine.DEEPSPEED) and shape.problem.workload.precision.compute_bytes < 4:
        return kept.optimizer  # masters are part of it
    there = stage.hosted.state_params if stage.hosted is not None else 0.0
    own = (stage.params - routed - there) / shards + routed / shape.degrees.expert_shards
    return 4 * own + kept.optimizer
