"""What the layers of a model cost under degrees of one kind: all that data parallelism does not change.

Shapes that differ in data parallelism, pipeline and schedule alone share it.

What adding up gradients, clipping and update take of each tensor and parameter of a device's shard.

What shapes of one model share: costs of layers by kind, and messages of units by their sharding.

What parallelism makes of blocks: what they sum over ranks, and what they send besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from planner.cost.communication.collectives import overlap_of
from planner.cost.communication.context_parallel import ContextCost, Exchanged
from planner.cost.communication.expert_parallel import ExpertPass, expert_pass, spreads_experts
from planner.cost.communication.messages import Messages
from planner.cost.compute.analytic import DeviceRates
from planner.cost.constants import TimeConstants
from planner.cost.layer import LayerCost, LayerShape, Pass, Unit
from planner.cost.memory.activations import most_waits, waiting_bytes
from planner.cost.stage.layer_cost import LayerModel, Units
from planner.foundation.arrays import larger, smaller
from planner.job.engine_settings import Engine, EngineSettings, Selective
from planner.job.problem import PlanningProblem
from planner.model.attention import CpExchange
from planner.model.feed_forward import Experts
from planner.model.spec import Block, Layer
from planner.model.sublayer import Recompute
from planner.model.traced_layer import TracedLayer
from planner.profile.profile import LayerKind, Op
from planner.strategy.strategy import Degrees


def tensor_exchanges(layer: Layer, degrees: Degrees, settings: EngineSettings) -> tuple[int, int]:
    """How many inputs of a block's sublayers its tensor-parallel ranks need whole, and how many results they
    sum.

    Each sublayer's, but of those side by side one sum of their results and one input of both: in the own
    runtime where they read one norm's, else each norm's; elsewhere always, as is reported of such models
    (Falcon, arXiv 2311.16867). Experts that are shared out in their own way are not among them where each
    rank sends its own tokens, unless shared experts are beside.
    """
    if isinstance(layer, TracedLayer):
        return 0, 0
    if layer.parallel and not isinstance(layer.mlp, Experts):
        return layer.norms if settings.own else 1, 1
    apart = isinstance(layer.mlp, Experts) and not layer.mlp.shared and spreads_experts(layer, degrees)
    each = len(layer.mixers) + (layer.mlp is not None) - (apart and degrees.sequence_parallel)
    return each, each


def summed_copies_s(units: Sequence[tuple[Unit, int]], messages: Messages) -> float:
    """Once a step, in the open: the fp32 gradients of key-value heads that neighbours have copies of."""
    params: dict[int, float] = {}
    for unit, count in units:
        for copies, copied in unit.copied:
            params[copies] = params.get(copies, 0.0) + count * copied / messages.degrees.weight_shards
    return sum(messages.over_copies_s(4.0 * each, copies) for copies, each in params.items())


def tensor_s(layer: Layer, messages: Messages, option: Recompute) -> tuple[float, float]:
    """Seconds of a block's messages over tensor-parallel ranks, forward and backward.

    Where PyTorch's recomputing runs a block again, it stops at the last result that is needed.
    """
    degrees = messages.degrees
    gather, scatter = messages.over_tp(Op.ALL_GATHER, operands=True), messages.over_tp(Op.REDUCE_SCATTER)
    reduce = messages.over_tp(Op.ALL_REDUCE)
    reads, sums = tensor_exchanges(layer, degrees, messages.problem.engine_settings)
    sp = degrees.sequence_parallel
    forward_s = reads * gather + sums * scatter if sp else sums * reduce
    backward_s = sums * gather + reads * scatter if sp else reads * reduce
    if not messages.problem.engine_settings.stops_early:
        return forward_s, backward_s + forward_s * (option is Recompute.FULL)
    spared = sums > 0 and _last_sum_spared(layer, degrees)
    again_s = forward_s - (scatter if sp else reduce) * spared
    return forward_s, backward_s + again_s * (option is not Recompute.NONE)


def cp_sent_again(option: Recompute, settings: EngineSettings, exchange: CpExchange) -> bool:
    """Whether an option sends the exchange of attention once more going back.

    Where element-wise results are computed again, so are the ones that are traded for heads, but in the own
    runtime, which keeps what an all-to-all gave; a ring's or gathered keys' result is kept as attention's.
    """
    if option is not Recompute.SELECTIVE:
        return option is Recompute.FULL
    traded = exchange is CpExchange.ALL_TO_ALL and settings.recomputes is Selective.ELEMENTWISE
    return (traded and not settings.own) or settings.recomputes is Selective.ATTENTION


def experts_sent_again(option: Recompute, settings: EngineSettings, passing: ExpertPass) -> float:
    """Seconds of what an option sends once more of the exchange of experts going back.

    The own runtime's selective recomputation keeps what an all-to-all gave and nothing else of it.
    """
    whole = option is Recompute.FULL or (
        option is Recompute.SELECTIVE and settings.recomputes is Selective.MLP
    )
    beside = whole or (option is Recompute.SELECTIVE and settings.own)
    return passing.forward_s * whole + passing.beside_s * beside


def _last_sum_spared(layer: Layer, degrees: Degrees) -> bool:
    """Whether a block's last sum over tensor-parallel ranks is the last that it computes, so that nothing
    needs it once more going back: not where experts come after it, or a gate weighs it."""
    if isinstance(layer, TracedLayer) or not isinstance(layer.mlp, Experts):
        return True
    last = layer.mlp.shared is not None and not layer.mlp.shared_gate
    return last or not (degrees.spreads_experts and degrees.sequence_parallel)


def exchanged(layer: Layer, shape: LayerShape, messages: Messages, layers: LayerModel) -> Exchanged:
    """What a block's context-parallel exchange shows in either pass.

    What a rank does for it besides waiting is left out where the block's own cost has it already.
    """
    if shape.cp == 1 or not isinstance(layer, Block):
        return Exchanged()
    bandwidth, step_s = (
        layers.rates.memory_bytes_per_s if layers.rates else None,
        messages.constants.cp_step_s,
    )
    if layers.exchange_measured(shape):
        bandwidth, step_s = None, 0.0
    overlap = overlap_of(layers.problem.profile)
    cost = ContextCost(shape, messages.cp_seconds, bandwidth, overlap)
    return cost.block(layer, layers.core_s(shape), step_s)


def experts_pass(layer: Layer, messages: Messages) -> ExpertPass:
    """What sharing out a block's experts shows, if it has some."""
    if not isinstance(layer, Block) or not isinstance(layer.mlp, Experts):
        return ExpertPass()
    return expert_pass(messages, layer.mlp, layer.hidden)


