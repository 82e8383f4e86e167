"""The messages of one step: those that the ranks of a plan sent, those that the cost model charges for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from planner.cost.message_list import COPIES, Message, charged_messages
from planner.model.attention import Attention
from planner.model.feed_forward import Experts
from planner.profile.profile import Op
from planner.strategy.plan import Plan
from planner.strategy.strategy import AXES, Zero
from runtime.check.comm_count import count_messages
from runtime.model.experts import Router
from tests.runtime.ranks import batch_of, make_executor, on_ranks, slice_of

Ranks = tuple[int, ...]


def expected_messages(plan: Plan) -> list[Counter[Message]]:
    """What each rank should send: what its stage is charged for, and what is left out of that."""
    degrees, charged, names = plan.strategy.degrees, charged_messages(plan), _names(plan)
    stages = [rank * degrees.pp // degrees.world for rank in range(degrees.world)]
    found = []
    for stage in stages:
        own: Counter[Message] = Counter()
        for message, count in (*charged[stage].items(), *_beside(plan, stage).items()):
            for each, times in _sent_as(plan, message):
                own[each._replace(axis=names[each.axis])] += count * times
        found.append(own)
    return found


def _sent_as(plan: Plan, message: Message) -> Iterator[tuple[Message, int]]:
    """What is sent for a message that is charged, by the axis whose ranks take part.

    A hop of a ring is one batch of tensors: keys and values, and gradients of both. Of what is charged for
    experts an all-to-all goes over ep, rows are gathered over etp, and counts summed over the ranks that have
    the other parts of a sequence. Experts that are apart are one unit of data parallelism of their own.
    """
    degrees = plan.strategy.degrees
    if message.op is Op.P2P and message.axis == "cp":
        tensor = _key_bytes(plan)
        yield message._replace(bytes=tensor), message.bytes // tensor
    elif message.axis == "ep" and message.op is not Op.ALL_TO_ALL:
        parts = "cp" if degrees.cp > 1 else "tp"
        yield message._replace(axis=parts if message.op is Op.ALL_REDUCE else "etp"), 1
    elif message.axis.startswith("dp") and message.bytes in _routed_bytes(plan):
        yield message._replace(axis=f"e{message.axis}"), 1
    else:
        yield message, 1


def _key_bytes(plan: Plan) -> int:
    """The keys of a micro-batch that one rank holds, as large as the values."""
    degrees, workload = plan.strategy.degrees, plan.workload
    mixer = plan.model.block(0).mixer
    assert isinstance(mixer, Attention) and mixer.kv_width == mixer.value_width
    tokens = degrees.micro_batch * workload.seq // degrees.cp
    return workload.precision.compute_bytes * tokens * mixer.kv_width // min(degrees.tp, mixer.kv_heads)


def _routed_bytes(plan: Plan) -> set[int]:
    """Bytes of the routed experts of a block on one rank, in the compute precision and in fp32, and of their
    shards, where they are apart from all else."""
    degrees = plan.strategy.degrees
    if not degrees.spreads_experts:
        return set()
    blocks = [segment.block for segment in plan.model.segments]
    counts = [block.routed_params_shard(degrees.expert_tp) / degrees.ep for block in blocks]
    sizes = (4, plan.workload.precision.compute_bytes)
    return {round(n * size / cut) for n in counts for size in sizes for cut in (1, degrees.expert_shards)}


def _names(plan: Plan) -> dict[str, str]:
    """The name by which the ranks of every axis go: of axes with the same ranks the last of the grid, with
    those of experts behind all others (runtime.check.comm_count)."""
    degrees = plan.strategy.degrees
    data = ["dp_replicate"] if degrees.zero is Zero.NONE else ["dp_replicate", "dp_shard"]
    by_axis: dict[str, Ranks] = {"world": tuple(range(degrees.world))}
    world = _along(dict(zip(AXES, degrees.grid_shape(), strict=True)))
    sizes = {axis: getattr(degrees, axis) for axis in data}
    sizes[data[-1]] = degrees.replicas // math.prod(sizes[axis] for axis in data[:-1])
    folded = _along({"pp": degrees.pp, **sizes, "tp": degrees.tp})
    experts = _along(
        {
            "pp": degrees.pp,
            "edp_replicate": degrees.expert_replicas // degrees.expert_shards,
            "edp_shard": degrees.expert_shards,
            "ep": degrees.ep,
            "etp": degrees.expert_tp,
        }
    )
    known: dict[Ranks, str] = {by_axis["world"]: "world"}
    for axes in ({axis: folded[axis] for axis in data}, world):
        known |= {ranks: axis for axis, ranks in axes.items() if len(ranks) > 1}
    for axis, ranks in experts.items():
        known.setdefault(ranks, axis)
    by_axis |= {**world, **{axis: folded[axis] for axis in data}, **experts}
    names = {axis: known.get(ranks, axis) for axis, ranks in by_axis.items()}
    return names | {COPIES: names["tp"] if plan.model.heads_copied(degrees.tp) == (1,) else COPIES}


def _along(sizes: dict[str, int]) -> dict[str, Ranks]:
    """The ranks of the first rank's group along each axis of a grid."""
    grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return {
        axis: tuple(np.moveaxis(grid, place, -1).reshape(-1, size)[0].tolist())
        for place, (axis, size) in enumerate(sizes.items())
    }


