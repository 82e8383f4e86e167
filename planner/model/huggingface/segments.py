"""From a Description to the segments of a model: mixers and feed-forward layers, equal blocks joined.

Which kind every layer is, and which layers hold experts, where a config does not list it.

Rules are those of the configuration classes of transformers 5.23.0; layers count from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby

from planner.model.attention import CAUSAL, Attention, AttentionSpan, Indexer, LatentAttention, QkNorm, Reach
from planner.model.feed_forward import Experts, FeedForward, Mlp, Routing, TopkMethod
from planner.model.huggingface.family import (
    CHUNKED,
    DENSE,
    FULL,
    INDEXED,
    LINEAR,
    SLIDING,
    SPARSE,
    Description,
    Family,
)
from planner.model.mixers import DeltaNet, LightningAttention, Mixer, StateSpace
from planner.model.spec import Block, Norm, Segment

HYBRID_LETTERS = {"M": LINEAR, "E": SPARSE, "*": FULL, "-": DENSE}
"""Letters of nemotron_h's hybrid_override_pattern."""


def all_full(d: Description) -> Sequence[str]:
    return (FULL,) * d.layers


def all_windowed(d: Description) -> Sequence[str]:
    """Every layer has the window, if there is one."""
    return (SLIDING if d.window and d.use_window else FULL,) * d.layers


def full_every_nth(other: str) -> Callable[[Description], Sequence[str]]:
    """Every `full_every`-th layer is full attention, the rest are `other`."""

    def kinds(d: Description) -> Sequence[str]:
        return tuple(other if (layer + 1) % d.full_every else FULL for layer in range(d.layers))

    return kinds


def full_first_and_every_sixth(d: Description) -> Sequence[str]:
    """The first layer and every sixth is full attention, the rest have the window, unless flagged (mimo)."""
    if d.windowed_layers:
        return tuple(SLIDING if windowed else FULL for windowed in d.windowed_layers)
    return tuple(SLIDING if layer and (layer + 1) % 6 else FULL for layer in range(d.layers))


def windowed_from(d: Description) -> Sequence[str]:
    """Layers from `first_window` on have the window (qwen2, qwen3)."""
    windowed = d.use_window and d.window is not None
    return tuple(SLIDING if windowed and layer >= d.first_window else FULL for layer in range(d.layers))


def windowed_before(d: Description) -> Sequence[str]:
    """Every other layer before `first_window` has the window (qwen2_moe)."""
    return tuple(
        SLIDING if d.use_window and (layer + 1) % 2 and layer < d.first_window else FULL
        for layer in range(d.layers)
    )


def linear_at_odd(d: Description) -> Sequence[str]:
    """Full attention and linear attention in turn (minimax)."""
    return tuple(FULL if (layer + 1) % 2 else LINEAR for layer in range(d.layers))


def is_rotary(d: Description, layer: int) -> bool:
    """Whether a layer has rotary positions: all but every `rotary_every`-th, unless listed."""
    if d.rotary_layers:
        return bool(d.rotary_layers[layer])
    return bool((layer + 1) % d.rotary_every)


def chunked_where_rotary(d: Description) -> Sequence[str]:
    """Layers with rotary positions see a chunk, the others everything (llama4)."""
    return tuple(CHUNKED if is_rotary(d, layer) else FULL for layer in range(d.layers))


def windowed_where_not_rotary(d: Description) -> Sequence[str]:
    """Layers without rotary positions have the window, if it is used (smollm3)."""
    windowed = d.use_window and d.window is not None
    return tuple(SLIDING if windowed and not is_rotary(d, layer) else FULL for layer in range(d.layers))


def all_linear(d: Description) -> Sequence[str]:
    return (LINEAR,) * d.layers


def all_indexed(d: Description) -> Sequence[str]:
    return (INDEXED,) * d.layers


