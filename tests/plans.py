"""Tiny models and plans for tests. The estimates in these plans are zeros: nothing here reads them."""

from __future__ import annotations

import dataclasses

from planner.hardware.cluster import ClusterSpec, Device, DeviceGroup, Link
from planner.model.arithmetic import Arithmetic
from planner.model.attention import Attention, LatentAttention
from planner.model.feed_forward import Activation, Experts, Mlp, Routing, Score
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.sublayer import Recompute
from planner.model.workload import Adapters, Method, Optimizer, Precision, Workload
from planner.strategy.estimate import (
    Coverage,
    Estimate,
    MemoryBreakdown,
    StageEstimate,
    TimeBreakdown,
    Verdict,
)
from planner.strategy.plan import Plan
from planner.strategy.schedule.schedules import build_table, print_table
from planner.strategy.strategy import AXES, Degrees, RecomputeCounts, Stage, Strategy, even_stages


def tiny_llama(
    *, layers: int = 4, hidden: int = 32, vocab: int = 64, tied: bool = False, kv_heads: int = 4
) -> ModelSpec:
    """A llama of four layers with grouped key and value heads."""
    block = Block(
        hidden=hidden,
        norm=Norm.RMSNORM,
        mixer=Attention(heads=8, kv_heads=kv_heads, head_dim=hidden // 8),
        mlp=Mlp(width=2 * hidden, gated=True, activation=Activation.SILU),
    )
    return ModelSpec(
        name="tiny-llama",
        model_type="llama",
        hidden=hidden,
        vocab=vocab,
        max_positions=64,
        learned_positions=0,
        rope_theta=10_000.0,
        norm=Norm.RMSNORM,
        norm_eps=1e-5,
        initializer_range=0.1,
        tied_embeddings=tied,
        segments=(Segment(block=block, count=layers),),
    )


def tiny_gpt2(*, layers: int = 4, hidden: int = 32, vocab: int = 64) -> ModelSpec:
    """A GPT-2 of four layers: LayerNorm, biases, learned positions, tied embeddings."""
    block = Block(
        hidden=hidden,
        norm=Norm.LAYERNORM,
        mixer=Attention(heads=4, kv_heads=4, head_dim=hidden // 4, qkv_bias=True, out_bias=True),
        mlp=Mlp(width=4 * hidden, gated=False, activation=Activation.GELU_TANH, bias=True),
    )
    return ModelSpec(
        name="tiny-gpt2",
        model_type="gpt2",
        hidden=hidden,
        vocab=vocab,
        max_positions=64,
        learned_positions=64,
        rope_theta=10_000.0,
        norm=Norm.LAYERNORM,
        norm_eps=1e-5,
        initializer_range=0.1,
        tied_embeddings=True,
        segments=(Segment(block=block, count=layers),),
    )


def changed_mixer(model: ModelSpec, **changes: object) -> ModelSpec:
    """The model with its blocks' mixer changed."""
    (segment,) = model.segments
    mixer = dataclasses.replace(segment.block.mixer, **changes)
    block = dataclasses.replace(segment.block, mixer=mixer)
    return dataclasses.replace(model, segments=(dataclasses.replace(segment, block=block),))


def parallel(model: ModelSpec, norms: int) -> ModelSpec:
    """The model with attention and MLP side by side, by one norm or two."""
    (segment,) = model.segments
    block = dataclasses.replace(segment.block, parallel=True, norms=norms)
    return dataclasses.replace(model, segments=(dataclasses.replace(segment, block=block),))


def tiny_mla(*, layers: int = 4, hidden: int = 32) -> ModelSpec:
    """A dense model with DeepSeek's latent attention: latents of queries and keys, a turned part of each."""
    llama = tiny_llama(layers=layers, hidden=hidden)
    block = llama.block(0)
    assert isinstance(block, Block)
    mixer = LatentAttention(
        heads=4, query_rank=12, kv_rank=8, nope_dim=hidden // 4, rope_dim=4, value_dim=hidden // 4
    )
    latent = Segment(block=dataclasses.replace(block, mixer=mixer), count=layers)
    return dataclasses.replace(
        llama,
        name="tiny-mla",
        model_type="deepseek_v3",
        segments=(latent,),
        arithmetic=Arithmetic(rope_interleaved=True),
    )


def tiny_mixtral(*, layers: int = 4, hidden: int = 32, vocab: int = 64, **changes: object) -> ModelSpec:
    """A mixtral of four layers with eight experts of which a token meets two; `changes` are the experts'."""
    dense = tiny_llama(layers=layers, hidden=hidden, vocab=vocab)
    block = dense.segments[0].block
    assert isinstance(block, Block)
    expert = Mlp(width=hidden, gated=True, activation=Activation.SILU)
    mlp = dataclasses.replace(Experts(count=8, topk=2, expert=expert), **changes)  # type: ignore[arg-type]
    segments = (Segment(block=dataclasses.replace(block, mlp=mlp), count=layers),)
    return dataclasses.replace(dense, name="tiny-mixtral", model_type="mixtral", segments=segments)


def tiny_deepseek_experts(*, layers: int = 4) -> ModelSpec:
    """The same with DeepSeek-V3's routing, and shared experts whose result is gated."""
    return tiny_mixtral(
        layers=layers,
        topk=3,
        shared=Mlp(width=32, gated=True, activation=Activation.SILU),
        shared_gate=True,
        routing=Routing(
            score=Score.SIGMOID,
            scale=2.5,
            groups=4,
            chosen_groups=2,
            group_experts=2,
            corrected=True,
            bias_speed=0.01,
            aux_loss=0.02,
        ),
    )


def split(*sizes: int, recompute: Recompute = Recompute.NONE) -> tuple[Stage, ...]:
    """Stages of these many layers, all with one recompute option."""
    stages, first = [], 0
    for size in sizes:
        counts = RecomputeCounts(**{"none": 0, str(recompute): size})
        stages.append(Stage(first=first, end=first + size, recompute=counts))
        first += size
    return tuple(stages)


def local_cluster(devices: int) -> ClusterSpec:
    """Processes on this CPU."""
    device = Device(
        name="cpu",
        title="a process on this CPU",
        vendor="cpu",
        memory_bytes=2**32,
        usable_memory_bytes=2**32,
        memory_bandwidth_bytes_per_s=None,
        peak_fp32_flops=None,
        peak_bf16_flops=None,
        peak_fp16_flops=None,
        link_bytes_per_s=None,
    )
    link = Link(name="loopback", latency_s=0.0, bytes_per_s=None)
    group = DeviceGroup(device=device, nodes=1, devices_per_node=devices)
    return ClusterSpec(name=f"local:{devices}", groups=(group,), intra=link, inter=link)


def make_plan(
    spec: ModelSpec,
    degrees: Degrees,
    stages: tuple[Stage, ...] | None = None,
    *,
    seq: int = 16,
    precision: Precision = Precision.FP32,
    optimizer: Optimizer = Optimizer.ADAMW,
    recompute: Recompute = Recompute.NONE,
    adapters: Adapters | None = None,
) -> Plan:
    """The plan that runs `spec` by these degrees; stages are even where none are given."""
    stages = stages or even_stages(spec.layers, degrees.stages, recompute)
    table = build_table(degrees.schedule, degrees.pp, degrees.chunks, degrees.num_micro_batches)
    zero = StageEstimate(memory=MemoryBreakdown(), time_s=0.0, forward_s=0.0, backward_s=0.0)
    return Plan(
        model=spec,
        workload=Workload(
            seq=seq,
            batch=degrees.batch,
            precision=precision,
            optimizer=optimizer,
            method=Method.LORA if adapters else Method.PRETRAIN,
            adapters=adapters,
        ),
        cluster=local_cluster(degrees.world),
        strategy=Strategy(degrees=degrees, stages=stages),
        stage_estimates=(zero,) * len(stages),
        estimate=_no_estimate(),
        rank_axes=AXES,
        rank_grid_shape=degrees.grid_shape(),
        schedule_table=print_table(table),
        solver=None,
        rejected={},
        alternatives=(),
        digests={},
    )


def _no_estimate() -> Estimate:
    return Estimate(
        step_time_s=0.0,
        step_time_interval_s=(0.0, 0.0),
        tokens_per_s=0.0,
        mfu=None,
        days=None,
        cost_usd=None,
        breakdown=TimeBreakdown(),
        peak_memory_bytes=0,
        memory_limit_bytes=0,
        verdict=Verdict.SAFE,
        coverage=Coverage(),
    )


def batch8(**degrees: object) -> Degrees:
    """Degrees with as many micro-batches as make a batch of 8 sequences."""
    found = Degrees(**degrees)  # type: ignore[arg-type]
    return dataclasses.replace(found, num_micro_batches=8 // (found.micro_batch * found.dp))
