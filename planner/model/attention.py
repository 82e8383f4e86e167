"""Attention: which keys a query meets, plain and grouped heads, and latents (see `planner.model.mixers`)."""

from __future__ import annotations

import dataclasses
from enum import StrEnum

from planner.foundation.frozen import frozen
from planner.model.sublayer import AttentionKernel, HeadCount, SavedActivations, Split, WeightMatrix


class CpExchange(StrEnum):
    """How ranks that share out a sequence meet each other's keys and values.

    ring        K and V go round, a hop for each part of the sequence, behind the part's attention
                (Ring Attention, arXiv 2310.01889; Transformer Engine's p2p, Megatron-LM's default)
    gather      K and V of the whole sequence are gathered first, their gradients scattered after
                (Llama 3, arXiv 2407.21783; torch's and so torchtitan's default)
    all_to_all  ranks trade their part of the sequence for a part of the heads and back
                (DeepSpeed Ulysses, arXiv 2309.14509)
    """

    RING = "ring"
    GATHER = "gather"
    ALL_TO_ALL = "all_to_all"


class Reach(StrEnum):
    """Which keys a query meets: those before it, a window or a chunk of them, some chosen, or all."""

    CAUSAL = "causal"
    WINDOW = "window"
    CHUNK = "chunk"
    CHOSEN = "chosen"
    ALL = "all"


@frozen
class AttentionSpan:
    """The keys that a query meets. `size` is the width of a window or chunk, or the number chosen."""

    reach: Reach = Reach.CAUSAL
    size: int = 0

    def mean_keys(self, seq: int) -> float:
        """Keys that a query of a sequence of `seq` tokens meets on average, itself included."""
        match self.reach:
            case Reach.ALL:
                return float(seq)
            case Reach.CAUSAL:
                return (seq + 1) / 2
            case Reach.WINDOW | Reach.CHOSEN:
                short = min(seq, self.size)
                return (short * (short + 1) / 2 + (seq - short) * short) / seq
            case Reach.CHUNK:
                whole, rest = divmod(seq, self.size)
                return (whole * self.size * (self.size + 1) / 2 + rest * (rest + 1) / 2) / seq

    @property
    def key(self) -> str:
        """Empty for plain causal attention."""
        return "" if self.reach is Reach.CAUSAL else f"-{self.reach}{self.size or ''}"


CAUSAL = AttentionSpan()


class QkNorm(StrEnum):
    """Normalisation of queries and keys: by head with shared weights (HEAD; HEAD_LAYERNORM with biases),
    or with a weight for every dimension of the projection (WIDTH); WEIGHTLESS holds no parameter.
    """

    NONE = "none"
    WEIGHTLESS = "weightless"
    HEAD = "head"
    HEAD_LAYERNORM = "head_layernorm"
    WIDTH = "width"


