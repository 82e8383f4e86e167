"""Strategy: the pure choice of how a step is spread over devices."""

from __future__ import annotations

import itertools
from enum import IntEnum, StrEnum

from planner.codec import noun


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
    def least_chunks(self) -> int:
        """The fewest stages that a rank holds; only interleaved may hold more."""
        return 2 if self.v_shaped or self is Schedule.INTERLEAVED else 1


class Zero(IntEnum):
    """What data-parallel ranks share out: 0 nothing, 1 optimizer, 2 and gradients, 3 and parameters."""

    NONE = 0
    OPTIMIZER = 1
    GRADIENTS = 2
    PARAMETERS = 3


class Recompute(StrEnum):
    """What a block recomputes in the backward pass instead of keeping it.

    `selective` keeps the results of matrix products and of attention and recomputes the element-wise
    rest; `full` keeps only the block's input.
    """

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


AXES = ("pp", "dp_replicate", "dp_shard", "cp", "ep", "tp")
"""The axes of the rank grid, outermost first: neighbouring ranks share a tensor-parallel group."""


@noun
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


@noun
class Stage:
    """One pipeline stage: the blocks [first, end) and what they recompute."""

    first: int
    end: int
    recompute: RecomputeCounts

    @property
    def layers(self) -> int:
        return self.end - self.first


@noun
class Degrees:
    """The global shape of a strategy: every degree, the schedule and the micro-batch.

    dp = dp_replicate x dp_shard is the whole data-parallel degree. `chunks` is the number of stages that
    each pipeline rank holds (one, two under V placement, any number when interleaved).
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

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

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
            parts.append(f"cp{self.cp}")
        if self.ep > 1:
            parts.append(f"ep{self.ep}")
        parts.append(f"zero{int(self.zero)}")
        parts.append(f"mb{self.micro_batch}x{self.num_micro_batches}")
        if self.pp > 1:
            parts.append(str(self.schedule))
        return " ".join(parts)


@noun
class Strategy:
    """Degrees, and for every stage its blocks and their options. Stages are in layer order."""

    degrees: Degrees
    stages: tuple[Stage, ...]


def even_stages(layers: int, stages: int, recompute: Recompute = Recompute.NONE) -> tuple[Stage, ...]:
    """`layers` blocks over `stages` stages as evenly as whole blocks allow, the extra ones first."""
    bounds = [stage * layers // stages for stage in range(stages + 1)]
    sizes = sorted((b - a for a, b in itertools.pairwise(bounds)), reverse=True)
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
