"""The messages of one step: those that the ranks of a plan sent, those that the cost model charges for.

Counts the messages that a rank really sends: what torch is asked for, seen as it is dispatched.

Seen are the operators of torch.distributed (namespaces c10d and _c10d_functional), whoever calls them:
DTensor, FSDP2, pipelining, or this runtime. Inside a compiled block they are not seen: count eager steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.charged_messages import COPIES, Message, charged_messages
from planner.model.attention import Attention
from planner.model.feed_forward import Experts
from planner.profile.profile import Op
from planner.strategy.plan import Plan
from planner.strategy.strategy import AXES, Zero
from runtime.model.experts import Router
from runtime.parallel import context as context_attention
from runtime.parallel.meshes import Meshes
from tests.runtime.ranks import batch_of, make_executor, on_ranks, slice_of

# Which argument of an operator is the whole message: what is gathered into, or what goes in.
_WHOLE: Mapping[str, tuple[Op, int]] = {
    "allgather_": (Op.ALL_GATHER, 0),
    "_allgather_base_": (Op.ALL_GATHER, 0),
    "allgather_into_tensor_coalesced_": (Op.ALL_GATHER, 0),
    "reduce_scatter_": (Op.REDUCE_SCATTER, 1),
    "_reduce_scatter_base_": (Op.REDUCE_SCATTER, 1),
    "reduce_scatter_tensor_coalesced_": (Op.REDUCE_SCATTER, 1),
    "allreduce_": (Op.ALL_REDUCE, 0),
    "allreduce_coalesced_": (Op.ALL_REDUCE, 0),
    "alltoall_": (Op.ALL_TO_ALL, 1),
    "alltoall_base_": (Op.ALL_TO_ALL, 1),
    "send": (Op.P2P, 0),
    "reduce_scatter_tensor": (Op.REDUCE_SCATTER, 0),
    "reduce_scatter_tensor_coalesced": (Op.REDUCE_SCATTER, 0),
    "all_reduce": (Op.ALL_REDUCE, 0),
    "all_reduce_": (Op.ALL_REDUCE, 0),
    "all_to_all_single": (Op.ALL_TO_ALL, 0),
}
_SHARD = ("all_gather_into_tensor", "all_gather_into_tensor_coalesced")
"""Functional gathers are given the shard and the number of ranks."""
_SILENT = ("recv_", "barrier", "wait_tensor", "monitored_barrier_", "_wrap_tensor_autograd")
OWN = "shardwise"
"""The namespace of the operators in `runtime.parallel.context`."""
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class MessageCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts this rank's messages by operation, mesh axis and bytes into `messages`.

    A group that is no axis of the mesh is named by its ranks, such as `0,3`; that of all ranks `world`. What
    a rank sends to itself alone is no message.
    """

    def __init__(self, meshes: Meshes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.messages: Counter[Message] = Counter()
        self._axes = _axes_by_ranks(meshes)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # A DTensor's own rules run first, and what they send is seen then.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        if namespace == OWN:
            with self:  # an operator of ours hides what it sends: its own code is run in sight
                return getattr(context_attention, name)._init_fn(*args, **(kwargs or {}))
        if namespace in _NAMESPACES and name not in _SILENT:
            self._note(name, (*args, *(kwargs or {}).values()))
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        group = _group_of(args)
        if dist.get_world_size(group) == 1:
            return
        if name in _SHARD:
            op, size = Op.ALL_GATHER, _bytes(args[0]) * dist.get_world_size(group)
        elif name in _WHOLE:
            op, place = _WHOLE[name]
            size = _bytes(args[place])
        else:
            raise AssertionError(f"no rule for the bytes of {name}")
        self.messages[Message(op, self._axis(group), size)] += 1

    def _axis(self, group: dist.ProcessGroup) -> str:
        ranks = tuple(sorted(dist.get_process_group_ranks(group)))
        return self._axes.get(ranks) or ",".join(map(str, ranks))


def count_messages(step: Callable[[], object], meshes: Meshes) -> Counter[Message]:
    """The messages of one call of `step` on this rank."""
    counting = MessageCount(meshes)
    with counting:
        step()
    return counting.messages


def _axes_by_ranks(meshes: Meshes) -> dict[tuple[int, ...], str]:
    """The groups that this rank is in, by their ranks; of axes with the same ranks the last of the grid.

    A data axis that cp is folded into goes by its own name. Axes of the grid of experts go by theirs where
    their ranks are no axis of the other.
    """
    names = {tuple(range(dist.get_world_size())): "world"}
    for heads in meshes.copied.values():
        names[tuple(sorted(dist.get_process_group_ranks(heads.copies.get_group())))] = COPIES
    for mesh in (meshes.data, meshes.world):
        for ranks, name in _axes_of(mesh):
            names[ranks] = name.removesuffix("_cp")
    experts = meshes.experts
    for mesh in () if experts is None else (experts.ep, experts.etp, experts.data):
        for ranks, name in _axes_of(mesh):
            names.setdefault(ranks, name)
    return names


def _axes_of(mesh: DeviceMesh) -> Iterator[tuple[tuple[int, ...], str]]:
    """The ranks of each of a mesh's axes of more than one."""
    for place, name in enumerate(mesh.mesh_dim_names or ()):
        ranks = tuple(sorted(dist.get_process_group_ranks(mesh.get_group(place))))
        if len(ranks) > 1:
            yield ranks, name


def _group_of(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """The process group among an operator's arguments: an object, or at the end its name."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            return dist.ProcessGroup.unbox(arg)
        if isinstance(arg, dist.ProcessGroup):
            return arg
    named = [arg for arg in args if isinstance(arg, str)]
    assert named, [type(arg) for arg in args]
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    found: dist.ProcessGroup = resolve(named[-1])
    return found


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


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
    those of experts behind all others (tests.runtime.messages)."""
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
