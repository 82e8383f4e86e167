"""Strategy: the pure choice of how a step is spread over devices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from enum import IntEnum, StrEnum

from planner.foundation.frozen import frozen
from planner.model.attention import CpExchange
from planner.model.sublayer import Recompute


class Schedule(StrEnum):
    """The order of forward and backward passes in a pipeline."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZB_H1 = "zb-h1"
    ZBV = "zbv"
    DUALPIPEV = "dualpipev"

    @property
    def v_shaped(self) -> bool:
        """Whether rank r holds stages r and 2 pp - 1 - r, down and up a V, instead of stages dealt round."""
        return self in (Schedule.ZBV, Schedule.DUALPIPEV)

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients may be apart from the gradients of a stage's input."""
        return self in (Schedule.ZB_H1, Schedule.ZBV, Schedule.DUALPIPEV)

    @property
    def splits_every_backward(self) -> bool:
        """Whether no backward pass is run whole."""
        return self in (Schedule.ZB_H1, Schedule.ZBV)

    @property
    def least_chunks(self) -> int:
        """The fewest stages that a rank holds; only interleaved may hold more."""
        return 2 if self.v_shaped or self is Schedule.INTERLEAVED else 1


class Zero(IntEnum):
    """What data-parallel ranks share out: 0 nothing, 1 optimizer, 2 and gradients, 3 and parameters."""

    NONE = 0
    OPTIMIZER = 1
    GRADIENTS = 2
    PARAMETERS = 3


