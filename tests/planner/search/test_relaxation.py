"""Stages in fractions of blocks: a bound that no assignment beats, and how near to the best it comes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from planner.job.engine_settings import Engine
from planner.search.bounds.relaxation import Whole
from planner.search.bounds.timed import MAX_PLACES, LinearProgramme, Solution, timed
from planner.search.programme.partition import Dealer
from planner.search.programme.stages import Sizes, StageSpace
from planner.strategy.schedule.longest_path import action_order
from tests.planner.brute_force import all_cuts
from tests.planner.rank_samples import best_of, bounds_of
from tests.planner.small_shapes import (
    PIPES,
    ROOMY,
    assignments,
    drawn_shapes,
    sizes_around,
    tightened,
    with_limits,
)

ANY = float("inf")
DUST = 1e-9
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"lora": True},
    {"mixed": True},
    {"engine": Engine.TORCHTITAN},
    {"engine": Engine.MEGATRON},
    {"engine": Engine.DEEPSPEED},
    {"engine": Engine.MEGATRON, "lora": True},
)
"""Engines, frozen weights, and devices of two kinds."""
AMPLE = 3.0
FEW = 6
"""Stages up to which blocks are whole here: that takes long."""


def cases(pipe: tuple[str, int], seeds: range, **drawn: Any) -> Iterator[tuple[str, StageSpace]]:
    """Shapes of every kind with tight and ample memory, and what they are."""
    for (number, kind), seed in itertools.product(enumerate(KINDS), seeds):
        share = (0.1, 0.5, AMPLE)[(number + seed) % 3]
        for space in drawn_shapes(seed, pipe, **kind, **drawn):
            yield f"{seed} {kind} {share} {space.degrees.label()}", tightened(space, share)


def every_size(space: StageSpace) -> Sizes:
    """All sizes of a space."""
    sizes = bounds_of(space).sizes(ANY)
    assert sizes is not None
    return sizes


def sizes_of(space: StageSpace, deal: tuple[int, ...]) -> Sizes:
    """The sizes of one deal alone."""
    ranks = (sum(deal[s] for s in stages) for stages in space.stages_of)
    return Sizes(tuple((n, n) for n in deal), tuple((n, n) for n in ranks))


@pytest.mark.parametrize("pipe", PIPES)
def test_no_assignment_that_fits_takes_less_than_the_bound(pipe: tuple[str, int]) -> None:
    """Of all sizes, and of those near its own: after no replay and after some, in fractions and whole."""
    draw, compared, near = random.Random(str(pipe)), 0, 0
    for name, space in cases(pipe, range(2)):
        sizes, ways = every_size(space), [(0, None), (3, None)]
        whole = [(1, Whole(20))] if space.degrees.stages <= FEW else []
        all_s = max(bounds_of(space).relaxation.within(ANY, sizes, *way).bound_s for way in (*ways, *whole))
        for columns in assignments(space, draw, 4):
            step_s = space.replay(columns).step_time_s
            assert all_s <= step_s * (1 + DUST), name
            for about in (None, draw):
                own = sizes_around(space, columns, about)
                bound_s = max(bounds_of(space).relaxation.within(ANY, own, *way).bound_s for way in ways)
                assert bound_s <= step_s * (1 + DUST), (name, own)
                near += bound_s > 0.9 * step_s
                compared += 1
    assert compared > 80 and near > compared / 8, (compared, near)


@pytest.mark.parametrize("pipe", PIPES)
def test_the_best_of_every_deal_is_not_less_than_its_bound_and_near_to_it(pipe: tuple[str, int]) -> None:
    """By trying all mixes of all deals of few blocks, models of three layers among them; and memory that
    makes some recompute is felt."""
    each, compared, felt, nearer, reached = ((1, 3), (1, 2), (1, 1))[pipe[1] - 1], 0, 0, 0, 0.0
    for name, space in cases(pipe, range(3), pp=(2,), each=each):
        best_s = ANY
        for cut in all_cuts(space.layers, space.degrees.stages):
            deal = tuple(end - first for first, end in cut)
            if any(not low <= n <= high for n, (low, high) in zip(deal, space.size_limits, strict=True)):
                continue
            least_s = best_of(space, tuple(space.span(s, n) for s, n in enumerate(deal)))
            best_s = min(best_s, least_s)
            bound_s = bounds_of(space).relaxation.within(ANY, sizes_of(space, deal), 3).bound_s
            assert bound_s <= least_s * (1 + DUST), (name, deal)
        whole_s = bounds_of(space).relaxation.within(ANY, every_size(space), 6, Whole(500)).bound_s
        assert whole_s <= best_s * (1 + DUST), name
        near_s = bounds_of(space).relaxation.within(1.001 * best_s, every_size(space), 6, Whole(500)).bound_s
        assert best_s == ANY or near_s <= best_s * (1 + DUST), name
        if len(action_order(space.table).needed) <= MAX_PLACES:
            exact = timed(bounds_of(space).relaxation.rows, every_size(space), None)
            exact_s = ANY if exact is None else exact.least_s + space.optimizer_s
            assert exact_s <= best_s * (1 + DUST), name
            nearer += best_s < ANY and exact_s > 1.001 * whole_s
        if best_s < ANY:
            compared += 1
            reached += whole_s / best_s
            free = with_limits(space, [float(ROOMY)] * space.degrees.pp)
            free_s = bounds_of(free).relaxation.within(ANY, every_size(space), 6).bound_s
            felt += bounds_of(space).relaxation.within(ANY, every_size(space), 6).bound_s > 1.01 * free_s
    assert compared > 12 and reached > 0.7 * compared, (compared, reached / compared)
    assert felt > compared / 8, (compared, felt)
    assert nearer > 0, compared


@pytest.mark.parametrize("pipe", PIPES)
def test_where_nothing_recomputes_the_bound_of_a_deal_is_nearly_its_replay(pipe: tuple[str, int]) -> None:
    """Paths along rows alone are near where backward passes are whole; a few replays bring the others."""
    compared, first, split = 0, 0.0, pipe[0] in ("zb-h1", "zbv", "dualpipev")
    for seed in range(10):
        for roomy in drawn_shapes(seed, pipe, pp=(2, 4), each=(2, 2)):
            space = tightened(roomy, AMPLE)
            deal = tuple(b - a for a, b in itertools.pairwise(space.even))
            columns = Dealer(space).columns(deal)
            assert columns is not None and not any(c.stage.recompute.full for c in columns)
            step_s = space.replay(columns).step_time_s
            rows_s, bound_s = (
                bounds_of(space).relaxation.within(ANY, sizes_of(space, deal), n).bound_s for n in (0, 8)
            )
            assert rows_s >= (0.6 if split else 0.97) * step_s, (seed, space.degrees.label())
            assert 0.99 * step_s <= bound_s <= step_s * (1 + DUST), (seed, space.degrees.label())
            compared, first = compared + 1, first + bound_s / step_s
    assert compared >= 10 and first > 0.998 * compared, first / compared


@pytest.mark.parametrize("pipe", PIPES)
def test_whole_blocks_of_a_deal_with_room_take_just_its_replay(pipe: tuple[str, int]) -> None:
    """But for what ends gather and reduce, and how torch divides a pass back: every path is in the programme.
    No deal beats the optimum of all, which one nearly reaches."""
    compared = 0
    for seed in range(8):
        for roomy in drawn_shapes(seed, pipe, pp=(2,), each=(2, 2)):
            space = tightened(roomy, AMPLE)
            if len(action_order(space.table).needed) > MAX_PLACES:
                continue
            columns = Dealer(space).columns(tuple(b - a for a, b in itertools.pairwise(space.even)))
            assert columns is not None
            own = timed(
                bounds_of(space).relaxation.rows, sizes_of(space, tuple(c.layers for c in columns)), None
            )
            assert own is not None
            step_s = space.replay(columns).step_time_s
            assert 0.98 * step_s <= own.least_s + space.optimizer_s <= step_s * (1 + DUST)
            best = timed(bounds_of(space).relaxation.rows, every_size(space), None)
            assert best is not None and best.blocks is not None and best.least_s <= own.least_s * (1 + DUST)
            found = Dealer(space).columns(tuple(int(n) for n in best.blocks))
            assert found is not None
            found_s = space.replay(found).step_time_s
            assert 0.95 * found_s <= best.least_s + space.optimizer_s <= found_s * (1 + DUST)
            compared += 1
    assert compared >= 4, compared


@pytest.mark.parametrize("chunks", [2, 3])
def test_the_bound_of_equal_ranks_of_an_interleaved_table_is_near_the_even_split(chunks: int) -> None:
    """Although blocks may lie on any of a rank's stages, and in fractions."""
    shares = []
    for seed in range(14):
        for roomy in drawn_shapes(seed, ("interleaved", chunks), pp=(2, 4), each=(2, 2)):
            space = tightened(roomy, AMPLE)
            columns = Dealer(space).columns(tuple(b - a for a, b in itertools.pairwise(space.even)))
            assert columns is not None
            held = space.layers // space.degrees.pp
            sizes = Sizes(every_size(space).stages, ((held, held),) * space.degrees.pp)
            shares.append(
                bounds_of(space).relaxation.within(ANY, sizes, 8).bound_s / space.replay(columns).step_time_s
            )
    assert min(shares) > 0.88 and sum(shares) / len(shares) > 0.96, shares


