"""ModelSpec: a language model as a chain of layer classes, with the sizes that costs are made of.

A model is an embedding, then segments of equal blocks, then a head (final norm, output projection and
loss). Parameter counts are exact; tied embeddings count once.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from planner.codec import noun


class Norm(StrEnum):
    """The normalisation of a block: RMSNorm holds a weight, LayerNorm a weight and a bias."""

    RMSNORM = "rmsnorm"
    LAYERNORM = "layernorm"

    def params(self, width: int) -> int:
        return width if self is Norm.RMSNORM else 2 * width


class Activation(StrEnum):
    """The non-linearity of an MLP."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


@noun
class Attention:
    """Multi-head attention with grouped key and value heads (`kv_heads` < `heads` is GQA)."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def params(self, hidden: int) -> int:
        qkv_width = self.query_width + 2 * self.kv_width
        biases = qkv_width * self.qkv_bias + hidden * self.out_bias
        return hidden * qkv_width + self.query_width * hidden + biases


@noun
class Mlp:
    """A feed-forward layer: up and down projections, and a gate beside the up when `gated`."""

    width: int
    gated: bool
    activation: Activation
    bias: bool = False

    @property
    def up_projections(self) -> int:
        return 2 if self.gated else 1

    def params(self, hidden: int) -> int:
        biases = (self.up_projections * self.width + hidden) * self.bias
        return (self.up_projections + 1) * hidden * self.width + biases


@noun
class Block:
    """One transformer block, a layer class: norm, attention, norm, MLP, with two residual additions."""

    hidden: int
    norm: Norm
    attention: Attention
    mlp: Mlp

    @property
    def params(self) -> int:
        """Parameters of one block."""
        return (
            self.attention.params(self.hidden)
            + self.mlp.params(self.hidden)
            + 2 * self.norm.params(self.hidden)
        )

    @property
    def tensors(self) -> int:
        """Parameter tensors of one block, with separate query, key, value, gate and up projections."""
        norms = 2 if self.norm is Norm.RMSNORM else 4
        attention = 4 + 3 * self.attention.qkv_bias + self.attention.out_bias
        return norms + attention + (self.mlp.up_projections + 1) * (1 + self.mlp.bias)

    def matmul_flops_forward(self, tokens: int) -> float:
        """FLOPs of the projections for `tokens` tokens: 2 per weight per token."""
        attention = self.hidden * (2 * self.attention.query_width + 2 * self.attention.kv_width)
        mlp = (self.mlp.up_projections + 1) * self.hidden * self.mlp.width
        return 2.0 * tokens * (attention + mlp)

    def attention_flops_forward(self, tokens: int, seq: int) -> float:
        """FLOPs of scores and values, causal: each token meets (seq + 1) / 2 keys on average."""
        return 2.0 * 2.0 * tokens * self.attention.query_width * (seq + 1) / 2

    @property
    def shape_key(self) -> str:
        """A text that two blocks share exactly when they cost the same."""
        a, m = self.attention, self.mlp
        bias = f"{int(a.qkv_bias)}{int(a.out_bias)}{int(m.bias)}"
        gate = "g" if m.gated else "u"
        return (
            f"h{self.hidden}-a{a.heads}x{a.head_dim}-kv{a.kv_heads}-{gate}{m.width}-"
            f"{m.activation}-{self.norm}-b{bias}"
        )


@noun
class Segment:
    """`count` equal blocks in a row."""

    block: Block
    count: int


@noun
class ModelSpec:
    """A decoder-only language model.

    `learned_positions` is the length of a learned position table (0: rotary positions with base
    `rope_theta`). `sources` says where the description came from.
    """

    name: str
    model_type: str
    hidden: int
    vocab: int
    max_positions: int
    learned_positions: int
    rope_theta: float
    norm: Norm
    norm_eps: float
    initializer_range: float
    tied_embeddings: bool
    segments: tuple[Segment, ...]
    sources: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return sum(segment.count for segment in self.segments)

    def blocks(self) -> Iterator[Block]:
        """The blocks in order, one for each layer."""
        for segment in self.segments:
            for _ in range(segment.count):
                yield segment.block

    def block(self, layer: int) -> Block:
        """The block of layer `layer`."""
        for segment in self.segments:
            if layer < segment.count:
                return segment.block
            layer -= segment.count
        raise IndexError(layer)

    @property
    def params_embedding(self) -> int:
        """Parameters of the token and position tables (the output projection not counted)."""
        return (self.vocab + self.learned_positions) * self.hidden

    @property
    def params_head(self) -> int:
        """Parameters that the head owns: final norm, and the output projection unless it is tied."""
        return self.norm.params(self.hidden) + (0 if self.tied_embeddings else self.vocab * self.hidden)

    @property
    def params_blocks(self) -> int:
        return sum(segment.block.params * segment.count for segment in self.segments)

    @property
    def params_total(self) -> int:
        return self.params_embedding + self.params_blocks + self.params_head

    @property
    def params_active(self) -> int:
        """Parameters that one token meets; equal to the total in a dense model."""
        return self.params_total

    def head_flops_forward(self, tokens: int) -> float:
        """FLOPs of the output projection."""
        return 2.0 * tokens * self.hidden * self.vocab

    def flops_per_token_forward(self, seq: int) -> float:
        """Model FLOPs of one token's forward pass at sequence length `seq`, causal attention as done."""
        per_block = sum(
            s.count * (s.block.matmul_flops_forward(1) + s.block.attention_flops_forward(1, seq))
            for s in self.segments
        )
        return per_block + self.head_flops_forward(1)
