"""Stage recipes: for a stage and the blocks that it holds, the best mix of recompute options that fits.

The mixes of n blocks over three options are few, (n + 1)(n + 2) / 2, and their times are sums: the fastest
that fits is found by going through them in order of time. It is a column of the ILP. Options are dealt in
layer order, so counts say everything; where all blocks are of one class, so does their number.
"""

from __future__ import annotations

from planner.codec import noun
from planner.cost.memory import resident_bytes, transient_bytes
from planner.cost.stage import ShapeModel
from planner.cost.stage_cost import StageCost
from planner.strategy import Recompute, RecomputeCounts, Stage

MAX_MIXES = 16
"""Recomputation mixes of one stage and size that the ILP chooses from where a rank holds several stages."""


@noun
class Column:
    """A recipe for stage `index`: its blocks and their options, and what they cost.

    Where all blocks are of one class it stands for any blocks as many, between the same ends.
    """

    index: int
    stage: Stage
    cost: StageCost
    resident_bytes: float
    transient_bytes: float

    @property
    def layers(self) -> int:
        return self.stage.layers


def column(shape: ShapeModel, index: int, stage: Stage, in_flight: int) -> Column:
    """The column of a stage, of which at most `in_flight` micro-batches are alive."""
    cost = shape.stage(stage)
    return Column(
        index=index,
        stage=stage,
        cost=cost,
        resident_bytes=resident_bytes(shape, cost),
        transient_bytes=transient_bytes(shape, cost, in_flight),
    )


def mixes(shape: ShapeModel, first: int, end: int, options: tuple[Recompute, ...]) -> list[Stage]:
    """Every way to give the blocks [first, end) one of `options` each, the fastest first."""
    layers = end - first
    legal = [
        RecomputeCounts(none=none, selective=layers - none - full, full=full)
        for none in (range(layers, -1, -1) if Recompute.NONE in options else (0,))
        for full in (range(layers - none + 1) if Recompute.FULL in options else (0,))
        if Recompute.SELECTIVE in options or none + full == layers
    ]
    stages = [Stage(first=first, end=end, recompute=counts) for counts in legal]
    stages.sort(key=lambda s: (shape.backward_s(s), s.recompute.full, s.recompute.selective))
    return stages


def recipe(
    shape: ShapeModel,
    index: int,
    first: int,
    end: int,
    in_flight: int,
    limit_bytes: float,
    options: tuple[Recompute, ...],
) -> Column | None:
    """The fastest column of the blocks [first, end) within `limit_bytes`, or None where none fits."""
    for stage in mixes(shape, first, end, options):
        candidate = column(shape, index, stage, in_flight)
        used = shape.runtime_bytes + candidate.resident_bytes + candidate.transient_bytes
        if used + in_flight * candidate.cost.saved_bytes <= limit_bytes:
            return candidate
    return None


def pareto(
    shape: ShapeModel, index: int, first: int, end: int, in_flight: int, options: tuple[Recompute, ...]
) -> list[Column]:
    """Columns of the blocks [first, end) none of which is both slower and larger than another.

    Of more than MAX_MIXES, evenly many are kept from the fastest to the smallest: this narrows the space
    that the certificate speaks of to strategies with these mixes.
    """
    kept: list[tuple[float, float]] = []
    chosen = []
    for stage in mixes(shape, first, end, options):
        each = [(shape.block(*choice), count) for choice, count in shape.chosen(stage)]
        size = sum(cost.saved_bytes * count for cost, count in each)
        transient = max((cost.backward_transient_bytes for cost, _ in each), default=0.0)
        if any(other <= size and wide <= transient for other, wide in kept):
            continue
        kept.append((size, transient))
        chosen.append(stage)
    if len(chosen) > MAX_MIXES:
        step = (len(chosen) - 1) / (MAX_MIXES - 1)
        chosen = [chosen[round(number * step)] for number in range(MAX_MIXES)]
    return [column(shape, index, stage, in_flight) for stage in chosen]
