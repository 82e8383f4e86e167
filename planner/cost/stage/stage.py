"""What one pipeline stage costs: its passes for a micro-batch, its once-a-step work, its bytes.

All figures are linear in the number of blocks of each class and recompute option, which is what lets the
planner pick recipes exactly.

StageCost: what one pipeline stage costs on each of its devices, and what of it lies in host memory.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

from planner.cost.communication.collectives import CommModel
from planner.cost.communication.messages import Messages
from planner.cost.layer import Pass, Unit
from planner.cost.memory.parameter_state import ParamBytes, States, states_of
from planner.cost.stage.layer_cost import LayerModel
from planner.cost.stage.sharded_layers import SharedCosts, apart_params, summed_copies_s, update_s
from planner.foundation.arrays import larger
from planner.foundation.frozen import frozen
from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.model.sublayer import Recompute
from planner.profile.profile import LayerKind
from planner.strategy.strategy import Degrees, Stage, Zero

if TYPE_CHECKING:
    from planner.foundation.arrays import Ints


@frozen
class Hosted:
    """What of a stage lies in host memory: `blocks` first blocks' activations, state, or both.

    `kept` are the states that stay on the device. `saved_bytes` are activations of a micro-batch and
    `state_bytes` the optimizer's in host memory; `window_bytes` of activations are on the device at a time,
    those of `window` blocks.
    """

    kept: ParamBytes
    state_bytes: float
    state_params: float
    blocks: int
    window: int
    saved_bytes: float
    window_bytes: float


@frozen
class StageCost:
    """One stage on each of its devices.

    `unshard_s` comes before the first forward of a step, `reduce_s` after the last backward, `optimizer_s`
    after the reduction of all stages. `copied_s` of `reduce_s` sums the gradients of key-value heads over
    the tensor-parallel ranks that have copies of them. `params` are those of one device's shard by tensor
    and expert parallelism, before any sharding over data ranks; `end_params` those of embedding and head
    among them, `routed_params` those of routed experts, `largest_apart_params` those of the largest block's
    experts where they are a unit of their own. `saved_bytes` are kept for each micro-batch;
    `block_saved_bytes` of them by blocks; `waiting_bytes` from its input gradients to its weight gradients,
    where a schedule puts those off and the engine holds less for them. `frozen` weights have no gradients:
    those of adapters beside them alone. `hosted` says what of the stage lies in host memory, where something
    does (planner.cost.stage.offload).
    `weights_s` are the blocks' weight gradients that the engine can leave for later, `deferred_s` those that
    it does: of blocks that recompute nothing. None where it splits a backward as torch does.
    """

    forward: Pass
    backward: Pass
    unshard_s: float
    reduce_s: float
    optimizer_s: float
    params: float
    largest_unit_params: float
    saved_bytes: float
    forward_transient_bytes: float
    backward_transient_bytes: float
    blocks: int = 0
    end_params: float = 0.0
    routed_params: float = 0.0
    largest_block_params: float = 0.0
    largest_apart_params: float = 0.0
    block_saved_bytes: float = 0.0
    block_transient_bytes: float = 0.0
    waiting_bytes: float = 0.0
    holds_head: bool = False
    frozen: bool = False
    hosted: Hosted | None = None
    weights_s: float | None = None
    deferred_s: float | None = None
    copied_s: float = 0.0


Chosen = tuple[tuple[str, Recompute], int]
"""Blocks of one class with one option, and how many there are."""


def _with_times(passing: Pass, compute_s: float, host_s: float, dp_s: float) -> Pass:
    """A pass with other times of these causes; thousands of shapes ask for it."""
    return Pass(
        compute_s=compute_s,
        recompute_s=passing.recompute_s,
        host_s=host_s,
        tp_s=passing.tp_s,
        dp_s=dp_s,
        cp_s=passing.cp_s,
        ep_s=passing.ep_s,
    )


class LayoutModel:
    """Costs of stages under given degrees. `slow` is the slowdown of work while every device works."""

    def __init__(
        self,
        problem: PlanningProblem,
        degrees: Degrees,
        layers: LayerModel,
        comms: CommModel,
        slow: float,
        shared: SharedCosts,
    ) -> None:
        self.problem, self.degrees, self.slow = problem, degrees, slow
        self.layer_model = layers
        self.constants, self.memory = layers.constants, layers.memory
        self.messages = Messages(problem, degrees, comms, layers.constants, layers.stream_width)
        self.runtime_bytes = layers.runtime_bytes(degrees)
        self.classes = layers.classes
        units = layers.units(degrees)
        self.block_units, self.embedding_unit, self.head_unit = units.blocks, units.embedding, units.head
        self.sent = shared.sent(self.messages, units)
        self.sharded_layers = shared.layers(self.messages, layers)
        self.overlaps, self.overlap = self.sharded_layers.overlaps, self.sharded_layers.overlap
        self.block, self.layer, self.shape_of = (
            self.sharded_layers.block,
            self.sharded_layers.layer,
            self.sharded_layers.shape_of,
        )
        self._stages: dict[tuple[tuple[Chosen, ...], bool, bool], StageCost] = {}
        self._passes: dict[tuple[str, Recompute], tuple[Pass, Pass]] = {}
        self._ends: dict[LayerKind, tuple[Pass, Pass]] = {}

    def scheduled(self, degrees: Degrees) -> LayoutModel:
        """The same costs under degrees that differ in schedule, chunks and order of groups at most."""
        model = copy.copy(self)
        model.degrees = degrees
        return model

    @cached_property
    def states(self) -> States:
        """Bytes of each parameter's state."""
        return states_of(self.problem, self.degrees)

    @property
    def gathers(self) -> dict[Unit, Pass]:
        """Messages to gather all of a unit."""
        return self.sent.gathers

    @property
    def updates(self) -> dict[Unit, Pass]:
        """Messages to gather what an update changes."""
        return self.sent.updates

    @property
    def reduces(self) -> dict[Unit, Pass]:
        """Messages to reduce a unit's gradients."""
        return self.sent.reduces

    # Layers

    def count(self, key: str, first: int, end: int) -> int:
        """Blocks of a class among the layers [first, end)."""
        return self.layer_model.count(key, first, end)

    def passes(self, key: str, option: Recompute) -> tuple[Pass, Pass]:
        """Forward and backward of one block of a class with an option, with all that is sent meanwhile."""
        if (key, option) not in self._passes:
            self._passes[key, option] = self._block_passes(key, option)
        return self._passes[key, option]

    def _block_passes(self, key: str, option: Recompute) -> tuple[Pass, Pass]:
        return self._with_data_parallel(*self.sharded_layers.block_passes(key, option), self.block_units[key])

    @property
    def working_bytes(self) -> float:
        """What a block's backward pass needs for a moment beyond what was kept or is computed again."""
        return self.sharded_layers.working_bytes

    @property
    def waiting_bytes(self) -> dict[tuple[str, Recompute], float]:
        """What a block holds between its input and its weight gradients, by class and option."""
        return self.sharded_layers.waiting_bytes

    @property
    def embedding_passes(self) -> tuple[Pass, Pass]:
        """Forward and backward of the embedding, with all that is sent meanwhile."""
        return self._end_passes(LayerKind.EMBEDDING)

    @property
    def head_passes(self) -> tuple[Pass, Pass]:
        """Forward and backward of the head and the loss, with all that is sent meanwhile."""
        return self._end_passes(LayerKind.HEAD)

    def _end_passes(self, kind: LayerKind) -> tuple[Pass, Pass]:
        if kind not in self._ends:
            unit = self.embedding_unit if kind is LayerKind.EMBEDDING else self.head_unit
            forward, backward = self._with_data_parallel(*self.sharded_layers.end_passes(kind), unit)
            self._ends[kind] = forward, backward + Pass(compute_s=-self._spared_s(kind))
        return self._ends[kind]

    def _spared_s(self, kind: LayerKind) -> float:
        """What the first block need not do where the embedding is frozen; counted with the embedding."""
        if kind is not LayerKind.EMBEDDING or self.problem.workload.adapters is None:
            return 0.0
        lowest = self.shape_of(LayerKind.BLOCK, block=self.layer_model.keys[0])
        return self.layer_model.lowest_spares_s(lowest)

    def _with_data_parallel(self, forward: Pass, backward: Pass, unit: Unit) -> tuple[Pass, Pass]:
        """Adds the wrapper, gradient accumulation, and what ZeRO 2 and 3 send in every micro-batch."""
        zero, host_s = self.degrees.zero, backward.host_s + self._accumulate_s(unit)
        gather_s, reduce_s = self._copies_s(unit)
        forward_s, backward_s = forward.compute_s, backward.compute_s
        if zero is Zero.PARAMETERS:
            forward_s, backward_s = forward_s + gather_s, backward_s + gather_s
        if zero in (Zero.GRADIENTS, Zero.PARAMETERS):
            backward_s += reduce_s
        forward_host_s = forward.host_s
        if self.degrees.replicas > 1:
            forward_host_s += self.messages.constant(f"{self.messages.wrapper}_unit_forward_s")
            host_s += self.messages.constant(f"{self.messages.wrapper}_unit_backward_s")
        forward = _with_times(forward, forward_s, forward_host_s, forward.dp_s)
        backward = _with_times(backward, backward_s, host_s, backward.dp_s)
        if self.degrees.replicas == 1:
            return forward, backward
        if zero is Zero.PARAMETERS:
            forward = self._exposed(forward, self.gathers[unit])
            backward = self._exposed(backward, self.gathers[unit] + self.reduces[unit])
        elif zero is Zero.GRADIENTS:
            backward = self._exposed(backward, self.reduces[unit])
        return forward, backward

    def _copies_s(self, unit: Unit) -> tuple[float, float]:
        """Seconds of FSDP's copies of a unit on the device, at gathering and at reducing.

        Gathering casts the own fp32 shard of what is trained, and copies the gathered unit out of its
        buffer; reducing casts gradients to fp32 into another. What a profile measured is in its constants.
        """
        rates, profile = self.layer_model.rates, self.problem.profile
        sharded = self.problem.engine_settings.engine in (Engine.NATIVE, Engine.TORCHTITAN)
        if rates is None or not sharded or (profile is not None and profile.layers):
            return 0.0, 0.0
        size, shards = self.problem.workload.precision.compute_bytes, self.degrees.weight_shards
        cast = (4 + size) / shards if size < 4 else 0.0
        copied = 2 * size if shards > 1 else 0.0
        gathered = cast * unit.trained + copied * unit.params
        reduced = (size + 4) * unit.trained
        return gathered / rates.memory_bytes_per_s, reduced / rates.memory_bytes_per_s

    def _accumulate_s(self, unit: Unit) -> float:
        """Adding a micro-batch's gradients to earlier ones; the first micro-batch of a step adds nothing."""
        more = 1 - 1 / self.degrees.num_micro_batches
        kept = self._sharded(unit) if self.degrees.zero >= Zero.GRADIENTS else unit.trained
        return self.sharded_layers.accumulate_s * kept * more

    def _sharded(self, unit: Unit) -> float:
        """Trained parameters of a unit whose state one device keeps."""
        degrees, routed = self.degrees, unit.routed_trained
        return (unit.trained - routed) / degrees.weight_shards + routed / degrees.expert_shards

    def _exposed(self, passing: Pass, message: Pass) -> Pass:
        """The pass with a message beside it: hidden behind compute where the device overlaps.

        While both run they slow each other (planner.cost.communication.collectives).
        """
        if not self.overlaps:
            return passing + message
        shown_s = self.overlap.shown_s(message.total_s, passing.total_s)
        return _with_times(passing, passing.compute_s, passing.host_s, passing.dp_s + shown_s)

    def once_s(self, message: Pass) -> float:
        """Seconds of a message that all ranks send at the same time, once a step."""
        return message.work_s * self.slow + message.fixed_s

    # Stages

    @cached_property
    def action(self) -> Pass:
        """What a pass takes besides its layers."""
        pp_action_s = self.messages.constant("pp_action_s") if self.degrees.pp > 1 else 0.0
        standing_s = self.constants.pp_exposed * self.messages.p2p_s()
        return Pass(host_s=pp_action_s + self.constants.action_s + standing_s)

    def stage(self, stage: Stage) -> StageCost:
        """The cost of a stage: its blocks with their options, and the ends that it holds."""
        first, last = stage.first == 0, stage.end == self.problem.model.layers
        chosen = self.chosen(stage)
        key = (chosen, first, last)
        if key not in self._stages:
            blocks: Counter[str] = Counter()
            for (name, _), count in chosen:
                blocks[name] += count
            self._stages[key] = self._stage(chosen, blocks, first=first, last=last)
        return self._stages[key]

    def mixed_stages(self, first: int, end: int, full: Ints, selective: Ints) -> StageCost:
        """The costs of many mixes of one stage's blocks at once: figures that differ are arrays.

        Of the blocks [first, end) the first `full` recompute all, the next `selective` the element-wise rest.
        """
        import numpy as np

        starts = {
            Recompute.FULL: (np.full_like(full, first), first + full),
            Recompute.SELECTIVE: (first + full, first + full + selective),
            Recompute.NONE: (first + full + selective, np.full_like(full, end)),
        }
        counts: list[Chosen] = [
            ((key, option), cast(int, self.layer_model.counts(key, a, b)))  # as many as there are mixes
            for option, (a, b) in starts.items()
            if (b > a).any()
            for key in self.classes
        ]
        blocks = Counter({key: self.count(key, first, end) for key in self.classes})
        last = end == self.problem.model.layers
        return self._stage(counts, +blocks, first=first == 0, last=last)

    def chosen(self, stage: Stage) -> tuple[Chosen, ...]:
        """How many blocks of each class have each option; options are dealt in layer order."""
        return self.chosen_among(stage, stage.first, stage.end)

    def chosen_among(self, stage: Stage, first: int, end: int) -> tuple[Chosen, ...]:
        """The same of the stage's blocks in [first, end)."""
        full = stage.first + stage.recompute.full
        selective = full + stage.recompute.selective
        ranges = (
            (Recompute.NONE, selective, stage.end),
            (Recompute.SELECTIVE, full, selective),
            (Recompute.FULL, stage.first, full),
        )
        spans = [(option, max(a, first), min(b, end)) for option, a, b in ranges]
        counts = [
            ((key, option), self.count(key, a, b)) for option, a, b in spans if a < b for key in self.classes
        ]
        return tuple((choice, count) for choice, count in counts if count)

    def _stage(self, chosen: Sequence[Chosen], blocks: Counter[str], *, first: bool, last: bool) -> StageCost:
        """Counts of `chosen` may be arrays; what is asked of them holds for one and for many."""
        forward, backward = self.action, self.action
        again = sum(count for (_, option), count in chosen if option is not Recompute.NONE)
        backward += Pass(recompute_s=self.constants.recompute_pass_s * (again > 0))
        for choice, count in chosen:
            one_forward, one_backward = self.passes(*choice)
            forward, backward = forward + one_forward * count, backward + one_backward * count
        ends = [self.embedding_passes] * first + [self.head_passes] * last
        for end_forward, end_backward in ends:
            forward, backward = forward + end_forward, backward + end_backward
        units = self.units(blocks, first=first, last=last)
        copied_s = summed_copies_s(units, self.messages)
        return StageCost(
            forward=forward,
            backward=backward,
            unshard_s=self._unshard_s(units),
            reduce_s=self._reduce_s(units, backward.total_s) + copied_s,
            optimizer_s=self.optimizer_s(units),
            params=sum(unit.params * count for unit, count in units) - self.tied_params(first, last),
            routed_params=sum(unit.routed_params * count for unit, count in units),
            largest_unit_params=max(unit.params for unit, _ in units),
            blocks=sum(blocks.values()),
            holds_head=last and self.problem.model.vocab > 0,
            frozen=self.problem.workload.adapters is not None,
            hosted=None,
            weights_s=self._weights_s(chosen),
            deferred_s=self._weights_s([each for each in chosen if each[0][1] is Recompute.NONE]),
            copied_s=copied_s,
            **stage_bytes(self, chosen, blocks, first=first, last=last),
        )

    def _weights_s(self, chosen: Sequence[Chosen]) -> float | None:
        """Weight gradients of blocks that the own runtime can leave for later; None for other engines."""
        if not self.problem.engine_settings.recomputes_once:
            return None
        return sum((count * self.deferrable_s[key] for (key, _), count in chosen), 0.0)

    @property
    def deferrable_s(self) -> dict[str, float]:
        """Seconds of a block's weight gradients that the own runtime can leave for later, by class."""
        return self.sharded_layers.deferrable_s

    def units(self, blocks: Counter[str], *, first: bool, last: bool) -> list[tuple[Unit, int]]:
        """The units of a stage with their counts: blocks by class, and the ends that it holds."""
        units = [(self.block_units[key], count) for key, count in blocks.items()]
        return units + [(self.embedding_unit, 1)] * first + [(self.head_unit, 1)] * last

    def all_units(self) -> list[tuple[Unit, int]]:
        """The units of the whole model."""
        return self.layer_model.all_units(self.degrees)

    def tied_params(self, first: bool, last: bool) -> float:
        """Weights that two layers share count once where one stage holds both."""
        model = self.problem.model
        if not model.vocab:
            shared = sum(s.count * s.block.shared_params for s in model.segments)
            return float(shared) if first and last else 0.0
        tied = model.tied_embeddings and first and last
        return float(model.vocab_shard(self.degrees.tp) * model.token_width) if tied else 0.0

    def _unshard_s(self, units: list[tuple[Unit, int]]) -> float:
        """ZeRO 1 and 2 gather each unit once a step; where that overlaps, only the first one shows."""
        if self.degrees.zero not in (Zero.OPTIMIZER, Zero.GRADIENTS):
            return 0.0
        each = [(self.once_s(self.updates[unit]), count) for unit, count in units]
        total_s = sum(seconds * count for seconds, count in each)
        if not self.overlaps:
            return total_s
        first_s = larger(*(seconds for seconds, _ in each))
        return first_s + self.constants.dp_exposed * (total_s - first_s)

    def _reduce_s(self, units: list[tuple[Unit, int]], backward_s: float) -> float:
        """ZeRO 0 and 1 reduce each unit once a step, behind the last backward where it overlaps."""
        if self.degrees.zero in (Zero.GRADIENTS, Zero.PARAMETERS):
            return 0.0
        each = [(self.once_s(self.reduces[unit]), count) for unit, count in units]
        total_s = sum(seconds * count for seconds, count in each)
        if not self.overlaps:
            return total_s
        behind_s = larger(total_s - backward_s, *(seconds for seconds, _ in each))
        return behind_s + self.constants.dp_exposed * (total_s - behind_s)

    def optimizer_s(self, units: list[tuple[Unit, int]]) -> float:
        """Clipping and the update of this device's shard: a cost a parameter and a cost a tensor.

        What a step takes besides, once for all stages of a rank, is `constants.step_s`.
        """
        params = sum(self._sharded(unit) * count for unit, count in units)
        tensors = sum(unit.tensors * count for unit, count in units)
        per_tensor, each = update_s(self.messages, self.layer_model.rates, self.constants)
        return params * each + tensors * per_tensor


