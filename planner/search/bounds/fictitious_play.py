"""What the ranks of a pipeline may hold and how it is chosen: one choice of each, of all blocks together.

A choice has a place: so many blocks, which lie anywhere where blocks are of one class, and begin at a layer
where they are of several. The least sums over ranks follow from those of fewer ranks, by the layer at which
they end.

The best recipes of one shape and how good they may be: a game of paths against recipes.

The length of any path through a table's graph bounds every replay from below
(planner.cost.replay),
and so does a mixture of paths. With W[s, k] its mean count of figure k of stage s (passes by kind, gathering,
reduction, optimizer), h its mean number of messages,

    step  >=  min over recipes of  sum over s, k of W[s, k] t[s, k]  +  h x message  +  clipping.

Ranks share nothing but the number of blocks: the minimum takes each rank's best way to hold n blocks within
its memory, and a sum over ranks of all blocks. Those recipes are replayed; their longest path joins the
mixture, with ever less weight (fictitious play, Brown 1951). The bounds rise, the replays fall, both towards
the value of the game, which is below the best step time by what mixing recipes would gain.

Only recipes that may beat a step time take part. Where the bound reaches that time, none of them does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple

from planner.cost.replay import Replay, critical_path
from planner.search.programme.rank_options import FIGURES, OPTIMIZER, REDUCE, UNSHARD, Held, undominated
from planner.search.programme.stage_options import Column
from planner.search.programme.stages import Sizes, Spans, StageSpace
from planner.strategy.schedule.table import KINDS

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats, Ints


Place = tuple[int | None, int]
"""The first layer (None: any) and the number of blocks."""
Fastest = dict[Place, tuple[float, int]]
"""Of each place of a rank the least seconds, and the choice that takes them."""
INFINITE = float("inf")


class Choices(NamedTuple):
    """Ways of a rank to hold its blocks: their places and figures [n, stages x FIGURES]; `columns` gives the
    recipes of a choice by its number among `numbers`."""

    places: list[Place]
    figures: Floats
    numbers: list[int]
    columns: Callable[[int], tuple[Column, ...]]

    def picked(self, place: int) -> tuple[Column, ...]:
        """The recipes of a choice by where it stands."""
        return self.columns(self.numbers[place])

    def only(self, kept: Sequence[int]) -> Choices:
        """Those that stand at some places alone."""
        places = [self.places[n] for n in kept]
        return Choices(places, self.figures[list(kept)], [self.numbers[n] for n in kept], self.columns)


def fastest_of(own_s: Floats, choices: Choices) -> Fastest:
    """The fastest choice for each place, when choices take these seconds."""
    fastest: Fastest = {}
    for number, (place, seconds) in enumerate(zip(choices.places, own_s.tolist(), strict=True)):
        if place not in fastest or seconds < fastest[place][0]:
            fastest[place] = seconds, number
    return fastest


def sums_before(ranks: Sequence[Fastest], layers: int) -> list[dict[int, float]]:
    """The least sums of the first 0, 1, ... ranks, by the layers that they hold."""
    return _sums(ranks, layers, lambda held, blocks: held)


def sums_after(ranks: Sequence[Fastest], layers: int) -> list[dict[int, float]]:
    """The least sums of all ranks, all but the first, ..., none, by the layers that they hold."""
    return _sums(ranks[::-1], layers, lambda held, blocks: layers - held - blocks)[::-1]


def _sums(ranks: Sequence[Fastest], layers: int, begins: Callable[[int, int], int]) -> list[dict[int, float]]:
    """Sums rank after rank, as far as the ranks that come can hold the rest; `begins` is the first layer of
    blocks behind layers that are held."""
    low, high = (sum(most(blocks for _, blocks in each) for each in ranks) for most in (min, max))
    sums: list[dict[int, float]] = [{0: 0.0}]
    for each in ranks:
        low -= min(blocks for _, blocks in each)
        high -= max(blocks for _, blocks in each)
        after: dict[int, float] = {}
        for held, held_s in sums[-1].items():
            for (first, blocks), (own_s, _) in each.items():
                placed, total_s = held + blocks, held_s + own_s
                if not layers - high <= placed <= layers - low or total_s >= after.get(placed, INFINITE):
                    continue
                if first is None or first == begins(held, blocks):
                    after[placed] = total_s
        sums.append(after)
    return sums


def least(ranks: Sequence[Fastest], layers: int) -> tuple[float, list[int] | None]:
    """The least sum over ranks that hold all layers, and the choice of each; None where none do."""
    before_s = sums_before(ranks, layers)
    if layers not in before_s[-1]:
        return INFINITE, None
    chosen, placed = [], layers
    for held, each in zip(reversed(before_s[:-1]), reversed(ranks), strict=True):
        left = placed
        place = min(each, key=lambda at: _with(held, at, left) + each[at][0])
        chosen.append(each[place][1])
        placed -= place[1]
    return before_s[-1][layers], chosen[::-1]


def _with(before_s: dict[int, float], place: Place, end: int) -> float:
    """The least sum of the ranks before blocks that end at a layer."""
    first, blocks = place
    return before_s.get(end - blocks, INFINITE) if first in (None, end - blocks) else INFINITE


def least_with(ranks: Sequence[Fastest], layers: int) -> list[dict[Place, float]]:
    """For each place of every rank, the least sum of all others, with which they hold all layers."""
    before_s, after_s = sums_before(ranks, layers), sums_after(ranks, layers)
    return [
        {place: _joined(before, after, place, layers) for place in each}
        for each, before, after in zip(ranks, before_s[:-1], after_s[1:], strict=True)
    ]


def _joined(before_s: dict[int, float], after_s: dict[int, float], place: Place, layers: int) -> float:
    """The least sum of the ranks before and after blocks at a place."""
    first, blocks = place
    held = before_s if first is None else {first: before_s.get(first, INFINITE)}
    return min((s + after_s.get(layers - n - blocks, INFINITE) for n, s in held.items()), default=INFINITE)


ROUNDS = 48
"""Mixtures of paths that are tried for a shape."""
MAX_REPLAYED = 400_000
"""Actions of all their replays together, beyond which there are fewer rounds."""
FEW, NEAR = 12, 0.05
"""Rounds after which a game goes on only where its bound or its best replay is as near the time to beat."""
TRIMMED = 4
"""Rounds between looks at which choices the bound leaves: with fewer, the next bounds are higher."""
OLDEST = 8
"""Rounds that a mixture counts for at most when another game goes on from it."""
MAX_SPLITS, MAX_MIXES = 600, 200_000
"""Ways to deal blocks to the stages of all ranks, and their mixes, beyond which there is no game."""

Span = tuple[int, int]
Splits = list[list[tuple[Span, ...]]]
"""Of each rank, the ways to deal blocks to its stages: of each the blocks that its stages hold."""


class _Fitting(NamedTuple):
    """Mixes of a rank's stages that fit and take less than a time: their figures, numbers and seconds."""

    within_s: float
    figures: Floats
    numbers: Ints
    own_s: Floats