@pytest.mark.parametrize("pipe", PIPES)
def test_more_replays_and_whole_blocks_never_lower_the_bound(pipe: tuple[str, int]) -> None:
    """Each asked of the shape afresh; some raise it."""
    raised = wholly = compared = 0
    each = (1, 2) if pipe[1] == 1 else (1, 1)
    for name, space in cases(pipe, range(1, 3), pp=(2, 3), each=each):

        def bound_s(rounds: int, nodes: int = 0, of: StageSpace = space) -> float:
            afresh = with_limits(of, list(of.limits_bytes))
            return (
                bounds_of(afresh)
                .relaxation.within(ANY, every_size(afresh), rounds, Whole(nodes) if nodes else None)
                .bound_s
            )

        found = [bound_s(rounds) for rounds in (0, 1, 2, 4, 8)]
        whole_s = bound_s(2, 30)
        assert found == sorted(found), (name, found)
        assert whole_s >= found[2], (name, whole_s, found[2])
        compared += 1
        raised += found[-1] > found[0] * 1.001
        wholly += whole_s > found[2] * 1.001
    assert compared >= len(KINDS) and raised + wholly > compared / 4, (compared, raised, wholly)


@pytest.mark.parametrize("pipe", PIPES)
def test_what_nothing_fits_into_is_infinite(pipe: tuple[str, int]) -> None:
    """Memory of which the states and ends alone take more; but none that some assignment fits into."""
    draw, infinite, finite = random.Random(str(pipe)), 0, 0
    for name, space in cases(pipe, range(1), pp=(2,), each=(2, 3)):
        sizes = every_size(space)
        if bounds_of(space).ranks.parts.bounded:
            least = [space.books[rank].shape.runtime_bytes * 1.001 for rank in range(space.degrees.pp)]
            assert bounds_of(with_limits(space, least)).relaxation.within(ANY, sizes, 2).bound_s == ANY, name
            infinite += 1
        if next(assignments(space, draw, 4), None) is not None:
            assert bounds_of(space).relaxation.within(ANY, sizes, 2, Whole(20)).bound_s < ANY, name
            finite += 1
    assert infinite >= 4 and finite >= 4, (infinite, finite)


