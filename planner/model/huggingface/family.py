"""Family: one model_type as data; Description: what a config of it says, with the class's own facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from types import MappingProxyType
from typing import Any

from planner.foundation.frozen import frozen
from planner.model.attention import QkNorm
from planner.model.feed_forward import Activation
from planner.model.huggingface.keys import KEYS
from planner.model.routing import Score, TopkMethod
from planner.model.spec import Norm, Segment

NOTHING: Mapping[str, Any] = MappingProxyType({})


@frozen
class Description:
    """The facts of one model, of which a family reads some and states others;
    `planner.model.huggingface.keys` has their
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
    say nothing about cost, `noted` are as in `planner.model.huggingface.inert`; `needless` are needed keys
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
