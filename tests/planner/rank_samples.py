"""Stages of random shapes, and what their ranks take by trying every mix of recipes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from planner.cost.replay import kind_passes
from planner.cost.stage.memory_timeline import idle_apart
from planner.job.problem import PlanningProblem
from planner.search.bounds.partition_limits import PartitionBounds
from planner.search.programme.stage_options import Column
from planner.search.programme.stages import StageSpace
from planner.search.solve import Solver
from planner.search.space import shapes
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.strategy import Degrees, Stage
from tests.planner.brute_force import EXACT, mixes_of


def spaces(problem: PlanningProblem, fix: tuple[str, ...] = ()) -> Iterator[StageSpace]:
    """The stages of every shape with a pipeline."""
    solver = Solver(problem, EXACT)
    for degrees in shapes(problem, parse_fixed_choices(fix)):
        if isinstance(degrees, Degrees) and degrees.pp > 1:
            base = solver.modeller.base(dataclasses.replace(degrees, schedule="1f1b", chunks=1))  # type: ignore[arg-type]
            yield StageSpace(solver.model, solver.model.layout(degrees), base.limits_bytes, base.books)


@functools.cache
def bounds_of(space: StageSpace) -> PartitionBounds:
    """The bounds of a pipeline, which are remembered."""
    return PartitionBounds(space)


def used_bytes(space: StageSpace, rank: int, held: dict[int, Stage]) -> float:
    """What a rank's stages take together at the fullest moment of its row."""
    book = space.books[rank]
    each = {s: book.column(stage) for s, stage in held.items()}
    apart = idle_apart(book.shape)
    return book.shape.runtime_bytes + max(
        sum(column.held_bytes(moment[s]) for s, column in each.items())
        + max(
            book.transient_bytes(column, moment[s])
            for s, column in each.items()
            if moment[s].alive or not apart
        )
        for moment in space.in_flight[rank]
    )


def fits(space: StageSpace, rank: int, held: dict[int, Stage]) -> bool:
    return used_bytes(space, rank, held) <= space.limits_bytes[rank]


def own_s(space: StageSpace, rank: int, held: dict[int, Stage]) -> float:
    """What a rank's actions take, a micro-batch."""
    passes = {s: kind_passes(space.books[rank].column(stage).cost) for s, stage in held.items()}
    each = (n * passes[s][kind].total_s for (s, kind), n in space.table.counts(rank).items())
    return sum(each) / space.degrees.num_micro_batches


def placed(stage: int, stages: int, size: int, layers: int) -> tuple[int, int]:
    first = 0 if stage == 0 else layers - size if stage == stages - 1 else 1
    return first, first + size


def ways_of(space: StageSpace, rank: int, blocks: int) -> list[dict[int, Stage]]:
    """Every way to give a rank's blocks to its two stages, and every mix of recipes on them."""
    own, layers, stages = space.stages_of[rank], space.layers, space.degrees.stages
    ways = []
    for size in range(1, blocks):
        sizes = (size, blocks - size)
        limits = [space.size_limits[s] for s in own]
        if all(low <= n <= high for n, (low, high) in zip(sizes, limits, strict=True)):
            mixes = [mixes_of(*placed(s, stages, n, layers)) for s, n in zip(own, sizes, strict=True)]
            ways += [dict(zip(own, mix, strict=True)) for mix in itertools.product(*mixes)]
    return ways


def best_of(space: StageSpace, spans: tuple[tuple[int, int], ...]) -> float:
    """The least step time of a split: each rank's stages with every mix that fits, without
    those that take as long as another in every pass."""
    by_rank: list[list[tuple[Column, ...]]] = []
    for rank, own in enumerate(space.stages_of):
        each = itertools.product(*(mixes_of(*spans[s]) for s in own))
        held = [dict(zip(own, mix, strict=True)) for mix in each]
        ways = [
            tuple(space.books[rank].column(stage) for stage in way.values())
            for way in held
            if fits(space, rank, way)
        ]
        fastest: list[tuple[Column, ...]] = []
        for way in sorted(ways, key=lambda way: sum(_seconds(way))):
            if not any(
                all(a <= b for a, b in zip(_seconds(one), _seconds(way), strict=True)) for one in fastest
            ):
                fastest.append(way)
        by_rank.append(fastest)
    best_s = float("inf")
    for choice in itertools.product(*by_rank):
        pairs = [zip(own, way, strict=True) for own, way in zip(space.stages_of, choice, strict=True)]
        chosen = dict(itertools.chain(*pairs))
        best_s = min(best_s, space.replay(tuple(chosen[s] for s in range(len(spans)))).step_time_s)
    return best_s


def _seconds(way: tuple[Column, ...]) -> list[float]:
    once = [s for c in way for s in (c.cost.unshard_s, c.cost.reduce_s, c.cost.optimizer_s)]
    return [seconds for column in way for seconds in column.passes_s] + once