class Offload(StrEnum):
    """What lies in host memory until it is used: optimizer state with its masters, or kept activations."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"


AXES = ("pp", "dp_replicate", "dp_shard", "cp", "ep", "tp")
"""The axes of the rank grid, outermost first: neighbouring ranks share a tensor-parallel group."""


@frozen
class RecomputeCounts:
    """How many blocks of a stage use each option. In layer order: full first, then selective, then none."""

    none: int
    selective: int = 0
    full: int = 0

    @property
    def layers(self) -> int:
        return self.none + self.selective + self.full

    def options(self) -> tuple[Recompute, ...]:
        """The option of each block of the stage, in layer order."""
        return (
            (Recompute.FULL,) * self.full
            + (Recompute.SELECTIVE,) * self.selective
            + (Recompute.NONE,) * self.none
        )


@frozen
class OffloadCounts:
    """How many blocks of a stage have optimizer state, and kept activations, in host memory: its first ones.

    Embedding and head follow where the optimizer state of all blocks of their stage does.
    """

    optimizer: int = 0
    activations: int = 0


@frozen
class Stage:
    """One pipeline stage: the blocks [first, end), what they recompute, what of them is in host memory."""

    first: int
    end: int
    recompute: RecomputeCounts
    offload: OffloadCounts = OffloadCounts()

    @property
    def layers(self) -> int:
        return self.end - self.first


@frozen
class Degrees:
    """The global shape of a strategy: every degree, the schedule and the micro-batch.

    dp = dp_replicate x dp_shard is the whole data-parallel degree. The `cp` ranks of a context-parallel group
    share out each sequence and hold the same weights, so gradients are reduced over dp x cp. `ep` ranks
    share out the routed experts and `etp` ranks each expert (None: as many as tp); both are carved out of
    dp x cp x tp. `chunks` is the number of stages that
    each pipeline rank holds (one, two under V placement, any number when interleaved).
    `device_order` are the groups of a cluster in the order in which ranks are laid over them, by their place
    in `ClusterSpec.groups`; (): as they are listed there.
    """

    tp: int = 1
    pp: int = 1
    chunks: int = 1
    schedule: Schedule = Schedule.ONE_F_ONE_B
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    ep: int = 1
    zero: Zero = Zero.NONE
    micro_batch: int = 1
    num_micro_batches: int = 1
    sequence_parallel: bool = False
    cp_exchange: CpExchange = CpExchange.RING
    etp: int | None = None
    device_order: tuple[int, ...] = ()

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def replicas(self) -> int:
        """Ranks that meet other tokens with the same dense weights: their gradients are summed."""
        return self.dp * self.cp

    @property
    def weight_shards(self) -> int:
        """Ranks that share out the state of dense weights."""
        return 1 if self.zero is Zero.NONE else self.dp_shard * self.cp

    @property
    def expert_tp(self) -> int:
        """Ranks that share out one expert."""
        return self.etp or self.tp

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold all routed experts of a layer, once."""
        return self.ep * self.expert_tp

    @property
    def spreads_experts(self) -> bool:
        """Whether routed experts are shared out otherwise than other weights are."""
        return self.ep > 1 or self.expert_tp != self.tp

    @property
    def expert_replicas(self) -> int:
        """Ranks that meet other tokens with the same routed experts."""
        return max(1, self.replicas * self.tp // self.expert_ranks)

    @property
    def expert_shards(self) -> int:
        """Ranks that share out the state of routed experts."""
        if self.zero is Zero.NONE:
            return 1
        return max(1, self.weight_shards * self.tp // self.expert_ranks)

    @property
    def stages(self) -> int:
        return self.pp * self.chunks

    @property
    def batch(self) -> int:
        """Sequences in a global step."""
        return self.micro_batch * self.num_micro_batches * self.dp

    def grid_shape(self) -> tuple[int, ...]:
        """Sizes along AXES. Expert parallelism is carved out of the data axes, so its size here is 1."""
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp, 1, self.tp)

    def pp_rank_of_stage(self, stage: int) -> int:
        """The pipeline rank that holds stage `stage`: dealt round, or down and up a V."""
        if self.schedule.v_shaped and stage >= self.pp:
            return 2 * self.pp - 1 - stage
        return stage % self.pp

    def stages_of_pp_rank(self, pp_rank: int) -> tuple[int, ...]:
        """The stages that a pipeline rank holds, in the order of the layers."""
        return tuple(stage for stage in range(self.stages) if self.pp_rank_of_stage(stage) == pp_rank)

    def pp_rank_of_rank(self, rank: int) -> int:
        """The pipeline rank of a global rank."""
        return rank // (self.world // self.pp)

    def ranks_of_pp_rank(self, pp_rank: int) -> tuple[int, ...]:
        """Global ranks of one pipeline rank."""
        per = self.world // self.pp
        return tuple(range(pp_rank * per, (pp_rank + 1) * per))

    def label(self) -> str:
        """A short name: `tp2 pp2x1 dp1 zero0 mb4x8 1f1b`."""
        parts = [f"tp{self.tp}"]
        if self.sequence_parallel:
            parts[0] += "+sp"
        parts.append(f"pp{self.pp}" + (f"x{self.chunks}" if self.chunks > 1 else ""))
        parts.append(f"dp{self.dp}")
        if self.cp > 1:
            parts.append(f"cp{self.cp}-{self.cp_exchange}")
        if self.ep > 1:
            parts.append(f"ep{self.ep}")
        if self.etp is not None and self.etp != self.tp:
            parts.append(f"etp{self.etp}")
        parts.append(f"zero{int(self.zero)}")
        parts.append(f"mb{self.micro_batch}x{self.num_micro_batches}")
        if self.pp > 1:
            parts.append(str(self.schedule))
        if self.device_order:
            parts.append("groups" + ",".join(map(str, self.device_order)))
        return " ".join(parts)


@frozen
class Strategy:
    """Degrees, and for every stage its blocks and their options. Stages are in layer order."""

    degrees: Degrees
    stages: tuple[Stage, ...]

    @property
    def offloads(self) -> tuple[Offload, ...]:
        """What of some stage lies in host memory."""
        found = {
            Offload.OPTIMIZER: any(stage.offload.optimizer for stage in self.stages),
            Offload.ACTIVATIONS: any(stage.offload.activations for stage in self.stages),
        }
        return tuple(offload for offload, used in found.items() if used)


def offloaded(stages: tuple[Stage, ...], offload: Offload) -> tuple[Stage, ...]:
    """The stages with one kind of what all their blocks hold in host memory."""
    return tuple(
        dataclasses.replace(
            stage,
            offload=OffloadCounts(
                optimizer=stage.layers if offload is Offload.OPTIMIZER else 0,
                activations=stage.layers if offload is Offload.ACTIVATIONS else 0,
            ),
        )
        for stage in stages
    )


def even_stages(layers: int, stages: int, recompute: Recompute = Recompute.NONE) -> tuple[Stage, ...]:
    """`layers` blocks over `stages` stages as evenly as whole blocks allow, the extra ones first."""
    bounds = [stage * layers // stages for stage in range(stages + 1)]
    return sized_stages(sorted((b - a for a, b in itertools.pairwise(bounds)), reverse=True), recompute)


def sized_stages(sizes: Sequence[int], recompute: Recompute = Recompute.NONE) -> tuple[Stage, ...]:
    """Stages of so many blocks each, in order, all with one option."""
    result, first = [], 0
    for size in sizes:
        counts = RecomputeCounts(
            none=size if recompute is Recompute.NONE else 0,
            selective=size if recompute is Recompute.SELECTIVE else 0,
            full=size if recompute is Recompute.FULL else 0,
        )
        result.append(Stage(first=first, end=first + size, recompute=counts))
        first += size
    return tuple(result)
