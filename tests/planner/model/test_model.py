"""ModelSpec and its sublayers: parameters, FLOPs and activations against closed forms and published ones."""

from __future__ import annotations

import dataclasses

import pytest

from planner.model.attention import CAUSAL, Attention, AttentionSpan, LatentAttention, QkNorm, Reach
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.mixers import DeltaNet, LightningAttention, Mixer, StateSpace
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.sublayer import AttentionKernel, Recompute, Split, WeightMatrix

SWIGLU = Mlp(width=28, gated=True, activation=Activation.SILU)
MIXERS: dict[str, Mixer] = {
    "mha": Attention(heads=4, kv_heads=4, head_dim=8),
    "gqa": Attention(heads=4, kv_heads=2, head_dim=8, qkv_bias=True),
    "gated": Attention(heads=4, kv_heads=2, head_dim=8, gated=True, sinks=True),
    "mla": LatentAttention(heads=4, query_rank=8, kv_rank=6, nope_dim=4, rope_dim=2, value_dim=4),
    "mamba2": StateSpace(state_heads=4, head_dim=8, state=16, groups=2, kernel=4, chunk=8),
    "delta": DeltaNet(key_heads=2, key_dim=4, value_heads=4, value_head_dim=4, kernel=4),
    "lightning": LightningAttention(lightning_heads=4, head_dim=8, chunk=8),
}


def block(mixer: Mixer | None, mlp: Mlp | Experts | None = SWIGLU, hidden: int = 16) -> Block:
    return Block(hidden=hidden, norm=Norm.RMSNORM, mixer=mixer, mlp=mlp, norms=(mixer is not None) + 1)


def spec(*segments: Segment, hidden: int = 16, vocab: int = 100) -> ModelSpec:
    return ModelSpec(
        name="m", model_type="llama", hidden=hidden, vocab=vocab, max_positions=64, learned_positions=0,
        rope_theta=1e4, norm=Norm.RMSNORM, norm_eps=1e-5, initializer_range=0.02, tied_embeddings=False,
        segments=segments,
    )  # fmt: skip


def brute_mean_keys(span: AttentionSpan, seq: int) -> float:
    """Keys met, one query at a time."""
    met = 0
    for query in range(seq):
        for key in range(seq):
            near = span.reach is not Reach.WINDOW or query - key < span.size
            same = span.reach is not Reach.CHUNK or query // span.size == key // span.size
            met += span.reach is Reach.ALL or (key <= query and near and same)
    return met / seq


@pytest.mark.parametrize("seq", [1, 5, 8, 9, 17, 32])
@pytest.mark.parametrize(
    "span",
    [
        CAUSAL,
        AttentionSpan(reach=Reach.ALL),
        *(AttentionSpan(reach=r, size=n) for r in (Reach.WINDOW, Reach.CHUNK) for n in (1, 8, 50)),
    ],
    ids=lambda span: f"{span.reach}{span.size}",
)
def test_mean_keys_are_those_that_a_mask_leaves(span: AttentionSpan, seq: int) -> None:
    assert span.mean_keys(seq) == pytest.approx(brute_mean_keys(span, seq))


def test_chosen_keys_are_all_of_a_short_past_and_then_their_number() -> None:
    span = AttentionSpan(reach=Reach.CHOSEN, size=4)
    assert span.mean_keys(4) == 2.5
    assert span.mean_keys(8) == (1 + 2 + 3 + 4 + 4 * 4) / 8


@pytest.mark.parametrize("name", MIXERS)
def test_shards_of_a_block_sum_to_it_but_for_what_is_whole(name: str) -> None:
    one = block(MIXERS[name])
    whole = one.params - sum(m.params for m in one.matrices() if m.split is not Split.NONE)
    shared = 2 * one.params_shard(2) - one.params
    assert one.params_shard(1) == one.params
    biases = sum(m.outputs for m in one.matrices() if m.bias and m.split is Split.INPUTS)
    assert shared == whole + biases


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("kernel", AttentionKernel)
def test_recomputation_keeps_less_and_less(name: str, kernel: AttentionKernel) -> None:
    for tp, sequence_parallel in ((1, False), (2, False), (2, True)):
        kept = [
            block(MIXERS[name]).saved_bytes(
                64, 32, tp=tp, sequence_parallel=sequence_parallel, recompute=option, kernel=kernel
            )
            for option in Recompute
        ]
        assert kept == sorted(kept, reverse=True) and kept[0] > kept[2] > 0