@frozen
class Attention:
    """Multi-head attention with grouped key and value heads (`kv_heads` < `heads` is GQA, 1 is MQA).

    `gated` doubles the query projection by an output gate; `sinks` is a learned logit a head;
    `position_buckets` is a table of relative positions, one value a head (T5); `cross` attends to the
    encoder's output, of the same length as the sequence.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm = QkNorm.NONE
    span: AttentionSpan = CAUSAL
    gated: bool = False
    sinks: bool = False
    position_buckets: int = 0
    value_dim: int | None = None
    cross: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Width of the values, which is that of the keys unless `value_dim` differs."""
        return self.kv_heads * (self.value_dim or self.head_dim)

    @property
    def out_width(self) -> int:
        """Width of the attention's result before the output projection."""
        return self.heads * (self.value_dim or self.head_dim)

    @property
    def heads_split(self) -> tuple[HeadCount, ...]:
        return (
            HeadCount(count=self.heads, what="attention heads"),
            HeadCount(count=self.kv_heads, what="key-value heads", repeated=True),
        )

    def with_kv_copies(self, tp: int) -> Attention:
        """What `tp` ranks hold together: where key-value heads are fewer, each rank has a copy of one."""
        return dataclasses.replace(self, kv_heads=tp) if self.kv_heads < tp else self

    def kv_copies(self, tp: int) -> int:
        """How many of `tp` ranks hold the same key-value heads."""
        return max(1, tp // self.kv_heads)

    def matrices(self, hidden: int) -> tuple[WeightMatrix, ...]:
        """Query (with its gate), key, value and output projections."""
        queries = self.query_width * (2 if self.gated else 1)
        return (
            WeightMatrix(inputs=hidden, outputs=queries, bias=self.qkv_bias),
            *self.key_value(hidden),
            WeightMatrix(inputs=self.out_width, outputs=hidden, split=Split.INPUTS, bias=self.out_bias),
        )

    @property
    def module_names(self) -> tuple[str, ...]:
        """What Hugging Face's llama calls the modules of `matrices`."""
        return ("q_proj", "k_proj", "v_proj", "o_proj")

    def key_value(self, hidden: int) -> tuple[WeightMatrix, WeightMatrix]:
        """Key and value projections."""
        return (
            WeightMatrix(inputs=hidden, outputs=self.kv_width, bias=self.qkv_bias),
            WeightMatrix(inputs=hidden, outputs=self.value_width, bias=self.qkv_bias),
        )

    @property
    def vector_params(self) -> int:
        norm = {
            QkNorm.NONE: 0,
            QkNorm.WEIGHTLESS: 0,
            QkNorm.HEAD: 2 * self.head_dim,
            QkNorm.HEAD_LAYERNORM: 4 * self.head_dim,
            QkNorm.WIDTH: self.query_width + self.kv_width,
        }[self.qk_norm]
        return norm + self.heads * (self.sinks + self.position_buckets)

    @property
    def vectors(self) -> int:
        weighted = self.qk_norm not in (QkNorm.NONE, QkNorm.WEIGHTLESS)
        biased = self.qk_norm is QkNorm.HEAD_LAYERNORM
        return 2 * weighted * (1 + biased) + self.sinks + bool(self.position_buckets)

    def core_flops(self, seq: int) -> float:
        """Scores and values: 2 (d_qk + d_v) a head and key met."""
        return 2.0 * (self.query_width + self.out_width) * self.span.mean_keys(seq)

    def saved_activations(self, seq: int, kernel: AttentionKernel) -> SavedActivations:
        """q, k, v and the result; copies before a q-k norm; eager keeps every probability."""
        normed = 0 if self.qk_norm is QkNorm.NONE else self.query_width + self.kv_width
        gate = 2 * self.out_width if self.gated else 0
        probabilities = 0 if kernel is AttentionKernel.FLASH else self.heads * seq
        return SavedActivations(
            products=self.query_width + self.kv_width + self.value_width + self.out_width + probabilities,
            elementwise=normed + gate,
            statistics=self.heads if kernel is AttentionKernel.FLASH else 0,
        )

    @property
    def rotated(self) -> int:
        """Values a token that rotary positions turn, where the model has them: queries and keys."""
        return 0 if self.cross else self.query_width + self.kv_width

    @property
    def key(self) -> str:
        extras = [
            f"-{self.qk_norm}norm" if self.qk_norm is not QkNorm.NONE else "",
            self.span.key,
            "-gated" if self.gated else "",
            "-sinks" if self.sinks else "",
            f"-buckets{self.position_buckets}" if self.position_buckets else "",
            f"-v{self.value_dim}" if self.value_dim else "",
            "-cross" if self.cross else "",
        ]
        return f"a{self.heads}x{self.head_dim}-kv{self.kv_heads}" + "".join(extras)

    @property
    def bias_key(self) -> str:
        return f"{int(self.qkv_bias)}{int(self.out_bias)}"


@frozen
class Indexer:
    """The small scorer of sparse attention, which chooses the keys of `Reach.CHOSEN`.

    Its queries come from the query latent, its one key a token and its head weights from the hidden
    state; scores are taken with every key before (DeepSeek-V3.2, arXiv 2512.02556).
    """

    heads: int
    head_dim: int


@frozen
class LatentAttention:
    """Multi-head latent attention: keys and values come from one small latent (DeepSeek-V2, 2405.04434).

    `query_rank` None projects queries directly. A head's query and key have `nope_dim` + `rope_dim`, of
    which the rotary part of the key is shared by all heads; its value has `value_dim`. Training computes
    the expanded form.
    """

    heads: int
    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool = False
    span: AttentionSpan = CAUSAL
    indexer: Indexer | None = None

    @property
    def kv_heads(self) -> int:
        """Keys and values are expanded for every head."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Dimensions of a query and key."""
        return self.nope_dim + self.rope_dim

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def heads_split(self) -> tuple[HeadCount, ...]:
        return (HeadCount(count=self.heads, what="attention heads"),)

    def matrices(self, hidden: int) -> tuple[WeightMatrix, ...]:
        """Down and up projections of query and key-value latents, output projection, indexer."""
        whole = Split.NONE
        if self.query_rank is None:
            query: tuple[WeightMatrix, ...] = (WeightMatrix(inputs=hidden, outputs=self.query_width),)
        else:
            query = (
                WeightMatrix(inputs=hidden, outputs=self.query_rank, split=whole, bias=self.bias),
                WeightMatrix(inputs=self.query_rank, outputs=self.query_width),
            )
        latent = self.kv_rank + self.rope_dim
        expanded = self.heads * (self.nope_dim + self.value_dim)
        return (
            *query,
            WeightMatrix(inputs=hidden, outputs=latent, split=whole, bias=self.bias),
            WeightMatrix(inputs=self.kv_rank, outputs=expanded),
            WeightMatrix(
                inputs=self.heads * self.value_dim, outputs=hidden, split=Split.INPUTS, bias=self.bias
            ),
            *self._indexer_matrices(hidden),
        )

    @property
    def module_names(self) -> tuple[str, ...]:
        """What Hugging Face's deepseek_v3 and deepseek_v32 call the modules of `matrices`."""
        query = ("q_proj",) if self.query_rank is None else ("q_a_proj", "q_b_proj")
        indexer = ("wq_b", "wk", "weights_proj") if self.indexer else ()
        return (*query, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *indexer)

    def _indexer_matrices(self, hidden: int) -> tuple[WeightMatrix, ...]:
        if self.indexer is None:
            return ()
        index, whole = self.indexer, Split.NONE
        return (
            WeightMatrix(inputs=self.query_rank or hidden, outputs=index.heads * index.head_dim, split=whole),
            WeightMatrix(inputs=hidden, outputs=index.head_dim, split=whole),
            WeightMatrix(inputs=hidden, outputs=index.heads, split=whole),
        )

    @property
    def vector_params(self) -> int:
        indexer = 2 * self.indexer.head_dim if self.indexer else 0
        return (self.query_rank or 0) + self.kv_rank + indexer

    @property
    def vectors(self) -> int:
        return 1 + (self.query_rank is not None) + (2 if self.indexer else 0)

    def core_flops(self, seq: int) -> float:
        """Scores over nope + rope dimensions, values over theirs, and the indexer's scores of all keys."""
        per_key = 2.0 * (self.query_width + self.heads * self.value_dim)
        index = self.indexer
        scoring = 2.0 * index.heads * index.head_dim * (seq + 1) / 2 if index else 0.0
        return per_key * self.span.mean_keys(seq) + scoring

    @property
    def rotated(self) -> int:
        """Values a token that rotary positions turn: a part of each query, and one key for all heads."""
        return (self.heads + 1) * self.rope_dim

    def saved_activations(self, seq: int, kernel: AttentionKernel) -> SavedActivations:
        """Both latents before and after their norms, q, assembled k, v, and the result."""
        latents = 2 * (self.query_rank or 0) + 2 * self.kv_rank + self.rope_dim
        probabilities = 0 if kernel is AttentionKernel.FLASH else self.heads * seq
        return SavedActivations(
            products=2 * self.query_width + 2 * self.heads * self.value_dim + probabilities,
            elementwise=self.heads * self.nope_dim,
            statistics=self.heads if kernel is AttentionKernel.FLASH else 0,
            whole=latents,
        )

    @property
    def key(self) -> str:
        query = self.query_rank or 0
        dims = f"{self.nope_dim}+{self.rope_dim}-v{self.value_dim}"
        indexer = f"-index{self.indexer.heads}x{self.indexer.head_dim}" if self.indexer else ""
        return f"mla{self.heads}x{dims}-q{query}-kv{self.kv_rank}{self.span.key}{indexer}"

    @property
    def bias_key(self) -> str:
        return str(int(self.bias))
