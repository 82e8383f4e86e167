"""Floors of all ranks at once, and what of their memory limits blocks: nothing that fits is ruled out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from planner.cost.memory.activations import most_waits
from planner.job.engine_settings import Engine
from planner.model.sublayer import Recompute
from planner.search.programme.stage_options import Column
from planner.search.programme.stages import StageSpace
from planner.strategy.schedule.schedules import in_flight
from tests.planner.rank_samples import bounds_of, own_s
from tests.planner.small_shapes import PIPES, Columns, assignments, drawn_shapes, sizes_around, tightened

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"lora": True},
    {"mixed": True},
    {"engine": Engine.MEGATRON},
    {"engine": Engine.DEEPSPEED},
    {"engine": Engine.DEEPSPEED, "lora": True},
)


def cases(pipe: tuple[str, int], seeds: range) -> Iterator[tuple[str, StageSpace]]:
    """Shapes of which it is known what ranks hold, with tight memory, and what they are."""
    for kind, seed in itertools.product(KINDS, seeds):
        for space in drawn_shapes(seed, pipe, **kind):
            if bounds_of(space).ranks.parts.bounded:
                share = (0.0, 0.3, 0.7)[seed % 3]
                yield f"{seed} {kind} {space.degrees.label()}", tightened(space, share)


def held_by_option(space: StageSpace, rank: int, columns: Columns) -> np.ndarray:  # type: ignore[type-arg]
    """Blocks of a rank [place, option]."""
    options = space.books[rank].options
    each = (columns[s].stage.recompute for s in space.stages_of[rank])
    return np.asarray([[getattr(own, option.value) for option in options] for own in each])


@pytest.mark.parametrize("pipe", PIPES)
def test_what_fits_keeps_every_row(pipe: tuple[str, int]) -> None:
    """Of every way, rank and moment, whatever sizes stages may have; and tight memory nearly fills some."""
    draw, compared, fullest = random.Random(str(pipe)), 0, []
    for name, space in cases(pipe, range(4)):
        for columns in assignments(space, draw, 5):
            every = bounds_of(space).sizes(float("inf"))
            assert every is not None
            own = (sizes_around(space, columns, about).stages for about in (None, draw))
            for limits in (every.stages, *own):
                held, free = bounds_of(space).ranks.parts.rows(limits)
                shares = np.zeros(free.shape)
                for rank in range(space.degrees.pp):
                    blocks = held_by_option(space, rank, columns)
                    used = (held[:, rank] * blocks).sum(axis=(-2, -1))
                    assert (used <= free[:, rank] * (1 + 1e-9)).all(), (name, rank, blocks.tolist())
                    shares[:, rank] = used / free[:, rank]
            fullest.append(float(shares.max()))
            compared += 1
    assert compared > 20, compared
    assert sum(share > 0.97 for share in fullest) > compared / 8, sorted(fullest)


@pytest.mark.parametrize("pipe", PIPES)
def test_the_moments_are_those_of_the_table(pipe: tuple[str, int]) -> None:
    """Of every rank; where one has fewer, its last again."""
    for _, space in cases(pipe, range(2)):
        d, settings = space.degrees, space.model.problem.engine_settings
        flights = in_flight(d.schedule, d.pp, d.chunks, d.num_micro_batches, most_waits(settings, d))
        alive, waiting, begun, messages = bounds_of(space).ranks.parts.moments
        for rank, stages in enumerate(space.stages_of):
            own = [*flights[rank], *flights[rank][-1:] * (alive.shape[1] - len(flights[rank]))]
            for number, moment in enumerate(own):
                each = [moment[s] for s in stages]
                assert alive[rank, number].tolist() == [flight.alive for flight in each]
                assert waiting[rank, number].tolist() == [flight.waiting for flight in each]
                assert begun[rank, number].tolist() == [flight.begun for flight in each]
                assert messages[rank, number] == each[0].messages


@pytest.mark.parametrize("pipe", PIPES)
def test_no_rank_that_fits_takes_less_than_its_floor(pipe: tuple[str, int]) -> None:
    """Whatever its stages hold; and tight memory makes some floors greater than without it."""
    draw, compared, forced = random.Random(str(pipe)), 0, 0
    for name, space in cases(pipe, range(4)):
        least_s = bounds_of(space).ranks.parts_s(space.layers)
        for columns in assignments(space, draw, 4):
            for rank, stages in enumerate(space.stages_of):
                held = {s: columns[s].stage for s in stages}
                blocks = sum(stage.layers for stage in held.values())
                spent_s = own_s(space, rank, held)
                assert least_s[rank, blocks] <= spent_s * (1 + 1e-9), (name, rank, held)
                free_s = blocks * space.block_s[rank] + space.held_s[rank]
                compared, forced = compared + 1, forced + (free_s * (1 + 1e-6) < least_s[rank, blocks])
    assert compared > 60 and forced > compared / 5, (compared, forced)


@pytest.mark.parametrize("kind", KINDS)
def test_the_floor_of_many_blocks_is_nearly_what_their_stage_takes(kind: dict[str, Any]) -> None:
    """Where a rank has one stage its fastest recipe is known, and of many blocks a part of one is little."""
    compared = near = forced = 0
    for seed in range(8):
        for roomy in drawn_shapes(
            seed, (("1f1b", 1), ("gpipe", 1))[seed % 2], pp=(2,), each=(12, 16), **kind
        ):
            space = tightened(roomy, (0.05, 0.15, 0.3, 0.6)[seed % 4])
            if not bounds_of(space).ranks.parts.bounded:
                continue
            least_s = bounds_of(space).ranks.parts_s(space.layers)
            for rank, blocks in itertools.product(range(2), range(1, space.layers - 1)):
                column = space.recipe(rank, space.span(rank, blocks))
                if column is None:
                    continue
                spent_s = column.whole_s(space.degrees.schedule)
                assert least_s[rank, blocks] <= spent_s * (1 + 1e-9), (seed, rank, blocks)
                compared, near = compared + 1, near + (least_s[rank, blocks] > 0.97 * spent_s)
                forced += column.stage.recompute.none < blocks
    assert compared > 60 and forced > compared / 8 and near > compared / 4, (compared, forced, near)


def test_the_least_sum_is_that_of_the_best_places() -> None:
    """By trying all ways to lay so many blocks in places that have room for them."""
    draw, compared = random.Random(5), 0
    for pipe, seed in itertools.product((("interleaved", 3), ("zbv", 2), ("interleaved", 2)), range(4)):
        for space in drawn_shapes(seed, pipe, pp=(2,), each=(1, 2)):
            alive, parts = bounds_of(space).ranks.parts.moments.alive, bounds_of(space).ranks.parts
            each = np.asarray([draw.uniform(0, 9) for _ in range(alive.size)]).reshape(alive.shape)
            highs = [[space.size_limits[s][1] for s in stages] for stages in space.stages_of]
            most = min(sum(high) for high in highs)
            found = parts._least_sum(each, np.arange(most + 1))
            for rank, high in enumerate(highs):
                ways = list(itertools.product(*(range(n + 1) for n in high)))
                for blocks, moment in itertools.product(range(most + 1), range(alive.shape[1])):
                    sums = (
                        sum(n * own for n, own in zip(way, each[rank, moment].tolist(), strict=True))
                        for way in ways
                        if sum(way) == blocks
                    )
                    assert found[rank, moment, blocks] == pytest.approx(min(sums), abs=1e-9)
                    compared += 1
    assert compared > 300, compared


def pure_columns(space: StageSpace, stage: int, sizes: range) -> dict[tuple[int, Recompute], Column]:
    """A stage's recipes of one option by size."""
    book = space.books[space.rank_of[stage]]
    return {
        (size, option): column
        for size in sizes
        for option, column in zip(book.options, book.pure(*space.span(stage, size)), strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_blocks_and_ends_make_those_of_stages(kind: dict[str, Any]) -> None:
    """A stage's states, and what it keeps of a micro-batch, are those of its blocks and of its ends."""
    for seed in range(4):
        for space in drawn_shapes(seed, ("1f1b", 1), each=(2, 3), **kind):
            for stage, rank in enumerate(space.rank_of):
                known, ends = space.books[rank].block_bytes, (stage == 0, stage == space.degrees.stages - 1)
                if not space.books[rank].bounded or space.layers < 4:
                    continue
                for (size, option), column in pure_columns(space, stage, range(1, 4)).items():
                    for begun in (False, True):
                        resident, saved, _ = known.ends(*ends, begun=begun)
                        late = 0.0 if begun else column.late_bytes
                        states = known.states - (0.0 if begun else known.late)
                        assert resident + size * states == pytest.approx(column.resident_bytes - late)
                        assert saved + size * known.saved[option] == pytest.approx(column.cost.saved_bytes)
                    assert size * known.waiting[option] == pytest.approx(column.cost.waiting_bytes)
