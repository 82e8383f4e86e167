"""What training a block takes besides its forward products and the gradients of their inputs.

A block's backward has, for each forward product y = x W, one product for the gradient of x and one for that
of W. Where all weights are trained, that is all. Where they are frozen beside adapters (LoRA, arXiv
2106.09685), the second falls away, and an adapter computes y + s (x A) B with A of in x r and B of r x out:
two thin products forward, four backward (for x and A, for x A and B). Every value of the output is scaled and
added, and going back the two gradients of x are added:

    values moved            2 out + 3 out forward           2 out + 3 in backward
    kernels                 4 forward                       6 backward, and 1 fewer for each frozen W

Thin products run at the rate of their smaller side, r (planner.cost.compute.gemm). What the ranks of tensor
parallelism send of x A, r values a token, is not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from planner.cost.compute.fixed import BLOCK_LAUNCHES
from planner.cost.layer import LayerShape
from planner.foundation.frozen import frozen
from planner.model.lora import adapted
from planner.model.spec import Block, ModelSpec
from planner.model.sublayer import Split
from planner.model.workload import Adapters, Workload

ProductSeconds = Callable[[float, float, float], float]
"""Seconds of an (m, k) x (k, n) product, from m, n and k."""


@frozen
class Trained:
    """By direction: seconds of products, values moved a token, and launches over those of a block's forward.

    Launches are below 0 where weight gradients are not computed.
    """

    forward_products_s: float = 0.0
    backward_products_s: float
    forward_values: float = 0.0
    backward_values: float = 0.0
    forward_launches: float = 0.0
    backward_launches: float = 0.0


def beside_frozen(block: Block, shape: LayerShape, adapters: Adapters, product_s: ProductSeconds) -> Trained:
    """Adapters beside a frozen block, on one tensor-parallel rank."""
    rank, tokens = adapters.rank, shape.tokens
    shards = [matrix.shard(shape.tp) for matrix in adapted(block, adapters.modules)]
    thin_s = sum(product_s(tokens, rank, n) + product_s(tokens, m, rank) for n, m in shards)
    inputs, outputs = sum(n for n, _ in shards), sum(m for _, m in shards)
    frozen = sum(matrix.copies for matrix in block.matrices())
    return Trained(
        forward_products_s=thin_s,
        backward_products_s=2 * thin_s,
        forward_values=5 * outputs,
        backward_values=2 * outputs + 3 * inputs,
        forward_launches=4 * len(shards) / BLOCK_LAUNCHES,
        backward_launches=(6 * len(shards) - frozen) / BLOCK_LAUNCHES,
    )


def without_lowest(work: Trained, block: Block, shape: LayerShape, product_s: ProductSeconds) -> Trained:
    """The work of the model's first block, less the input gradients that no one needs.

    The embedding is frozen: matrices that read the first block's own input need not give it a gradient.
    """
    first = block.mixer.matrices(block.hidden) if block.mixer else ()
    readers = [m for m in first if m.inputs == block.hidden and m.split is not Split.INPUTS]
    shards = [matrix.shard(shape.tp) for matrix in readers]
    needless_s = sum(product_s(shape.tokens, outputs, inputs) for inputs, outputs in shards)
    return dataclasses.replace(work, backward_products_s=work.backward_products_s - needless_s)


def trained_flops_per_token(model: ModelSpec, workload: Workload) -> float:
    """Model FLOPs of training one token: three forwards, less the weight gradients of frozen weights.

    Products between tokens have two gradients whatever is frozen. Adapters' own products are not counted.
    """
    forward = model.flops_per_token_forward(workload.seq)
    if workload.adapters is None:
        return 3 * forward
    between = sum(s.count * s.block.attention_flops_forward(1, workload.seq) for s in model.segments)
    return 2 * forward + between
