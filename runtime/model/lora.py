"""LoRA: the model is frozen, and beside chosen projections stand matrices of low rank that are trained.

    y = x W^T + s (x A^T) B^T        A [r, in] drawn from N(0, 1/in), B [out, r] zero, s = alpha / r

(Hu et al., arXiv 2106.09685, section 4.1). Frozen weights are in the compute precision: they need no master.

Under tensor parallelism the half beside the split dimension is split with it: B where the outputs of W are,
A where its inputs are. Then x A^T needs no communication of its own: each rank adds its part of the adapter's
result to its part of y, before that is summed or left apart as y is. The other half is whole on every rank,
and its gradient a part of a sum over them, which the executor adds up once a step. Beside a weight that is
whole on every rank, as those of latents are, both halves are whole as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional

from planner.foundation.errors import InputError, Problem
from planner.model.lora import adapts
from planner.model.workload import Adapters, Workload
from runtime.model.block import Block
from runtime.model.held_weights import Weight, local_part, split_dim
from runtime.model.huggingface.names import PROJECTIONS
from runtime.model.initial import drawn
from runtime.model.mlp import Mlp
from runtime.model.precision import compute_dtype

A, B = "lora_a", "lora_b"


def apply_lora(name: str, part: nn.Module, workload: Workload, *, alpha: float | None, seed: int) -> None:
    """Freezes a part, in the compute precision, and puts adapters beside a block's projections.

    The part has its values and is split over tensor-parallel ranks, not yet over data-parallel ones.
    """
    adapters = workload.adapters
    if adapters is None:
        return
    scale, dtype = scale_of(adapters, alpha), compute_dtype(workload.precision)
    for module in part.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            frozen = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            module.register_parameter(key, frozen)
    if isinstance(part, Block):
        for path in adapted_modules(part, adapters.modules):
            linear = part.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            add_adapter(linear, f"{name}.{path}", adapters.rank, scale=scale, seed=seed)


def scale_of(adapters: Adapters, alpha: float | None) -> float:
    """s = alpha / r; alpha is twice the rank where nothing is said."""
    return 2.0 if alpha is None else alpha / adapters.rank


def adapted_modules(block: Block, modules: str) -> list[str]:
    """The paths of a block's projections that get adapters (planner.model.lora)."""
    parts: dict[str, nn.Module] = {"attention": block.attention}
    if isinstance(block.mlp, Mlp):
        parts["mlp"] = block.mlp
    linear = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, child in part.named_children()
        if isinstance(child, nn.Linear)
    ]
    return [path for path in linear if adapts(modules, PROJECTIONS[path])]


def add_adapter(linear: nn.Linear, name: str, rank: int, *, scale: float, seed: int) -> None:
    """Puts an adapter beside one projection, whose weight may be split over a mesh of one axis."""
    weight: Tensor = linear.weight
    outputs, inputs = weight.shape
    whole_a = drawn(f"{name}.{A}", (rank, inputs), scale=inputs**-0.5, seed=seed)
    whole_b = torch.zeros(outputs, rank)
    for key, whole, dim in ((A, whole_a, 1), (B, whole_b, 0)):
        half = whole.to(weight.device)
        if isinstance(weight, DTensor) and split_dim(weight.placements[0]) in (None, dim):
            half = _own_slice(half, weight.device_mesh, weight.placements[0], dim)
        linear.register_parameter(key, nn.Parameter(half))
    # First of all hooks: the result is then still laid out as the product leaves it.
    linear.register_forward_hook(_Beside(scale), prepend=True)


def _own_slice(whole: Tensor, mesh: DeviceMesh, placement: Placement, dim: int) -> DTensor:
    parts = 1 if placement.is_replicate() else mesh.size()
    own = whole.chunk(parts, dim)[mesh.get_local_rank() % parts].contiguous()
    return DTensor.from_local(own, mesh, [placement], run_check=False)


class _Beside:
    """Adds the adapter's result to that of its projection."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, linear: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x, halves = args[0], (getattr(linear, A), getattr(linear, B))
        if isinstance(out, DTensor) and all(isinstance(half, DTensor) for half in halves):
            inner, outer = halves
            added: Tensor = out + self.scale * functional.linear(functional.linear(x, inner), outer)
            return added
        a, b = map(local_part, halves)
        if not isinstance(out, DTensor):
            result: Tensor = out + self.scale * ((x @ a.T) @ b.T)
            return result
        # Where inputs are whole, each rank's gradient of them is a part of a sum.
        whole = x.placements[0].is_replicate()
        x = x.to_local(grad_placements=[Partial()]) if whole else x.to_local()
        beside = self.scale * ((x @ a.T) @ b.T)
        total: Tensor = out + DTensor.from_local(beside, out.device_mesh, out.placements, run_check=False)
        return total


def fingerprint(frozen: Sequence[Weight], device: torch.device) -> Tensor:
    """Three sums over all frozen weights, the same in every layout but for rounding. Collective."""
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for weight in frozen:
        total += weight.share * sums_of(local_part(weight.parameter.detach()))
    dist.all_reduce(total)
    return total.cpu()


def sums_of(values: Tensor) -> Tensor:
    """The sum of values, of what they are without their signs, and of their squares."""
    values = values.double()
    return torch.stack((values.sum(), values.abs().sum(), values.square().sum()))


def check_base(saved: Tensor, own: Tensor) -> None:
    """Raises InputError where adapters were trained beside other weights than those of this run."""
    if not torch.allclose(saved, own, rtol=1e-6, atol=1e-6 * float(own[1])):
        raise InputError(
            Problem(
                where="checkpoint",
                fault="its adapters were trained beside weights with a sum of squares of "
                f"{float(saved[2]):.9g}; those of this run have {float(own[2]):.9g}.",
                fix="resume with the same model weights (and --seed, where they are drawn)",
            )
        )
