"""Games of paths against recipes: bounds that no recipes beat, recipes that fit, and nothing left out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from planner.search.bounds.fictitious_play import PathGame, Splits, even_splits, splits_within
from planner.search.programme.stages import StageSpace
from tests.planner import instances
from tests.planner.brute_force import all_cuts, mixes_of
from tests.planner.rank_samples import best_of, bounds_of, spaces, used_bytes


def tight(seed: int, fix: tuple[str, ...], *, layers: int, mixed: bool = False) -> Iterator[StageSpace]:
    """Shapes of two ranks whose memory has room for some recomputation less than all."""
    drawn = instances.random_problem(seed, layers=layers, mixed=mixed)
    workload = dataclasses.replace(drawn.workload, batch=4, seq=2048)
    roomy = dataclasses.replace(drawn, workload=workload, memory_limit_bytes=1 << 45)
    for space in itertools.islice(spaces(roomy, ("pp=2", *fix)), 2):
        thrifty, greedy = (max(used_of_all(space, least=least)) for least in (True, False))
        limit = thrifty * (1 + 1e-9) + (seed % 5) / 4 * (greedy - thrifty)
        yield StageSpace(space.model, space.shape, [limit] * 2, space.books)


def used_of_all(space: StageSpace, *, least: bool) -> list[float]:
    """What each rank of the even split needs with the mixes that need least, or most."""
    found = []
    for rank, stages in enumerate(space.stages_of):
        each = itertools.product(*(mixes_of(space.even[s], space.even[s + 1]) for s in stages))
        used = [used_bytes(space, rank, dict(zip(stages, mix, strict=True))) for mix in each]
        found.append(min(used) if least else max(used))
    return found


def best_split(space: StageSpace, splits: Splits) -> float:
    """The least step time over all mixes of every split, by trying all."""
    best_s = float("inf")
    for cut in all_cuts(space.layers, space.degrees.stages):
        sizes = [end - first for first, end in cut]
        spans = [space.span(s, size) for s, size in enumerate(sizes)] if space.one_class else list(cut)
        dealt = [tuple(spans[s] for s in stages) for stages in space.stages_of]
        if all(own in each for own, each in zip(dealt, splits, strict=True)):
            best_s = min(best_s, best_of(space, cut))
    return best_s


@pytest.mark.parametrize(
    "fix", ["schedule=zbv", "schedule=interleaved", "schedule=dualpipev", "schedule=1f1b"]
)
def test_no_recipes_beat_the_bound_and_those_found_fit(fix: str) -> None:
    """Of every split of one class within the sizes that may beat a little more than the best of them."""
    chunks = "chunks=1" if fix == "schedule=1f1b" else "chunks=2"
    compared = met = 0
    for seed in range(24):
        for space in tight(seed, (fix, chunks), layers=5):
            sizes = bounds_of(space).sizes(float("inf"))
            assert sizes is not None
            best_s = best_split(space, splits_within(space, sizes))
            if best_s == float("inf"):
                continue
            to_beat_s = best_s * 1.1
            sizes = bounds_of(space).sizes(to_beat_s)
            assert sizes is not None, (seed, space.degrees.label())
            outcome = PathGame(space).play(to_beat_s, splits_within(space, sizes), thorough=True)
            assert outcome is not None and outcome.columns is not None
            assert outcome.bound_s <= best_s * (1 + 1e-9), (seed, space.degrees.label())
            assert best_s <= outcome.step_time_s * (1 + 1e-9)
            assert outcome.step_time_s == pytest.approx(space.replay(outcome.columns).step_time_s)
            compared += 1
            met += outcome.step_time_s < best_s * (1 + 1e-9)
    assert compared > 12 and met > compared / 2, (compared, met)


def test_a_time_that_nothing_beats_is_ruled_out_or_left_open_but_never_the_best() -> None:
    ruled_out = 0
    for seed in range(24):
        for space in tight(seed, ("schedule=zbv", "chunks=2"), layers=5):
            sizes = bounds_of(space).sizes(float("inf"))
            assert sizes is not None
            splits = splits_within(space, sizes)
            best_s = best_split(space, splits)
            if best_s == float("inf"):
                continue
            game = PathGame(space)
            below, above = best_s * 0.9, best_s * (1 + 1e-6)
            ruled = game.play(below, splits, thorough=True)
            left = game.play(above, splits, thorough=True)  # goes on from the mixture before
            assert ruled is not None and left is not None
            assert ruled.step_time_s >= best_s * (1 - 1e-9)
            ruled_out += ruled.bound_s >= below
            assert left.bound_s < above
    assert ruled_out > 5, ruled_out


@pytest.mark.parametrize("fix", ["schedule=zbv", "schedule=interleaved"])
def test_even_splits_of_several_layer_classes(fix: str) -> None:
    compared = 0
    for seed in range(24):
        for space in tight(seed, (fix, "chunks=2"), layers=6, mixed=True):
            splits = even_splits(space)
            best_s = best_of(space, tuple(itertools.pairwise(space.even)))
            outcome = (
                PathGame(space).play(best_s * 1.2, splits, thorough=True) if best_s < float("inf") else None
            )
            if outcome is None:
                continue
            assert outcome.bound_s <= best_s * (1 + 1e-9), (seed, space.degrees.label())
            assert outcome.columns is not None and outcome.step_time_s >= best_s * (1 - 1e-9)
            compared += 1
    assert compared > 10, compared


@pytest.mark.parametrize("fix", ["schedule=1f1b", "schedule=zb-h1"])
def test_cuts_of_several_layer_classes(fix: str) -> None:
    """The best of all cuts is left among the places that may beat a little more than it."""
    compared = narrowed = 0
    for seed in range(40):
        for space in tight(seed, (fix, "chunks=1"), layers=6, mixed=True):
            best_s, best = float("inf"), ()
            for cut in all_cuts(space.layers, space.degrees.stages):
                each = [space.recipe(stage, span) for stage, span in enumerate(cut)]
                columns = tuple(column for column in each if column is not None)
                if len(columns) == len(cut) and (step_s := space.replay(columns).step_time_s) < best_s:
                    best_s, best = step_s, cut
            if not best:
                continue
            cuts = bounds_of(space).cuts.within(best_s * 1.05)
            assert cuts is not None, (seed, space.degrees.label())
            outcome = PathGame(space).play_cuts(best_s * 1.05, cuts, thorough=True)
            assert outcome.bound_s <= best_s * (1 + 1e-9), (seed, space.degrees.label())
            assert outcome.columns is not None and outcome.step_time_s >= best_s * (1 - 1e-9)
            compared += 1
            if outcome.places is not None:
                assert all((a, b - a) in own for (a, b), own in zip(best, outcome.places, strict=True))
                every = sum(len(ends) for s in range(2) for ends in space.spans(s, None))
                narrowed += sum(map(len, outcome.places)) < every
    assert compared > 12 and narrowed > compared / 4, (compared, narrowed)


@pytest.mark.parametrize("fix", ["schedule=zbv", "schedule=1f1b"])
def test_a_mix_is_left_out_only_where_another_is_no_worse_at_any_moment(fix: str) -> None:
    """In seconds and bytes, those of a pass included, which are below 0 where not all gradients exist."""
    chunks = "chunks=1" if fix == "schedule=1f1b" else "chunks=2"
    left_out = 0
    for seed in range(24):
        for space in tight(seed, (fix, chunks), layers=6):
            for rank, stages in enumerate(space.stages_of):
                mixes = space.mixes[rank]
                for held in space.all_held(rank, [(1, max(2, space.layers - 1)) for _ in stages]):
                    each = [mixes.figures(held.span)]
                    for flight in held.flights:
                        each += [column[:, None] for column in mixes._all_bytes(held.span, flight)]
                    figures = np.concatenate(each, axis=1)
                    kept = mixes.useful(held)
                    for number in set(range(len(figures))) - set(kept.tolist()):
                        assert (figures[kept] <= figures[number]).all(axis=1).any()
                        left_out += 1
    assert left_out > 10, left_out