@pytest.mark.parametrize("pipe", PIPES)
def test_a_relaxation_that_cannot_beat_a_time_says_so_and_no_more(pipe: tuple[str, int]) -> None:
    for name, space in cases(pipe, range(1)):
        sizes = every_size(space)
        bound_s = bounds_of(space).relaxation.within(ANY, sizes, 0).bound_s
        if bound_s < ANY:
            assert (
                bounds_of(space).relaxation.within(bound_s * 0.9, sizes, 2, Whole(20)).bound_s
                == bound_s * 0.9
            ), name
            assert bounds_of(space).relaxation.within(bound_s * 1.1, sizes, 0).bound_s == pytest.approx(
                bound_s, rel=1e-5
            ), name


@pytest.mark.parametrize("pipe", PIPES)
def test_the_same_shape_has_the_same_relaxation(pipe: tuple[str, int]) -> None:
    """To the last digit, the blocks that nearly reach it included; and these are as many as the model's."""
    for name, space in cases(pipe, range(1), pp=(2,), each=(1, 2)):
        sizes = every_size(space)
        first, second = (
            bounds_of(with_limits(space, list(space.limits_bytes))).relaxation.within(
                ANY, sizes, 3, Whole(30)
            )
            for _ in range(2)
        )
        assert first.bound_s == second.bound_s, name
        assert (first.blocks is None) == (second.blocks is None), name
        if first.blocks is not None and second.blocks is not None:
            assert first.blocks.tolist() == second.blocks.tolist(), name
            assert sum(first.blocks) == pytest.approx(space.layers), name


def test_no_row_is_added_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS may break a row by as much as its tolerance, however often it is there."""
    solved, rows = LinearProgramme.solved, []

    def counted(programme: LinearProgramme) -> Solution | None:
        rows.append(programme._highs.getNumRow())
        assert len(rows) < 100
        return solved(programme)

    monkeypatch.setattr(LinearProgramme, "solved", counted)
    (roomy,) = drawn_shapes(0, ("interleaved", 3), engine=Engine.MEGATRON)
    space = tightened(roomy, 0.5)
    for rounds, whole in ((0, None), (3, None), (0, Whole(20))):
        assert bounds_of(space).relaxation.within(ANY, every_size(space), rounds, whole).bound_s < ANY


class GivesUp:
    """HiGHS that does not know after its first run."""

    def __init__(self, highs: Any) -> None:
        self.highs, self.runs = highs, 0

    def run(self) -> None:
        self.runs += 1
        self.highs.run()

    def getModelStatus(self) -> Any:  # noqa: N802
        import highspy

        return highspy.HighsModelStatus.kUnknown if self.runs == 1 else self.highs.getModelStatus()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.highs, name)


@pytest.mark.parametrize("most", [1.0, 3.0])
def test_where_the_dual_simplex_gives_up_the_other_one_answers(most: float) -> None:
    """Two variables add up to two, and to `most` at most. The strategies are HiGHS's own again then."""
    import highspy
    import numpy as np

    linear = LinearProgramme(np.ones((1, 2)), np.asarray([2.0]), np.asarray([2.0]))
    linear.add(np.asarray([[1.0, 1.0, 0.0]]), np.asarray([most]))
    linear.add(np.asarray([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]]), np.zeros(2))
    linear._highs = GivesUp(linear._highs)
    found = linear.solved()
    assert (found is not None and abs(found.least - 1.0) < 1e-6) if most >= 2 else found is None
    assert linear._highs.runs == 2
    usual = highspy.Highs()
    for name in ("simplex_strategy", "simplex_scale_strategy"):
        assert linear._highs.getOptionValue(name) == usual.getOptionValue(name)