class Outcome(NamedTuple):
    """What a game found: the best recipes (None: none are left), their step time, and what none beats.

    `places` are what each rank holds in recipes that may beat the time to beat.
    """

    columns: tuple[Column, ...] | None
    step_time_s: float
    bound_s: float
    places: tuple[frozenset[Place], ...] | None = None


def splits_within(space: StageSpace, sizes: Sizes) -> Splits:
    """All ways to deal blocks of one class within sizes, as the blocks that stand for those of each stage."""
    splits = []
    for stages, (low, high) in zip(space.stages_of, sizes.ranks, strict=True):
        limits = (space.size_limits[s] for s in stages)
        every = product(*(range(least, min(most, high) + 1) for least, most in limits))
        fitting = (each for each in every if low <= sum(each) <= high)
        splits.append([tuple(map(space.span, stages, each)) for each in fitting])
    return splits


def even_splits(space: StageSpace) -> Splits:
    """The even split."""
    spans = list(pairwise(space.even))
    return [[tuple(spans[s] for s in stages)] for stages in space.stages_of]


class PathGame:
    """The game of a shape on ranks with cores of their own."""

    def __init__(self, space: StageSpace) -> None:
        self.space, self.hop_s = space, space.shape.messages.p2p_s()
        self._known: dict[tuple[int, tuple[Held, ...]], _Fitting] = {}
        self._weights, self._hops, self._age = self._rows(), 0.0, 0

    def play(self, to_beat_s: float, splits: Splits, *, thorough: bool = False) -> Outcome | None:
        """The best recipes of these splits that may beat a step time; None where they are too many."""
        within_s = self.space.within_s(to_beat_s)
        if sum(map(len, splits)) > MAX_SPLITS or not all(map(self._few, range(len(splits)), splits)):
            return None
        held = [[self.space.all_held(rank, spans) for spans in each] for rank, each in enumerate(splits)]
        mixes = sum(self._count(rank, own) for rank, each in enumerate(held) for own in each)
        if mixes > MAX_MIXES:
            return None
        choices = [self._choices(rank, each, within_s) for rank, each in enumerate(held)]
        return self._played(choices, to_beat_s, thorough)

    def play_cuts(self, to_beat_s: float, cuts: list[Spans], *, thorough: bool = False) -> Outcome:
        """The same of cuts, each rank having one stage with its recipe."""
        within_s = self.space.within_s(to_beat_s)
        choices = [self._cuts(stage, spans, within_s) for stage, spans in enumerate(cuts)]
        return self._played(choices, to_beat_s, thorough)

    def _cuts(self, stage: int, spans: Spans, within_s: float) -> Choices:
        """The recipes of a stage with the layers that it may hold, those that are in time."""
        import numpy as np

        found = self.space.columns(stage, within_s, None, spans)
        rows = [[*c.passes_s, c.cost.unshard_s, c.cost.reduce_s, c.cost.optimizer_s] for c in found]
        places: list[Place] = [(column.stage.first, column.layers) for column in found]
        figures = np.asarray(rows).reshape(len(found), FIGURES)
        return Choices(places, figures, list(range(len(found))), lambda number: (found[number],))

    def _few(self, rank: int, splits: list[tuple[Span, ...]]) -> bool:
        mixes = self.space.mixes[rank]
        return all(mixes.few([end - first for first, end in spans]) for spans in splits)

    def _count(self, rank: int, held: tuple[Held, ...]) -> int:
        mixes = self.space.mixes[rank]
        return math.prod(len(mixes.useful(own)) for own in held)

    def _choices(self, rank: int, each: list[tuple[Held, ...]], within_s: float) -> Choices:
        """All ways of a rank that fit and are in time, but those that others beat in every figure."""
        import numpy as np

        places: list[Place] = []
        figures, picked = [np.zeros((0, FIGURES * len(self.space.stages_of[rank])))], []
        for held in each:
            fitting = self._fitting(rank, held, within_s)
            in_time = fitting.own_s < within_s
            figures.append(fitting.figures[in_time])
            spans = [own.span for own in held]
            numbers = fitting.numbers[in_time].tolist()
            picked += [list(zip(spans, mixes, strict=True)) for mixes in numbers]
            places += [(None, sum(end - first for first, end in spans))] * len(numbers)
        book = self.space.books[rank]

        def columns(number: int) -> tuple[Column, ...]:
            return tuple(book.mix(span, mix) for span, mix in picked[number])

        return Choices(places, np.concatenate(figures), list(range(len(picked))), columns)

    def _fitting(self, rank: int, held: tuple[Held, ...], within_s: float) -> _Fitting:
        """What fits of stages that ranks may hold, known for the longest time that was asked for."""
        import numpy as np

        mixes = self.space.mixes[rank]
        known = self._known.get((id(mixes), held))
        if known is None or known.within_s < within_s:
            numbers, own_s = mixes.fitting(held, within_s)
            figures = np.concatenate(
                [mixes.figures(own.span)[numbers[:, place]] for place, own in enumerate(held)], axis=1
            )
            kept = undominated(figures)
            known = _Fitting(within_s, figures[kept], numbers[kept], own_s[kept])
            self._known[id(mixes), held] = known
        return known

    def _played(self, choices: list[Choices], to_beat_s: float, thorough: bool) -> Outcome:
        """Round after round, until the bound meets the time to beat or the best replay.

        Goes on from the mixture of the game before, which was for another time to beat. Less than `thorough`,
        it gives up where after FEW rounds neither is near the time to beat.
        """
        space, best = self.space, None
        best_s, bound_s = float("inf"), 0.0
        for number in range(max(1, min(ROUNDS, MAX_REPLAYED // space.table.actions))):
            if not all(each.places for each in choices):
                return Outcome(best, best_s, to_beat_s)
            stages_of = zip(space.stages_of, choices, strict=True)
            own_s = [each.figures @ self._weights[stages].ravel() for stages, each in stages_of]
            fastest = list(map(fastest_of, own_s, choices))
            least_s, chosen = least(fastest, space.layers)
            fixed_s = self._hops * self.hop_s + space.shape.constants.step_s
            bound_s = max(bound_s, least_s + fixed_s)
            near = best_s < (1 + NEAR) * to_beat_s or bound_s > (1 - NEAR) * to_beat_s
            if chosen is None or bound_s >= min(to_beat_s, best_s) or not (thorough or near or number < FEW):
                break
            columns = self._columns(choices, chosen)
            replayed = space.replay(columns)
            if replayed.step_time_s < best_s:
                best, best_s = columns, replayed.step_time_s
            if number % TRIMMED == TRIMMED - 1:
                choices = _left(choices, own_s, least_with(fastest, space.layers), to_beat_s - fixed_s)
            self._mix(replayed, 2 / (self._age + 3))
            self._age += 1
        self._age = min(self._age, OLDEST)
        places = tuple(frozenset(each.places) for each in choices)
        return Outcome(best, best_s, min(bound_s, to_beat_s, best_s), places)

    def _mix(self, replayed: Replay, share: float) -> None:
        """Adds the longest path of a replay to the mixture, to a share of it."""
        counts, hops = self._path(replayed)
        self._weights = self._weights + share * (counts - self._weights)
        self._hops += share * (hops - self._hops)

    def _rows(self) -> Floats:
        """The mean of the paths along each rank's row, which have no messages."""
        import numpy as np

        space, ranks = self.space, self.space.degrees.pp
        weights = np.zeros((space.degrees.stages, FIGURES))
        weights[:, len(KINDS) :] = 1.0
        for rank in range(ranks):
            for (stage, kind), count in space.table.counts(rank).items():
                weights[stage, KINDS.index(kind)] += count
        return weights / ranks

    def _path(self, replayed: Replay) -> tuple[Floats, int]:
        """What decides a replay, as counts of every stage's figures, and messages."""
        import numpy as np

        path, stages_of = critical_path(replayed, self.hop_s), self.space.stages_of
        counts = np.zeros((self.space.degrees.stages, FIGURES))
        counts[:, : len(KINDS)] = path.counts
        slowest = max(range(len(stages_of)), key=replayed.optimizer_s.__getitem__)
        for rank, figure in ((path.first_rank, UNSHARD), (path.last_rank, REDUCE), (slowest, OPTIMIZER)):
            counts[stages_of[rank], figure] = 1.0
        return counts, path.hops

    def _columns(self, choices: list[Choices], chosen: list[int]) -> tuple[Column, ...]:
        columns: dict[int, Column] = {}
        for stages, each, number in zip(self.space.stages_of, choices, chosen, strict=True):
            columns |= dict(zip(stages, each.picked(number), strict=True))
        return tuple(columns[s] for s in range(self.space.degrees.stages))


def _left(
    choices: list[Choices], own_s: list[Floats], others_s: list[dict[Place, float]], most_s: float
) -> list[Choices]:
    """The choices that take less than a time with the least of all others."""
    left = []
    for each, seconds, others in zip(choices, own_s, others_s, strict=True):
        totals = (own + others[place] for own, place in zip(seconds.tolist(), each.places, strict=True))
        left.append(each.only([number for number, total_s in enumerate(totals) if total_s < most_s]))
    return left
