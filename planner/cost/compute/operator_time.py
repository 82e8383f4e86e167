"""Seconds of the parts of a layer by the measured times of their operators, as the runtime runs them.

Each part is a pair, forward and backward. A block is its products, attention between the projections, and
what lies between them; embedding and head are an operator each.
"""

from __future__ import annotations

from planner.cost.compute.measured_operators import MeasuredRates
from planner.cost.layer import LayerShape
from planner.foundation.frozen import frozen
from planner.model.attention import Attention, LatentAttention, QkNorm
from planner.model.feed_forward import Experts, FeedForward, Mlp
from planner.model.mixers import Mixer
from planner.model.spec import Block, Norm
from planner.model.sublayer import AttentionKernel, WeightMatrix
from planner.profile.profile import OperatorKind

ADDED_VALUES = 3
"""Values that a sum of two tensors reads and writes, for each value of the result."""

ROUTED_PASSES = 4
"""Times that the runtime reads or writes a row of experts beside their products: copied from its token, and
at its place again to be weighed and summed (runtime.model.experts)."""


@frozen
class BothWays:
    """Seconds forward and backward."""

    forward_s: float = 0.0
    backward_s: float = 0.0

    def __add__(self, other: BothWays) -> BothWays:
        return BothWays(
            forward_s=self.forward_s + other.forward_s, backward_s=self.backward_s + other.backward_s
        )

    def times(self, count: float) -> BothWays:
        """So many of them."""
        return BothWays(forward_s=count * self.forward_s, backward_s=count * self.backward_s)