UPDATE_BYTES = 28.0
"""AdamW reads parameter, gradient and two moments, and writes three of them, all in fp32."""


def update_s(messages: Messages, rates: DeviceRates | None, constants: TimeConstants) -> tuple[float, float]:
    """Seconds a tensor, and a parameter: of a profile's sweep, else its constants, else by bytes."""
    swept = rates.sampled.update_s() if rates and rates.sampled and rates.own else None
    if swept is not None:
        return swept
    constant = messages.constant
    each = constant("optimizer_s_per_param") + constant("clip_s_per_param")
    per_tensor = constant("optimizer_s_per_tensor") + constant("clip_s_per_tensor")
    if each == 0.0 and rates is not None:
        each = constants.optimizer_scale * UPDATE_BYTES / rates.memory_bytes_per_s
    return per_tensor, each


def accumulate_s(messages: Messages, rates: DeviceRates | None) -> float:
    """Seconds of adding a micro-batch's gradient to that of earlier ones, a parameter: measured, or by bytes.

    Megatron-LM adds the compute precision's to fp32, DeepSpeed adds in the compute precision, all others in
    fp32: two are read, one is written. Where bf16 gradients are summed beside themselves, these are set to
    zero and added to before. Behind a product that adds up by itself that takes no time.
    """
    measured, settings = messages.constant("grad_accumulate_s_per_param"), messages.problem.engine_settings
    if measured or rates is None or settings.accumulates_in_products:
        return measured
    size = messages.value_bytes
    moved = {Engine.MEGATRON: size + 8, Engine.DEEPSPEED: 3 * size}.get(settings.engine, 12)
    if settings.accumulates_beside(messages.problem.workload.precision):
        moved += 4 * size
    return moved / rates.memory_bytes_per_s


class LayerSharding(NamedTuple):
    """The degrees on which the cost of a layer depends, data parallelism left out."""

    tp: int
    sequence_parallel: bool
    micro_batch: int
    cp: int
    cp_exchange: CpExchange
    ep: int
    etp: int | None
    devices: int


def layer_sharding(d: Degrees) -> LayerSharding:
    """Return the sharding of layers under the given degrees."""
    return LayerSharding(d.tp, d.sequence_parallel, d.micro_batch, d.cp, d.cp_exchange, d.ep, d.etp, d.world)


