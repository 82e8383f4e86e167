"""Random small planning problems, seeded, for laws and for brute force."""

from __future__ import annotations

import dataclasses
import random
from itertools import groupby
from typing import Any

from planner.cost.constants import spec_of
from planner.cost.layer import LayerShape, Pass
from planner.cost.stage.layer_cost import block_shape
from planner.cost.stage.peak_memory import MEMORY_ERROR
from planner.cost.stage.stage import StageCost
from planner.hardware.cluster import ClusterSpec, Device, DeviceGroup, Link
from planner.job.problem import PlanningProblem
from planner.model.attention import Attention, AttentionSpan, LatentAttention, Reach
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.mixers import DeltaNet, Mixer, StateSpace
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.model.sublayer import Recompute
from planner.model.workload import Precision, Workload
from planner.profile.profile import PROFILE_SCHEMA, BlockResidual, BlockResiduals, LayerKind, Profile


def cost(forward_s: float, backward_s: float, fixed_s: float = 0.0) -> StageCost:
    """A stage that only takes time."""
    return StageCost(
        forward=Pass(compute_s=forward_s, tp_s=fixed_s),
        backward=Pass(compute_s=backward_s, tp_s=fixed_s),
        unshard_s=0.0,
        reduce_s=0.0,
        optimizer_s=0.0,
        params=0.0,
        largest_unit_params=0.0,
        saved_bytes=0.0,
        forward_transient_bytes=0.0,
        backward_transient_bytes=0.0,
    )


