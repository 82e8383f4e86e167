"""LoRA: the model is frozen, and beside chosen projections stand matrices of low rank that are trained.

    y = x W^T + s (x A^T) B^T        A [r, in] drawn from N(0, 1/in), B [out, r] zero, s = alpha / r

(Hu et al., arXiv 2106.09685, section 4.1). Frozen weights are in the compute precision: they need no master.

Under tensor parallelism the half beside the split dimension is split with it: B where the outputs of W are,
A where its inputs are. Then x A^T needs no communication of its own: each rank adds its part of the adapter's
result to its part of y, before that is summed or left apart as y is. The other half is whole on every rank,
and its gradient a part of a sum over them, which the executor adds up once a step. Beside a weight that is
whole on every rank, as those of latents are, both halves are whole as it is.

Which modules of a Hugging Face model get PEFT's adapters for ours, and how ours lie in them.

A module that is one of our projections has the same adapter, A [r, in] and B [out, r]. One that holds several
of them, row after row, has one adapter for all k that are adapted, of rank k r:

    A = [A_1; ...; A_k]     B = the rows of projection m: B_m in columns [m r, (m + 1) r), else zero

which gives each its own B_m A_m x. PEFT's own adapter of such a module is of rank r, with one A for all: read
from there, each projection begins with a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
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
from planner.model.spec import ModelSpec
from planner.model.workload import Adapters, Workload
from runtime.model.held_weights import Weight, local_part, split_dim
from runtime.model.huggingface.files import Box
from runtime.model.huggingface.names import PROJECTIONS, Mapped, Piece, key_map
from runtime.model.layers import Mlp
from runtime.model.precision import compute_dtype
from runtime.model.transformer import Block, build_transformer, drawn

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


@dataclass(frozen=True, slots=True)
class PeftModule:
    """A module with an adapter: its name, its outputs and inputs, and the adapted projections that it holds.

    `members` are their paths (`layers.0.attention.wq`) with the pieces of their rows; `rank` is ours.
    """

    name: str
    shape: tuple[int, int]
    members: tuple[tuple[str, tuple[Piece, ...]], ...]
    rank: int

    @property
    def written_rank(self) -> int:
        """The rank of the adapter that is written for it."""
        return self.rank * len(self.members)

    @property
    def fused(self) -> bool:
        """Whether it holds more rows than those of one adapted projection."""
        return self.shape[0] > sum(piece.rows for piece in self.members[0][1])

    def join(self, halves: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Its A and B, from those of its members by their paths."""
        whole_a = torch.cat([halves[path][0] for path, _ in self.members])
        whole_b = torch.zeros(self.shape[0], self.written_rank)
        for place, (path, pieces) in enumerate(self.members):
            for piece in pieces:
                own = halves[path][1][piece.first : piece.first + piece.rows]
                whole_b[piece.begin : piece.begin + piece.rows, self._columns(place)] = own
        return whole_a, whole_b

    def box_of_a(self, path: str, box: Box, file_rank: int) -> Box:
        """Where a part of a member's A lies in that of a file."""
        (begin, end), inputs = box
        first = self._columns(self._place(path)).start if file_rank != self.rank else 0
        return (first + begin, first + end), inputs

    def boxes_of_b(self, path: str, box: Box, file_rank: int) -> Iterator[tuple[slice, Box]]:
        """Rows of a part of a member's B, and where these lie in that of a file."""
        (begin, end), (left, right) = box
        place = self._place(path)
        first = self._columns(place).start if file_rank != self.rank else 0
        for piece in self.members[place][1]:
            low, high = max(begin, piece.first), min(end, piece.first + piece.rows)
            if low < high:
                shift = piece.begin - piece.first
                columns = (first + left, first + right)
                yield slice(low - begin, high - begin), ((low + shift, high + shift), columns)

    def left_over(self, whole_b: Tensor) -> Tensor:
        """What of a file's B no member takes; zero where they take all that counts."""
        rest = whole_b.clone()
        for place, (_, pieces) in enumerate(self.members):
            taken = self._columns(place) if whole_b.shape[1] != self.rank else slice(None)
            for piece in pieces:
                rest[piece.begin : piece.begin + piece.rows, taken] = 0.0
        return rest

    def _place(self, path: str) -> int:
        return [member for member, _ in self.members].index(path)

    def _columns(self, place: int) -> slice:
        return slice(place * self.rank, (place + 1) * self.rank)


def peft_modules(model: ModelSpec, adapters: Adapters) -> list[PeftModule]:
    """The modules that get adapters. Raises InputError for a family whose names are not known."""
    wanted = set(_adapted_paths(model, adapters.modules))
    known = key_map(model)
    by_key: dict[str, list[Mapped]] = {}
    for mapped in known.parameters:
        if mapped.name.removesuffix(".weight") in wanted:
            by_key.setdefault(mapped.pieces[0].key, []).append(mapped)
    modules = []
    for key, members in by_key.items():
        shape = known.shapes[key]
        outputs, inputs = shape[::-1] if key in known.transposed else shape
        pieces = tuple((mapped.name.removesuffix(".weight"), mapped.pieces) for mapped in members)
        modules.append(PeftModule(key.removesuffix(".weight"), (outputs, inputs), pieces, adapters.rank))
    return modules


def targets(model: ModelSpec, names: Iterable[str]) -> dict[str, str]:
    """For each of some modules the end of its name by which PEFT finds it, and none that is not meant."""
    meant = set(names)
    everywhere = {key.removesuffix(".weight") for key in key_map(model).shapes if key.endswith(".weight")}
    others = sorted(everywhere - meant)

    @cache
    def means(end: str) -> bool:
        return not any(other.endswith(f".{end}") for other in others)

    return {name: next(filter(means, _ends(name)), name) for name in meant}


def named_modules(model: ModelSpec, found: Iterable[str]) -> list[str]:
    """What `--lora-modules` calls the modules that have adapters in a file; empty where one is not known."""
    paths: dict[str, list[str]] = {}
    for mapped in key_map(model).parameters:
        path = mapped.name.removesuffix(".weight").split(".", 2)[-1]
        if path in PROJECTIONS:
            paths.setdefault(mapped.pieces[0].key.removesuffix(".weight"), []).append(PROJECTIONS[path])
    given = set(found)
    names = [name for module, ours in paths.items() if module in given for name in ours]
    return list(dict.fromkeys(names)) if given <= paths.keys() else []


def _ends(name: str) -> Iterator[str]:
    """The last parts of a name, from one part on."""
    parts = name.split(".")
    return (".".join(parts[-count:]) for count in range(1, len(parts)))


def _adapted_paths(model: ModelSpec, modules: str) -> Iterator[str]:
    layers = build_transformer(model, 0, model.layers, True, True, seq=1).layers
    for name, block in layers.named_children():
        assert isinstance(block, Block)
        yield from (f"layers.{name}.{path}" for path in adapted_modules(block, modules))
