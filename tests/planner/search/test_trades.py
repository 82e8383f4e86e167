"""Trades of recomputation between the stages of a rank: what they change and gain, and that they fit."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest

from planner.cost.replay import critical_path
from planner.search.programme import partition as deal
from planner.search.programme.partition import Dealer, Trade, trades
from planner.search.programme.stages import StageSpace
from planner.strategy.strategy import RecomputeCounts
from tests.planner.small_shapes import PIPES, Columns, assignments, drawn_shapes, held_fits, tightened

SEVERAL = tuple(pipe for pipe in PIPES if pipe[1] > 1)


def cases(pipe: tuple[str, int], seeds: range) -> Iterator[tuple[int, StageSpace]]:
    """Shapes whose memory makes them recompute some, but not all."""
    for seed in seeds:
        for space in drawn_shapes(seed, pipe, mixed=seed % 4 == 3, lora=seed % 4 == 2, each=(2, 3)):
            yield seed, tightened(space, (0.2, 0.4, 0.6)[seed % 3])


def traded(columns: Columns, trade: Trade) -> Columns:
    """The recipes after a trade."""
    chosen = dict(enumerate(columns)) | dict(zip(trade.stages, trade.columns, strict=True))
    return tuple(chosen[s] for s in range(len(columns)))


def shifts(before: RecomputeCounts, after: RecomputeCounts) -> dict[str, int]:
    """How many blocks more or fewer of each option, where there are any."""
    each = {name: getattr(after, name) - getattr(before, name) for name in ("none", "selective", "full")}
    return {name: n for name, n in each.items() if n}


@pytest.mark.parametrize("pipe", SEVERAL)
def test_a_trade_moves_one_block_of_two_stages_of_a_rank(pipe: tuple[str, int]) -> None:
    """From one option to another, of one stage to less recomputation, of the other to more."""
    draw, compared = random.Random(str(pipe)), 0
    less = {("full", "selective"), ("selective", "none"), ("full", "none")}
    for _, space in cases(pipe, range(8)):
        for columns in assignments(space, draw, 3):
            path = critical_path(space.replay(columns), space.hop_s)
            for trade in trades(columns, path.counts, space.stages_of, space.books):
                one, other = trade.stages
                assert one != other and {one, other} <= set(space.stages_of[trade.rank])
                assert trade.gain_s > 0
                moves = set()
                for s, column in zip(trade.stages, trade.columns, strict=True):
                    before, after = columns[s].stage, column.stage
                    assert (before.first, before.end) == (after.first, after.end)
                    shift = shifts(before.recompute, after.recompute)
                    (source,), (target,) = (
                        [name for name, n in shift.items() if n == sign] for sign in (-1, 1)
                    )
                    assert len(shift) == 2
                    moves.add((s, (source, target) in less))
                    assert column is space.books[trade.rank].column(after)
                assert moves == {(one, True), (other, False)}
                compared += 1
    assert compared > 100, compared


@pytest.mark.parametrize("pipe", SEVERAL)
def test_a_trade_gains_what_the_longest_path_gets_shorter(pipe: tuple[str, int]) -> None:
    """The path's length before and after, and those that gain most come first."""
    draw, compared = random.Random(str(pipe)), 0
    for seed, space in cases(pipe, range(8)):
        for columns in assignments(space, draw, 3):
            path = critical_path(space.replay(columns), space.hop_s)

            def length_s(of: Columns, counts: np.ndarray = path.counts) -> float:  # type: ignore[type-arg]
                return float((counts * np.asarray([column.passes_s for column in of])).sum())

            found = trades(columns, path.counts, space.stages_of, space.books)
            assert [trade.gain_s for trade in found] == sorted((t.gain_s for t in found), reverse=True)
            whole_s = length_s(columns)
            for trade in found:
                gain_s = whole_s - length_s(traded(columns, trade))
                assert trade.gain_s == pytest.approx(gain_s, abs=1e-9 * whole_s), (seed, trade)
                compared += 1
    assert compared > 100, compared


@pytest.mark.parametrize("pipe", SEVERAL)
def test_no_trade_that_shortens_the_path_is_missed(pipe: tuple[str, int]) -> None:
    """As many as there are among all pairs of a rank's stages and of moves between options."""
    draw, compared = random.Random(str(pipe)), 0
    names = ("none", "selective", "full")
    for _, space in cases(pipe, range(4)):
        for columns in assignments(space, draw, 2):
            counts = critical_path(space.replay(columns), space.hop_s).counts
            expected = 0
            for book, stages in zip(space.books, space.stages_of, strict=True):
                gains: dict[tuple[int, bool], list[float]] = {}
                for s, (before, after) in itertools.product(stages, itertools.permutations(range(3), 2)):
                    each = [getattr(columns[s].stage.recompute, name) for name in names]
                    if each[before]:
                        each[before], each[after] = each[before] - 1, each[after] + 1
                        options = RecomputeCounts(none=each[0], selective=each[1], full=each[2])
                        stage = columns[s].stage
                        changed = book.column(dataclasses.replace(stage, recompute=options))
                        times = zip(columns[s].passes_s, changed.passes_s, strict=True)
                        gain_s = sum(n * (a - b) for n, (a, b) in zip(counts[s].tolist(), times, strict=True))
                        gains.setdefault((s, after < before), []).append(gain_s)
                for one, other in itertools.permutations(stages, 2):
                    pairs = itertools.product(gains.get((one, True), []), gains.get((other, False), []))
                    expected += sum(a + b > 0 for a, b in pairs)
            assert len(trades(columns, counts, space.stages_of, space.books)) == expected
            compared += expected
    assert compared > 40, compared


@pytest.mark.parametrize("pipe", SEVERAL)
def test_the_best_deal_with_trades_is_no_slower_and_fits(
    pipe: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its time is that of its replay; some are faster."""
    compared = faster = 0
    for seed, space in cases(pipe, range(30)):
        even = tuple(b - a for a, b in itertools.pairwise(space.even))
        found = Dealer(space).best(even, float("inf"))
        with monkeypatch.context() as patched:
            patched.setattr(deal, "trades", lambda *_: [])
            without = Dealer(space).best(even, float("inf"))
        assert (found is None) == (without is None)
        if found is None or without is None:
            continue
        columns, step_s = found
        assert held_fits(space, columns), (seed, space.degrees.label())
        assert step_s == pytest.approx(space.replay(columns).step_time_s, rel=1e-12)
        assert step_s <= without[1], (seed, space.degrees.label())
        assert sum(column.layers for column in columns) == space.layers
        compared += 1
        faster += step_s < without[1]
    assert compared > 12 and faster >= 1, (compared, faster)
