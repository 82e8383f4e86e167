"""Bytes of one stage on one device at the moments of a step, by what lives at each.

With W, G and O the bytes of weights, gradients and optimizer, a micro-batches alive of s bytes each, w of d
bytes that wait for their weight gradients, T what a pass needs for a moment, and U the parameters of the
largest unit:

    native       the largest of, with G' = G once a pass back is done, and A = a s + w d + messages
      forward    W + O + G' + A + T_forward + gathered units (see _native_gathered)
      head       W + O + G' + A + 4 U_head (1 + 1/n), its gradients being reduced
      block j    W + O + G' + A - s + s_j + T_block + some of its gradients, units gathered, and what is
                 reduced: the block behind or the head, under ZeRO 0 and 1 behind a step's last pass alone,
                 beside which a rank of one stage has nothing in flight; or all of its gradients, its
                 activations being gone. Experts that are a unit of their own run back and are reduced first
      step       G and O beside W without the copies that ZeRO 0 to 2 gather
    megatron,    W + G + O + a s + T; gradients lie in buffers of their own from the start. Under ZeRO 3 with
    deepspeed    gathered units as native
    torchtitan   the largest of
      loss       W + O + G' + a s + T_head                                G' = G from the 2nd micro-batch on
      block j    W + O + G' + (a - 1) s + s_j + T_block + gathered and reduced units (see _block_bytes)
      root       W + O + G + (a - 1) s + (c + 4) R + 4 R/n (if m > 1)     R: embedding and head, one unit
    all          W + G + O + the optimizer's temporaries, at its step; W + 4 U while weights are loaded

Native's are of FSDP2 with the embedding, each block, and norm and head as units, and a loss by chunks of
tokens: what ranks of 16 plans for H100 hold, traced on layouts alone, and ranks of 21 plans on gloo
(bench/results/*-rehearsal-*.json). What waits between I and W of the zero-bubble schedules is
planner.cost.memory.activations's; the moment of a W needs no looking at, for the last block of the I
before it has more.

Torchtitan's is FSDP2 per block and root with resharding after forward, as measured on an H100: at the loss
the root's weights are resharded and no gradient exists yet in a step's only micro-batch; a block's backward
has its gathered weights and the next's, its gradients in the compute precision, and the reduction of the
block before, in fp32, in flight. Of offloaded activations, those of a window of blocks count.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from planner.cost.memory.parameter_state import ParamBytes
from planner.cost.stage.sharded_layers import apart_params
from planner.cost.stage.stage import LayoutModel, StageCost
from planner.foundation.arrays import larger
from planner.job.engine_settings import Engine
from planner.model.sublayer import Recompute
from planner.model.workload import Optimizer
from planner.strategy.engines.native import chunk_logits
from planner.strategy.schedule.table import InFlight
from planner.strategy.strategy import Zero

HOLE_SHARE = 0.6
"""Part of the freed half-width logits' place that nothing else fits into: fitted to reserved less allocated
of 16 runs on an H100 with torch 2.11 and expandable segments (0.5 to 0.95 each)."""


FIRST_GRADIENTS = 0.25
"""The part of a block's gradients that its last product has, whose factors exist with all that a block kept:
an MLP's down projection is a quarter (gated) to a third of a block."""


def idle_apart(layout: LayoutModel) -> bool:
    """Whether a stage with nothing in flight needs nothing for a pass: what it would need depends on that."""
    return layout.problem.engine_settings.engine in (Engine.NATIVE, Engine.TORCHTITAN)


def resident(layout: LayoutModel, stage: StageCost) -> ParamBytes:
    """Weights, gradients and optimizer state of a stage on its device."""
    if stage.hosted is not None:
        return stage.hosted.kept
    return layout.states.of(stage.params, stage.end_params, stage.routed_params)


def _window_bytes(stage: StageCost) -> float:
    """Offloaded activations of the running pass."""
    return stage.hosted.window_bytes if stage.hosted is not None else 0.0


def step_temporaries_bytes(layout: LayoutModel, stage: StageCost) -> float:
    """What the optimizer's step needs for a moment, by the largest unit's shard u or the stage's P/n.

    Fused AdamW and SGD work in place. Adafactor forms an update (4 u), muon orthogonalises matrices in the
    compute precision of c bytes with two products beside (3 c U). DeepSpeed unscales into an fp32 copy of
    its gradients (4 P/n).
    """
    degrees, workload = layout.degrees, layout.problem.workload
    unit = stage.largest_unit_params
    extra = {
        Optimizer.ADAFACTOR: 4 * unit / degrees.weight_shards,
        Optimizer.MUON: 3 * workload.precision.compute_bytes * unit,
    }
    bytes_ = extra.get(workload.optimizer, 0.0)
    if layout.problem.engine_settings.engine is Engine.DEEPSPEED and workload.precision.compute_bytes < 4:
        there = stage.hosted.state_params if stage.hosted is not None else 0.0
        bytes_ += 4 * (stage.params - there) / degrees.weight_shards
    return bytes_


