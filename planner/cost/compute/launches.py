"""How many operators the host launches for a block."""

from __future__ import annotations

from planner.cost.compute import fixed
from planner.cost.layer import LayerShape
from planner.model.attention import Attention, LatentAttention
from planner.model.feed_forward import Experts, FeedForward
from planner.model.spec import Block
from planner.model.sublayer import AttentionKernel


def launches(block: Block, shape: LayerShape) -> float:
    """Operators of a block's forward over BLOCK_OPERATORS, those of a Llama block.

    Each product, norm and residual addition is one, an activation one or with its gate two, attention between
    the projections one where flash, else two products and a softmax; turning queries and keys takes more.
    """
    operators = len(block.matrices()) + max(block.norms, block.sublayers) + block.sublayers
    operators += _activation_operators(block.mlp)
    for mixer in block.mixers:
        operators += 1 if shape.kernel is AttentionKernel.FLASH else 3
        operators += fixed.EAGER_LAUNCHES if shape.kernel is AttentionKernel.EAGER else 0
        if shape.rotary and isinstance(mixer, (Attention, LatentAttention)) and mixer.rotated:
            operators += fixed.ROTARY_OPERATORS
    return operators / fixed.BLOCK_OPERATORS


def _activation_operators(mlp: FeedForward | None) -> int:
    """Operators of a feed-forward sublayer besides its products: activation, gate, routing."""
    if mlp is None:
        return 0
    if isinstance(mlp, Experts):
        return fixed.ROUTING_OPERATORS + mlp.expert.up_projections
    return mlp.up_projections