def by_attention_types(d: Description) -> Sequence[str]:
    """Global and local attention as attention_types repeats them (gpt_neo)."""
    listed = d.attention_types or ("global", "local") * (d.layers // 2 + 1)
    return tuple(SLIDING if kind == "local" else FULL for kind in listed[: d.layers])


def by_hybrid_pattern(d: Description) -> Sequence[str]:
    """One letter a layer (nemotron_h)."""
    return tuple(HYBRID_LETTERS[letter] for letter in d.hybrid_pattern or "ME*-")


def nowhere(d: Description) -> Sequence[bool]:
    return (False,) * d.layers


def everywhere(d: Description) -> Sequence[bool]:
    return (True,) * d.layers


def after_first_dense(d: Description) -> Sequence[bool]:
    """The first layers are dense, the rest sparse (deepseek, glm); `mlp_types` lists them in newer files."""
    if d.mlp_types is not None:
        return tuple(kind == SPARSE for kind in d.mlp_types)
    if d.sparse_flags:
        return tuple(map(bool, d.sparse_flags))
    return tuple(layer >= d.first_dense and layer % d.sparse_every == 0 for layer in range(d.layers))


def every_step(d: Description) -> Sequence[bool]:
    """Every `sparse_every`-th layer is sparse, but those that are listed as dense (qwen)."""
    dense = set(d.dense_layers or ())
    return tuple(
        d.experts > 0 and layer not in dense and (layer + 1) % d.sparse_every == 0
        for layer in range(d.layers)
    )


def listed_or_every_step(d: Description) -> Sequence[bool]:
    """Every `sparse_every`-th layer is sparse, unless the sparse ones are listed (llama4)."""
    if d.sparse_layers is None:
        return every_step(d)
    sparse = set(d.sparse_layers)
    return tuple(layer in sparse for layer in range(d.layers))


ALL = AttentionSpan(reach=Reach.ALL)

MixerOf = Callable[[Description, str, int], Mixer]
"""The mixer of a layer from its kind and index."""


def span(d: Description, kind: str) -> AttentionSpan:
    """The keys that a layer of `kind` meets; a window that is 0, null or not used means all before."""
    if kind == SLIDING and d.window and d.use_window:
        return AttentionSpan(reach=Reach.WINDOW, size=d.window)
    if kind == CHUNKED and d.chunk_span:
        return AttentionSpan(reach=Reach.CHUNK, size=d.chunk_span)
    return CAUSAL


def attention(d: Description, kind: str, layer: int) -> Attention:
    """Attention with heads of its own; llama4's weightless norm belongs to layers with rotary positions."""
    normed = d.qk_normed and (d.qk_norm is not QkNorm.WEIGHTLESS or is_rotary(d, layer))
    return Attention(
        heads=d.heads,
        kv_heads=d.key_heads,
        head_dim=d.width_of_head,
        qkv_bias=d.qkv_bias,
        out_bias=d.out_bias,
        qk_norm=d.qk_norm if normed else QkNorm.NONE,
        span=span(d, kind),
        gated=d.gated_attention,
        sinks=d.sinks,
    )


def _sink_attention(d: Description, kind: str, layer: int) -> Attention:
    """Values of their own width; windowed layers have twice the key and value heads, and sinks (MiMo-V2)."""
    windowed = kind == SLIDING
    return Attention(
        heads=d.heads,
        kv_heads=d.key_heads * (2 if windowed else 1),
        head_dim=d.width_of_head,
        qkv_bias=d.qkv_bias,
        span=span(d, kind),
        sinks=windowed,
        value_dim=d.value_dim,
    )


def _full_or(other: Callable[[Description], Mixer], d: Description, kind: str, layer: int) -> Mixer:
    return other(d) if kind == LINEAR else attention(d, kind, layer)


def _delta_net(d: Description) -> Mixer:
    return DeltaNet(
        key_heads=d.delta_key_heads,
        key_dim=d.delta_key_dim,
        value_heads=d.delta_value_heads,
        value_head_dim=d.delta_value_dim,
        kernel=d.kernel,
    )


def _lightning(d: Description) -> Mixer:
    return LightningAttention(lightning_heads=d.heads, head_dim=d.width_of_head, chunk=d.block_size)


def state_space(d: Description) -> StateSpace:
    """A Mamba-2 layer."""
    return StateSpace(
        state_heads=d.state_heads,
        head_dim=d.state_head_dim,
        state=d.state,
        groups=d.groups,
        kernel=d.kernel,
        chunk=d.state_chunk,
        bias=d.state_bias,
        conv_bias=d.conv_bias,
    )


def _has_indexer(d: Description, layer: int) -> bool:
    """Whether a layer scores keys itself, or uses the choice of one before it (glm_moe_dsa)."""
    if d.indexer_types is not None:
        return d.indexer_types[layer] == "full"
    if d.index_pattern is not None:
        return d.index_pattern[layer] == "F"
    return max(layer - d.index_offset + 1, 0) % max(d.index_every, 1) == 0


def latent_attention(d: Description, kind: str, layer: int) -> LatentAttention:
    """Multi-head latent attention; where `index_topk` is set, over chosen keys only."""
    chosen = kind == INDEXED and d.index_topk > 0
    indexer = Indexer(heads=d.index_heads, head_dim=d.index_dim)
    return LatentAttention(
        heads=d.heads,
        query_rank=d.query_rank,
        kv_rank=d.kv_rank,
        nope_dim=d.nope_dim,
        rope_dim=d.rope_dim,
        value_dim=d.value_dim,
        bias=d.qkv_bias,
        span=AttentionSpan(reach=Reach.CHOSEN, size=d.index_topk) if chosen else CAUSAL,
        indexer=indexer if chosen and _has_indexer(d, layer) else None,
    )


def mlp(d: Description, width: int) -> Mlp:
    return Mlp(width=width, gated=d.gated, activation=d.activation, bias=d.mlp_bias)


def experts(d: Description) -> Experts:
    """Routed experts of `expert_ffn`, or of the ffn where there is one width for both."""
    width = d.expert_ffn or d.ffn
    shared = d.shared_ffn or (d.shared or 0) * width
    return Experts(
        count=d.experts,
        topk=d.topk,
        expert=Mlp(width=width, gated=d.gated, activation=d.activation, bias=d.expert_bias),
        router_bias=d.router_bias,
        shared=mlp(d, shared) if shared else None,
        shared_gate=d.shared_gate,
        latent=d.latent,
        latent_bias=d.latent is not None and d.mlp_bias,
        routing=routing(d),
    )


def routing(d: Description) -> Routing:
    """How tokens choose; groups count where the method limits the choice to some (DeepSeek)."""
    limited = d.topk_method is not TopkMethod.GREEDY and (d.expert_groups or 1) > 1
    corrected = d.topk_method is TopkMethod.CORRECTED
    return Routing(
        score=d.score,
        normalised=d.normalised,
        scale=d.expert_scale,
        groups=(d.expert_groups or 1) if limited else 1,
        chosen_groups=(d.chosen_groups or 1) if limited else 1,
        group_experts=2 if limited and corrected else 1,
        corrected=corrected,
        bias_speed=d.bias_speed if corrected else 0.0,
        aux_loss=d.aux_loss,
        z_loss=d.z_loss,
        capacity=d.capacity,
    )


def dense_width(d: Description) -> int:
    """Width of a dense MLP: 4 times the hidden size where nothing is said."""
    return d.dense_ffn or d.ffn or d.optional_ffn or 4 * d.hidden


def block_norms(d: Description) -> int:
    """Norms of a block: parallel sublayers share one, unless the class gives each its own."""
    if not d.parallel:
        return d.norms
    return d.parallel_norms or (2 if d.new_architecture else 1)


def joined(blocks: Iterable[Block]) -> tuple[Segment, ...]:
    """Equal blocks in a row as one segment."""
    return tuple(Segment(block=block, count=len(list(run))) for block, run in groupby(blocks))


def layer_kinds(d: Description, family: Family) -> Sequence[str]:
    """The kind of each layer: as listed, or by the family's rule."""
    if d.layer_types is not None:
        return d.layer_types
    return (family.kinds or all_full)(d)


def _decoder(mixer_of: MixerOf, d: Description, family: Family) -> tuple[Segment, ...]:
    sparse = (family.sparse or nowhere)(d)
    made: dict[tuple[Mixer, bool], Block] = {}
    dense_mlp, moe = mlp(d, dense_width(d)), experts(d) if any(sparse) else None

    def block(kind: str, layer: int) -> Block:
        mixer = mixer_of(d, kind, layer)
        key = (mixer, sparse[layer])
        if key not in made:
            feed: FeedForward | None = moe if sparse[layer] else dense_mlp
            made[key] = Block(
                hidden=d.hidden, norm=d.norm, mixer=mixer, mlp=feed, norms=block_norms(d), parallel=d.parallel
            )
        return made[key]

    return joined(block(kind, layer) for layer, kind in enumerate(layer_kinds(d, family)))


decoder = partial(_decoder, attention)
"""A stack of attention blocks with MLPs or experts."""

sink_decoder = partial(_decoder, _sink_attention)
"""A stack in which windowed layers have sinks and more key and value heads."""

latent_decoder = partial(_decoder, latent_attention)
"""A stack of latent-attention blocks with MLPs or experts."""

delta_decoder = partial(_decoder, partial(_full_or, _delta_net))
"""A stack in which some layers are gated delta-rule layers."""

lightning_decoder = partial(_decoder, partial(_full_or, _lightning))
"""A stack in which some layers are lightning attention."""


def hybrid_decoder(d: Description, family: Family) -> tuple[Segment, ...]:
    """A stack of layers with one sublayer each: state space, attention, MLP or experts."""
    kinds = layer_kinds(d, family)
    made = {kind: _one_sublayer(d, kind) for kind in set(kinds)}
    return joined(made[kind] for kind in kinds)


def _one_sublayer(d: Description, kind: str) -> Block:
    mixer: Mixer | None = None
    feed: FeedForward | None = None
    if kind == LINEAR:
        mixer = state_space(d)
    elif kind == FULL:
        mixer = attention(d, FULL, 0)
    elif kind == DENSE:
        feed = mlp(d, dense_width(d))
    else:
        feed = experts(d)
    return Block(hidden=d.hidden, norm=d.norm, mixer=mixer, mlp=feed, norms=1)


def encoder(d: Description, family: Family) -> tuple[Segment, ...]:
    """A stack of blocks in which every token meets every other (bert)."""
    mixer = Attention(
        heads=d.heads,
        kv_heads=d.heads,
        head_dim=d.width_of_head,
        qkv_bias=d.qkv_bias,
        out_bias=d.out_bias,
        span=ALL,
    )
    block = Block(hidden=d.hidden, norm=d.norm, mixer=mixer, mlp=mlp(d, dense_width(d)))
    return (Segment(block=block, count=d.layers),)


def encoder_decoder(d: Description, family: Family) -> tuple[Segment, ...]:
    """T5: both stacks' first layer holds the table of relative positions; the decoder attends across."""
    gated, activation = d.gated_activation
    feed = Mlp(width=d.ffn, gated=gated, activation=activation)

    def heads(span: AttentionSpan, layer: int, cross: bool = False) -> Attention:
        buckets = 0 if layer or cross else d.buckets
        return Attention(
            heads=d.heads,
            kv_heads=d.heads,
            head_dim=d.width_of_head,
            span=span,
            position_buckets=buckets,
            cross=cross,
        )

    encoding = (
        Block(hidden=d.hidden, norm=Norm.RMSNORM, mixer=heads(ALL, layer), mlp=feed)
        for layer in range(d.layers)
    )
    decoding = (
        Block(
            hidden=d.hidden,
            norm=Norm.RMSNORM,
            mixer=heads(CAUSAL, layer),
            mlp=feed,
            norms=3,
            cross=heads(ALL, layer, cross=True),
        )
        for layer in range(d.decoder_layers or d.layers)
    )
    return (*joined(encoding), *joined(decoding))
