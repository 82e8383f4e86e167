"""Bytes of one layer's activations as its engine keeps them, where no sample measured them.

The analytic layer keeps what eager PyTorch keeps (planner.model.spec.Block.saved_bytes). This changes it by
what
the engine does otherwise:

- Sequence parallelism but Megatron's: each sublayer's gathered input, h values a token, stays whole on every
  rank, (1 - 1/tp) h more than its shard; Megatron gathers it again instead (arXiv 2205.05198).
- A compiled block recomputes the result of its activation function, one MLP width a token, since it fuses
  into what reads it; so do Megatron's fused SwiGLU and GELU.
- Selective recomputation is the engine's own (planner.job.engine_settings.Selective). What is traded for
heads
  (planner.cost.communication.context_parallel.traded_bytes) it trades again, unless it recomputes the MLP
  alone.
- The own runtime's pass back frees what it has used up before it forms more
(planner.cost.compute.elementwise_time), as was
  traced on shapes alone.
- The loss over a sharded vocabulary takes 6 bytes a logit more at its worst than the whole one does in
  torch's loss_parallel (18, not 12: shifted logits, their exponentials and a copy for the sum). Where ranks
  gather the logits instead, each holds all of them.

Measured against: 16 runs on an H100 with torch 2.11, all within 0.5 % (tests/planner/cost/test_memory.py).

Bytes that a block holds of a micro-batch between its input gradients (I) and its weight gradients (W).

The own runtime (runtime.parallel.deferred_gradients) keeps the two factors of every linear layer's weight
gradient, x and dy,
and frees all else in I: saved values of norms, of attention and of the activation function, experts, what
embedding and head keep. With t tokens, c bytes a value and h values a token of the hidden state,

    t c ( h for each sublayer that reads one + inputs of every other linear layer + outputs of every one )

since the linear layers that read a sublayer's input keep one and the same tensor. Sublayers side by side
read one input where they share a norm, and have one gradient of their results. Tensor parallelism shares out
what it splits; inputs of split outputs and gradients of split inputs are whole on every rank, under sequence
parallelism too, as they were gathered. A llama block of hidden h, query q, key-value k, MLP f thus holds

    x  2 h + q + f     dy  2 h + q + 2 k + 2 f

A block that recomputes does its whole backward in I, and holds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.cost.communication.context_parallel import both_sides_bytes, traded_bytes
from planner.cost.compute.elementwise_time import formed_values, widest_values
from planner.cost.compute.recompute_time import keeps_every_second
from planner.cost.constants import MemoryConstants
from planner.cost.layer import LayerCost, LayerShape, block_saved_bytes
from planner.foundation.frozen import replaced
from planner.job.engine_settings import Engine, EngineSettings, Selective
from planner.model.attention import Attention
from planner.model.feed_forward import FeedForward, Mlp
from planner.model.spec import Block, ModelSpec
from planner.model.sublayer import AttentionKernel, Recompute, SavedActivations, Split, WeightMatrix
from planner.model.workload import Precision
from planner.profile.profile import LayerKind
from planner.strategy.engines.native import chunk_logits
from planner.strategy.strategy import Degrees

SHARDED_LOSS_BYTES = 6.0
"""Bytes a logit that torch's vocabulary-parallel loss needs over the plain one, at the worst moment."""


def engine_bytes(
    cost: LayerCost, model: ModelSpec, shape: LayerShape, settings: EngineSettings, constants: MemoryConstants
) -> LayerCost:
    """An analytic layer's cost with the bytes that `settings` keeps."""
    if shape.kind is LayerKind.BLOCK:
        block = model.classes()[shape.block] if shape.block else model.segments[0].block
        if isinstance(block, Block):
            return _block_bytes(cost, block.with_kv_copies(shape.tp), shape, settings, constants)
    if shape.kind is LayerKind.HEAD and model.vocab:
        return _head_bytes(cost, model, shape, settings, constants)
    return replaced(
        cost,
        forward_transient_bytes=cost.forward_transient_bytes * constants.transient_scale,
        backward_transient_bytes=cost.backward_transient_bytes * constants.transient_scale,
    )


