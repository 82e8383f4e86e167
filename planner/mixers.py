"""Mixers: the sublayers in which tokens meet each other, attention and what takes its place.

Each has the same members, so that a block adds them up without asking what they are:

    matrices(hidden)        its weights
    vector_params, vectors  parameters, and tensors, that are not matrices: norms, sinks, convolutions
    core_flops(seq)         FLOPs a token, forward, between the projections: scores and values, state
    kept(seq, kernel)       values a token kept for the backward pass
    heads_split             counts that tensor parallelism must divide
    key                     a text that is equal where the costs are
"""

from __future__ import annotations

from enum import StrEnum

from planner.codec import noun
from planner.matrix import Matrix, Split


class AttentionKernel(StrEnum):
    """How attention is computed: flash keeps a number a row, the others the whole matrix of probabilities.

    Fused scales, masks and normalises the scores in one kernel, eager in one each.
    """

    FLASH = "flash"
    FUSED = "fused"
    EAGER = "eager"


class Reach(StrEnum):
    """Which keys a query meets: those before it, a window or a chunk of them, some chosen, or all."""

    CAUSAL = "causal"
    WINDOW = "window"
    CHUNK = "chunk"
    CHOSEN = "chosen"
    ALL = "all"


@noun
class Span:
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


CAUSAL = Span()


@noun
class Kept:
    """Values a token that a sublayer keeps for its backward pass, besides the residual stream.

    `products` are results of matrix products and of attention, which selective recomputation keeps too;
    `elementwise` are what it recomputes. `statistics` are fp32 values. All are shared out by tensor
    parallelism, except `whole`, which is not.
    """

    products: float
    elementwise: float = 0.0
    statistics: float = 0.0
    whole: float = 0.0


class QkNorm(StrEnum):
    """Normalisation of queries and keys: by head with shared weights (HEAD; HEAD_LAYERNORM with biases),
    or with a weight for every dimension of the projection (WIDTH); WEIGHTLESS holds no parameter.
    """

    NONE = "none"
    WEIGHTLESS = "weightless"
    HEAD = "head"
    HEAD_LAYERNORM = "head_layernorm"
    WIDTH = "width"


