"""Family: one model_type as data; Description: what a config of it says, with the class's own facts.

The keys of a Hugging Face config.json: for each fact of a model its usual names, type and legal range.

A family (`planner.model.huggingface.family`) says which of them it reads, under which names, and what the
class's default
is where a key is absent. Source: the configuration classes of transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from enum import Enum
from types import MappingProxyType
from typing import Any

from planner.foundation.frozen import frozen
from planner.model.attention import QkNorm
from planner.model.feed_forward import Activation, Score, TopkMethod
from planner.model.spec import Norm, Segment

MAX_LAYERS = 10_000
MAX_WIDTH = 2**20
MAX_FFN = 2**24
MAX_HEADS = 2**16
MAX_VOCAB = 2**27
MAX_POSITIONS = 2**31
MAX_EXPERTS = 2**16


class Kind(Enum):
    """The type of a key's value, and how an error names it."""

    WHOLE = "a whole number"
    REAL = "a number"
    FLAG = "true or false"
    TEXT = "a text"
    WHOLES = "a list of whole numbers"
    TEXTS = "a list of texts"
    TYPES = "a list of [[types], repeats]"


@frozen
class Key:
    """One key: its names in files (the first is the usual one), type and range.

    A name may be a path into nested objects, such as `rope_parameters.rope_theta`. `choices` maps the
    texts that are legal to what they mean. `needed` keys must be in a config that stands alone. Where
    null means "none" or "derived", and not "the default", the key is `nullable`.
    """

    names: tuple[str, ...]
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    choices: Mapping[str, Any] | None = None
    needed: bool = False
    nullable: bool = False


def _whole(*names: str, high: int, low: int = 1, needed: bool = False, nullable: bool = False) -> Key:
    return Key(names=names, kind=Kind.WHOLE, low=low, high=high, needed=needed, nullable=nullable)


def _real(*names: str, low: float, high: float, nullable: bool = False) -> Key:
    return Key(names=names, kind=Kind.REAL, low=low, high=high, nullable=nullable)


def _flag(*names: str) -> Key:
    return Key(names=names, kind=Kind.FLAG)


def _choice(*names: str, choices: Mapping[str, Any]) -> Key:
    return Key(names=names, kind=Kind.TEXT, choices=choices)


def _wholes(*names: str, high: int) -> Key:
    return Key(names=names, kind=Kind.WHOLES, low=0, high=high, nullable=True)


def _texts(*names: str, choices: Mapping[str, str]) -> Key:
    return Key(names=names, kind=Kind.TEXTS, choices=choices, nullable=True)


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": Activation.SILU,
        "swish": Activation.SILU,
        "gelu": Activation.GELU,
        "gelu_python": Activation.GELU,
        "gelu_accurate": Activation.GELU_TANH,
        "gelu_new": Activation.GELU_TANH,
        "gelu_pytorch_tanh": Activation.GELU_TANH,
        "gelu_fast": Activation.GELU_TANH,
        "quick_gelu": Activation.GELU,
        "relu": Activation.RELU,
        "relu2": Activation.RELU2,
    }
)

T5_MLPS: Mapping[str, tuple[bool, Activation]] = MappingProxyType(
    {
        "relu": (False, Activation.RELU),
        "gelu": (False, Activation.GELU),
        "gelu_new": (False, Activation.GELU_TANH),
        "silu": (False, Activation.SILU),
        "gated-relu": (True, Activation.RELU),
        "gated-gelu": (True, Activation.GELU_TANH),
        "gated-gelu_new": (True, Activation.GELU_TANH),
        "gated-silu": (True, Activation.SILU),
    }
)
"""feed_forward_proj of T5: whether it is gated, and by what."""

FULL, SLIDING, CHUNKED, LINEAR = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
)
INDEXED, SPARSE, DENSE = "indexed_attention", "moe", "mlp"

LAYER_TYPES: Mapping[str, str] = MappingProxyType(
    {name: name for name in (FULL, SLIDING, CHUNKED, LINEAR, INDEXED, SPARSE, DENSE)}
    | {"attention": FULL, "mamba": LINEAR, "deepseek_sparse_attention": INDEXED}
)
"""Kinds of layer, with the names that older files use."""

SCORES: Mapping[str, Score] = MappingProxyType({score.value: score for score in Score})
TOPK_METHODS: Mapping[str, TopkMethod] = MappingProxyType({method.value: method for method in TopkMethod})

