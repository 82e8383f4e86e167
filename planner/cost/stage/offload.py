"""State and activations in host memory: what crosses the host link, and what of it shows.

Optimizer state (ZeRO-Offload, arXiv 2101.06840), for P parameters of a device and n shards, c bytes of the
compute precision, a link of rate r:

    down     c P / (n r): gradients; behind the backward pass of their block in every micro-batch where ZeRO 2
             or 3 shares them out, once a step behind the reduction otherwise
    update   P / n times the devices of a node, whose processors update the parameters of them all, at
             cpu_update_s for AdamW's 28 bytes and by their bytes for other optimizers
    up       c P / (n r), beside the update: the longer shows

Activations: a block keeps S bytes of each micro-batch. They go down behind its forward pass and come up
behind its backward one, S / r each way, and what is longer than the pass shows. WINDOW blocks at a time are
on the device.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from planner.cost.layer import Pass, Unit
from planner.cost.memory.parameter_state import ParamBytes, States, offloaded_states, state_rates
from planner.cost.stage.stage import Hosted, LayoutModel, StageCost
from planner.foundation.arrays import larger
from planner.foundation.frozen import frozen
from planner.strategy.strategy import OffloadCounts, Stage, Zero

WINDOW = 2
"""Blocks whose offloaded activations are on the device: that of the pass that runs, and one on its way."""

COPIED_BYTES = 2.0**26
"""Of a copy whose measured rate stands for all: the activations or gradients of a block."""

UPDATE_BYTES = 12.0
"""What an update reads and writes of a parameter and its gradient, in fp32; its state is read and written
besides: 28 bytes for AdamW's two moments."""


@frozen
class Offloaded:
    """Parameters whose optimizer state lies in host memory; those of ends and routed experts among them."""

    params: float = 0.0
    end_params: float = 0.0
    routed_params: float = 0.0

    def __add__(self, other: Offloaded) -> Offloaded:
        return Offloaded(
            params=self.params + other.params,
            end_params=self.end_params + other.end_params,
            routed_params=self.routed_params + other.routed_params,
        )


class HostMemory:
    """Copies to and from host memory, and updates there, under a layout's degrees."""

    def __init__(self, layout: LayoutModel) -> None:
        self.layout, self.constants = layout, layout.constants
        self.size = layout.problem.workload.precision.compute_bytes
        self.every_pass = layout.degrees.zero >= Zero.GRADIENTS
        links = [group.device.host_link_bytes_per_s for group in layout.problem.cluster.groups]
        known = [rate for rate in links if rate]
        assert len(known) == len(links), "rules.offload_possible asks for it"
        rates = layout.layer_model.rates
        copied = rates.sampled.copies_bytes_per_s(COPIED_BYTES) if rates and rates.sampled else None
        self.bytes_per_s = copied or min(known) * layout.constants.host_link_share

    def copy_s(self, bytes_: float) -> float:
        """Seconds of a copy over the host link, one way; the other way runs beside it."""
        return bytes_ / self.bytes_per_s

    def own_params(self, params: Offloaded) -> float:
        """Those that this device updates: its shards."""
        degrees, routed = self.layout.degrees, params.routed_params
        return (params.params - routed) / degrees.weight_shards + routed / degrees.expert_shards

    def shard_s(self, params: Offloaded) -> float:
        """Sending so many parameters' gradients, or getting their weights."""
        return self.copy_s(self.size * self.own_params(params))

    def update_s(self, params: Offloaded) -> float:
        """Updating parameters beside those of the node's other devices, and copying weights up."""
        problem = self.layout.problem
        devices = min(problem.cluster.devices_per_node, self.layout.degrees.world)
        block, _ = state_rates(problem.workload.optimizer, problem.model)
        traffic = (UPDATE_BYTES + 2 * block) / (UPDATE_BYTES + 2 * 8)
        node_params = devices * self.own_params(params)
        return larger(node_params * traffic * self.constants.cpu_update_s, self.shard_s(params))


def with_offload(layout: LayoutModel, stage: Stage, cost: StageCost) -> StageCost:
    """The cost of a stage with what its counts say in host memory."""
    if stage.offload == OffloadCounts():
        return cost
    host = HostMemory(layout)
    forward_s, backward_s = _shown_s(host, stage)
    state = _state_params(layout, stage, cost)
    saved, blocks = _saved_bytes(layout, stage), stage.offload.activations
    window = min(WINDOW, blocks)
    kept, state_bytes = _states(layout, cost, state)
    unshared_s = 0.0 if host.every_pass else host.shard_s(state)
    share = state.params / max(cost.params, 1.0)
    return dataclasses.replace(
        cost,
        forward=cost.forward + Pass(host_s=forward_s),
        backward=cost.backward + Pass(host_s=backward_s),
        reduce_s=cost.reduce_s + unshared_s,
        optimizer_s=cost.optimizer_s * (1 - share) + host.update_s(state),
        saved_bytes=cost.saved_bytes - saved,
        hosted=Hosted(
            kept=kept,
            state_bytes=state_bytes,
            state_params=state.params,
            blocks=blocks,
            window=window,
            saved_bytes=saved,
            window_bytes=saved * window / max(blocks, 1),
        ),
    )


def _shown_s(host: HostMemory, stage: Stage) -> tuple[float, float]:
    """What of the stage's copies lasts longer than the passes of their blocks, forward and backward."""
    layout, forward_s, backward_s = host.layout, 0.0, 0.0
    kept, state = stage.offload.activations, stage.offload.optimizer
    for a, b in pairwise(sorted({0, kept, state})):
        for choice, count in layout.chosen_among(stage, stage.first + a, stage.first + b):
            forward, backward = layout.passes(*choice)
            saved_s = host.copy_s(layout.block(*choice).saved_bytes if a < kept else 0.0)
            grads_s = host.shard_s(_of(layout.block_units[choice[0]], a < state and host.every_pass))
            forward_s += count * larger(saved_s - forward.total_s, 0.0)
            backward_s += count * larger(larger(saved_s, grads_s) - backward.total_s, 0.0)
    return forward_s, backward_s


def _saved_bytes(layout: LayoutModel, stage: Stage) -> float:
    """Activations of a micro-batch that lie in host memory."""
    chosen = layout.chosen_among(stage, stage.first, stage.first + stage.offload.activations)
    return sum(count * layout.block(*choice).saved_bytes for choice, count in chosen)


def _of(unit: Unit, count: float) -> Offloaded:
    return Offloaded(params=count * unit.params, routed_params=count * unit.routed_params)


def _state_params(layout: LayoutModel, stage: Stage, cost: StageCost) -> Offloaded:
    """Parameters whose optimizer state lies in host memory."""
    if stage.offload.optimizer == stage.layers:
        return Offloaded(params=cost.params, end_params=cost.end_params, routed_params=cost.routed_params)
    chosen = layout.chosen_among(stage, stage.first, stage.first + stage.offload.optimizer)
    return sum((_of(layout.block_units[key], count) for (key, _), count in chosen), Offloaded())


def _states(layout: LayoutModel, cost: StageCost, away: Offloaded) -> tuple[ParamBytes, float]:
    """The states that the device keeps, and the bytes of those in host memory."""
    device, host = offloaded_states(layout.problem, layout.degrees)
    resident: States = layout.states
    kept = resident.of(
        cost.params - away.params,
        cost.end_params - away.end_params,
        cost.routed_params - away.routed_params,
    )
    gone = (away.params, away.end_params, away.routed_params)
    return kept + device.of(*gone), host.of(*gone).total
