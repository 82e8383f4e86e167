"""What one pipeline stage costs: its passes for a micro-batch, its once-a-step work, its bytes.

All figures are linear in the number of blocks of each class and recompute option, which is what lets the
planner pick recipes exactly.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from planner.cost.comm import CommModel
from planner.cost.compute import LayerModel
from planner.cost.context import Exchanged
from planner.cost.layer import LayerCost, LayerShape
from planner.cost.messages import Messages
from planner.cost.overlap import overlap_of
from planner.cost.passes import Pass, Unit
from planner.cost.seconds import larger
from planner.cost.spread import (
    cp_sent_again,
    exchanged,
    experts_pass,
    experts_sent_again,
    summed_copies_s,
    tensor_s,
)
from planner.cost.stage_bytes import block_waiting_bytes, stage_bytes
from planner.cost.stage_cost import StageCost
from planner.cost.states import States, states_of
from planner.cost.update import accumulate_s, update_s
from planner.problem import PlanningProblem
from planner.profile import LayerKind, Op
from planner.stack import Engine
from planner.strategy import Degrees, Recompute, Stage, Zero

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, np.dtype[np.int64]]

AlonePasses = dict[tuple[object, ...], tuple[Pass, Pass]]
"""Passes of layers without data parallelism, which shapes of one model share, by all that they depend on."""
Chosen = tuple[tuple[str, Recompute], int]
"""Blocks of one class with one option, and how many there are."""


class ShapeModel:
    """Costs of stages under given degrees. `slow` is the slowdown of work while every device works."""

    def __init__(
        self,
        problem: PlanningProblem,
        degrees: Degrees,
        layers: LayerModel,
        comms: CommModel,
        slow: float,
        alone: AlonePasses,
    ) -> None:
        self.problem, self.degrees, self.slow = problem, degrees, slow
        self.layer_model, self._alone = layers, alone
        self.physics, self.memory = layers.physics, layers.memory
        self.messages = Messages(problem, degrees, comms, layers.physics, layers.stream_width)
        self.overlaps = problem.cluster.groups[0].slots_per_node is None
        self.overlap = overlap_of(problem.profile)
        self.runtime_bytes = layers.runtime_bytes(degrees)
        self.classes = layers.classes
        units = layers.units(degrees)
        self.block_units, self.embedding_unit, self.head_unit = units.blocks, units.embedding, units.head
        gather = self.messages.gather
        self.gathers = {unit: gather(unit.dense_params, unit.routed_params) for unit in units.all()}
        self.updates = self.gathers
        if problem.workload.adapters is not None:
            self.updates = {unit: gather(unit.trained) for unit in units.all()}
        self.reduces = {unit: self.messages.reduce(unit) for unit in units.all()}
        self._stages: dict[tuple[tuple[Chosen, ...], bool, bool], StageCost] = {}
        self._passes: dict[tuple[str, Recompute], tuple[Pass, Pass]] = {}

    def scheduled(self, degrees: Degrees) -> ShapeModel:
        """The same costs under degrees that differ in schedule, chunks and order of groups at most."""
        model = copy.copy(self)
        model.degrees = degrees
        return model

    @cached_property
    def states(self) -> States:
        """Bytes of each parameter's state."""
        return states_of(self.problem, self.degrees)

    # Layers

    def count(self, key: str, first: int, end: int) -> int:
        """Blocks of a class among the layers [first, end)."""
        return self.layer_model.count(key, first, end)

    def block(self, key: str, recompute: Recompute = Recompute.NONE) -> LayerCost:
        """One block of a class on one device for one micro-batch."""
        return self.layer(LayerKind.BLOCK, recompute, key)

    def layer(self, kind: LayerKind, recompute: Recompute = Recompute.NONE, block: str = "") -> LayerCost:
        """One layer on one device for one micro-batch."""
        return self.layer_model.cost(self.shape_of(kind, recompute, block))

    def shape_of(self, kind: LayerKind, recompute: Recompute = Recompute.NONE, block: str = "") -> LayerShape:
        """What is asked of one layer's cost under these degrees."""
        degrees, workload = self.degrees, self.problem.workload
        return LayerShape(
            kind=kind,
            tp=degrees.tp,
            sequence_parallel=degrees.sequence_parallel,
            micro_batch=degrees.micro_batch,
            seq=workload.seq,
            precision=workload.precision,
            recompute=recompute,
            block=block,
            kernel=self.layer_model.kernel(degrees),
            rotary=self.problem.model.rotary,
            cp=degrees.cp,
            cp_exchange=degrees.cp_exchange,
            ep=degrees.ep,
            etp=degrees.etp,
        )

    def passes(self, key: str, option: Recompute) -> tuple[Pass, Pass]:
        """Forward and backward of one block of a class with an option, with all that is sent meanwhile."""
        if (key, option) not in self._passes:
            self._passes[key, option] = self._block_passes(key, option)
        return self._passes[key, option]

    def _block_passes(self, key: str, option: Recompute) -> tuple[Pass, Pass]:
        known = (*self._kind, key, option)
        if known not in self._alone:
            self._alone[known] = self._block_alone(key, option)
        return self._with_data_parallel(*self._alone[known], self.block_units[key])

    @cached_property
    def _kind(self) -> tuple[object, ...]:
        """What the passes of a layer depend on besides data parallelism."""
        d = self.degrees
        return d.tp, d.sequence_parallel, d.micro_batch, d.cp, d.cp_exchange, d.ep, d.etp, d.world

    def _block_alone(self, key: str, option: Recompute) -> tuple[Pass, Pass]:
        """Forward and backward of a block without what data parallelism adds."""
        cost, plain = self.block(key, option), self.block(key)
        tp_forward_s, tp_backward_s = tensor_s(self.classes[key], self.messages, option)
        if self.overlaps:  # while the device waits for the host, its messages go out
            tp_forward_s = larger(tp_forward_s - cost.forward_idle_s, 0.0)
            tp_backward_s = larger(tp_backward_s - cost.backward_idle_s, 0.0)
        extra_s = larger(cost.backward_s - plain.backward_s, 0.0)
        again_s = self.physics.recompute_scale * extra_s
        cp, ep = self.exchanged(key), experts_pass(self.classes[key], self.messages)
        cp_again = cp_sent_again(option, self.problem.stack, self.degrees.cp_exchange)
        ep_s = ep.forward_s + ep.beside_s
        forward = Pass(compute_s=cost.forward_s, tp_s=tp_forward_s, cp_s=cp.forward_s, ep_s=ep_s)
        backward = Pass(
            compute_s=cost.backward_s - extra_s,
            recompute_s=again_s,
            tp_s=tp_backward_s,
            cp_s=cp.backward_s + cp_again * cp.forward_s,
            ep_s=ep.backward_s + experts_sent_again(option, self.problem.stack, ep),
        )
        return forward, backward

    @cached_property
    def working_bytes(self) -> float:
        """What a block's backward pass needs for a moment beyond what was kept or is computed again."""
        each = ((self.block(key, option) for option in Recompute) for key in self.classes)
        return max(min(cost.backward_transient_bytes for cost in costs) for costs in each)

    @cached_property
    def waiting_bytes(self) -> dict[tuple[str, Recompute], float]:
        """What a block holds between its input and its weight gradients, by class and option."""
        return {
            (key, option): block_waiting_bytes(self, key, option)
            for key in self.classes
            for option in Recompute
        }

    @cached_property
    def embedding_passes(self) -> tuple[Pass, Pass]:
        """Forward and backward of the embedding, with all that is sent meanwhile."""
        return self._end_passes(LayerKind.EMBEDDING)

    @cached_property
    def head_passes(self) -> tuple[Pass, Pass]:
        """Forward and backward of the head and the loss, with all that is sent meanwhile."""
        return self._end_passes(LayerKind.HEAD)

    def exchanged(self, key: str) -> Exchanged:
        """What a block of a class shows of its context-parallel exchange."""
        shape = self.shape_of(LayerKind.BLOCK, Recompute.NONE, key)
        return exchanged(self.classes[key], shape, self.messages, self.layer_model)

    def _end_passes(self, kind: LayerKind) -> tuple[Pass, Pass]:
        known = (*self._kind, kind)
        if known not in self._alone:
            self._alone[known] = self._end_alone(kind)
        unit = self.embedding_unit if kind is LayerKind.EMBEDDING else self.head_unit
        forward, backward = self._with_data_parallel(*self._alone[known], unit)
        return forward, backward + Pass(compute_s=-self._spared_s(kind))

    def _end_alone(self, kind: LayerKind) -> tuple[Pass, Pass]:
        cost = self.layer(kind)
        gather, scatter = self.messages.over_tp(Op.ALL_GATHER), self.messages.over_tp(Op.REDUCE_SCATTER)
        reduce = self.messages.over_tp(Op.ALL_REDUCE)
        sp = self.degrees.sequence_parallel
        if kind is LayerKind.EMBEDDING:
            forward_tp, backward_tp = (scatter, gather) if sp else (reduce, 0.0)
        else:
            loss = self.messages.loss_s()
            forward_tp, backward_tp = (gather + loss, scatter) if sp else (loss, reduce)
        forward = Pass(compute_s=cost.forward_s, tp_s=forward_tp)
        return forward, Pass(compute_s=cost.backward_s, tp_s=backward_tp)

    def _spared_s(self, kind: LayerKind) -> float:
        """What the first block need not do where the embedding is frozen; counted with the embedding."""
        if kind is not LayerKind.EMBEDDING or self.problem.workload.adapters is None:
            return 0.0
        lowest = self.shape_of(LayerKind.BLOCK, block=self.layer_model.keys[0])
        return self.layer_model.lowest_spares_s(lowest)

    def _with_data_parallel(self, forward: Pass, backward: Pass, unit: Unit) -> tuple[Pass, Pass]:
        """Adds the wrapper, gradient accumulation, and what ZeRO 2 and 3 send in every micro-batch."""
        backward += Pass(host_s=self._accumulate_s(unit))
        gather_s, reduce_s = self._copies_s(unit)
        if self.degrees.zero is Zero.PARAMETERS:
            forward, backward = forward + Pass(compute_s=gather_s), backward + Pass(compute_s=gather_s)
        if self.degrees.zero in (Zero.GRADIENTS, Zero.PARAMETERS):
            backward += Pass(compute_s=reduce_s)
        if self.degrees.replicas == 1:
            return forward, backward
        forward += Pass(host_s=self.messages.constant(f"{self.messages.wrapper}_unit_forward_s"))
        backward += Pass(host_s=self.messages.constant(f"{self.messages.wrapper}_unit_backward_s"))
        zero = self.degrees.zero
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
        sharded = self.problem.stack.engine in (Engine.NATIVE, Engine.TORCHTITAN)
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
        return accumulate_s(self.messages, self.layer_model.rates) * kept * more

    def _sharded(self, unit: Unit) -> float:
        """Trained parameters of a unit whose state one device keeps."""
        degrees, routed = self.degrees, unit.routed_trained
        return (unit.trained - routed) / degrees.weight_shards + routed / degrees.expert_shards

    def _exposed(self, passing: Pass, message: Pass) -> Pass:
        """The pass with a message beside it: hidden behind compute where the device overlaps.

        While both run they slow each other (planner.cost.overlap).
        """
        if not self.overlaps:
            return passing + message
        return passing + Pass(dp_s=self.overlap.shown_s(message.total_s, passing.total_s))

    def once_s(self, message: Pass) -> float:
        """Seconds of a message that all ranks send at the same time, once a step."""
        return message.work_s * self.slow + message.fixed_s

    # Stages

    @cached_property
    def action(self) -> Pass:
        """What a pass takes besides its layers."""
        pp_action_s = self.messages.constant("pp_action_s") if self.degrees.pp > 1 else 0.0
        standing_s = self.physics.pp_exposed * self.messages.p2p_s()
        return Pass(host_s=pp_action_s + self.physics.action_s + standing_s)

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
        backward += Pass(recompute_s=self.physics.recompute_pass_s * (again > 0))
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
        if not self.problem.stack.recomputes_once:
            return None
        return sum((count * self.deferrable_s[key] for (key, _), count in chosen), 0.0)

    @cached_property
    def deferrable_s(self) -> dict[str, float]:
        """Seconds of a block's weight gradients that the own runtime can leave for later, by class."""
        shapes = {key: self.shape_of(LayerKind.BLOCK, block=key) for key in self.classes}
        return {key: self.layer_model.deferrable_s(shape) for key, shape in shapes.items()}

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
        return first_s + self.physics.dp_exposed * (total_s - first_s)

    def _reduce_s(self, units: list[tuple[Unit, int]], backward_s: float) -> float:
        """ZeRO 0 and 1 reduce each unit once a step, behind the last backward where it overlaps."""
        if self.degrees.zero in (Zero.GRADIENTS, Zero.PARAMETERS):
            return 0.0
        each = [(self.once_s(self.reduces[unit]), count) for unit, count in units]
        total_s = sum(seconds * count for seconds, count in each)
        if not self.overlaps:
            return total_s
        behind_s = larger(total_s - backward_s, *(seconds for seconds, _ in each))
        return behind_s + self.physics.dp_exposed * (total_s - behind_s)

    def optimizer_s(self, units: list[tuple[Unit, int]]) -> float:
        """Clipping and the update of this device's shard: a cost a parameter and a cost a tensor.

        What a step takes besides, once for all stages of a rank, is `physics.step_s`.
        """
        params = sum(self._sharded(unit) * count for unit, count in units)
        tensors = sum(unit.tensors * count for unit, count in units)
        per_tensor, each = update_s(self.messages, self.layer_model.rates, self.physics)
        return params * each + tensors * per_tensor
