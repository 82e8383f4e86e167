"""Bytes that a block holds of a micro-batch between its input gradients (I) and its weight gradients (W).

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

from collections.abc import Sequence

from planner.cost.layer import LayerShape
from planner.job.engine_settings import Stack
from planner.model.feed_forward import FeedForward, Mlp
from planner.model.spec import Block
from planner.model.weight_matrix import Matrix, Split
from planner.strategy.strategy import Degrees


def most_waits(stack: Stack, degrees: Degrees) -> int:
    """How many times what a forward kept what waits for W may take; 0 where an engine keeps all until W.

    Twice where tensor and sequence parallelism share out all that is kept but the gathered inputs of layers:
    beside these then lie the gathered gradients of results.
    """
    if not stack.defers_products:
        return 0
    return 2 if degrees.sequence_parallel else 1


def waiting_bytes(block: Block, shape: LayerShape) -> float:
    """What a block that recomputes nothing holds for W."""
    block = block.held(shape.tp)
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


def _dense(mlp: FeedForward, hidden: int) -> tuple[Matrix, ...]:
    """The linear layers of an MLP, or those that every token meets beside experts; the router is none."""
    matrices = mlp.matrices(hidden)
    return matrices if isinstance(mlp, Mlp) else tuple(each for each in matrices[1:] if not each.routed)


def _factors(matrices: Sequence[Matrix], hidden: int, tp: int) -> tuple[float, float]:
    """Values a token of the distinct inputs of a sublayer's linear layers, and of their results."""
    reading = any(matrix.inputs == hidden and matrix.split is not Split.INPUTS for matrix in matrices)
    inputs = float(hidden * reading)
    for matrix in matrices:
        if matrix.inputs != hidden or matrix.split is Split.INPUTS:
            inputs += matrix.shard(tp)[0]
    return inputs, sum(matrix.shard(tp)[1] for matrix in matrices)
