"""Shapes of small random models under every schedule and engine, and assignments of them that fit."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

from planner.calibration.software import settings_for_engine
from planner.hardware.cluster import ClusterSpec
from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.model.workload import AdapterModules, Adapters, Method
from planner.search.programme.partition import Dealer
from planner.search.programme.stage_options import Column
from planner.search.programme.stages import Sizes, StageSpace, narrowed
from planner.strategy.strategy import RecomputeCounts, Stage
from tests.planner import instances
from tests.planner.rank_samples import fits, spaces, used_bytes

PIPES = (
    ("1f1b", 1),
    ("gpipe", 1),
    ("zb-h1", 1),
    ("interleaved", 2),
    ("interleaved", 3),
    ("zbv", 2),
    ("dualpipev", 2),
)
"""Schedules, with the stages of a rank."""
ROOMY = 1 << 45
Columns = tuple[Column, ...]


def drawn_problem(
    draw: random.Random, pp: int, layers: tuple[int, int], engine: Engine, *, lora: bool, mixed: bool
) -> PlanningProblem:
    """A model of equal blocks on devices of one kind, or (`mixed`) of two, with memory for anything."""
    hidden, rate = draw.choice([32, 64, 128]), 10 ** draw.uniform(8, 11)
    spec = instances.model(layers=draw.randint(*layers), hidden=hidden, vocab=draw.choice([64, 1024, 8192]))
    of = instances.device(flops=10 ** draw.uniform(10, 13), bandwidth=10 ** draw.uniform(9.5, 12))
    on = instances.cluster(
        nodes=pp,
        per_node=draw.choice([1, 2]),
        of=of,
        link_bytes_per_s=rate,
        inter_bytes_per_s=rate * draw.choice([0.1, 1.0]),
        latency_s=10 ** draw.uniform(-6, -4),
    )
    drawn = instances.problem(
        of=spec, on=on, seq=draw.choice([512, 2048]), batch=pp * draw.choice([4, 8]), limit_bytes=ROOMY
    )
    workload = drawn.workload
    if lora:
        adapters = Adapters(rank=8, modules=draw.choice(list(AdapterModules)))
        workload = dataclasses.replace(workload, method=Method.LORA, adapters=adapters)
    return dataclasses.replace(
        drawn,
        workload=workload,
        engine_settings=dataclasses.replace(settings_for_engine(engine, None, on), compiled=False),
        cluster=of_two_kinds(on, draw) if mixed else on,
    )


def of_two_kinds(cluster: ClusterSpec, draw: random.Random) -> ClusterSpec:
    """The same with slower devices on its second half."""
    (group,) = cluster.groups
    of = group.device
    other = instances.device(
        flops=(of.peak_bf16_flops or 0.0) * draw.uniform(0.4, 0.9),
        bandwidth=of.memory_bandwidth_bytes_per_s or 0.0,
        name="other",
    )
    first, rest = group.nodes // 2, group.nodes - group.nodes // 2
    groups = (
        dataclasses.replace(group, nodes=first),
        dataclasses.replace(group, device=other, nodes=rest),
    )
    return dataclasses.replace(cluster, groups=groups)


def drawn_shapes(
    seed: int,
    pipe: tuple[str, int],
    *,
    pp: tuple[int, ...] = (2, 3, 4),
    each: tuple[int, int] = (1, 3),
    engine: Engine = Engine.NATIVE,
    lora: bool = False,
    mixed: bool = False,
    count: int = 1,
) -> Iterator[StageSpace]:
    """Shapes that have memory for anything, of `each` blocks or so a stage."""
    draw, (schedule, chunks) = random.Random(f"{seed} {pipe}"), pipe
    ranks = draw.choice(pp)
    low, high = (n * ranks * chunks for n in each)
    problem = drawn_problem(draw, ranks, (max(3, low), max(3, high)), engine, lora=lora, mixed=mixed)
    fix = (f"schedule={schedule}", f"pp={ranks}", *((f"chunks={chunks}",) if chunks > 1 else ()))
    every = list(itertools.islice(spaces(problem, fix), 24))
    yield from draw.sample(every, min(count, len(every)))


def with_limits(space: StageSpace, limits_bytes: list[float]) -> StageSpace:
    """The same stages with other memory."""
    return StageSpace(space.model, space.shape, limits_bytes, space.books)


def tightened(space: StageSpace, share: float) -> StageSpace:
    """The same with memory between what the even split needs that recomputes all (0), and nothing (1)."""
    limits = []
    for rank, stages in enumerate(space.stages_of):
        sizes = {s: space.even[s + 1] - space.even[s] for s in stages}
        most, least = (
            used_bytes(space, rank, {s: stage_of(space, s, each(n)) for s, n in sizes.items()})
            for each in (lambda n: (n, 0, 0), lambda n: (0, 0, n))
        )
        limits.append((least + share * (most - least)) * (1 + 1e-9))
    return with_limits(space, limits)


def stage_of(space: StageSpace, stage: int, options: Sequence[int]) -> Stage:
    """A stage with so many blocks of each option."""
    none, selective, full = options
    first, end = space.span(stage, sum(options))
    counts = RecomputeCounts(none=none, selective=selective, full=full)
    return Stage(first=first, end=end, recompute=counts)


def drawn_deal(space: StageSpace, draw: random.Random, moves: int) -> tuple[int, ...]:
    """Blocks of each stage: the even split after so many moves of one block."""
    deal, limits = [b - a for a, b in itertools.pairwise(space.even)], space.size_limits
    for _ in range(moves):
        a, b = draw.sample(range(len(deal)), 2)
        if deal[a] > limits[a][0] and deal[b] < limits[b][1]:
            deal[a], deal[b] = deal[a] - 1, deal[b] + 1
    return tuple(deal)


def drawn_rank(
    space: StageSpace, draw: random.Random, rank: int, deal: Sequence[int]
) -> dict[int, Stage] | None:
    """A rank's stages, of which one block after another recomputes until they fit; None if they never do."""
    stages, often = space.stages_of[rank], draw.choice([0.0, 0.5, 1.0])
    counts = {s: [deal[s], 0, 0] for s in stages}
    begun = draw.random() < 0.3
    while True:
        held = {s: stage_of(space, s, each) for s, each in counts.items()}
        if fits(space, rank, held) and not begun:
            return held
        places = [(s, o) for s in stages for o in (0, 1) if counts[s][o]]
        if not places:
            return held if fits(space, rank, held) else None
        s, before = draw.choice(places)
        after = 1 if before == 0 and draw.random() < often else 2
        counts[s][before] -= 1
        counts[s][after] += 1
        begun = begun and draw.random() < 0.5


