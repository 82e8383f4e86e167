"""ModelSpec: a language model as a chain of layer classes, with the sizes that costs are made of.

A model is an embedding, then segments of equal blocks, then a head (final norm, output projection and
loss). An encoder-decoder is the chain of its encoder's blocks, then its decoder's. Parameter counts are
exact; tied embeddings count once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import lru_cache
from itertools import chain

from planner.foundation.frozen import frozen
from planner.model.arithmetic import PLAIN, Arithmetic
from planner.model.attention import Attention, LatentAttention
from planner.model.feed_forward import Experts, FeedForward
from planner.model.mixers import Mixer
from planner.model.sublayer import AttentionKernel, HeadCount, Recompute, SavedActivations, WeightMatrix
from planner.model.traced_layer import TracedLayer

VOCAB_UNIT = 128
"""Rows to a multiple of which engines pad each rank's part of a vocabulary that does not divide.

Megatron-LM's --make-vocab-size-divisible-by (megatron/training/tokenizer/tokenizer.py)."""


def vocab_shard(vocab: int, tp: int) -> int:
    """Rows of a vocabulary on one of `tp` ranks: V / tp, or where that is not whole, the next multiple of
    VOCAB_UNIT. The own runtime has no more than V / tp rounded up of them, and none that is no token's."""
    return vocab // tp if vocab % tp == 0 else -(-vocab // (VOCAB_UNIT * tp)) * VOCAB_UNIT


class Norm(StrEnum):
    """The normalisation of a block: what of weight and bias it holds."""

    RMSNORM = "rmsnorm"
    LAYERNORM = "layernorm"
    LAYERNORM_WITHOUT_BIAS = "layernorm_without_bias"
    LAYERNORM_WITHOUT_PARAMETERS = "layernorm_without_parameters"

    @property
    def tensors(self) -> int:
        """Parameter tensors of one norm."""
        match self:
            case Norm.LAYERNORM:
                return 2
            case Norm.RMSNORM | Norm.LAYERNORM_WITHOUT_BIAS:
                return 1
            case Norm.LAYERNORM_WITHOUT_PARAMETERS:
                return 0

    def params(self, width: int) -> int:
        return self.tensors * width