def test_a_longer_sequence_costs_quadratic_mixers_more_and_linear_ones_no_more() -> None:
    flops = {name: (m.core_flops(64), m.core_flops(4096)) for name, m in MIXERS.items()}
    for name in ("mamba2", "delta", "lightning"):
        assert flops[name][0] == flops[name][1]
    for name in ("mha", "gqa", "mla"):
        assert flops[name][1] > 50 * flops[name][0]


def test_experts_count_all_weights_and_compute_with_the_chosen() -> None:
    experts = Experts(count=8, topk=2, expert=SWIGLU, shared=SWIGLU, shared_gate=True)
    one = block(None, experts)
    each = 3 * 16 * 28
    assert one.params == 8 * each + each + 16 * 8 + 16 + 16
    assert one.params_active == one.params - 6 * each
    assert one.matmul_flops_forward(1) == 2 * (one.params_active - 16)


def test_a_matrix_counts_by_its_definition() -> None:
    matrix = WeightMatrix(inputs=4, outputs=6, bias=True, copies=3, used=2)
    assert (matrix.params, matrix.params_active, matrix.flops_per_token) == (90, 60, 96)
    assert matrix.params_shard(2) == 3 * (4 * 3 + 3)
    across = dataclasses.replace(matrix, split=Split.INPUTS)
    assert across.params_shard(2) == 3 * (2 * 6 + 6)


def test_layers_are_found_by_their_index_and_class() -> None:
    a, b = block(MIXERS["mha"]), block(MIXERS["mla"])
    model = spec(Segment(block=a, count=2), Segment(block=b, count=1), Segment(block=a, count=1))
    assert [one.shape_key for one in model.blocks()] == [model.block(i).shape_key for i in range(4)]
    assert list(model.classes().values()) == [a, b]
    with pytest.raises(IndexError):
        model.block(4)


def test_keys_differ_where_costs_do() -> None:
    variants = [block(mixer) for mixer in MIXERS.values()]
    attention = Attention(heads=4, kv_heads=4, head_dim=8)
    for change in (
        {"qkv_bias": True}, {"out_bias": True}, {"qk_norm": QkNorm.HEAD}, {"qk_norm": QkNorm.WIDTH},
        {"span": AttentionSpan(reach=Reach.WINDOW, size=8)}, {"position_buckets": 4}, {"value_dim": 4},
    ):  # fmt: skip
        variants.append(block(dataclasses.replace(attention, **change)))
    plain = block(attention)
    variants += [dataclasses.replace(plain, norms=4), dataclasses.replace(plain, parallel=True)]
    variants += [block(attention, Experts(count=4, topk=k, expert=SWIGLU)) for k in (1, 2)]
    variants += [dataclasses.replace(plain, cross=attention)]
    assert len({one.shape_key for one in variants}) == len(variants)


def test_gpt3_activations_are_those_published() -> None:
    """Korthikanti et al. 2022 (arXiv 2205.05198), table 2: s b h (34 + 5 a s / h) bytes a layer.

    Of the 34, dropout masks and the copy before the second dropout are 2 + 1 + 1, and of the 5 a s / h all
    but the probabilities' own 2 are dropout: this model has none.
    """
    hidden, heads, seq = 12288, 96, 2048
    layer = Block(
        hidden=hidden,
        norm=Norm.LAYERNORM,
        mixer=Attention(heads=heads, kv_heads=heads, head_dim=128, qkv_bias=True, out_bias=True),
        mlp=Mlp(width=4 * hidden, gated=False, activation=Activation.GELU_TANH, bias=True),
    )
    published = hidden * (34 - 2) + 2 * heads * seq
    kept = layer.saved_bytes(1, seq, kernel=AttentionKernel.EAGER)
    assert kept == pytest.approx(published, rel=0.03)
    full = layer.saved_bytes(1, seq, recompute=Recompute.FULL)
    assert full == 2 * hidden


def test_causal_attention_is_counted_as_done() -> None:
    """Half of the 4 s h a token of the full square (PaLM, arXiv 2204.02311, appendix B counts it whole)."""
    one = block(MIXERS["mha"])
    seq = 1001
    assert one.attention_flops_forward(1, seq) == 4 * 32 * (seq + 1) / 2