def _head_bytes(
    cost: LayerCost, model: ModelSpec, shape: LayerShape, settings: EngineSettings, constants: MemoryConstants
) -> LayerCost:
    """The head with its loss: K bytes a logit are kept, `loss_bytes` there at worst, of the own shard or all.

    K = 4 + c, fp32 and the compute precision, or 4 where they are one.
    """
    if settings.chunks_loss:
        return _chunked_bytes(cost, model, shape, settings, constants)
    size = shape.precision.compute_bytes
    shard = shape.tokens * model.vocab_shard(shape.tp)
    logits = shard * shape.tp
    own = logits if settings.gathers_logits else shard
    kept = 4.0 + (size if size < 4 else 0)
    beside = SHARDED_LOSS_BYTES * own if _dtensor(settings) and shape.tp > 1 else 0.0
    gathered = constants.gathered_logits_bytes * logits if shape.tp > 1 else 0.0
    return replaced(
        cost,
        saved_bytes=cost.saved_bytes + kept * (own - shard),
        forward_transient_bytes=4.0 * own + gathered,
        backward_transient_bytes=max(constants.loss_bytes - kept, 0.0) * own + beside + gathered,
    )


def _chunked_bytes(
    cost: LayerCost, model: ModelSpec, shape: LayerShape, settings: EngineSettings, constants: MemoryConstants
) -> LayerCost:
    """The head and its loss over a part of the tokens at a time, forward and backward at once.

    Instead of logits their gradients stay from the forward pass: of the head's input and of its weights.
    Source: Liger Kernel, arXiv 2410.10989 (FusedLinearCrossEntropy: h/V of the tokens at a time); the own
    runtime's chunks are planner.strategy.engines.native'. There a logit takes, besides what the product
    gives, its
    exponential in fp32, and in 16 bits its gradient.
    """
    size = shape.precision.compute_bytes
    vocab, kept = model.vocab_shard(shape.tp), 4.0 + (size if size < 4 else 0)
    if settings.liger:
        chunk = constants.loss_bytes * vocab * shape.tokens / math.ceil(model.vocab / model.token_width)
    else:
        chunk = (size + kept) * chunk_logits(shape.tokens, vocab)
    gradients = size * (shape.tokens * model.token_width + vocab * model.token_width)
    return replaced(
        cost,
        saved_bytes=cost.saved_bytes - kept * shape.tokens * vocab + gradients,
        forward_transient_bytes=chunk,
        backward_transient_bytes=0.0,
    )


def _dtensor(settings: EngineSettings) -> bool:
    return settings.engine in (Engine.NATIVE, Engine.TORCHTITAN)


def _block_bytes(
    cost: LayerCost, block: Block, shape: LayerShape, settings: EngineSettings, constants: MemoryConstants
) -> LayerCost:
    plain = block_saved_bytes(block, shape, Recompute.NONE)
    whole = _kept_bytes(plain, block, shape, settings, constants)
    analytic, kept = plain, whole
    if shape.recompute is not Recompute.NONE:
        analytic = block_saved_bytes(block, shape, shape.recompute)
        kept = constants.activation_scale * analytic
    if shape.recompute is Recompute.SELECTIVE:
        kept = _selective_bytes(whole, plain - analytic, block, shape, settings, constants)
    each = shape.precision.compute_bytes * shape.tokens
    working = cost.backward_transient_bytes - (plain - analytic) + _gathered_bytes(block, shape, settings)
    if settings.liger and isinstance(block.mlp, Mlp):
        stream = block.hidden / (shape.tp if shape.sequence_parallel else 1)
        working = each * (2 * stream + block.mlp.width / shape.tp)
    elif settings.engine is Engine.NATIVE:
        working += each * (formed_values(block, shape) - widest_values(block, shape)) / shape.tp
    working *= constants.transient_scale
    return replaced(
        cost,
        saved_bytes=kept,
        forward_transient_bytes=max(working, whole if shape.recompute is Recompute.FULL else 0.0),
        backward_transient_bytes=working + whole - kept + _weight_gradient_bytes(block, shape, settings),
    )