_MLP_TYPES = MappingProxyType({"dense": DENSE, "sparse": SPARSE})
_INDEXER_TYPES = MappingProxyType({"full": "full", "shared": "shared"})

KEYS: Mapping[str, Key] = MappingProxyType(
    {
        # the model
        "hidden": _whole("hidden_size", high=MAX_WIDTH, needed=True),
        "layers": _whole("num_hidden_layers", high=MAX_LAYERS, needed=True),
        "vocab": _whole("vocab_size", high=MAX_VOCAB, needed=True),
        "heads": _whole("num_attention_heads", high=MAX_HEADS, needed=True),
        "ffn": _whole("intermediate_size", high=MAX_FFN, needed=True),
        "optional_ffn": _whole("intermediate_size", high=MAX_FFN, nullable=True),
        "kv_heads": _whole("num_key_value_heads", high=MAX_HEADS, nullable=True),
        "head_dim": _whole("head_dim", high=MAX_HEADS, nullable=True),
        "max_positions": _whole("max_position_embeddings", high=MAX_POSITIONS),
        "activation": _choice("hidden_act", choices=ACTIVATIONS),
        "norm_eps": _real("rms_norm_eps", low=0.0, high=1.0),
        "rope_theta": _real(
            "rope_theta",
            "rope_parameters.rope_theta",
            "rope_parameters.full_attention.rope_theta",
            low=1.0,
            high=1e12,
        ),
        "initializer_range": _real("initializer_range", low=0.0, high=10.0),
        "tied": _flag("tie_word_embeddings"),
        "embedding_width": _whole("word_embed_proj_dim", high=MAX_WIDTH, nullable=True),
        "token_types": _whole("type_vocab_size", low=0, high=MAX_VOCAB),
        # biases and norms
        "qkv_bias": _flag("attention_bias"),
        "out_bias": _flag("attention_bias"),
        "mlp_bias": _flag("mlp_bias"),
        "head_bias": _flag("lm_head_bias"),
        "qk_normed": _flag("use_qk_norm"),
        "parallel": _flag("use_parallel_residual"),
        "affine": _flag("layer_norm_elementwise_affine"),
        "norm_first": _flag("do_layer_norm_before"),
        "no_final_norm": _flag("_remove_final_layer_norm"),
        # falcon
        "multi_query": _flag("multi_query"),
        "new_architecture": _flag("new_decoder_architecture"),
        "parallel_norms": _whole("num_ln_in_parallel_attn", low=1, high=2, nullable=True),
        # which keys are met
        "window": _whole("sliding_window", low=0, high=MAX_POSITIONS, nullable=True),
        "use_window": _flag("use_sliding_window"),
        "first_window": _whole("max_window_layers", low=0, high=MAX_POSITIONS),
        "full_every": _whole("sliding_window_pattern", "_sliding_window_pattern", high=MAX_LAYERS),
        "chunk_span": _whole("attention_chunk_size", low=0, high=MAX_POSITIONS, nullable=True),
        "layer_types": _texts("layer_types", choices=LAYER_TYPES),
        "windowed_layers": _wholes("hybrid_layer_pattern", high=1),
        "attention_types": Key(names=("attention_types",), kind=Kind.TYPES, nullable=True),
        "rotary_layers": _wholes("no_rope_layers", high=1),
        "rotary_every": _whole("no_rope_layer_interval", high=MAX_LAYERS),
        # experts
        "experts": _whole("num_local_experts", "num_experts", low=0, high=MAX_EXPERTS),
        "topk": _whole("num_experts_per_tok", high=MAX_EXPERTS),
        "expert_ffn": _whole("moe_intermediate_size", high=MAX_FFN),
        "dense_ffn": _whole("intermediate_size_mlp", high=MAX_FFN),
        "shared": _whole("n_shared_experts", low=0, high=MAX_EXPERTS, nullable=True),
        "shared_ffn": _whole("shared_expert_intermediate_size", high=MAX_FFN),
        "latent": _whole("moe_latent_size", high=MAX_WIDTH, nullable=True),
        "first_dense": _whole("first_k_dense_replace", low=0, high=MAX_LAYERS),
        "sparse_every": _whole("moe_layer_freq", high=MAX_LAYERS),
        "dense_layers": _wholes("mlp_only_layers", high=MAX_LAYERS),
        "sparse_layers": _wholes("moe_layers", high=MAX_LAYERS),
        "sparse_flags": _wholes("moe_layer_freq", high=1),
        "mlp_types": _texts("mlp_layer_types", choices=_MLP_TYPES),
        # routing
        "score": _choice("scoring_func", choices=SCORES),
        "topk_method": _choice("topk_method", choices=TOPK_METHODS),
        "normalised": _flag("norm_topk_prob"),
        "expert_scale": _real("routed_scaling_factor", low=0.0, high=1e6),
        "expert_groups": _whole("n_group", high=MAX_EXPERTS, nullable=True),
        "chosen_groups": _whole("topk_group", high=MAX_EXPERTS, nullable=True),
        "aux_loss": _real("router_aux_loss_coef", low=0.0, high=1e3),
        "z_loss": _real("router_z_loss_coef", low=0.0, high=1e3),
        "bias_speed": _real("router_bias_update_rate", low=0.0, high=1.0),
        "capacity": _real("capacity_factor", low=0.0, high=1e3, nullable=True),
        # latent attention
        "query_rank": _whole("q_lora_rank", high=MAX_WIDTH, nullable=True),
        "kv_rank": _whole("kv_lora_rank", high=MAX_WIDTH),
        "nope_dim": _whole("qk_nope_head_dim", high=MAX_HEADS),
        "rope_dim": _whole("qk_rope_head_dim", high=MAX_HEADS),
        "value_dim": _whole("v_head_dim", high=MAX_HEADS),
        "index_heads": _whole("index_n_heads", high=MAX_HEADS),
        "index_dim": _whole("index_head_dim", high=MAX_HEADS),
        "index_topk": _whole("index_topk", high=MAX_POSITIONS),
        "indexer_types": _texts("indexer_types", choices=_INDEXER_TYPES),
        "index_pattern": Key(names=("index_topk_pattern",), kind=Kind.TEXT, nullable=True),
        "index_every": _whole("index_topk_freq", low=0, high=MAX_LAYERS),
        "index_offset": _whole("index_skip_topk_offset", low=0, high=MAX_LAYERS),
        # linear attention and state spaces
        "delta_key_heads": _whole("linear_num_key_heads", high=MAX_HEADS),
        "delta_key_dim": _whole("linear_key_head_dim", high=MAX_HEADS),
        "delta_value_heads": _whole("linear_num_value_heads", high=MAX_HEADS),
        "delta_value_dim": _whole("linear_value_head_dim", high=MAX_HEADS),
        "kernel": _whole("linear_conv_kernel_dim", high=MAX_HEADS),
        "block_size": _whole("block_size", high=MAX_POSITIONS),
        "state_heads": _whole("mamba_num_heads", high=MAX_HEADS),
        "state_head_dim": _whole("mamba_head_dim", high=MAX_HEADS),
        "state": _whole("ssm_state_size", high=MAX_WIDTH),
        "groups": _whole("n_groups", "mamba_n_groups", high=MAX_HEADS),
        "state_chunk": _whole("chunk_size", "mamba_chunk_size", high=MAX_POSITIONS),
        "expand": _whole("expand", high=MAX_HEADS),
        "conv_bias": _flag("use_conv_bias", "mamba_conv_bias"),
        "state_bias": _flag("use_bias"),
        "hybrid_pattern": Key(names=("hybrid_override_pattern",), kind=Kind.TEXT, nullable=True),
        # encoder and decoder
        "decoder_layers": _whole("num_decoder_layers", high=MAX_LAYERS, nullable=True),
        "buckets": _whole("relative_attention_num_buckets", high=MAX_HEADS),
        "gated_activation": _choice("feed_forward_proj", choices=T5_MLPS),
    }
)
"""Every fact that a family may read, by the field of `Description` that it fills."""


