"""Stage recipes: for a stage and a number of blocks, the best mix of recompute options that fits.

The mixes of n blocks over three options are few, (n + 1)(n + 2) / 2, and their times are sums: the fastest
that fits is found by going through them in order of time. It is a column of the ILP.
"""

from __future__ import annotations

from planner.codec import noun
from planner.cost.memory import grads_bytes, optimizer_bytes, transient_bytes, weights_bytes
from planner.cost.stage import ShapeModel, StageCost
from planner.profile import LayerKind
from planner.strategy import Recompute, RecomputeCounts

MAX_MIXES = 16
"""Recomputation mixes of one stage and size that the ILP chooses from where a rank holds several stages."""


@noun
class Column:
    """A recipe: `layers` blocks on stage `stage` with these options, and what they cost."""

    stage: int
    counts: RecomputeCounts
    cost: StageCost
    resident_bytes: float
    transient_bytes: float

    @property
    def layers(self) -> int:
        return self.counts.layers


def column(shape: ShapeModel, stage: int, counts: RecomputeCounts) -> Column:
    """The column of a stage with given counts."""
    cost = shape.stage(counts, first=stage == 0, last=stage == shape.degrees.stages - 1)
    resident = (
        weights_bytes(shape, cost.params)
        + grads_bytes(shape, cost.params)
        + optimizer_bytes(shape, cost.params)
    )
    return Column(
        stage=stage,
        counts=counts,
        cost=cost,
        resident_bytes=resident,
        transient_bytes=transient_bytes(shape, cost),
    )


def mixes(shape: ShapeModel, layers: int, options: tuple[Recompute, ...]) -> list[RecomputeCounts]:
    """Every way to give `layers` blocks one of `options` each, the fastest first."""
    legal = [
        (none, layers - none - full, full)
        for none in (range(layers, -1, -1) if Recompute.NONE in options else (0,))
        for full in (range(layers - none + 1) if Recompute.FULL in options else (0,))
        if Recompute.SELECTIVE in options or none + full == layers
    ]
    plain_s, selective_s, full_s = (shape.block_passes[option][1].total_s for option in Recompute)
    legal.sort(key=lambda c: (c[0] * plain_s + c[1] * selective_s + c[2] * full_s, c[2], c[1]))
    return [RecomputeCounts(none=none, selective=some, full=full) for none, some, full in legal]


def recipe(
    shape: ShapeModel,
    stage: int,
    layers: int,
    in_flight: int,
    limit_bytes: float,
    options: tuple[Recompute, ...],
) -> Column | None:
    """The fastest column of `layers` blocks within `limit_bytes`, or None where none fits."""
    for counts in mixes(shape, layers, options):
        candidate = column(shape, stage, counts)
        used = shape.runtime_bytes + candidate.resident_bytes + candidate.transient_bytes
        if used + in_flight * candidate.cost.saved_bytes <= limit_bytes:
            return candidate
    return None


def pareto(shape: ShapeModel, stage: int, layers: int, options: tuple[Recompute, ...]) -> list[Column]:
    """Columns of `layers` blocks none of which is both slower and larger than another.

    Of more than MAX_MIXES, evenly many are kept from the fastest to the smallest: this narrows the space
    that the certificate speaks of to strategies with these mixes.
    """
    saved = {option: shape.layer(LayerKind.BLOCK, option).saved_bytes for option in Recompute}
    widest = {option: shape.layer(LayerKind.BLOCK, option).backward_transient_bytes for option in Recompute}
    kept: list[tuple[float, float]] = []
    chosen = []
    for counts in mixes(shape, layers, options):
        used = dict(zip(Recompute, (counts.none, counts.selective, counts.full), strict=True))
        size = sum(saved[option] * count for option, count in used.items())
        transient = max((widest[option] for option, count in used.items() if count), default=0.0)
        if any(other <= size and wide <= transient for other, wide in kept):
            continue
        kept.append((size, transient))
        chosen.append(counts)
    if len(chosen) > MAX_MIXES:
        step = (len(chosen) - 1) / (MAX_MIXES - 1)
        chosen = [chosen[round(index * step)] for index in range(MAX_MIXES)]
    return [column(shape, stage, counts) for counts in chosen]
