"""Seconds of matrix products: of a block, of its experts, and of casts to fp8 around them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from planner.cost.compute import fixed
from planner.cost.layer import LayerShape
from planner.model.spec import Block
from planner.model.sublayer import Split, WeightMatrix
from planner.model.workload import Precision
from planner.profile.profile import OperatorKind

if TYPE_CHECKING:
    from planner.cost.compute.analytic import DeviceRates


def product_s(m: float, n: float, k: float, rates: DeviceRates, *, precise: bool = False) -> float:
    """Seconds of an (m, k) x (k, n) product: 2 m n k over the rate of its shape.

    Where only the rate of large products is known, small dimensions are padded. `precise` ones stay in bf16
    where the others are in fp8.
    """
    sampled = rates.sampled_precise if precise else rates.sampled
    if sampled is not None:
        return sampled.forward_s(OperatorKind.GEMM, m, n, k) / rates.constants.gemm_scale
    shapes = rates.precise if precise else rates.by_shape
    rate = shapes.rate_flops(m, n, k) if shapes else None
    if rate is not None:
        own = rates.constants.fp8_scale if rates.fp8 and not precise else 1.0
        return 2.0 * m * n * k / (rate[0] * own * rates.constants.gemm_scale)
    half = fixed.GEMM_HALF_DIM
    return 2.0 * m * n * k * (1 + half / n) * (1 + half / k) / rates.flops


def matrices_s(block: Block, shape: LayerShape, rates: DeviceRates) -> float:
    """Seconds of a block's forward products."""
    pieces = rates.pieces(shape)
    if pieces is not None:
        return pieces.products(block.matrices()).forward_s
    total_s = 0.0
    for matrix in products_of(block, rates):
        if matrix.routed:
            total_s += routed_s(matrix, shape, rates)
            continue
        inputs, outputs = matrix.shard(shape.tp)
        total_s += product_s(shape.tokens, outputs, inputs, rates)
    return total_s


def products_of(block: Block, rates: DeviceRates) -> tuple[WeightMatrix, ...]:
    """A block's matrices, those of a sublayer that have one input as one where the engine fuses them.

    Query, key and value; up projection and gate (Megatron-LM's linear_qkv and linear_fc1).
    """
    if not rates.fused:
        return block.matrices()
    sublayers = [mixer.matrices(block.hidden) for mixer in block.mixers]
    sublayers += [block.mlp.matrices(block.hidden)] if block.mlp else []
    return tuple(matrix for matrices in sublayers for matrix in _fused(matrices))


def _fused(matrices: tuple[WeightMatrix, ...]) -> list[WeightMatrix]:
    """The matrices of one sublayer, neighbours as one that are split by outputs and have one input."""
    found: list[WeightMatrix] = []
    for matrix in matrices:
        last = found[-1] if found else None
        if last and last.split is Split.OUTPUTS and last == dataclasses.replace(matrix, outputs=last.outputs):
            found[-1] = dataclasses.replace(matrix, outputs=last.outputs + matrix.outputs)
        else:
            found.append(matrix)
    return found


def cast_s(block: Block, shape: LayerShape, rates: DeviceRates) -> tuple[float, float]:
    """Seconds of casts to fp8, forward of every product's input, backward of its result's gradient.

    A value is read in 2 bytes and written in 1, once more transposed for the gradient of weights: 4 bytes.
    """
    if shape.precision is not Precision.FP8 or rates.pieces(shape) is not None:
        return 0.0, 0.0  # samples of the runtime's products have their casts in them
    inputs = outputs = 0.0
    for matrix in products_of(block, rates):
        shards = shape.expert_tp if matrix.routed else shape.tp
        rows = matrix.used * shape.expert_tp / shape.tp if matrix.routed else 1.0
        own_inputs, own_outputs = matrix.shard(shards)
        inputs, outputs = inputs + rows * own_inputs, outputs + rows * own_outputs
    value_s = 4.0 * rates.constants.cast_scale * shape.tokens / rates.memory_bytes_per_s
    return inputs * value_s, outputs * value_s


def routed_s(matrix: WeightMatrix, shape: LayerShape, rates: DeviceRates) -> float:
    """Seconds of the products of a device's experts with the rows that are sent to it.

    Of E experts a device holds E / ep, each in etp shards. The ep x etp ranks that hold all of them bring
    ep x etp / tp times its t tokens, and each expert meets k / E of these: t (ep etp / tp) k / E rows.
    Products of several experts run at once, so their rate is that of a product of their rows together. The
    slowest of ep ranks has more rows than the mean.
    """
    inputs, outputs = matrix.shard(shape.expert_tp)
    own = matrix.copies / shape.ep
    rows = shape.tokens * shape.ep * shape.expert_tp / shape.tp * matrix.used / matrix.copies
    together = min(own, fixed.GROUPED_PRODUCTS)
    seconds = (
        own / together * product_s(rows * together, outputs, inputs, rates) / rates.constants.grouped_scale
    )
    return seconds * rates.imbalance if shape.ep > 1 else seconds