@frozen
class Block:
    """One transformer block, a layer class: a mixer, an MLP or experts, and norms over the hidden size.

    Either sublayer may be absent (layers of a hybrid model hold one). `norms` counts the block's norms:
    2 before (or after) both sublayers, 1 where both read the same (`parallel`), 4 where results are
    normed too. `cross` is attention to an encoder's output.
    """

    hidden: int
    norm: Norm
    mixer: Mixer | None
    mlp: FeedForward | None
    norms: int = 2
    parallel: bool = False
    cross: Attention | None = None

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixers that the block has."""
        return tuple(mixer for mixer in (self.mixer, self.cross) if mixer is not None)

    @property
    def sublayers(self) -> int:
        """Sublayers that add to the residual stream, one after the other."""
        return 1 if self.parallel else len(self.mixers) + (self.mlp is not None)

    @property
    def shared_params(self) -> int:
        """Blocks share no weights with other layers."""
        return 0

    @property
    def stream_width(self) -> int:
        """Values a token of the message to the next layer: the residual stream."""
        return self.hidden

    def matrices(self) -> tuple[WeightMatrix, ...]:
        """Every weight of the block that tokens are multiplied with."""
        return _matrices(self)

    @property
    def _vector_params(self) -> int:
        return sum(m.vector_params for m in self.mixers) + self.norms * self.norm.params(self.hidden)

    @property
    def params(self) -> int:
        """Parameters of one block."""
        return sum(matrix.params for matrix in self.matrices()) + self._vector_params

    @property
    def params_active(self) -> int:
        """Parameters that one token meets: of experts, the chosen ones."""
        return sum(matrix.params_active for matrix in self.matrices()) + self._vector_params

    def with_kv_copies(self, tp: int) -> Block:
        """What `tp` ranks hold together: the block, with copies of key-value heads where these are fewer."""
        return _held(self, tp)

    def params_shard(self, tp: int) -> float:
        """Parameters on one of `tp` tensor-parallel ranks: shards of matrices, whole norms."""
        return (
            sum(matrix.params_shard(tp) for matrix in self.with_kv_copies(tp).matrices())
            + self._vector_params
        )

    def params_copied(self, tp: int) -> dict[int, float]:
        """Parameters of key-value heads on one of `tp` ranks, by how many ranks have copies of them."""
        copied: dict[int, float] = {}
        for mixer in self.mixers:
            if isinstance(mixer, Attention) and mixer.kv_copies(tp) > 1:
                heads = sum(matrix.params for matrix in mixer.key_value(self.hidden)) / mixer.kv_heads
                copied[mixer.kv_copies(tp)] = copied.get(mixer.kv_copies(tp), 0.0) + heads
        return copied

    @property
    def params_routed(self) -> int:
        """Parameters of the experts that tokens choose among."""
        return sum(matrix.params for matrix in self.matrices() if matrix.routed)

    def routed_params_shard(self, expert_tp: int) -> float:
        """Parameters of all routed experts, each in `expert_tp` shards."""
        return sum(matrix.params_shard(expert_tp) for matrix in self.matrices() if matrix.routed)

    @property
    def tensors(self) -> int:
        """Parameter tensors of one block, with separate query, key, value, gate and up projections."""
        mixing = sum(matrix.tensors for matrix in self.matrices()) + sum(m.vectors for m in self.mixers)
        return mixing + self.norms * self.norm.tensors

    def matmul_flops_forward(self, tokens: float) -> float:
        """FLOPs of the projections for `tokens` tokens: 2 per weight per token that meets it."""
        return tokens * sum(matrix.flops_per_token for matrix in self.matrices())

    def attention_flops_forward(self, tokens: float, seq: int) -> float:
        """FLOPs between the projections: scores and values of the keys met, or states."""
        return tokens * sum(mixer.core_flops(seq) for mixer in self.mixers)

    def saved_activations(self, seq: int, kernel: AttentionKernel) -> SavedActivations:
        """Values a token that both sublayers keep for the backward pass, without the residual stream."""
        return _kept(self, seq, kernel)[0]

    def saved_bytes(
        self,
        tokens: float,
        seq: int,
        *,
        size: int = 2,
        tp: int = 1,
        sequence_parallel: bool = False,
        recompute: Recompute = Recompute.NONE,
        kernel: AttentionKernel = AttentionKernel.FLASH,
        expert_tp: int | None = None,
    ) -> float:
        """Bytes kept from forward to backward for `tokens` tokens in values of `size` bytes.

        With h the hidden size (a shard of it under sequence parallelism) and s sublayers:

            none        (2 s h + products + elementwise) size + 4 statistics
            selective   ((s + 1) h + products) size + 4 statistics
            full        h size

        Rows of experts that `expert_tp` ranks share out (None: tp) are those of tp / expert_tp groups.
        2 s h are the input and the output of each sublayer's norm; norms after a sublayer keep its
        result besides. Products, elementwise and statistics are each sublayer's (`SavedActivations`).
        """
        stream = self.hidden / (tp if sequence_parallel else 1)
        if recompute is Recompute.FULL:
            return size * tokens * stream
        kept, sublayers = _kept(self, seq, kernel)
        statistics = 4.0 * tokens * ((kept.statistics - self.norms) / tp + self.norms)
        after = max(0, self.norms - sublayers)
        whole = kept.whole + kept.routed * (expert_tp or tp) / tp
        if recompute is Recompute.SELECTIVE:
            values = (sublayers + 1 + after) * stream + kept.products / tp + whole
        else:
            values = (2 * sublayers + after) * stream
            values += (kept.products + kept.elementwise) / tp + whole
        return size * tokens * values + statistics

    @property
    def shape_key(self) -> str:
        """A text that two blocks share exactly when they cost the same."""
        parts = [part for part in (self.mixer, self.mlp) if part is not None]
        keys = "-".join(part.key for part in parts)
        biases = "".join(part.bias_key for part in parts)
        extras = [
            f"-n{self.norms}" if self.norms != 2 else "",
            "-parallel" if self.parallel else "",
            f"-x{self.cross.key}-b{self.cross.bias_key}" if self.cross else "",
        ]
        return f"h{self.hidden}-{keys}-{self.norm}-b{biases}" + "".join(extras)


@lru_cache(maxsize=1024)
def _matrices(block: Block) -> tuple[WeightMatrix, ...]:
    mixing = chain.from_iterable(mixer.matrices(block.hidden) for mixer in block.mixers)
    return (*mixing, *(block.mlp.matrices(block.hidden) if block.mlp else ()))


@lru_cache(maxsize=1024)
def _held(block: Block, tp: int) -> Block:
    mixer, cross = (
        m.with_kv_copies(tp) if isinstance(m, Attention) else m for m in (block.mixer, block.cross)
    )
    if mixer is block.mixer and cross is block.cross:
        return block
    assert cross is None or isinstance(cross, Attention)
    return dataclasses.replace(block, mixer=mixer, cross=cross)


@lru_cache(maxsize=1024)
def _kept(block: Block, seq: int, kernel: AttentionKernel) -> tuple[SavedActivations, int]:
    """What the block keeps, and its sublayers."""
    each = [mixer.saved_activations(seq, kernel) for mixer in block.mixers]
    each += [block.mlp.saved_activations(block.hidden)] if block.mlp else []
    whole = SavedActivations(
        products=sum(kept.products for kept in each),
        elementwise=sum(kept.elementwise for kept in each),
        statistics=sum(kept.statistics for kept in each) + block.norms,
        whole=sum(kept.whole for kept in each),
        routed=sum(kept.routed for kept in each),
    )
    return whole, block.sublayers


Layer = Block | TracedLayer


@frozen
class Segment:
    """`count` equal layers in a row."""

    block: Layer
    count: int


@lru_cache(maxsize=256)
def _classes(segments: tuple[Segment, ...]) -> Mapping[str, Layer]:
    distinct = {id(segment.block): segment.block for segment in segments}  # a key takes 15 us
    return {block.shape_key: block for block in distinct.values()}


@frozen
class ModelSpec:
    """A language model: decoder-only, encoder-only, or an encoder followed by its decoder.

    `learned_positions` is the length of a learned position table (0: rotary positions with base
    `rope_theta`, or where that is 0 others without parameters). `encoder_layers` are the leading layers whose
    result the later ones attend to (0: there is one stack). `embedding_width` differs from `hidden` where the
    embedding is projected. `final_norms` counts norms behind stacks of layers, `head_bias` is that of the
    output projection, `pooler` a dense layer over the first token beside it.
    `vocab` 0 means that there is neither embedding nor head. `sources` says where it came from.
    `arithmetic` is what it computes beside what its sizes say, which no cost hangs on.
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
    embedding_width: int | None = None
    embedding_norm: bool = False
    token_types: int = 0
    head_bias: bool = False
    pooler: bool = False
    final_norms: int = 1
    encoder_layers: int = 0
    arithmetic: Arithmetic = PLAIN

    @property
    def layers(self) -> int:
        return sum(segment.count for segment in self.segments)

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are turned by their position."""
        return self.learned_positions == 0 and self.rope_theta > 0

    def blocks(self) -> Iterator[Layer]:
        """The blocks in order, one for each layer."""
        for segment in self.segments:
            for _ in range(segment.count):
                yield segment.block

    def block(self, layer: int) -> Layer:
        """The block of layer `layer`."""
        for segment in self.segments:
            if layer < segment.count:
                return segment.block
            layer -= segment.count
        raise IndexError(layer)

    def classes(self) -> dict[str, Layer]:
        """The distinct layer classes by their key, in order of first use."""
        return dict(_classes(self.segments))

    def transformer_blocks(self) -> Iterator[Block]:
        """The distinct classes that are transformer blocks."""
        return (block for block in self.classes().values() if isinstance(block, Block))

    @property
    def heads_split(self) -> tuple[HeadCount, ...]:
        """Counts of heads that tensor parallelism shares out."""
        mixers = (mixer for block in self.transformer_blocks() for mixer in block.mixers)
        return tuple(dict.fromkeys(split for mixer in mixers for split in mixer.heads_split))

    def heads_copied(self, tp: int) -> tuple[int, ...]:
        """Counts of heads that are fewer than `tp` ranks, which have copies of them."""
        if tp == 1:
            return ()
        few = {heads.count for heads in self.heads_split if heads.repeated and heads.count < tp}
        return tuple(sorted(few))

    @property
    def widths_split(self) -> tuple[tuple[int, str], ...]:
        """Widths, and of what they are, that tensor parallelism must divide; a vocabulary is padded."""
        mlps = (block.mlp for block in self.transformer_blocks() if block.mlp)
        return tuple(dict.fromkeys(split for mlp in mlps for split in mlp.widths_split))

    def vocab_shard(self, tp: int) -> int:
        """Rows of the vocabulary on one of `tp` ranks."""
        return vocab_shard(self.vocab, tp)

    def padded(self, tp: int) -> ModelSpec:
        """The model with the vocabulary that `tp` ranks hold together."""
        held = tp * self.vocab_shard(tp)
        return self if held == self.vocab else dataclasses.replace(self, vocab=held)

    @property
    def experts(self) -> tuple[Experts, ...]:
        """The distinct mixtures of experts."""
        mlps = (block.mlp for block in self.transformer_blocks())
        return tuple(dict.fromkeys(mlp for mlp in mlps if isinstance(mlp, Experts)))

    @property
    def params_routed(self) -> int:
        """Parameters of the experts that tokens choose among."""
        return sum(s.count * s.block.params_routed for s in self.segments if isinstance(s.block, Block))

    @property
    def attention(self) -> Attention | LatentAttention | None:
        """The attention of the first layer that has one, or None."""
        mixers = (mixer for block in self.transformer_blocks() for mixer in block.mixers)
        return next((mixer for mixer in mixers if isinstance(mixer, (Attention, LatentAttention))), None)

    @property
    def token_width(self) -> int:
        """Width of the token embedding."""
        return self.embedding_width or self.hidden

    @property
    def params_embedding(self) -> int:
        """Parameters of the token, position and type tables, their norm and projection."""
        tables = self.vocab * self.token_width + (self.learned_positions + self.token_types) * self.hidden
        projection = self.token_width * self.hidden if self.embedding_width else 0
        return tables + projection + self.embedding_norm * self.norm.params(self.hidden)

    @property
    def params_head(self) -> int:
        """Parameters that the head owns: final norms, and the output projection unless it is tied."""
        projection = self.token_width * self.hidden if self.embedding_width else 0
        pooler = self.hidden * (self.hidden + 1) if self.pooler else 0
        return (
            self.final_norms * self.norm.params(self.hidden)
            + projection
            + pooler
            + (0 if self.tied_embeddings else self.vocab * self.token_width)
            + self.head_bias * self.vocab
        )

    @property
    def params_blocks(self) -> int:
        return sum(segment.block.params * segment.count for segment in self.segments)

    @property
    def params_total(self) -> int:
        return self.params_embedding + self.params_blocks + self.params_head

    @property
    def params_active(self) -> int:
        """Parameters that one token meets: routed experts by top-k, embeddings and head included."""
        blocks = sum(segment.block.params_active * segment.count for segment in self.segments)
        return self.params_embedding + blocks + self.params_head

    def head_flops_forward(self, tokens: int) -> float:
        """FLOPs of the output projection, behind one to the embedding's width where that differs."""
        narrowing = self.token_width * self.hidden if self.embedding_width else 0
        return 2.0 * tokens * (narrowing + self.token_width * self.vocab)

    def embedding_flops_forward(self, tokens: int) -> float:
        """FLOPs of projecting the token embedding to the hidden size, where its width differs."""
        return 2.0 * tokens * self.token_width * self.hidden if self.embedding_width else 0.0

    def flops_per_token_forward(self, seq: int) -> float:
        """Model FLOPs of one token's forward pass at sequence length `seq`, causal attention as done.

        Of an encoder-decoder: of a source token through the encoder and a target token through the
        decoder.
        """
        per_block = sum(
            s.count * (s.block.matmul_flops_forward(1) + s.block.attention_flops_forward(1, seq))
            for s in self.segments
        )
        return per_block + self.embedding_flops_forward(1) + self.head_flops_forward(1)

    @property
    def stream_width(self) -> int:
        """Values a token of the widest message between neighbouring layers.

        Behind an encoder its result travels along with the decoder's own stream.
        """
        own = max((s.block.stream_width for s in self.segments), default=self.hidden)
        return 2 * own if self.encoder_layers else own
