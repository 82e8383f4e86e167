"""Expert parallelism: routed experts shared out over ranks, tokens sent to their experts and back.

The ranks of a stage, in their order, are also a grid (edp_replicate, edp_shard, ep, etp): ranks along ep hold
whole experts each, those along etp a part of each expert's width, and those along edp the same experts, whose
state they share out. What a rank sends depends on what tensor-parallel ranks hold between layers:

    tokens of its own    sequence parallelism: each rank routes and sends its slice. Where etp ranks share out
                         an expert they gather each other's rows, and each gets its own results' sum.
    all tokens           no sequence parallelism: each rank of tp routes all and holds its part of experts, so
                         results are sums over tp. Likewise where experts are split as all else is (ep = 1,
                         etp = tp): then the tokens are gathered before, and the sum scattered after, as for a
                         dense MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
)

from planner.strategy.strategy import Degrees
from runtime.model.experts import Experts, MixtureOfExperts, rows_per_part
from runtime.parallel.collectives import exchange_counts, exchange_rows, gather_ranks, sum_to_ranks
from runtime.parallel.context import held_positions
from runtime.parallel.meshes import Meshes

WIDTH_DIM = {"gate": 1, "up": 1, "down": 2, "gate_bias": 1, "up_bias": 1}
"""The dimension of each stacked weight that is an expert's width; down_bias has none."""


def mixtures(part: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts in a part of the model."""
    return [module for module in part.modules() if isinstance(module, MixtureOfExperts)]


def routes_slices(degrees: Degrees) -> bool:
    """Whether each rank of a tensor-parallel group routes a slice of the tokens, not all of them."""
    return degrees.tp > 1 and degrees.sequence_parallel and degrees.spreads_experts


def keep_own_experts(part: nn.Module, meshes: Meshes) -> None:
    """Leaves a part on meta with the experts that this rank will hold: it never draws the others."""
    if meshes.experts is None:
        return
    ranks, rank = meshes.experts.ep.size(), meshes.experts.ep.get_local_rank()
    for mixture in mixtures(part):
        experts = mixture.experts
        count = mixture.spec.count // ranks
        experts.first = rank * count
        for name, weight in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(weight.new_empty(count, *weight.shape[1:])))


def apply_expert_parallel(part: nn.Module, seq: int, degrees: Degrees, meshes: Meshes) -> None:
    """Makes the stacked weights shards of the whole stack, and says how tokens reach them.

    The router's own losses are means over a step's sequences, as the loss is: its micro-batches add up, and
    data-parallel ranks are averaged; ranks of cp, which are averaged too, have parts of one sum.
    """
    for mixture in mixtures(part):
        if meshes.experts is not None:
            _own_mesh(mixture, degrees, meshes)
        elif degrees.tp > 1:
            _shard(mixture.experts, meshes.tp, meshes.tp)
        whole = degrees.tp > 1 and not routes_slices(degrees)
        mixture.router.loss_scale = degrees.cp / degrees.num_micro_batches / (degrees.tp if whole else 1)
        if whole:
            between = Shard(1) if degrees.sequence_parallel else Replicate()
            mixture.enter = _enter
            mixture.leave = Leave(meshes.tp, between)
        slices = (meshes.tp,) if degrees.tp > 1 and not whole else ()
        parts = (meshes.cp,) if degrees.cp > 1 else ()
        mixture.router.sequence_groups = tuple(mesh.get_group() for mesh in (*slices, *parts))
        if degrees.cp > 1:
            held = [held_positions(seq, degrees, rank) for rank in range(degrees.cp)]
            mixture.router.positions = torch.cat(held).to(mixture.router.counts.device)


def shared_expert_plan(
    mixture: MixtureOfExperts, between: Placement, degrees: Degrees
) -> dict[str, ParallelStyle]:
    """How tensor parallelism splits the shared experts, by names below the mixture's; "" is its own input."""
    inputs = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))
    slices = routes_slices(degrees)
    plan: dict[str, ParallelStyle] = {} if slices else {"": inputs}
    if mixture.shared is not None:
        plan |= {"shared": inputs} if slices else {}
        plan["shared.up"] = ColwiseParallel()
        plan["shared.down"] = RowwiseParallel(output_layouts=between if slices else Partial())
        if mixture.shared.gate is not None:
            plan["shared.gate"] = ColwiseParallel()
    return plan


def _own_mesh(mixture: MixtureOfExperts, degrees: Degrees, meshes: Meshes) -> None:
    assert meshes.experts is not None
    _shard(mixture.experts, meshes.experts.both, meshes.experts.etp)
    ep = meshes.experts.ep.get_group() if degrees.ep > 1 else None
    gathers = degrees.expert_tp > 1 and degrees.sequence_parallel
    etp = meshes.experts.etp.get_group() if gathers else None
    mixture.dispatch = SentByRank(ep, etp)