@noun
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
    span: Span = CAUSAL
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
    def heads_split(self) -> tuple[tuple[int, str], ...]:
        return ((self.heads, "attention heads"), (self.kv_heads, "key-value heads"))

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Query (with its gate), key, value and output projections."""
        bias = self.qkv_bias
        return (
            Matrix(inputs=hidden, outputs=self.query_width * (2 if self.gated else 1), bias=bias),
            Matrix(inputs=hidden, outputs=self.kv_width, bias=bias),
            Matrix(inputs=hidden, outputs=self.value_width, bias=bias),
            Matrix(inputs=self.out_width, outputs=hidden, split=Split.INPUTS, bias=self.out_bias),
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

    def kept(self, seq: int, kernel: AttentionKernel) -> Kept:
        """q, k, v and the result; copies before a q-k norm; eager keeps every probability."""
        normed = 0 if self.qk_norm is QkNorm.NONE else self.query_width + self.kv_width
        gate = 2 * self.out_width if self.gated else 0
        probabilities = 0 if kernel is AttentionKernel.FLASH else self.heads * seq
        return Kept(
            products=self.query_width + self.kv_width + self.value_width + self.out_width + probabilities,
            elementwise=normed + gate,
            statistics=self.heads if kernel is AttentionKernel.FLASH else 0,
        )

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


@noun
class Indexer:
    """The small scorer of sparse attention, which chooses the keys of `Reach.CHOSEN`.

    Its queries come from the query latent, its one key a token and its head weights from the hidden
    state; scores are taken with every key before (DeepSeek-V3.2, arXiv 2512.02556).
    """

    heads: int
    head_dim: int


@noun
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
    span: Span = CAUSAL
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
    def heads_split(self) -> tuple[tuple[int, str], ...]:
        return ((self.heads, "attention heads"),)

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Down and up projections of query and key-value latents, output projection, indexer."""
        whole = Split.NONE
        if self.query_rank is None:
            query: tuple[Matrix, ...] = (Matrix(inputs=hidden, outputs=self.query_width),)
        else:
            query = (
                Matrix(inputs=hidden, outputs=self.query_rank, split=whole, bias=self.bias),
                Matrix(inputs=self.query_rank, outputs=self.query_width),
            )
        latent = self.kv_rank + self.rope_dim
        expanded = self.heads * (self.nope_dim + self.value_dim)
        return (
            *query,
            Matrix(inputs=hidden, outputs=latent, split=whole, bias=self.bias),
            Matrix(inputs=self.kv_rank, outputs=expanded),
            Matrix(inputs=self.heads * self.value_dim, outputs=hidden, split=Split.INPUTS, bias=self.bias),
            *self._indexer_matrices(hidden),
        )

    def _indexer_matrices(self, hidden: int) -> tuple[Matrix, ...]:
        if self.indexer is None:
            return ()
        index, whole = self.indexer, Split.NONE
        return (
            Matrix(inputs=self.query_rank or hidden, outputs=index.heads * index.head_dim, split=whole),
            Matrix(inputs=hidden, outputs=index.head_dim, split=whole),
            Matrix(inputs=hidden, outputs=index.heads, split=whole),
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

    def kept(self, seq: int, kernel: AttentionKernel) -> Kept:
        """Both latents before and after their norms, q, assembled k, v, and the result."""
        latents = 2 * (self.query_rank or 0) + 2 * self.kv_rank + self.rope_dim
        probabilities = 0 if kernel is AttentionKernel.FLASH else self.heads * seq
        return Kept(
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


@noun
class StateSpace:
    """A Mamba-2 layer: projections, a short convolution, and a recurrence over states (2405.21060).

    The inner width is heads x head_dim; inputs to the state come in `groups`. `chunk` is the block of the
    chunked (SSD) algorithm.
    """

    state_heads: int
    head_dim: int
    state: int
    groups: int
    kernel: int
    chunk: int
    bias: bool = False
    conv_bias: bool = True

    @property
    def inner(self) -> int:
        return self.state_heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Channels of the convolution: the inner width and both state projections."""
        return self.inner + 2 * self.groups * self.state

    @property
    def heads_split(self) -> tuple[tuple[int, str], ...]:
        return ((self.state_heads, "state-space heads"), (self.groups, "state-space groups"))

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Input projection (gate, convolved channels, step sizes) and output projection."""
        outputs = self.inner + self.convolved + self.state_heads
        return (
            Matrix(inputs=hidden, outputs=outputs, bias=self.bias),
            Matrix(inputs=self.inner, outputs=hidden, split=Split.INPUTS, bias=self.bias),
        )

    @property
    def vector_params(self) -> int:
        """Convolution, step bias, decay and skip a head, and the gated norm."""
        return self.convolved * (self.kernel + self.conv_bias) + 3 * self.state_heads + self.inner

    @property
    def vectors(self) -> int:
        return 5 + self.conv_bias

    def core_flops(self, seq: int) -> float:
        """Convolution; inside a chunk scores and values of half its tokens; states written and read."""
        inside = (min(self.chunk, seq) + 1) / 2
        chunked = 2.0 * inside * (self.groups * self.state + self.inner)
        return 2.0 * self.kernel * self.convolved + chunked + 4.0 * self.inner * self.state

    def kept(self, seq: int, kernel: AttentionKernel) -> Kept:
        """Gate, channels before and after the convolution, step sizes, result, and states by chunk."""
        states = self.inner * self.state / min(self.chunk, seq)
        return Kept(
            products=self.inner + self.convolved + self.state_heads + self.inner,
            elementwise=self.convolved + self.inner,
            statistics=states,
        )

    @property
    def key(self) -> str:
        size = f"{self.state_heads}x{self.head_dim}-n{self.state}-g{self.groups}"
        return f"ssm{size}-k{self.kernel}-c{self.chunk}"

    @property
    def bias_key(self) -> str:
        return f"{int(self.bias)}{int(self.conv_bias)}"


@noun
class DeltaNet:
    """A gated delta-rule layer: linear attention with a decaying, correcting state (2412.06464).

    `chunk` is the block of the chunked algorithm.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_head_dim: int
    kernel: int
    chunk: int = 64

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_head_dim

    @property
    def convolved(self) -> int:
        return 2 * self.key_width + self.value_width

    @property
    def heads_split(self) -> tuple[tuple[int, str], ...]:
        return ((self.key_heads, "delta-rule key heads"), (self.value_heads, "delta-rule value heads"))

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Queries, keys, values and output gate; decay and write strength; output projection."""
        return (
            Matrix(inputs=hidden, outputs=self.convolved + self.value_width),
            Matrix(inputs=hidden, outputs=2 * self.value_heads),
            Matrix(inputs=self.value_width, outputs=hidden, split=Split.INPUTS),
        )

    @property
    def vector_params(self) -> int:
        """Convolution, decay and step bias a head, and the gated norm over a head."""
        return self.convolved * self.kernel + 2 * self.value_heads + self.value_head_dim

    @property
    def vectors(self) -> int:
        return 4

    def core_flops(self, seq: int) -> float:
        """Convolution; in a chunk two kinds of scores, the solve, and values; state read twice, written."""
        inside = (min(self.chunk, seq) + 1) / 2
        chunked = 2.0 * inside * (3 * self.key_dim + 2 * self.value_head_dim)
        states = 6.0 * self.key_dim * self.value_head_dim
        return 2.0 * self.kernel * self.convolved + self.value_heads * (chunked + states)

    def kept(self, seq: int, kernel: AttentionKernel) -> Kept:
        """Channels before and after the convolution, gate, strengths, result, and states by chunk."""
        states = self.value_heads * self.key_dim * self.value_head_dim / min(self.chunk, seq)
        return Kept(
            products=self.convolved + 2 * self.value_width + 2 * self.value_heads,
            elementwise=self.convolved + self.value_width,
            statistics=states,
        )

    @property
    def key(self) -> str:
        keys, values = f"{self.key_heads}x{self.key_dim}", f"{self.value_heads}x{self.value_head_dim}"
        return f"delta{keys}-v{values}-k{self.kernel}-c{self.chunk}"

    @property
    def bias_key(self) -> str:
        return "0"


@noun
class LightningAttention:
    """Linear attention with a fixed decay a head, normed and gated at its output (MiniMax-01, 2501.08313).

    `chunk` is the block of the chunked algorithm.
    """

    lightning_heads: int
    head_dim: int
    chunk: int

    @property
    def width(self) -> int:
        return self.lightning_heads * self.head_dim

    @property
    def heads_split(self) -> tuple[tuple[int, str], ...]:
        return ((self.lightning_heads, "lightning-attention heads"),)

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Queries, keys and values; output gate; output projection."""
        return (
            Matrix(inputs=hidden, outputs=3 * self.width),
            Matrix(inputs=hidden, outputs=self.width),
            Matrix(inputs=self.width, outputs=hidden, split=Split.INPUTS),
        )

    @property
    def vector_params(self) -> int:
        """The norm of the result."""
        return self.width

    @property
    def vectors(self) -> int:
        return 1

    def core_flops(self, seq: int) -> float:
        """Inside a chunk scores and values of half its tokens; the state written and read."""
        inside = (min(self.chunk, seq) + 1) / 2
        return self.width * (4.0 * inside + 4.0 * self.head_dim)

    def kept(self, seq: int, kernel: AttentionKernel) -> Kept:
        """q, k, v before and after their activation, the result before and after its norm, the gate."""
        states = self.width * self.head_dim / min(self.chunk, seq)
        return Kept(products=5 * self.width, elementwise=5 * self.width, statistics=states)

    @property
    def key(self) -> str:
        return f"lightning{self.lightning_heads}x{self.head_dim}-c{self.chunk}"

    @property
    def bias_key(self) -> str:
        return "0"


Mixer = Attention | LatentAttention | StateSpace | DeltaNet | LightningAttention