def _weight_gradient_bytes(block: Block, shape: LayerShape, settings: EngineSettings) -> float:
    """Megatron's largest weight gradient on its way to its buffer: that of the up projections, as one."""
    if settings.engine is not Engine.MEGATRON or not isinstance(block.mlp, Mlp):
        return 0.0
    matrix = block.mlp.up_projections * block.mlp.width * block.hidden / shape.tp
    return shape.precision.compute_bytes * matrix


def _kept_bytes(
    plain: float, block: Block, shape: LayerShape, settings: EngineSettings, constants: MemoryConstants
) -> float:
    """What a block keeps without recomputation, where eager PyTorch keeps `plain`."""
    size, probabilities = shape.precision.compute_bytes, _probability_bytes(block, shape)
    kept = plain + block.sublayers * _gathered_bytes(block, shape, settings)
    kept = (kept - probabilities - _fused_bytes(block, shape, settings)) * constants.activation_scale
    stream = block.hidden / (shape.tp if shape.sequence_parallel else 1)
    norms = constants.norm_bytes * size / 2 * block.norms * shape.tokens * stream
    return kept + norms + constants.probability_scale * probabilities + traded_bytes(block, shape)


def _probability_bytes(block: Block, shape: LayerShape) -> float:
    """What an unfused kernel keeps of probabilities, once."""
    if shape.kernel is AttentionKernel.FLASH:
        return 0.0
    flash = (mixer.saved_activations(shape.seq, AttentionKernel.FLASH).products for mixer in block.mixers)
    own = (mixer.saved_activations(shape.seq, shape.kernel).products for mixer in block.mixers)
    return shape.precision.compute_bytes * shape.tokens * (sum(own) - sum(flash)) / shape.tp


def _fused_bytes(block: Block, shape: LayerShape, settings: EngineSettings) -> float:
    """What fusing the activation function spares: its result, one width of the MLP."""
    modern = settings.engine is Engine.MEGATRON and shape.kernel is AttentionKernel.FLASH
    fused = settings.keeps_compiled or settings.liger or modern
    if not (fused and isinstance(block.mlp, Mlp)):
        return 0.0
    return shape.precision.compute_bytes * shape.tokens * block.mlp.width / shape.tp


def _gathered_bytes(block: Block, shape: LayerShape, settings: EngineSettings) -> float:
    """What a sublayer's gathered input takes over its shard where it stays whole."""
    if not (shape.sequence_parallel and settings.keeps_gathered):
        return 0.0
    return shape.precision.compute_bytes * shape.tokens * block.hidden * (1 - 1 / shape.tp)


def _selective_bytes(
    whole: float,
    dropped: float,
    block: Block,
    shape: LayerShape,
    settings: EngineSettings,
    constants: MemoryConstants,
) -> float:
    """What a block keeps of `whole` under the engine's selective recomputation; `dropped` is what eager
    PyTorch keeps of element-wise results."""
    size, tokens = shape.precision.compute_bytes, shape.tokens
    scale = constants.activation_scale
    match settings.recomputes:
        case Selective.EVERY_SECOND if keeps_every_second(block):
            return min(whole, scale * _every_second_bytes(block, shape))
        case Selective.ELEMENTWISE | Selective.EVERY_SECOND:
            if settings.own:
                return (
                    whole
                    + both_sides_bytes(block, shape)
                    - scale * max(dropped - _fused_bytes(block, shape, settings), 0.0)
                )
            again = traded_bytes(block, shape)
            return whole - again - scale * max(dropped - _fused_bytes(block, shape, settings), 0.0)
        case Selective.ATTENTION:
            probabilities = constants.probability_scale * _probability_bytes(block, shape)
            return whole - traded_bytes(block, shape) - probabilities
        case Selective.MLP:
            kept = block.mlp.saved_activations(block.hidden) if block.mlp else None
            values = _mlp_values(kept, shape) if kept else 0.0
            return whole - scale * (size * tokens * values - _fused_bytes(block, shape, settings))


