"""Counts the messages that a rank really sends: what torch is asked for, seen as it is dispatched.

Seen are the operators of torch.distributed (namespaces c10d and _c10d_functional), whoever calls them:
DTensor, FSDP2, pipelining, or this runtime. Inside a compiled block they are not seen: count eager steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.cost.message_list import COPIES, Message
from planner.profile.profile import Op
from runtime.parallel import context as context_attention
from runtime.parallel.meshes import Meshes

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