def _beside(plan: Plan, pp_rank: int) -> Counter[Message]:
    """What is sent and not charged for, since it is small: once a step, whatever the micro-batches.

    The loss and the squared gradient norm, 8 bytes each, and what corrects the choice of experts, over the
    world; and the gradients of what is whole on every tensor-parallel rank but sees or weighs a part of its
    tokens, as one all-reduce over tp.
    """
    degrees, model = plan.strategy.degrees, plan.model
    found = Counter({Message(Op.ALL_REDUCE, "world", 16): 1})
    experts = [mlp for mlp in (model.block(i).mlp for i in range(model.layers)) if isinstance(mlp, Experts)]
    corrected = sum(4 * mlp.count for mlp in experts if mlp.routing.corrected)
    if corrected:
        found[Message(Op.ALL_REDUCE, "world", corrected)] += 1
    stages = [s for s in range(degrees.stages) if degrees.pp_rank_of_stage(s) == pp_rank]
    partial_sums = sum(_partial_params(plan, stage) for stage in stages)
    if degrees.tp > 1 and partial_sums:
        found[Message(Op.ALL_REDUCE, "tp", round(4 * partial_sums / degrees.weight_shards))] = 1
    return found


def _partial_params(plan: Plan, stage: int) -> int:
    """Parameters of a stage whose gradients are partial sums over tp: those of routers and of gates of shared
    experts; under sequence parallelism norms and learned positions too."""
    degrees, model, span = plan.strategy.degrees, plan.model, plan.strategy.stages[stage]
    blocks = [model.block(i) for i in range(span.first, span.end)]
    mixtures = [block.mlp for block in blocks if isinstance(block.mlp, Experts)]
    found = sum(m.count * (model.hidden + m.router_bias) + model.hidden * m.shared_gate for m in mixtures)
    if degrees.sequence_parallel:
        norms = sum(block.norms for block in blocks) + (stage == degrees.stages - 1)
        found += norms * model.norm.params(model.hidden)
        found += model.learned_positions * model.hidden * (stage == 0)
    return int(found)


def _in_turn(router: Router, scores_bse: torch.Tensor) -> torch.Tensor:
    """Experts [B, S, K] in turn, so that each has as many tokens of every rank."""
    batch, seq, _ = scores_bse.shape
    places = torch.arange(batch * seq * router.topk) % router.experts
    return places.view(batch, seq, router.topk)


def sent_messages(plan: Plan) -> list[Counter[Message]]:
    """What each rank sent in a second step; the first one also sets things up."""

    def body(rank: int) -> Any:
        executor = make_executor(plan)
        for module in executor.pipeline.modules:
            for router in (m for m in module.modules() if isinstance(m, Router)):
                router._choose = partial(_in_turn, router)  # type: ignore[method-assign]
        executor.step(slice_of(executor, batch_of(plan, 0)))
        tokens = slice_of(executor, batch_of(plan, 1))
        counted = count_messages(lambda: executor.step(tokens), executor.meshes)
        return [[*message, count] for message, count in counted.items()]

    return [
        Counter({Message(Op(op), axis, size): count for op, axis, size, count in rows})
        for rows in on_ranks(body, plan.strategy.degrees.world)
    ]
