"""Bytes of one device at its worst moment of a step, by tenant.

States (weights, gradients, optimizer) are planner.cost.memory.parameter_state', moments
planner.cost.fit.memory_timeline'. Activations:
what micro-batches in flight keep at the worst moment of the schedule's row
(planner.strategy.schedule.in_flight). Transient:
what that moment holds besides. Allocator: what it reserves beyond tensors, pools and a slack
(reserved_bytes). Runtime: communicators. The driver's own context lies outside the memory that a program can
allocate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.cost.fit.memory_timeline import StageMemory, idle_apart
from planner.cost.stage.stage import ShapeModel
from planner.cost.stage.stage_cost import StageCost
from planner.strategy.estimate import MemoryBreakdown
from planner.strategy.schedule.in_flight import Flights, InFlight


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