def least_pass_bytes(
    layout: LayoutModel, options: Iterable[Recompute], key: str = "", *, behind: bool = False
) -> float:
    """What a stage's worst moment takes at least beside all states and activations: a block (of a class) runs
    back; with `behind`, while the gradients of one behind it are reduced. 0 where not all states exist then.
    """
    engine = layout.problem.engine_settings.engine
    if engine is Engine.TORCHTITAN:
        return 0.0
    each = [layout.block(own, option) for own in ([key] if key else layout.classes) for option in options]
    running = min(cost.backward_transient_bytes for cost in each)
    if engine is not Engine.NATIVE:
        return running + _unit_buffer_bytes(layout, min(own.params for own in layout.block_units.values()))
    reduced = reducing_bytes(layout) - max(cost.saved_bytes for cost in each) if behind else 0.0
    unit = min(_native_unit_bytes(layout, *parts, FIRST_GRADIENTS) for parts in _unit_parts(layout))
    return running + unit + larger(reduced, 0.0)


def reducing_bytes(layout: LayoutModel) -> float:
    """What reducing the gradients of a block takes at least, less the copy of its weights that is freed:
    native alone, where another block runs back meanwhile. 0 where a stage may do so with less in flight."""
    if layout.problem.engine_settings.engine is not Engine.NATIVE or (
        layout.degrees.pp > 1 and _reduces_once(layout)
    ):
        return 0.0
    copy = max(_freed_copy(layout, begun=begun) for begun in (False, True))
    reduced = _native_reduced(layout)
    return larger(min(reduced * rest - copy * (rest + apart) for rest, apart in _unit_parts(layout)), 0.0)


def _unit_parts(layout: LayoutModel) -> list[tuple[float, float]]:
    """Parameters of each class of blocks: of its unit, and of experts that are one of their own."""
    found = [(own.params, apart_params(layout.degrees, own)) for own in layout.block_units.values()]
    return [(params - apart, apart) for params, apart in found]


def _reduces_once(layout: LayoutModel) -> bool:
    """Whether gradients are reduced behind a step's last pass back alone, of several."""
    return layout.degrees.zero <= Zero.OPTIMIZER and layout.degrees.num_micro_batches > 1


def stage_pass_bytes(layout: LayoutModel, stage: StageCost) -> float:
    """The same of a stage with its ends, whose forward pass may be the worst moment."""
    if layout.problem.engine_settings.engine is Engine.NATIVE:
        return stage.forward_transient_bytes
    return pass_bytes(layout, stage)


def _native_reduced(layout: LayoutModel) -> float:
    """Bytes a parameter of a unit whose gradients are being reduced: what goes in and what comes out."""
    return 4 * (1 + 1 / layout.degrees.weight_shards) if layout.degrees.replicas > 1 else 0.0


def _native_unit_bytes(layout: LayoutModel, rest: float, apart: float, made: float) -> float:
    """What native holds of a block's weights while it runs back: those of its gradients that are `made`, a
    share, in the compute precision, which wait for the last of them (where nothing is wrapped each is added
    up at once), and what ZeRO 3 gathered: them, and the message of those in the unit to come next. Experts
    that are a unit `apart` run back before the `rest`, which comes next then."""
    degrees, size = layout.degrees, layout.problem.workload.precision.compute_bytes
    wrapped = degrees.replicas > 1 or size < 4
    gathered = (2 * rest + apart) * (degrees.zero is Zero.PARAMETERS)
    return size * (made * (rest + apart) * wrapped + gathered)


def _freed_copy(layout: LayoutModel, *, begun: bool) -> float:
    """Bytes a parameter of the gathered copies that ZeRO 0 to 2 free behind a step's last pass back, which
    that is where a step has one micro-batch, or two and gradients have `begun`."""
    last = layout.degrees.num_micro_batches == 1 + begun
    return _copy_bytes(layout) if last else 0.0