def stage_bytes(
    shape: LayoutModel, chosen: Sequence[Chosen], blocks: Counter[str], *, first: bool, last: bool
) -> dict[str, float]:
    """The bytes of a StageCost. Counts of `chosen` may be arrays, of many mixes at once."""
    each = [(shape.block(*choice), count) for choice, count in chosen]
    ends_of = [shape.layer(kind) for kind in [LayerKind.EMBEDDING] * first + [LayerKind.HEAD] * last]
    saved = sum(count * cost.saved_bytes for cost, count in each)
    widest = larger(*(cost.backward_transient_bytes * (count > 0) for cost, count in each))
    forward = larger(*(cost.forward_transient_bytes * (count > 0) for cost, count in each))
    largest = max((shape.block_units[key] for key in blocks), key=lambda unit: unit.params)
    ends = [shape.embedding_unit.params] * first + [shape.head_unit.params] * last
    return {
        "saved_bytes": saved + sum(cost.saved_bytes for cost in ends_of),
        "forward_transient_bytes": larger(forward, *(cost.forward_transient_bytes for cost in ends_of)),
        "backward_transient_bytes": larger(widest, *(cost.backward_transient_bytes for cost in ends_of)),
        "end_params": sum(ends) - shape.tied_params(first, last) * bool(ends),
        "largest_block_params": largest.params,
        "largest_apart_params": apart_params(shape.degrees, largest),
        "block_saved_bytes": saved,
        "block_transient_bytes": widest,
        "waiting_bytes": sum(count * shape.waiting_bytes[choice] for choice, count in chosen),
    }