def _mlp_values(kept: SavedActivations, shape: LayerShape) -> float:
    """Values a token that an MLP or experts keep."""
    routed = kept.routed * shape.expert_tp / shape.tp
    return (kept.products + kept.elementwise) / shape.tp + kept.whole + routed


def _every_second_bytes(block: Block, shape: LayerShape) -> float:
    """The block's input, attention's result with its statistics, every second product but of those in fp8
    (planner.cost.compute.recompute_time), messages over tp."""
    size, stream = shape.precision.compute_bytes, block.hidden / (shape.tp if shape.sequence_parallel else 1)
    kept = () if shape.precision is Precision.FP8 else block.matrices()[::2]
    products = sum(matrix.shard(shape.tp)[1] for matrix in kept)
    attentions = [mixer for mixer in block.mixers if isinstance(mixer, Attention)]
    results = sum(mixer.out_width for mixer in attentions) / shape.tp
    statistics = 4.0 * sum(mixer.heads for mixer in attentions) / shape.tp
    messages = block.sublayers * stream if shape.sequence_parallel else 0.0
    return shape.tokens * (size * (stream + results + products + messages) + statistics)


def most_waits(settings: EngineSettings, degrees: Degrees) -> int:
    """How many times what a forward kept what waits for W may take; 0 where an engine keeps all until W.

    Twice where tensor and sequence parallelism share out all that is kept but the gathered inputs of layers:
    beside these then lie the gathered gradients of results.
    """
    if not settings.defers_products:
        return 0
    return 2 if degrees.sequence_parallel else 1


def waiting_bytes(block: Block, shape: LayerShape) -> float:
    """What a block that recomputes nothing holds for W."""
    block = block.with_kv_copies(shape.tp)
    sublayers = [mixer.matrices(block.hidden) for mixer in block.mixers]
    sublayers += [_dense(block.mlp, block.hidden)] if block.mlp else []
    sublayers = [matrices for matrices in sublayers if matrices]
    inputs = outputs = 0.0
    for matrices in sublayers:
        own_inputs, own_outputs = _factors(matrices, block.hidden, shape.tp)
        inputs, outputs = inputs + own_inputs, outputs + own_outputs
    if block.parallel:
        more = len(sublayers) - 1
        inputs -= block.hidden * more * (block.norms == 1)
        outputs -= block.hidden * more
    return shape.precision.compute_bytes * shape.tokens * (inputs + outputs)


def _dense(mlp: FeedForward, hidden: int) -> tuple[WeightMatrix, ...]:
    """The linear layers of an MLP, or those that every token meets beside experts; the router is none."""
    matrices = mlp.matrices(hidden)
    return matrices if isinstance(mlp, Mlp) else tuple(each for each in matrices[1:] if not each.routed)


def _factors(matrices: Sequence[WeightMatrix], hidden: int, tp: int) -> tuple[float, float]:
    """Values a token of the distinct inputs of a sublayer's linear layers, and of their results."""
    reading = any(matrix.inputs == hidden and matrix.split is not Split.INPUTS for matrix in matrices)
    inputs = float(hidden * reading)
    for matrix in matrices:
        if matrix.inputs != hidden or matrix.split is Split.INPUTS:
            inputs += matrix.shard(tp)[0]
    return inputs, sum(matrix.shard(tp)[1] for matrix in matrices)