NOTHING: Mapping[str, Any] = MappingProxyType({})


@frozen
class Description:
    """The facts of one model, of which a family reads some and states others;
    `planner.model.huggingface.family` has their
    names in files. None is "derived" or "none", as the builders say.
    """

    hidden: int
    vocab: int
    heads: int
    layers: int = 0
    ffn: int = 0
    optional_ffn: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 2048
    activation: Activation = Activation.SILU
    gated: bool = True
    norm: Norm = Norm.RMSNORM
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02
    tied: bool = False
    norms: int = 2
    parallel: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: QkNorm = QkNorm.NONE
    qk_normed: bool = True
    gated_attention: bool = False
    sinks: bool = False
    rotary: bool = True
    learned_positions: bool = False
    extra_positions: int = 0
    reserved_positions: int = 0
    embedding_norm: bool = False
    embedding_width: int | None = None
    token_types: int = 0
    pooler: bool = False
    affine: bool = True
    norm_first: bool = True
    no_final_norm: bool = False
    multi_query: bool = False
    new_architecture: bool | None = None
    parallel_norms: int | None = None
    window: int | None = None
    use_window: bool = True
    first_window: int = 0
    full_every: int = 1
    chunk_span: int | None = None
    layer_types: tuple[str, ...] | None = None
    windowed_layers: tuple[int, ...] | None = None
    attention_types: tuple[str, ...] | None = None
    rotary_layers: tuple[int, ...] | None = None
    rotary_every: int = 1
    experts: int = 0
    topk: int = 1
    expert_ffn: int | None = None
    expert_bias: bool = False
    router_bias: bool = False
    dense_ffn: int | None = None
    shared: int | None = 0
    shared_ffn: int | None = None
    shared_gate: bool = False
    latent: int | None = None
    score: Score = Score.SOFTMAX
    topk_method: TopkMethod = TopkMethod.GREEDY
    normalised: bool = True
    expert_scale: float = 1.0
    expert_groups: int | None = None
    chosen_groups: int | None = None
    aux_loss: float = 0.0
    z_loss: float = 0.0
    bias_speed: float = 0.0
    capacity: float | None = None
    first_dense: int = 0
    sparse_every: int = 1
    dense_layers: tuple[int, ...] | None = None
    sparse_layers: tuple[int, ...] | None = None
    sparse_flags: tuple[int, ...] | None = None
    mlp_types: tuple[str, ...] | None = None
    query_rank: int | None = None
    kv_rank: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    index_heads: int = 0
    index_dim: int = 0
    index_topk: int = 0
    indexer_types: tuple[str, ...] | None = None
    index_pattern: str | None = None
    index_every: int = 1
    index_offset: int = 2
    delta_key_heads: int = 0
    delta_key_dim: int = 0
    delta_value_heads: int = 0
    delta_value_dim: int = 0
    kernel: int = 0
    block_size: int = 0
    state_heads: int = 0
    state_head_dim: int = 0
    state: int = 0
    groups: int = 1
    state_chunk: int = 0
    expand: int = 0
    conv_bias: bool = True
    state_bias: bool = False
    hybrid_pattern: str | None = None
    decoder_layers: int | None = None
    buckets: int = 0
    gated_activation: tuple[bool, Activation] = (False, Activation.RELU)

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def key_heads(self) -> int:
        """Key and value heads: as many as heads where nothing is said.

        Falcon's older architecture ignores its number: one under multi-query, all otherwise.
        """
        if self.new_architecture is False:
            return 1 if self.multi_query else self.heads
        return self.kv_heads or self.heads