def pass_bytes(layout: LayoutModel, stage: StageCost) -> float:
    """Where gradients lie in buffers: the larger pass, and what data parallelism holds for one unit.

    Where the last stage's logits are freed before its blocks run back, blocks do not fit into the place that
    the logits leave: both count (fitted to 439 layouts on A100).
    """
    passing = larger(stage.forward_transient_bytes, stage.backward_transient_bytes)
    if stage.holds_head and not layout.problem.engine_settings.liger:
        passing += stage.block_transient_bytes
    return passing + _unit_buffer_bytes(layout, stage.largest_unit_params)


def _unit_buffer_bytes(layout: LayoutModel, unit: float) -> float:
    """One unit's gathered weights (ZeRO 3) and the two ends of its gradient reduction."""
    degrees, size = layout.degrees, layout.problem.workload.precision.compute_bytes
    if degrees.replicas == 1:
        return 0.0
    reduced = degrees.zero >= Zero.GRADIENTS
    reduce = 4 * unit * (1 + 1 / degrees.weight_shards) if reduced else 0.0
    return reduce + (2 * size * unit if degrees.zero is Zero.PARAMETERS else 0.0)


def _unit_moments(layout: LayoutModel, stage: StageCost, alive: float, kept: ParamBytes) -> list[float]:
    """The loss, the backward passes of blocks, the root's reduction."""
    degrees, size = layout.degrees, layout.problem.workload.precision.compute_bytes
    accumulates = degrees.num_micro_batches > 1
    base = kept.weights + kept.optimizer + (alive - 1) * stage.saved_bytes
    extra = 4 / degrees.weight_shards if accumulates else 0.0
    root = base + kept.grads + (size + 4 + extra) * stage.end_params
    loss = base + _loss_bytes(stage) + (kept.grads if accumulates else 0.0)
    blocks = [
        base + _block_bytes(layout, stage, index) + _reduced_bytes(layout, stage, kept, index)
        for index in _blocks_to_try(stage.blocks)
    ]
    return [loss, root, *blocks]


def copied_bytes(layout: LayoutModel, stage: StageCost) -> float:
    """Bytes of the copies of a stage's weights that native ZeRO 0 to 2 keep until they are read last."""
    return _copy_bytes(layout) * stage.params


def _copy_bytes(layout: LayoutModel) -> float:
    size, degrees = layout.problem.workload.precision.compute_bytes, layout.degrees
    if degrees.zero is Zero.PARAMETERS or (degrees.zero is Zero.NONE and degrees.replicas == 1 and size == 4):
        return 0.0
    return size


def _native_pass_bytes(layout: LayoutModel, stage: StageCost, kept: ParamBytes, flight: InFlight) -> float:
    """The most that a pass needs beside the states that exist and what is in flight: the worst forward pass,
    the reduction of the head, the backward passes of blocks. Where a step reduces once, nothing else is alive
    then on a rank of one stage."""
    head = layout.head_unit.params if stage.holds_head else 0.0
    window = _window_bytes(stage)
    moments = [window + stage.forward_transient_bytes + _native_gathered(layout, stage, head)]
    reduced, copy = _native_reduced(layout), _freed_copy(layout, begun=flight.begun)
    alone = _reduces_once(layout) and flight.only
    gone = larger(flight.alive - 1, 0) * stage.saved_bytes if alone else 0.0
    if stage.holds_head:
        moments.append(window + reduced * layout.head_unit.trained - gone)
    for index in _blocks_to_try(stage.blocks):
        behind = stage.blocks - 1 - index
        before = reduced * (stage.largest_block_params - stage.largest_apart_params)
        if not behind:
            before = larger(reduced - copy, 0.0) * _head_apart(layout, stage)
        own = _native_block_bytes(layout, stage, before, reduced * stage.largest_apart_params)
        if alone:
            own = larger(own - gone, _native_block_bytes(layout, stage, 0.0, 0.0))
        if not index:
            own += _embedding_message_bytes(layout, stage, head)
        own += _kept_until(stage, index) - stage.saved_bytes - copy * stage.largest_block_params * behind
        if flight.waiting:  # and so does what the running pass leaves
            own += stage.waiting_bytes * behind / stage.blocks
        if not flight.begun:
            own += kept.grads * behind / stage.blocks * (1 - head / larger(stage.params, 1.0))
        moments.append(own)
    return larger(*moments)


def _native_block_bytes(layout: LayoutModel, stage: StageCost, before: float, experts: float) -> float:
    """What a block needs to run back, beside what is kept and so many bytes in which gradients are reduced:
    of what ran back `before` it, and in the end, if they are a unit, of its own `experts`."""
    apart = stage.largest_apart_params
    rest = stage.largest_block_params - apart
    start = stage.block_transient_bytes + _native_unit_bytes(layout, rest, apart, FIRST_GRADIENTS)
    end = layout.working_bytes + _native_unit_bytes(layout, rest, 0.0, 1.0)
    end -= stage.block_saved_bytes / stage.blocks
    return larger(start + before, end + (experts if apart else before))


