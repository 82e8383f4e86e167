"""Which spans of layers stages may hold within a step time: no cut that keeps it is left out, and few others
stay in."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest

from planner.search.bounds.relaxation import Whole
from planner.search.programme.stage_options import Column
from planner.search.programme.stages import StageSpace, narrowed
from tests.planner import instances
from tests.planner.brute_force import all_cuts
from tests.planner.rank_samples import bounds_of, spaces

Cut = tuple[tuple[int, int], ...]


def tight(seed: int, fix: tuple[str, ...], pp: int, *, mixed: bool) -> Iterator[StageSpace]:
    """Shapes whose ranks have room for some recomputation less than all on the fullest of the even split."""
    drawn = instances.random_problem(seed, layers=8, mixed=mixed)
    workload = dataclasses.replace(drawn.workload, batch=8, seq=2048)
    roomy = dataclasses.replace(drawn, workload=workload, memory_limit_bytes=1 << 45)
    for space in itertools.islice(spaces(roomy, (f"pp={pp}", *fix)), 2):
        book, (first, end), flights = space.books[0], space.even[:2], space.flights[0]
        used = [book._used_bytes(column.cost, flights) for column in book.pure(first, end)]
        limit = min(used) + (seed % 4) / 3 * (max(used) - min(used))
        yield StageSpace(space.model, space.shape, [limit * 1.02] * pp, space.books)


def cuts_with_times(space: StageSpace) -> list[tuple[float, Cut]]:
    """Every cut of the space whose stages have recipes, and its step time."""
    found = []
    for cut in all_cuts(space.layers, space.degrees.stages):
        if not all(first in space.near[stage] for stage, (first, _) in enumerate(cut)):
            continue
        each = [space.recipe(stage, span) for stage, span in enumerate(cut)]
        columns = tuple(column for column in each if column is not None)
        if len(columns) == len(cut):
            found.append((space.replay(columns).step_time_s, cut))
    return found


@pytest.mark.parametrize("fix", ["schedule=1f1b", "schedule=zb-h1", "schedule=gpipe"])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_no_cut_in_time_is_left_out(fix: str, pp: int) -> None:
    """Also where memory makes stages recompute; and most cuts that are too slow by a tenth go."""
    compared = ruled_out = slow = kept = 0
    for seed in range(70):
        for space in tight(seed, (fix, "chunks=1"), pp, mixed=True):
            every = cuts_with_times(space)
            if not every:
                continue
            best_s = min(step_s for step_s, _ in every)
            for factor in (1 + 1e-6, 1.1):
                within = bounds_of(space).cuts.within(best_s * factor)
                assert within is not None, (seed, space.degrees.label())
                spans = [{span for row in rows for span in row} for rows in within]
                for step_s, cut in every:
                    held = all(span in own for span, own in zip(cut, spans, strict=True))
                    assert held or step_s >= best_s * factor * (1 - 1e-9), (seed, space.degrees.label(), cut)
                    slow += step_s > 1.1 * best_s and factor < 1.1
                    kept += held and step_s > 1.1 * best_s and factor < 1.1
            compared += 1
            ruled_out += bounds_of(space).cuts.within(best_s * 0.8) is None
    assert compared > 8 and ruled_out > compared / 2, (compared, ruled_out)
    assert kept <= slow / 2, (kept, slow)


def roomy_s(space: StageSpace, sizes: tuple[int, ...]) -> float:
    """The step time of sizes that recompute nothing."""
    books = (space.books[rank] for rank in space.rank_of)
    pairs = enumerate(zip(books, sizes, strict=True))
    return space.replay(tuple(book.pure(*space.span(s, n))[0] for s, (book, n) in pairs)).step_time_s


@pytest.mark.parametrize("fix", ["schedule=1f1b", "schedule=zb-h1", "schedule=zbv", "schedule=interleaved"])
def test_relaxed_sizes_leave_out_none_in_time(fix: str) -> None:
    """Of all sizes within the limits of stages, where nothing recomputes: neither the bound nor the sizes of
    a step time rule out one that takes less; and slower times are ruled out."""
    chunks = "chunks=2" if fix in ("schedule=zbv", "schedule=interleaved") else "chunks=1"
    compared = ruled_out = 0
    for seed in range(30):
        drawn = instances.random_problem(seed, layers=8)
        workload = dataclasses.replace(drawn.workload, batch=8)
        problem = dataclasses.replace(drawn, workload=workload, memory_limit_bytes=1 << 45)
        for space in itertools.islice(spaces(problem, (fix, chunks)), 3):
            limits = narrowed(space.size_limits, space.layers)
            if limits is None or not space.one_class or space.model.sharing is not None or space.layers < 3:
                continue
            ways = itertools.product(*(range(low, high + 1) for low, high in limits))
            times = {way: roomy_s(space, way) for way in ways if sum(way) == space.layers}
            best_s, every = min(times.values()), bounds_of(space).sizes(float("inf"))
            assert every is not None
            bound_s = bounds_of(space).relaxation.within(float("inf"), every, 4, Whole(20)).bound_s
            assert bound_s <= best_s * (1 + 1e-9), (seed, space.degrees.label())
            for factor in (1 + 1e-6, 1.1):
                within = bounds_of(space).sizes(best_s * factor)
                assert within is not None, (seed, space.degrees.label())
                for way, step_s in times.items():
                    held = all(low <= n <= high for n, (low, high) in zip(way, within.stages, strict=True))
                    assert held or step_s >= best_s * factor * (1 - 1e-9), (seed, space.degrees.label(), way)
            compared += 1
            ruled_out += bounds_of(space).sizes(best_s * 0.8) is None
    assert compared > 12 and ruled_out > compared / 2, (compared, ruled_out)


@pytest.mark.parametrize("fix", ["schedule=1f1b", "schedule=zb-h1", "schedule=zbv", "schedule=dualpipev"])
def test_no_recipe_takes_less_than_the_least_passes(fix: str) -> None:
    """Of no kind of action, for any span of a stage; and where nothing recomputes the two are the same."""
    compared = equal = 0
    for seed in range(12):
        drawn = instances.random_problem(seed, layers=6, mixed=bool(seed % 2))
        for space in itertools.islice(spaces(drawn, (fix,)), 2):
            book = space.books[0]
            for first, end in itertools.combinations(range(space.layers + 1), 2):
                least = book.least_passes.stage_s(first, end)
                columns: list[Column] = book.pure(first, end)
                for column in columns:
                    passes = column.passes_s
                    assert all(a <= b * (1 + 1e-9) for a, b in zip(least, passes, strict=True)), (
                        seed,
                        first,
                        end,
                    )
                compared += 1
                equal += columns[0].passes_s == pytest.approx(tuple(least), rel=1e-9)
    assert compared > 40 and equal > compared / 2, (compared, equal)
