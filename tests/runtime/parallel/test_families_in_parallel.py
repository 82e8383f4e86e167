"""What families compute otherwise is exact in every layout: losses and norms are those of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.foundation.errors import InputError
from planner.model.arithmetic import Arithmetic, RopeKind, RopeScaling
from planner.model.attention import Attention, AttentionSpan, CpExchange, LatentAttention, QkNorm, Reach
from planner.model.feed_forward import Activation, Mlp
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.sublayer import Recompute
from planner.strategy.plan import Plan
from planner.strategy.strategy import Zero
from runtime.parallel.parallelize import check_supported
from tests.plans import batch8, make_plan, split, tiny_llama
from tests.runtime.ranks import make_executor, on_ranks, single_process, train

STEPS = 5
MLP = Mlp(width=64, gated=True, activation=Activation.GELU_TANH)
HEADS = Attention(heads=8, kv_heads=4, head_dim=4)
NORMED = replace(HEADS, qk_norm=QkNorm.HEAD)
SP = {"sequence_parallel": True}


def model(*blocks: Block, arithmetic: Arithmetic, **facts: object) -> ModelSpec:
    segments = tuple(Segment(block=block, count=1) for block in blocks)
    return replace(tiny_llama(), segments=segments, arithmetic=arithmetic, **facts)  # type: ignore[arg-type]


def block(mixer: Attention | LatentAttention, **facts: object) -> Block:
    return Block(hidden=32, norm=Norm.RMSNORM, mixer=mixer, mlp=MLP, **facts)  # type: ignore[arg-type]


WINDOW = replace(NORMED, span=AttentionSpan(reach=Reach.WINDOW, size=5))
GEMMA = model(
    block(WINDOW, norms=4),
    block(NORMED, norms=4),
    arithmetic=Arithmetic(
        unit_offset=True, embedding_scale=5.6, attention_cap=3.0, logit_cap=2.0, window_rope_theta=500.0
    ),
    tied_embeddings=True,
)
"""Norms around sublayers, two kinds of layers, capped scores and logits."""

OLMO = model(
    *(block(replace(HEADS, qk_norm=QkNorm.WIDTH)),) * 2,
    arithmetic=Arithmetic(
        post_norm=True, rope_scaling=RopeScaling(kind=RopeKind.YARN, factor=4.0, original_positions=8)
    ),
)
"""Norms behind sublayers, and over the width of all heads, which tensor parallelism cuts."""

PHI = model(
    *(
        Block(
            hidden=32,
            norm=Norm.LAYERNORM,
            mixer=replace(HEADS, kv_heads=8, qk_norm=QkNorm.HEAD_LAYERNORM, qkv_bias=True, out_bias=True),
            mlp=Mlp(width=64, gated=False, activation=Activation.GELU, bias=True),
            norms=1,
            parallel=True,
        ),
    )
    * 2,
    arithmetic=Arithmetic(rope_dims=2, rope_interleaved=True, residual_scale=0.7, logit_scale=1.5),
    norm=Norm.LAYERNORM,
    head_bias=True,
)
"""Attention and MLP side by side under one norm, a part of each head turned, a head with a bias."""

LATENT = LatentAttention(heads=4, query_rank=24, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6)
DEEPSEEK = model(
    block(LATENT),
    block(replace(LATENT, bias=True)),
    block(replace(LATENT, query_rank=None)),
    arithmetic=Arithmetic(rope_interleaved=True, attention_scale=0.3),
)


CASES: dict[str, Plan] = {
    "gemma-tp2-sp": make_plan(GEMMA, batch8(tp=2, micro_batch=4, **SP)),
    "gemma-pp2": make_plan(GEMMA, batch8(pp=2, micro_batch=2), split(1, 1, recompute=Recompute.FULL)),
    "olmo-tp2-sp-dp2-zero2": make_plan(OLMO, batch8(tp=2, dp_shard=2, micro_batch=2, zero=Zero(2), **SP)),
    "phi-tp2-sp-pp2": make_plan(PHI, batch8(tp=2, pp=2, micro_batch=2, **SP)),
    "mla-tp2": make_plan(DEEPSEEK, batch8(tp=2, micro_batch=4)),
    "mla-tp2-sp-dp2-zero3": make_plan(
        DEEPSEEK,
        batch8(tp=2, dp_shard=2, micro_batch=2, zero=Zero(3), **SP),
        split(3, recompute=Recompute.SELECTIVE),
    ),
    "mla-ring": make_plan(DEEPSEEK, batch8(cp=2, micro_batch=4)),
    "gemma-traded-heads": make_plan(GEMMA, batch8(cp=2, micro_batch=4, cp_exchange=CpExchange.ALL_TO_ALL)),
    "mla-pp2-uneven": make_plan(DEEPSEEK, batch8(pp=2, micro_batch=2), split(2, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradient_norms_are_those_of_one_process(name: str) -> None:
    plan = CASES[name]
    expected = [value for pair in single_process(plan, STEPS) for value in pair]
    for trajectory in on_ranks(
        lambda rank: train(make_executor(plan), 0, STEPS), plan.strategy.degrees.world
    ):
        assert [value for pair in trajectory for value in pair] == pytest.approx(expected, rel=1e-5)


def test_windows_and_caps_are_not_met_block_by_block() -> None:
    with pytest.raises(InputError) as caught:
        check_supported(make_plan(GEMMA, batch8(cp=2, micro_batch=4)))
    assert "attention reaches a window of 5 keys" in str(caught.value)
    assert "scores are capped. Legal here: all_to_all" in str(caught.value)