Sizes = list[tuple[float, int]]
"""Bytes of layers and how many have them, the largest first."""


class SavedRanges(NamedTuple):
    """Bytes of layers: what they keep, and what waits for their weight gradients, with the option that has
    least of it and with the one that has most."""

    least: Sizes
    most: Sizes
    least_waits: Sizes
    most_waits: Sizes


class ShardedLayers:
    """Costs of single layers, remembered. `degrees` and `messages` are those of any shape of the kind."""

    def __init__(
        self, problem: PlanningProblem, degrees: Degrees, layers: LayerModel, messages: Messages
    ) -> None:
        self.problem, self.degrees = problem, degrees
        self.layer_model, self.messages, self.classes = layers, messages, layers.classes
        self.overlaps = problem.cluster.groups[0].slots_per_node is None
        self.overlap = overlap_of(problem.profile)
        self.accumulate_s = accumulate_s(messages, layers.rates)
        self._shapes: dict[tuple[LayerKind, Recompute, str], LayerShape] = {}
        self._layers: dict[tuple[LayerKind, Recompute, str], LayerCost] = {}
        self._exchanged: dict[str, Exchanged] = {}
        self._experts: dict[str, ExpertPass] = {}
        self._blocks: dict[tuple[str, Recompute], tuple[Pass, Pass]] = {}
        self._ends: dict[LayerKind, tuple[Pass, Pass]] = {}
        self._ranges: dict[tuple[Recompute, ...], SavedRanges] = {}

    def layer(self, kind: LayerKind, recompute: Recompute = Recompute.NONE, block: str = "") -> LayerCost:
        """One layer on one device for one micro-batch."""
        key = kind, recompute, block
        if key not in self._layers:
            self._layers[key] = self.layer_model.cost(self.shape_of(*key))
        return self._layers[key]

    def block(self, key: str, recompute: Recompute = Recompute.NONE) -> LayerCost:
        """One block of a class on one device for one micro-batch."""
        return self.layer(LayerKind.BLOCK, recompute, key)

    def shape_of(self, kind: LayerKind, recompute: Recompute = Recompute.NONE, block: str = "") -> LayerShape:
        """What is asked of one layer's cost under these degrees."""
        key = kind, recompute, block
        if key not in self._shapes:
            degrees, workload = self.degrees, self.problem.workload
            self._shapes[key] = LayerShape(
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
        return self._shapes[key]

    def exchanged(self, key: str) -> Exchanged:
        """What a block of a class shows of its context-parallel exchange."""
        if key not in self._exchanged:
            shape = self.shape_of(LayerKind.BLOCK, Recompute.NONE, key)
            self._exchanged[key] = exchanged(self.classes[key], shape, self.messages, self.layer_model)
        return self._exchanged[key]

    def experts(self, key: str) -> ExpertPass:
        """What sharing out the experts of a block of a class shows."""
        if key not in self._experts:
            self._experts[key] = experts_pass(self.classes[key], self.messages)
        return self._experts[key]

    def block_passes(self, key: str, option: Recompute) -> tuple[Pass, Pass]:
        """Forward and backward of a block without what data parallelism adds."""
        if (key, option) not in self._blocks:
            self._blocks[key, option] = self._block_passes(key, option)
        return self._blocks[key, option]

    def _block_passes(self, key: str, option: Recompute) -> tuple[Pass, Pass]:
        cost, plain = self.block(key, option), self.block(key)
        tp_forward_s, tp_backward_s = tensor_s(self.classes[key], self.messages, option)
        if self.overlaps:  # while the device waits for the host, its messages go out
            tp_forward_s = larger(tp_forward_s - cost.forward_idle_s, 0.0)
            tp_backward_s = larger(tp_backward_s - cost.backward_idle_s, 0.0)
        extra_s = larger(cost.backward_s - plain.backward_s, 0.0)
        again_s = self.messages.constants.recompute_scale * extra_s
        cp, ep = self.exchanged(key), self.experts(key)
        cp_again = cp_sent_again(option, self.problem.engine_settings, self.degrees.cp_exchange)
        ep_s = ep.forward_s + ep.beside_s
        forward = Pass(compute_s=cost.forward_s, tp_s=tp_forward_s, cp_s=cp.forward_s, ep_s=ep_s)
        backward = Pass(
            compute_s=cost.backward_s - extra_s,
            recompute_s=again_s,
            tp_s=tp_backward_s,
            cp_s=cp.backward_s + cp_again * cp.forward_s,
            ep_s=ep.backward_s + experts_sent_again(option, self.problem.engine_settings, ep),
        )
        return forward, backward

    def end_passes(self, kind: LayerKind) -> tuple[Pass, Pass]:
        """The same of the embedding or the head."""
        if kind not in self._ends:
            self._ends[kind] = self._end_passes(kind)
        return self._ends[kind]

    def _end_passes(self, kind: LayerKind) -> tuple[Pass, Pass]:
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
    def deferrable_s(self) -> dict[str, float]:
        """Seconds of a block's weight gradients that the own runtime can leave for later, by class."""
        shapes = {key: self.shape_of(LayerKind.BLOCK, block=key) for key in self.classes}
        return {key: self.layer_model.deferrable_s(shape) for key, shape in shapes.items()}

    def kept_ranges(self, options: tuple[Recompute, ...]) -> SavedRanges:
        """Bytes of all layers of the model with any of these options."""
        if options not in self._ranges:
            each: tuple[Sizes, ...] = [], [], [], []
            for key in self.classes:
                saved = [self.block(key, option).saved_bytes for option in options]
                waiting = [self.waiting_bytes[key, option] for option in options]
                count = self.layer_model.count(key, 0, self.problem.model.layers)
                ends = (min(saved), max(saved), min(waiting), max(waiting))
                for found, size in zip(each, ends, strict=True):
                    found.append((size, count))
            self._ranges[options] = SavedRanges(*(sorted(sizes, reverse=True) for sizes in each))
        return self._ranges[options]


class UnitMessages:
    """What data parallelism sends of each unit, worked out where it is asked for."""

    def __init__(self, messages: Messages, units: Units) -> None:
        self._messages, self._units = messages, units.all()

    @cached_property
    def gathers(self) -> dict[Unit, Pass]:
        """To gather all of a unit."""
        gather = self._messages.gather
        return {unit: gather(unit.dense_params, unit.routed_params) for unit in self._units}

    @cached_property
    def updates(self) -> dict[Unit, Pass]:
        """To gather what an update changes: all, or beside frozen weights what is trained."""
        if self._messages.problem.workload.adapters is None:
            return self.gathers
        return {unit: self._messages.gather(unit.trained) for unit in self._units}

    @cached_property
    def reduces(self) -> dict[Unit, Pass]:
        """To reduce its gradients."""
        return {unit: self._messages.reduce(unit) for unit in self._units}


class SharedCosts:
    """Costs that many shapes of one problem have in common, made where one asks for them."""

    def __init__(self) -> None:
        self._kinds: dict[LayerSharding, ShardedLayers] = {}
        self._sent: dict[tuple[object, ...], UnitMessages] = {}

    def layers(self, messages: Messages, model: LayerModel) -> ShardedLayers:
        """The layers of a shape."""
        kind = layer_sharding(messages.degrees)
        if kind not in self._kinds:
            self._kinds[kind] = ShardedLayers(messages.problem, messages.degrees, model, messages)
        return self._kinds[kind]

    def sent(self, messages: Messages, units: Units) -> UnitMessages:
        """The messages of a shape's units."""
        d = messages.degrees
        key = d.tp, d.pp, d.cp, d.ep, d.etp, d.dp_shard, d.dp_replicate, d.zero
        if key not in self._sent:
            self._sent[key] = UnitMessages(messages, units)
        return self._sent[key]


def apart_params(degrees: Degrees, unit: Unit) -> float:
    """Parameters of a block's experts where these are a unit of their own, reduced before the rest of it."""
    return unit.routed_trained if degrees.spreads_experts else 0.0


def block_waiting_bytes(shape: ShardedLayers, key: str, option: Recompute) -> float:
    """What a block holds between its input and its weight gradients (planner.cost.memory.activations).

    Nothing where it recomputes, where weights are frozen, or where the engine counts it as alive all the
    time; of a traced layer, which is none of the own runtime's, all that it may.
    """
    if option is not Recompute.NONE or shape.problem.workload.adapters is not None:
        return 0.0
    block = shape.classes[key]
    most = most_waits(shape.problem.engine_settings, shape.degrees) * shape.block(key).saved_bytes
    if not isinstance(block, Block):
        return most
    return smaller(waiting_bytes(block, shape.shape_of(LayerKind.BLOCK, block=key)), most)