def _shard(experts: Experts, mesh: DeviceMesh, width: DeviceMesh) -> None:
    """The weights of a rank as shards over `mesh`: of the experts along ep, of their width along `width`."""
    ranks, rank = width.size(), width.get_local_rank()
    for name, weight in list(experts.named_parameters()):
        dim = WIDTH_DIM.get(name)
        local = weight.detach() if dim is None else weight.detach().chunk(ranks, dim)[rank].contiguous()
        split: Placement = Replicate() if dim is None else Shard(dim)
        placements = [split] if mesh.ndim == 1 else [Shard(0), split]
        shape = list(weight.shape)
        shape[0] *= 1 if mesh.ndim == 1 else mesh.size(0)
        whole = torch.Size(shape)
        stride = torch.empty(whole, device="meta").stride()
        sharded = DTensor.from_local(local, mesh, placements, run_check=False, shape=whole, stride=stride)
        setattr(experts, name, nn.Parameter(sharded))


def _enter(x_bsh: Tensor) -> Tensor:
    """The tokens of all ranks of tp; each gives its part of their gradient, which are summed."""
    assert isinstance(x_bsh, DTensor)
    local: Tensor = x_bsh.to_local(grad_placements=[Partial()])
    return local


@dataclass(frozen=True)
class Leave:
    """Sums the results of the ranks of tp, each of which has its part."""

    tp: DeviceMesh
    between: Placement

    def __call__(self, part_bsh: Tensor) -> Tensor:
        summed = DTensor.from_local(part_bsh, self.tp, [Partial()], run_check=False)
        local: Tensor = summed.redistribute(placements=[self.between]).to_local()
        return local


@dataclass(frozen=True)
class SentByRank:
    """Dispatch over ranks: rows go to the ranks of `ep` by all-to-all, and are gathered over `etp`."""

    ep: dist.ProcessGroup | None
    etp: dist.ProcessGroup | None

    def gather(
        self, tokens_th: Tensor, weights_tk: Tensor, chosen_tk: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With ep, rows are gathered when they have arrived; without, the tokens are, which are fewer."""
        if self.etp is None or self.ep is not None:
            return tokens_th, weights_tk, chosen_tk
        tokens, weights, chosen = (gather_ranks(t, self.etp) for t in (tokens_th, weights_tk, chosen_tk))
        return tokens, weights, chosen

    def scatter(self, out_th: Tensor) -> Tensor:
        return out_th if self.etp is None or self.ep is not None else sum_to_ranks(out_th, self.etp)

    def send(self, rows_rh: Tensor, counts_e: Tensor) -> tuple[Tensor, Tensor, Any]:
        if self.ep is None:
            return rows_rh, counts_e, None
        out_counts = counts_e.view(self.ep.size(), -1)
        in_counts = exchange_counts(out_counts, self.ep)
        both = torch.stack((out_counts.sum(1), in_counts.sum(1)))
        out_splits, in_splits = rows_per_part(both, rows_rh.shape[0])
        rows = exchange_rows(rows_rh, out_splits, in_splits, self.ep)
        arrived, rows_of_rank = in_counts[None], [rows.shape[0]]
        if self.etp is not None:
            arrived = gather_ranks(in_counts[None], self.etp)
            (rows_of_rank,) = rows_per_part(arrived.sum((1, 2))[None], self.etp.size() * rows.shape[0])
            rows = gather_ranks(_padded(rows, max(rows_of_rank)), self.etp)
        order = _order_by_expert(arrived, max(rows_of_rank))[: sum(rows_of_rank)]
        sent = _Sent(out_splits=out_splits, in_splits=in_splits, order=order, room=rows.shape[0])
        return rows.index_select(0, order), arrived.sum((0, 1)), sent

    def take_back(self, rows_rh: Tensor, sent: Any) -> Tensor:
        if self.ep is None:
            return rows_rh
        rows = rows_rh.new_zeros(sent.room, rows_rh.shape[1]).index_copy(0, sent.order, rows_rh)
        if self.etp is not None:
            rows = sum_to_ranks(rows, self.etp)[: sum(sent.in_splits)]
        return exchange_rows(rows, sent.in_splits, sent.out_splits, self.ep)


@dataclass(frozen=True)
class _Sent:
    """Rows that went to each rank of ep and came from each, and the order in which experts have what came."""

    out_splits: list[int]
    in_splits: list[int]
    order: Tensor
    room: int


def _padded(rows: Tensor, room: int) -> Tensor:
    return nn.functional.pad(rows, (0, 0, 0, room - rows.shape[0]))


def _order_by_expert(arrived: Tensor, room: int) -> Tensor:
    """Places of the rows that came, by expert, and of free ones after them: arrived [ranks, sources, experts]
    says how many of each; a rank's begin at a multiple of `room`, by source and then by expert."""
    ranks, sources, experts = arrived.shape
    flat = arrived.flatten(1)
    free = (room - flat.sum(1, keepdim=True)).clamp(min=0)
    counts = torch.cat((flat, free), dim=1).flatten()
    own = torch.arange(experts, device=arrived.device).repeat(sources)
    of_segment = torch.cat((own, own.new_tensor([experts]))).repeat(ranks)
    of_row = of_segment.repeat_interleave(counts, output_size=ranks * room)
    return of_row.argsort(stable=True)