def dense_block(hidden: int, heads: int = 4) -> Block:
    """A llama-like block."""
    return Block(
        hidden=hidden,
        norm=Norm.RMSNORM,
        mixer=Attention(heads=heads, kv_heads=heads, head_dim=hidden // heads),
        mlp=Mlp(width=3 * hidden, gated=True, activation=Activation.SILU),
    )


def random_block(draw: random.Random, hidden: int) -> Block:
    """A block of any kind: its mixer, its MLP or experts, its norms."""
    dim = hidden // 4
    mixers: list[Mixer | None] = [
        Attention(heads=4, kv_heads=2, head_dim=dim),
        Attention(heads=4, kv_heads=4, head_dim=dim, span=AttentionSpan(reach=Reach.WINDOW, size=32)),
        LatentAttention(heads=4, query_rank=None, kv_rank=16, nope_dim=dim, rope_dim=8, value_dim=dim),
        StateSpace(state_heads=8, head_dim=16, state=16, groups=4, kernel=4, chunk=32),
        DeltaNet(key_heads=4, key_dim=16, value_heads=8, value_head_dim=16, kernel=4),
        None,
    ]
    mlp = Mlp(width=draw.choice([1, 3]) * hidden, gated=True, activation=Activation.SILU)
    mixer = draw.choice(mixers)
    feeds = [mlp, Experts(count=8, topk=2, expert=mlp)] + ([None] if mixer else [])
    return Block(
        hidden=hidden, norm=Norm.RMSNORM, mixer=mixer, mlp=draw.choice(feeds), norms=draw.choice([1, 2, 4])
    )


def model(
    *, layers: int = 4, hidden: int = 64, heads: int = 4, vocab: int = 256, blocks: list[Block] | None = None
) -> ModelSpec:
    """A llama-like model, or one of these blocks in their order."""
    each = blocks or [dense_block(hidden, heads)] * layers
    return ModelSpec(
        name="random",
        model_type="llama",
        hidden=hidden,
        vocab=vocab,
        max_positions=4096,
        learned_positions=0,
        rope_theta=10_000.0,
        norm=Norm.RMSNORM,
        norm_eps=1e-5,
        initializer_range=0.02,
        tied_embeddings=False,
        segments=tuple(Segment(block=block, count=len(list(run))) for block, run in groupby(each)),
    )


def device(
    *, flops: float = 1e12, memory_bytes: int = 1 << 34, bandwidth: float = 1e11, name: str = "device"
) -> Device:
    """A device with these rates."""
    return Device(
        name=name,
        title=name,
        vendor="none",
        memory_bytes=memory_bytes,
        usable_memory_bytes=memory_bytes,
        memory_bandwidth_bytes_per_s=bandwidth,
        peak_fp32_flops=flops,
        peak_bf16_flops=flops,
        peak_fp16_flops=flops,
        peak_fp8_flops=2 * flops,
        link_bytes_per_s=None,
    )


def cluster(
    *,
    nodes: int = 1,
    per_node: int = 4,
    of: Device | None = None,
    link_bytes_per_s: float | None = 1e10,
    latency_s: float = 1e-5,
    inter_bytes_per_s: float | None = 1e9,
    slots: int | None = None,
) -> ClusterSpec:
    """Equal nodes of equal devices."""
    group = DeviceGroup(device=of or device(), nodes=nodes, devices_per_node=per_node, slots_per_node=slots)
    return ClusterSpec(
        name="random",
        groups=(group,),
        intra=Link(name="intra", latency_s=latency_s, bytes_per_s=link_bytes_per_s),
        inter=Link(name="inter", latency_s=2 * latency_s, bytes_per_s=inter_bytes_per_s),
    )


def problem(
    *,
    of: ModelSpec | None = None,
    on: ClusterSpec | None = None,
    seq: int = 128,
    batch: int = 8,
    limit_bytes: int = 1 << 34,
    precision: Precision = Precision.BF16,
) -> PlanningProblem:
    """A planning problem without a profile."""
    return PlanningProblem(
        model=of or model(),
        workload=Workload(seq=seq, batch=batch, precision=precision),
        cluster=on or cluster(),
        profile=None,
        memory_limit_bytes=limit_bytes,
    )


def profile(**held: Any) -> Profile:
    """A profile of a made-up device that holds nothing but what is named."""
    fields: dict[str, Any] = {
        "schema_version": PROFILE_SCHEMA,
        "name": "test",
        "device": "device",
        "device_title": "device",
        "backend": "none",
        "created": "2026-01-01",
        "versions": {},
        "devices_per_node": 4,
        "slots_per_node": None,
        "layers": (),
        "comms": (),
        "contention": (),
        "constants": (),
    }
    return Profile(**{**fields, **held})


def random_problem(seed: int, *, layers: int = 4, mixed: bool = False) -> PlanningProblem:
    """A small problem whose memory limit lies around its needs; `mixed`: of several layer classes."""
    draw = random.Random(seed)
    hidden = draw.choice([32, 64, 128])
    count, vocab = draw.randint(2, layers), draw.choice([64, 512, 4096])
    kinds = [random_block(draw, hidden) for _ in range(2)] if mixed else []
    blocks = [draw.choice(kinds) for _ in range(count)] if mixed else None
    spec = model(layers=count, hidden=hidden, vocab=vocab, blocks=blocks)
    nodes, per_node = draw.choice([(1, 2), (1, 3), (1, 4), (2, 2), (2, 1)])
    batch = draw.choice([2, 3, 4, 6])
    seq = draw.choice([64, 512])
    on = cluster(
        nodes=nodes,
        per_node=per_node,
        of=device(flops=10 ** draw.uniform(10, 13), bandwidth=10 ** draw.uniform(9.5, 12)),
        link_bytes_per_s=10 ** draw.uniform(8, 11),
        inter_bytes_per_s=10 ** draw.uniform(7.5, 10),
        latency_s=10 ** draw.uniform(-6, -4),
    )
    weights = 16 * spec.params_total
    activations = 40 * seq * batch * hidden * spec.layers
    need = (weights + activations) * 10 ** draw.uniform(-0.7, 0.5)
    return problem(of=spec, on=on, seq=seq, batch=batch, limit_bytes=_limit_bytes(need, nodes * per_node))


def _limit_bytes(need_bytes: float, devices: int) -> int:
    """A limit of each device, where all together need about so much besides their communicators."""
    groups = 2 if devices == 4 else 1  # axes over which a device talks, of the tightest shapes
    communicator_bytes = spec_of("communicator_bytes").prior
    assert communicator_bytes is not None
    each = need_bytes / devices**0.5 + groups * communicator_bytes
    return int(each * (1 + MEMORY_ERROR["datasheet"]))


def told_problem(seed: int) -> PlanningProblem:
    """A small problem with a profile whose runs took a fifth more or less than blocks are priced."""
    draw = random.Random(seed)
    plain = random_problem(seed, layers=3, mixed=seed % 2 == 1)
    blocks = list(plain.model.classes().values())
    told = [
        BlockResidual(
            shape=block_shape(draw.choice(blocks), shape, plain),
            log_ratio=draw.gauss(0, 0.2),
            weight=draw.uniform(1, 9),
        )
        for shape in (_layer_shape(draw, plain) for _ in range(draw.randint(1, 12)))
    ]
    residuals = BlockResiduals(spread=0.2, noise=0.05, told=tuple(told))
    return dataclasses.replace(plain, profile=profile(residuals=(residuals,)))


def _layer_shape(draw: random.Random, of: PlanningProblem) -> LayerShape:
    """Some block on a rank."""
    return LayerShape(
        kind=LayerKind.BLOCK,
        tp=draw.choice([1, 2, 4]),
        sequence_parallel=False,
        micro_batch=draw.choice([1, 2, 3]),
        seq=of.workload.seq,
        precision=of.workload.precision,
        recompute=draw.choice(list(Recompute)),
    )


def expert_problem(seed: int) -> PlanningProblem:
    """A small model of experts, with sequences long enough to be split over ranks."""
    drawn, draw = random_problem(seed, layers=3), random.Random(f"experts {seed}")
    hidden, layers = drawn.model.hidden, drawn.model.layers
    feed = Experts(
        count=draw.choice([2, 4, 6]), topk=2, expert=Mlp(width=hidden, gated=True, activation=Activation.SILU)
    )
    block = dataclasses.replace(dense_block(hidden), mlp=feed)
    spec = model(layers=layers, hidden=hidden, vocab=drawn.model.vocab, blocks=[block] * layers)
    seq, batch = draw.choice([64, 4096, 8192]), draw.choice([2, 4])
    need = (16 * spec.params_total + 80 * seq * batch * hidden * layers) * 10 ** draw.uniform(-0.5, 0.7)
    limit = _limit_bytes(need, drawn.cluster.devices)
    return problem(of=spec, on=drawn.cluster, seq=seq, batch=batch, limit_bytes=limit)


def two_kinds(seed: int) -> PlanningProblem:
    """A small problem on two kinds of devices, of which one may have more memory."""
    drawn, draw = random_problem(seed), random.Random(f"kinds {seed}")
    of = drawn.cluster.groups[0].device
    other = device(
        flops=(of.peak_bf16_flops or 0.0) * 10 ** draw.uniform(-0.5, 0.5),
        bandwidth=(of.memory_bandwidth_bytes_per_s or 0.0) * 10 ** draw.uniform(-0.5, 0.5),
        name="other",
    )
    sizes = draw.choice([((1, 1), (1, 1)), ((1, 2), (1, 2)), ((2, 1), (1, 1)), ((1, 2), (1, 1))])
    groups = tuple(
        DeviceGroup(device=kind, nodes=nodes, devices_per_node=per_node)
        for kind, (nodes, per_node) in zip((of, other), sizes, strict=True)
    )
    limits = (drawn.memory_limit_bytes, int(drawn.memory_limit_bytes * draw.choice([0.8, 1.0, 1.5])))
    return dataclasses.replace(
        drawn,
        cluster=dataclasses.replace(drawn.cluster, groups=groups),
        memory_limit_bytes=min(limits),
        device_limits_bytes=((of.name, limits[0]), (other.name, limits[1])),
    )
