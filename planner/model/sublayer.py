"""Matrix: a weight that tokens are multiplied with, and what it counts in parameters, FLOPs and tensors.

Every sublayer names its matrices once; parameters, FLOPs, tensors and the times of products follow.

What a sublayer keeps for its backward pass, and the attention kernel that this depends on.

Heads: counts of heads that the ranks of tensor parallelism share out.
"""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen


class Split(StrEnum):
    """How tensor parallelism cuts a matrix: its outputs, its inputs, or not at all."""

    OUTPUTS = "outputs"
    INPUTS = "inputs"
    NONE = "none"


@frozen
class WeightMatrix:
    """`copies` weights of shape [outputs, inputs], of which each token meets `used` (experts and top-k)."""

    inputs: int
    outputs: int
    split: Split = Split.OUTPUTS
    bias: bool = False
    copies: int = 1
    used: int = 1

    @property
    def params_each(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias

    @property
    def routed(self) -> bool:
        """Whether tokens choose among its copies: experts."""
        return self.copies > 1

    @property
    def params(self) -> int:
        return self.copies * self.params_each

    @property
    def params_active(self) -> int:
        return self.used * self.params_each

    @property
    def tensors(self) -> int:
        """Parameter tensors; the copies of experts are stacked into one."""
        return 1 + self.bias

    @property
    def flops_per_token(self) -> float:
        """FLOPs of one token's forward product: 2 per weight that it meets."""
        return 2.0 * self.used * self.inputs * self.outputs

    def shard(self, tp: int) -> tuple[float, float]:
        """Inputs and outputs of one of `tp` shards."""
        return (
            self.inputs / (tp if self.split is Split.INPUTS else 1),
            self.outputs / (tp if self.split is Split.OUTPUTS else 1),
        )

    def params_shard(self, tp: int) -> float:
        """Parameters of one of `tp` shards; a bias behind a sum over shards stays whole."""
        inputs, outputs = self.shard(tp)
        return self.copies * (inputs * outputs + outputs * self.bias)


class AttentionKernel(StrEnum):
    """How attention is computed: flash keeps a number a row, the others the whole matrix of probabilities.

    Fused scales, masks and normalises the scores in one kernel, eager in one each.
    """

    FLASH = "flash"
    FUSED = "fused"
    EAGER = "eager"


@frozen
class SavedActivations:
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


@frozen
class HeadCount:
    """A count of heads of which each rank has whole ones, as many as the others.

    Those that may be `repeated` can be fewer than the ranks: then neighbours have copies of one.
    """

    count: int
    what: str
    repeated: bool = False

    def split_over(self, tp: int) -> bool:
        """Whether `tp` ranks can share them out."""
        return self.count % tp == 0 or (self.repeated and tp % self.count == 0)