def _embedding_message_bytes(layout: LayoutModel, stage: StageCost, head: float) -> float:
    """What ZeRO 3 has of the embedding's weights on their way while the first block runs back, beyond a
    block's."""
    if layout.degrees.zero is not Zero.PARAMETERS:
        return 0.0
    size, rest = layout.problem.workload.precision.compute_bytes, stage.largest_block_params
    return size * larger(stage.end_params - head - (rest - stage.largest_apart_params), 0.0)


def _head_apart(layout: LayoutModel, stage: StageCost) -> float:
    """Parameters of a head that is a unit of its own: not the one whose weight the stage's embedding has."""
    tied = layout.problem.model.tied_embeddings and layout.degrees.stages == 1
    return layout.head_unit.trained if stage.holds_head and not tied else 0.0


def _native_gathered(layout: LayoutModel, stage: StageCost, head: float) -> float:
    """What FSDP2 holds of gathered weights in a forward pass beside those that stay.

    ZeRO 3: the unit's weights and the message that they came in, which is held until the next. ZeRO 1 and 2:
    that message, in a step's only micro-batch.
    """
    degrees, size = layout.degrees, layout.problem.workload.precision.compute_bytes
    if degrees.zero is Zero.PARAMETERS:
        return 2 * size * larger(head, stage.largest_block_params)
    once = degrees.zero is not Zero.NONE and degrees.num_micro_batches == 1
    return size * stage.largest_block_params if once else 0.0


def _loss_bytes(stage: StageCost) -> float:
    """One micro-batch's activations and the larger pass."""
    passing = larger(stage.forward_transient_bytes, stage.backward_transient_bytes)
    return stage.saved_bytes + _window_bytes(stage) + passing


def _blocks_to_try(blocks: int) -> tuple[int, ...]:
    """What a block holds is linear in its place, with steps at the ends: the last and first two tell."""
    return tuple(sorted({index for index in (0, 1, blocks - 2, blocks - 1) if 0 <= index < blocks}))


def _block_bytes(layout: LayoutModel, stage: StageCost, index: int) -> float:
    """What the backward pass of block `index` holds besides weights, state and other micro-batches.

    Its own and earlier blocks' activations; its weights and the next's, gathered; its gradients in the
    compute precision.
    """
    size, unit = layout.problem.workload.precision.compute_bytes, stage.largest_block_params
    gathered = size * unit * (2 if index else 1) if _reshards(layout) else 0.0
    return _kept_until(stage, index) + stage.block_transient_bytes + gathered + size * unit


def _kept_until(stage: StageCost, index: int) -> float:
    """A micro-batch's activations of the blocks up to `index`; of those in host memory a window's."""
    activations = stage.block_saved_bytes * (index + 1) / stage.blocks
    if stage.hosted is not None and stage.hosted.blocks:
        away = larger(0, min(stage.hosted.blocks, index + 1) - stage.hosted.window)
        activations = larger(activations - stage.hosted.saved_bytes * away / stage.hosted.blocks, 0.0)
    return activations


def _reduced_bytes(layout: LayoutModel, stage: StageCost, kept: ParamBytes, index: int) -> float:
    """Gradients of the blocks behind `index` (of all, where accumulated), and the reduction before it."""
    behind = stage.blocks - 1 - index
    share = (stage.params - stage.end_params) / larger(stage.params, 1.0) / stage.blocks
    grads = kept.grads * (1.0 if layout.degrees.num_micro_batches > 1 else behind * share)
    return grads + (4 * stage.largest_block_params if behind else 0.0)


def _reshards(layout: LayoutModel) -> bool:
    """Whether a unit's gathered weights are freed after use; one device gathers by units as well."""
    return layout.degrees.zero in (Zero.NONE, Zero.PARAMETERS)


