"""What blocks add at least to the actions of their stages, and what the ends add, frozen weights included."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from planner.job.engine_settings import Engine
from planner.model.sublayer import Recompute
from planner.search.programme.stage_options import LeastPasses, least_passes, option_passes
from planner.strategy.strategy import Stage
from tests.planner.brute_force import mixes_of
from tests.planner.small_shapes import drawn_shapes

KINDS: tuple[dict[str, Any], ...] = tuple(
    {"engine": engine, "lora": lora} for engine, lora in itertools.product(Engine, (False, True))
)


@pytest.mark.parametrize("kind", KINDS)
def test_no_stage_takes_less_than_its_blocks_and_ends_with_their_options(kind: dict[str, Any]) -> None:
    """Of no kind of action, for any mix of options; whole passes take just that."""
    compared = equal = 0
    for seed in range(4):
        for space in drawn_shapes(seed, ("zb-h1", 1), pp=(2,), each=(2, 3), **kind):
            book, shape = space.books[0], space.books[0].shape
            (key,), every = shape.classes, book.options
            options, least = option_passes(shape, key, every), book.least_passes
            for first, end in ((0, 2), (0, 3), (1, 2), (1, 4), (space.layers - 2, space.layers)):
                ends = least.stage_s(first, end) - (end - first) * options.min(axis=0)
                for stage in mixes_of(first, end):
                    counts = [getattr(stage.recompute, option.value) for option in every]
                    bound = ends + np.asarray(counts) @ options
                    passes = np.asarray(book.column(stage).passes_s)
                    assert (bound <= passes * (1 + 1e-9) + 1e-15).all(), (seed, stage)
                    assert (least.stage_s(first, end) <= passes * (1 + 1e-9) + 1e-15).all(), (seed, stage)
                    compared += 1
                    equal += bool((bound[:2] >= passes[:2] * (1 - 1e-9)).all())
    assert compared > 100 and equal == compared, (compared, equal)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", list(Recompute))
def test_the_least_passes_of_one_option_are_those_of_its_stages(
    kind: dict[str, Any], option: Recompute
) -> None:
    """Where a stage's blocks have that option alone, or the others are left out."""
    compared = 0
    for seed in range(3):
        for space in drawn_shapes(seed, ("1f1b", 1), pp=(2,), each=(2, 3), **kind):
            book = space.books[0]
            alone: LeastPasses = least_passes(book.shape, (option,))
            every = least_passes(book.shape, book.options)
            for first, end in itertools.combinations(range(space.layers + 1), 2):
                stage: Stage = book.pure(first, end)[book.options.index(option)].stage
                passes, own = np.asarray(book.column(stage).passes_s), alone.stage_s(first, end)
                assert (own <= passes * (1 + 1e-9) + 1e-15).all(), (seed, first, end)
                assert own[:2] == pytest.approx(passes[:2], rel=1e-9), (seed, first, end)
                assert (every.stage_s(first, end) <= own * (1 + 1e-9) + 1e-15).all()
                compared += 1
    assert compared > 20, compared


@pytest.mark.parametrize("kind", KINDS)
def test_many_stages_at_once_take_what_each_does(kind: dict[str, Any]) -> None:
    for space in drawn_shapes(7, ("1f1b", 1), **kind):
        least = space.books[0].least_passes
        spans = list(itertools.combinations(range(space.layers + 1), 2))
        firsts, ends = np.asarray(spans).T
        together = least.stage_s(firsts, ends)
        for number, span in enumerate(spans):
            assert together[:, number] == pytest.approx(least.stage_s(*span), rel=1e-12)
