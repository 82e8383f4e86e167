"""What lies between a block's products: seconds by its operators or by the values that they move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.cost.compute import fixed
from planner.cost.compute.operator_time import BothWays
from planner.cost.layer import LayerShape
from planner.model.attention import Attention, LatentAttention
from planner.model.feed_forward import Experts
from planner.model.spec import Block
from planner.model.sublayer import SavedActivations

if TYPE_CHECKING:
    from planner.cost.compute.analytic import DeviceRates


def between_products(block: Block, shape: LayerShape, stream: float, rates: DeviceRates) -> BothWays:
    """Seconds of what lies between the products, by its operators or by the bytes that it moves."""
    pieces = rates.pieces(shape)
    measured = pieces.between(block) if pieces else None
    if measured is not None:
        return measured
    moved = shape.precision.compute_bytes * shape.tokens * _moved_values(block, shape, stream, rates)
    once_s = moved / rates.memory_bytes_per_s
    return BothWays(forward_s=once_s, backward_s=2 * once_s)


def _sublayers_kept(block: Block, shape: LayerShape) -> tuple[list[SavedActivations], list[SavedActivations]]:
    """What the mixers keep, and what the MLP keeps."""
    mixing = [mixer.saved_activations(shape.seq, shape.kernel) for mixer in block.mixers]
    return mixing, [block.mlp.saved_activations(block.hidden)] if block.mlp else []


def _moved_values(block: Block, shape: LayerShape, stream: float, rates: DeviceRates) -> float:
    """Values a token that element-wise kernels read and write.

    A norm reads and writes a stream, a residual addition moves three a sublayer. Around attention each
    product is read and written once; an activation and the product with its gate move five values for the
    two that they keep.
    """
    mixing, feeding = _sublayers_kept(block, shape)
    norms = max(block.norms, block.sublayers)
    values = 3 * block.sublayers * stream
    values += sum(2 * k.products + 2.5 * k.elementwise for k in mixing) / shape.tp
    values += 2 * sum(k.whole for k in mixing + feeding)
    activated = sum(2.5 * k.elementwise for k in feeding) / shape.tp
    turned, constants = 2 * _rotated_values(block, shape), rates.constants
    moved = 2 * norms * stream * constants.norm_scale
    moved += values * constants.elementwise_scale + turned * constants.rotary_scale
    if not isinstance(block.mlp, Experts):
        return moved + activated * constants.elementwise_scale
    unfused = block.mlp.expert.bias and not rates.fused_experts
    rows = 2 * sum(k.routed for k in feeding) * shape.expert_tp / shape.tp
    rows += activated * (fixed.UNFUSED_ACTIVATION if unfused else 1)
    return moved + rows * constants.routed_scale


def _rotated_values(block: Block, shape: LayerShape) -> float:
    """Values a token that rotary positions turn on this shard."""
    if not shape.rotary:
        return 0.0
    return sum(m.rotated for m in block.mixers if isinstance(m, (Attention, LatentAttention))) / shape.tp


def widest_values(block: Block, shape: LayerShape) -> float:
    """Values a token that live for a moment at the widest place: one and a half times its products."""
    mixing, feeding = _sublayers_kept(block, shape)
    return 1.5 * max(k.products + k.whole + k.routed for k in mixing + feeding)


def formed_values(block: Block, shape: LayerShape) -> float:
    """Values a token that a pass back forms at the widest place, less those that it has used up there: the
    gradients of an MLP's product and of its two factors, without the product. As many as the products."""
    mixing, feeding = _sublayers_kept(block, shape)
    return max([*(k.products + k.whole for k in mixing), *(k.products for k in feeding)])