def drawn_assignment(space: StageSpace, draw: random.Random) -> Columns | None:
    """Recipes of all stages that fit, or None."""
    deal, chosen = drawn_deal(space, draw, draw.choice([0, 1, 2, 4])), {}
    for rank in range(space.degrees.pp):
        held = drawn_rank(space, draw, rank, deal)
        if held is None:
            return None
        chosen |= {s: space.books[rank].column(stage) for s, stage in held.items()}
    return tuple(chosen[s] for s in range(len(deal)))


def assignments(space: StageSpace, draw: random.Random, tries: int) -> Iterator[Columns]:
    """Assignments that fit: the best by moves and trades, and drawn ones."""
    dealt = Dealer(space).best(drawn_deal(space, draw, 0), float("inf"))
    if dealt is not None:
        yield dealt[0]
    for _ in range(tries):
        columns = drawn_assignment(space, draw)
        if columns is not None:
            yield columns


def held_fits(space: StageSpace, columns: Columns) -> bool:
    """Whether all ranks of an assignment fit."""
    return all(
        fits(space, rank, {s: columns[s].stage for s in stages})
        for rank, stages in enumerate(space.stages_of)
    )


def sizes_around(space: StageSpace, columns: Columns, draw: random.Random | None) -> Sizes:
    """Sizes that an assignment keeps: its own, or (`draw`) some about them."""
    held = [column.layers for column in columns]
    ranks = [sum(held[s] for s in stages) for stages in space.stages_of]

    def around(number: int, low: int, high: int) -> tuple[int, int]:
        if draw is None:
            return number, number
        return max(low, number - draw.randint(0, 2)), min(high, number + draw.randint(0, 2))

    stages = [around(n, *limits) for n, limits in zip(held, space.size_limits, strict=True)]
    by_stage = narrowed(stages, space.layers)
    assert by_stage is not None
    by_rank = tuple(around(n, space.degrees.chunks, space.layers) for n in ranks)
    return Sizes(by_stage, by_rank)