Kinds = Callable[[Description], Sequence[str]]
Sparse = Callable[[Description], Sequence[bool]]
Build = Callable[[Description, "Family"], tuple[Segment, ...]]


@frozen
class Family:
    """One model_type as data.

    `defaults` are the fields that a config may set, with the class's default; `names` are their keys where
    those are not the usual ones; `fixed` are facts of the class that no key changes. `only` are keys with
    the one value that is described, and why another is refused. `kinds` gives the kind of every layer and
    `sparse` says which hold experts, where files do not list them. `inert` are keys of the family that
    say nothing about cost, `noted` are as in `planner.model.huggingface.values`; `needless` are needed keys
    that published
    configs leave to the class; `remark` goes into the model's sources.
    """

    build: Build
    defaults: Mapping[str, Any]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: NOTHING)
    fixed: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    only: Mapping[str, tuple[Any, str]] = field(default_factory=lambda: NOTHING)
    kinds: Kinds | None = None
    sparse: Sparse | None = None
    noted: Mapping[str, tuple[Any, str]] = field(default_factory=lambda: NOTHING)
    inert: frozenset[str] = frozenset()
    needless: frozenset[str] = frozenset()
    remark: str = ""

    def names_of(self, fact: str) -> tuple[str, ...]:
        """The keys that hold `fact`, the usual one first."""
        return self.names.get(fact) or KEYS[fact].names

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every key that the family reads."""
        read = [name for fact in self.defaults for name in self.names_of(fact)]
        return (*read, *self.only)
