"""What one rank holds of the model's parameters, and who holds the rest of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

REDUCED = {"row_var": -1, "col_var": -2}
"""Optimizer states that are a mean over one dimension of their parameter, which has size 1 there."""


@dataclass(frozen=True)
class Weight:
    """One trained parameter on this rank.

    `shard` is what the optimizer updates: it shares the memory of the parameter's local part, or is its
    master in host memory, which `host` keeps. `share` is 1 over the number of ranks of the world that hold
    the same element, 0 for a copy that another stage counts. `gradient_scale` makes the mean over the ranks
    that FSDP averages the mean over replicas: routed experts are on fewer ranks, to which others' tokens
    come. `path` is its place in the stage, in our own transformer's words whatever the backend calls it.
    """

    name: str
    path: str
    parameter: nn.Parameter
    shard: nn.Parameter
    share: float
    gradient_scale: float = 1.0
    host: HostWeight | None = None

    @property
    def value(self) -> Tensor:
        """The weight in fp32 as a checkpoint sees it, over the memory that the optimizer updates."""
        return self.parameter.detach() if self.host is None else like(self.parameter, self.shard.detach())

    @property
    def matrix(self) -> bool:
        """Whether it multiplies: a matrix, or a stack of them; not a norm, a bias or a stack of biases."""
        return self.parameter.dim() >= 2 and not self.name.endswith("bias")

    @property
    def inner(self) -> bool:
        """Whether it is a matrix of a block, not an embedding or an output projection."""
        return self.matrix and self.path.startswith("layers.")

    def groups(self, *dims: int) -> list[dist.ProcessGroup]:
        """The groups of ranks that share out these dimensions of the parameter, counted from its end."""
        if not isinstance(self.parameter, DTensor):
            return []
        wanted = {dim + self.parameter.dim() for dim in dims}
        mesh, placements = self.parameter.device_mesh, self.parameter.placements
        return [mesh.get_group(axis) for axis, place in enumerate(placements) if split_dim(place) in wanted]

    def state(self, key: str, local: Tensor) -> Tensor:
        """An optimizer state of this weight as a checkpoint sees it: its place in the whole tensor."""
        if local.dim() == 0:
            return local
        return like(self.parameter, local, reduced=REDUCED.get(key))


def on_axis(parameter: Tensor, axis: str) -> bool:
    """Whether a parameter lives on a mesh with this axis."""
    return isinstance(parameter, DTensor) and axis in (parameter.device_mesh.mesh_dim_names or ())


def split_dim(placement: Placement) -> int | None:
    """The tensor dimension that a placement shares out; None where every rank has all of it."""
    # Strided shards (tensor parallelism inside data parallelism) are no Shard in every torch.
    return None if placement.is_replicate() else getattr(placement, "dim", None)


def local_part(value: Tensor) -> Tensor:
    """This rank's part of a tensor; a plain tensor is its own."""
    return value.to_local() if isinstance(value, DTensor) else value


def like(parameter: Tensor, local: Tensor, *, reduced: int | None = None) -> Tensor:
    """A local tensor as a DTensor laid out as the parameter is; itself where that is a plain tensor.

    `reduced` is the dimension, counted from the end, in which the tensor has size 1.
    """
    if not isinstance(parameter, DTensor):
        return local
    shape, placements = list(parameter.shape), list(parameter.placements)
    if reduced is not None:
        shape[reduced] = 1
        gone = reduced + len(shape)
        placements = [Replicate() if split_dim(place) == gone else place for place in placements]
    stride = torch.empty(shape, device="meta").stride() if reduced is not None else parameter.stride()
    meta = TensorMeta(torch.Size(shape), stride, local.dtype)
    # Not from_local: it would move a tensor in host memory to the device.
    return as_dtensor(local, DTensorSpec(parameter.device_mesh, tuple(placements), meta))


def as_dtensor(local: Tensor, spec: DTensorSpec) -> DTensor:
    """A local tensor as part of a whole one, wherever it lies."""
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def sum_over(parts: Iterable[tuple[Tensor, Sequence[dist.ProcessGroup]]]) -> None:
    """Sums each tensor over its groups in place: one all-reduce a group, for all tensors together.

    The ranks of a group must pass the same tensors in the same order.
    """
    by_group: dict[str, tuple[dist.ProcessGroup, list[Tensor]]] = {}
    for tensor, groups in parts:
        for group in groups:
            by_group.setdefault(group.group_name, (group, []))[1].append(tensor)
    for group, tensors in by_group.values():
        # NCCL sees no host memory.
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        flat = torch.cat([tensor.flatten().to(device) for tensor in tensors])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


class HostWeight:
    """The master of one parameter's shard in host memory, and the way of its gradients down to it."""

    def __init__(self, parameter: nn.Parameter, master: Tensor) -> None:
        self.parameter, self.master = parameter, nn.Parameter(master)
        local = local_part(parameter.detach())
        self._staged = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        self._arriving: torch.cuda.Event | None = None
        self._sum: Tensor | None = None
        self._holds_gradient = False

    def receive(self, gradient: Tensor) -> None:
        """Starts the copy of a gradient, laid out as the parameter is; it may be freed at once."""
        self._add_staged()
        self._staged.copy_(local_part(gradient.detach()), non_blocking=True)
        self._arriving = torch.cuda.current_stream().record_event() if gradient.is_cuda else None
        self._holds_gradient = True

    def receive_and_free(self, parameter: Tensor) -> None:
        """As a hook that FSDP calls with a parameter whose gradient it has just reduced."""
        assert parameter.grad is not None
        self.receive(parameter.grad)
        parameter.grad = None

    def take_gradient(self) -> Tensor:
        """The sum of what came since the last call, in fp32; zeros if nothing did."""
        self._add_staged()
        gradient, self._sum = self._sum, None
        return torch.zeros_like(self.master.detach()) if gradient is None else gradient

    def send_up(self) -> None:
        """Copies the master into the parameter, behind what the device does now."""
        with torch.no_grad():
            self._staged.copy_(self.master)
            local_part(self.parameter.detach()).copy_(self._staged, non_blocking=True)

    def _add_staged(self) -> None:
        if not self._holds_gradient:
            return
        if self._arriving is not None:
            self._arriving.synchronize()
        if self._sum is None:
            self._sum = self._staged.to(torch.float32, copy=True)
        else:
            self._sum.add_(self._staged)
        self._holds_gradient = False