class Pieces:
    """Parts of a layer of one shape. `imbalance` is that of experts over ranks."""

    def __init__(self, shape: LayerShape, rates: MeasuredRates, imbalance: float = 1.0) -> None:
        self.shape, self.rates, self.imbalance = shape, rates, imbalance

    # Products

    def products(self, matrices: tuple[WeightMatrix, ...]) -> BothWays:
        """A block's matrices; the gradients of weights are added to those of earlier micro-batches."""
        return sum((self._product(matrix) for matrix in matrices), BothWays())

    def _product(self, matrix: WeightMatrix) -> BothWays:
        """Of experts those that the device holds, each with as many rows: see `products.routed_s`."""
        shape = self.shape
        if not matrix.routed:
            inputs, outputs = matrix.shard(shape.tp)
            return self._both(OperatorKind.GEMM, shape.tokens, outputs, inputs)
        inputs, outputs = matrix.shard(shape.expert_tp)
        rows = shape.tokens * shape.ep * shape.expert_tp / shape.tp * matrix.used / matrix.copies
        own, slowest = matrix.copies / shape.ep, self.imbalance if shape.ep > 1 else 1.0
        if self.rates.has(OperatorKind.GROUPED):
            return self._both(OperatorKind.GROUPED, own, rows, outputs, inputs).times(slowest)
        return self._both(OperatorKind.GEMM, rows, outputs, inputs).times(own * slowest)

    # Attention

    def attention(self, block: Block) -> BothWays | None:
        """Flash attention between the projections; None where the samples are of another kind."""
        known = all(isinstance(mixer, (Attention, LatentAttention)) for mixer in block.mixers)
        flash = self.shape.kernel is AttentionKernel.FLASH and self.rates.has(OperatorKind.ATTENTION)
        if not known or not flash:
            return None
        return sum((self._core(mixer) for mixer in block.mixers), BothWays())

    def _core(self, mixer: Mixer) -> BothWays:
        """Causal attention of heads as wide as queries and values on average, by its share of keys met."""
        assert isinstance(mixer, (Attention, LatentAttention))
        shape, keys = self.shape, mixer.span.mean_keys(self.shape.seq)
        pairs = shape.tokens / shape.seq * mixer.heads / shape.tp
        width = mixer.core_flops(shape.seq) / (4 * mixer.heads * keys)
        causal_keys = (shape.seq + 1) / 2
        return self._both(OperatorKind.ATTENTION, pairs, shape.seq, width).times(keys / causal_keys)

    # Between the products

    def between(self, block: Block) -> BothWays | None:
        """Norms, additions, rotary positions and activations; None where a kind of them was not sampled."""
        kinds = (OperatorKind.NORM, OperatorKind.ADD, OperatorKind.ACTIVATION, OperatorKind.ROTARY)
        if not self.rates.has(*kinds):
            return None
        shards = self.shape.tp if self.shape.sequence_parallel else 1
        rows = self.shape.tokens / shards
        norms = self._norm(block.norm, rows, block.hidden).times(max(block.norms, block.sublayers))
        # Going back, the gradients of both branches are added.
        residual = self._moved(ADDED_VALUES * rows * block.hidden).times(block.sublayers)
        mixing = sum((self._mixing(mixer, block) for mixer in block.mixers), BothWays())
        return norms + residual + mixing + self._feeding(block.mlp, block.hidden) + self._summed(block)

    def _summed(self, block: Block) -> BothWays:
        """What summing over tensor-parallel ranks copies beside the message: its input, each way."""
        if self.shape.tp == 1:
            return BothWays()
        return self._moved(2 * self.shape.tokens * block.hidden).times(block.sublayers)

    def _mixing(self, mixer: Mixer, block: Block) -> BothWays:
        shape = self.shape
        if not isinstance(mixer, Attention):
            turned = self._rotated(mixer.rotated) if isinstance(mixer, LatentAttention) else BothWays()
            kept = mixer.saved_activations(shape.seq, shape.kernel)
            return turned + self._moved(
                shape.tokens * (2 * kept.products + 2.5 * kept.elementwise) / shape.tp
            )
        # Query, key and value read one input.
        read = self._gradients_added(2, block.hidden)
        turned = BothWays()
        for width in () if mixer.cross else (mixer.query_width, mixer.kv_width):
            turned += self._rotated(width)
        return read + self._qk_norms(mixer) + turned

    def _qk_norms(self, mixer: Attention) -> BothWays:
        normed = BothWays()
        if mixer.qk_norm in (QkNorm.NONE, QkNorm.WEIGHTLESS):
            return normed
        kind = Norm.LAYERNORM if mixer.qk_norm is QkNorm.HEAD_LAYERNORM else Norm.RMSNORM
        for whole in (mixer.query_width, mixer.kv_width):
            own = whole / self.shape.tp
            width = own if mixer.qk_norm is QkNorm.WIDTH else min(own, mixer.head_dim)
            normed += self._norm(kind, self.shape.tokens * own / width, width)
        return normed

    def _feeding(self, mlp: FeedForward | None, hidden: int) -> BothWays:
        shape = self.shape
        if mlp is None:
            return BothWays()
        if isinstance(mlp, Mlp):
            return self._activation(mlp, shape.tokens / shape.tp) + self._gradients_added(
                mlp.up_projections - 1, hidden
            )
        rows = shape.tokens * mlp.topk * shape.expert_tp / shape.tp
        shared = self._feeding(mlp.shared, hidden) if mlp.shared else BothWays()
        return self._routed(mlp, rows, hidden) + self._activation(mlp.expert, rows / shape.expert_tp) + shared

    def _routed(self, mlp: Experts, rows: float, hidden: int) -> BothWays:
        """Choice of experts and rows on their way there and back; its router's product counts twice."""
        if self.rates.has(OperatorKind.ROUTING):
            return self._both(OperatorKind.ROUTING, self.shape.tokens, mlp.count, mlp.topk, hidden)
        return self._moved(ROUTED_PASSES * rows * hidden)

    def _activation(self, mlp: Mlp, rows: float) -> BothWays:
        gated = "-gated" if mlp.gated else ""
        return self._both(OperatorKind.ACTIVATION, rows * mlp.width, variant=f"{mlp.activation}{gated}")

    def _gradients_added(self, count: int, hidden: int) -> BothWays:
        """What `count` more products that read one input add to its gradient."""
        added = self._moved(ADDED_VALUES * self.shape.tokens * hidden)
        return BothWays(backward_s=count * added.forward_s)

    def _norm(self, norm: Norm, rows: float, width: float) -> BothWays:
        kind = Norm.RMSNORM if norm is Norm.RMSNORM else Norm.LAYERNORM
        return self._both(OperatorKind.NORM, rows, width, variant=kind)

    def _rotated(self, width: float) -> BothWays:
        if not self.shape.rotary or width == 0:
            return BothWays()
        return self._both(OperatorKind.ROTARY, self.shape.tokens, width / self.shape.tp)

    def _moved(self, values: float) -> BothWays:
        """Element-wise work that reads and writes so many values, and going back as many again."""
        seconds = self.rates.forward_s(OperatorKind.ADD, max(values, 1.0) / ADDED_VALUES)
        return BothWays(forward_s=seconds, backward_s=seconds)

    # Ends

    def head(self, vocab: float, hidden: float, norm: Norm, width: int) -> BothWays | None:
        """Final norm, and projection and loss together; None where they were not sampled."""
        if not self.rates.has(OperatorKind.CROSS_ENTROPY, OperatorKind.NORM):
            return None
        shards = self.shape.tp if self.shape.sequence_parallel else 1
        loss = self._both(OperatorKind.CROSS_ENTROPY, self.shape.tokens, vocab, hidden)
        return self._norm(norm, self.shape.tokens / shards, width) + loss

    def embedding(self, vocab: float, hidden: float) -> BothWays | None:
        """The embedding of this shard of the vocabulary, whose gradient is of its rows alone."""
        if not self.rates.has(OperatorKind.EMBEDDING):
            return None
        return self._both(OperatorKind.EMBEDDING, self.shape.tokens, vocab, hidden)

    def _both(self, kind: OperatorKind, *sizes: float, variant: str = "") -> BothWays:
        forward_s, backward_s = self.rates.both_s(kind, *sizes, variant=variant)
        return BothWays(forward_s=forward_s, backward_s=backward_s)
