"""What a sublayer keeps for its backward pass, and the attention kernel that this depends on."""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen


class AttentionKernel(StrEnum):
    """How attention is computed: flash keeps a number a row, the others the whole matrix of probabilities.

    Fused scales, masks and normalises the scores in one kernel, eager in one each.
    """

    FLASH = "flash"
    FUSED = "fused"
    EAGER = "eager"


@frozen
class Kept:
    """Values a token that a sublayer keeps for its backward pass, besides the residual stream.

    `products` are results of matrix products and of attention, which selective recomputation keeps too;
    `elementwise` are what it recomputes. `statistics` are fp32 values. All are shared out by tensor
    parallelism, except `whole`, which is not, and `routed`, rows of experts, which is as far as each expert
    is not (its ranks then hold other tokens instead).
    """

    products: float
    elementwise: float = 0.0
    statistics: float = 0.0
    whole: float = 0.0
    routed: float = 0.0


class Recompute(StrEnum):
    """What a block recomputes in the backward pass instead of keeping it.

    `selective` keeps the results of matrix products and of attention and recomputes the element-wise
    rest; `full` keeps only the block's input.
    """

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"