class StageMemory:
    """Bytes of a stage, or of many mixes of one, on its device with whatever is in flight."""

    def __init__(self, layout: LayoutModel, stage: StageCost) -> None:
        self.layout, self.stage = layout, stage
        self.kept = resident(layout, stage)
        self._passes: dict[tuple[bool, bool, int, bool], float] = {}

    @property
    def late_bytes(self) -> float:
        """Gradients that do not exist before the first pass back: FSDP2's."""
        return self.kept.grads if idle_apart(self.layout) else 0.0

    def held_bytes(self, flight: InFlight) -> float:
        """The states that exist, and what micro-batches in flight keep."""
        late = 0.0 if flight.begun else self.late_bytes
        return self.kept.total - late + flight.kept_bytes(self.stage.saved_bytes, self.stage.waiting_bytes)

    def transient_bytes(self, flight: InFlight) -> float:
        """What is reserved at worst beyond what is held, before the slack.

        Below 0 where not all of it exists at that moment.
        """
        return self.reserved_bytes(flight) - self.held_bytes(flight)

    @cached_property
    def _step_bytes(self) -> float:
        """The optimizer's step, or weights being loaded."""
        layout, stage = self.layout, self.stage
        step = self.kept.total + step_temporaries_bytes(layout, stage)
        if layout.problem.engine_settings.engine is Engine.NATIVE:
            step -= copied_bytes(layout, stage)
        return larger(step, self.kept.weights + 4 * stage.largest_unit_params)

    def peak_bytes(self, flight: InFlight) -> float:
        """The most that tensors take at once."""
        layout, stage, kept = self.layout, self.stage, self.kept
        if layout.problem.engine_settings.engine is Engine.TORCHTITAN:
            moments = _unit_moments(layout, stage, flight.alive, kept)
            return larger(self._step_bytes, *moments) + layout.memory.workspace_bytes
        if layout.problem.engine_settings.engine is Engine.NATIVE:
            known = flight.begun, flight.waiting > 0, flight.alive, flight.only
            if known not in self._passes:
                self._passes[known] = _native_pass_bytes(layout, stage, kept, flight)
            messages = flight.messages * layout.messages.boundary_bytes()
            return larger(self._step_bytes, self.held_bytes(flight) + messages + self._passes[known])
        alive_bytes = flight.kept_bytes(stage.saved_bytes, stage.waiting_bytes) + min(
            flight.alive, 1
        ) * _window_bytes(stage)
        return larger(self._step_bytes, kept.total + alive_bytes + pass_bytes(layout, stage))

    @cached_property
    def _hole_bytes(self) -> float:
        """What is not used again of the place of the logits in the compute precision, freed before the loss:
        where `problem.engine_settings` is the own runtime's, of a chunk of them."""
        problem, tokens = self.layout.problem, self.layout.messages.tokens
        size = problem.workload.precision.compute_bytes
        if not self.stage.holds_head or size >= 4:
            return 0.0
        vocab = problem.model.vocab_shard(self.layout.degrees.tp)
        together = chunk_logits(tokens, vocab) if problem.engine_settings.own else tokens * vocab
        return HOLE_SHARE * size * together

    def reserved_bytes(self, flight: InFlight) -> float:
        """The most that the caching allocator takes for tensors, before its slack.

        Torchtitan: memory of one stream is not given to another, so FSDP2's streams add up, each at its own
        worst moment:

            compute     the moments above without gradients
            reduction   gradients, and the fp32 input of the largest unit's reduction (where gradients are
                        accumulated, two of its outputs besides)
            gathering   weights of the root, or of two blocks, on their way

        and the logits in the compute precision leave a hole. Native: the tensors, and that hole. Elsewhere,
        and on a device without streams of its own for messages: the tensors.
        """
        layout, stage, kept = self.layout, self.stage, self.kept
        problem, degrees = layout.problem, layout.degrees
        tensors = self.peak_bytes(flight)
        if not layout.overlaps or problem.engine_settings.engine in (Engine.MEGATRON, Engine.DEEPSPEED):
            return tensors
        if problem.engine_settings.engine is Engine.NATIVE:
            return tensors + self._hole_bytes
        size = problem.workload.precision.compute_bytes
        base = kept.weights + kept.optimizer + (flight.alive - 1) * stage.saved_bytes
        blocks = [_block_bytes(layout, stage, index) for index in _blocks_to_try(stage.blocks)]
        compute = base + larger(_loss_bytes(stage), *blocks) + layout.memory.workspace_bytes
        unit = larger(stage.end_params, stage.largest_block_params)
        outputs = 2 / degrees.weight_shards if degrees.num_micro_batches > 1 else 0.0
        reduction = kept.grads + 4 * unit * (1 + outputs)
        gathers = degrees.weight_shards > 1 and _reshards(layout)
        gathering = size * larger(stage.end_params, 2 * stage.largest_block_params) if gathers else 0.0
        return larger(tensors, compute + reduction + gathering + self._hole_bytes)
