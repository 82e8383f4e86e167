"""What the even split of a shape takes at least: the one that is looked at where layers are of several
classes and ranks hold several stages.

The best strategy of one shape: bounds first, then plans, then proof.

Sizes of stages that cannot beat the incumbent are left out, and cuts of models of several layer classes
. Stages in fractions of blocks bound what is left, and their
sizes, made whole, are deals of blocks to begin with beside the even one. Where one of these is near the
incumbent a game of paths against recipes (planner.search.bounds.fictitious_play) finds better recipes.

Where few ways to deal the blocks remain, all are replayed at once. Else the ILP's optimum is a lower bound of
every replay; what it finds is replayed, its critical path becomes a row of the programme, and it is solved
again, until the replay is no longer than its optimum. Where devices share cores a replay is no longest path:
the assignment is cut off instead, and what the bound leaves open stays open after a few rounds.
"""

from __future__ import annotations

import dataclasses
import time
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from planner.cost.replay import critical_path
from planner.search.bounds.fictitious_play import Outcome, PathGame, Place, even_splits, splits_within
from planner.search.bounds.partition_limits import PartitionBounds
from planner.search.bounds.relaxation import Relaxed, Whole
from planner.search.programme.ilp import StageIlp, StageProgramme
from planner.search.programme.partition import Dealer, splits, whole
from planner.search.programme.stage_options import Column
from planner.search.programme.stages import Sizes, StageSpace, narrowed
from planner.strategy.schedule.longest_path import action_order
from planner.strategy.schedule.table import BACKWARD, FORWARD
from planner.strategy.strategy import Strategy

if TYPE_CHECKING:
    from planner.foundation.arrays import Floats


def even_floor_s(space: StageSpace, enough_s: float = float("inf")) -> float:
    """What the even split does not beat with the cheapest options of all layers, or a bound of at least
    `enough_s` where that is no more: of few paths, or of all."""
    import numpy as np

    each = zip(space.rank_of, pairwise(space.even), strict=True)
    stages = np.stack([space.books[rank].least_passes.stage_s(*span) for rank, span in each])
    once_s = space.once_s + space.optimizer_s
    found_s = _few_paths_s(space, stages) + once_s
    if found_s >= enough_s:
        return found_s
    begin_s = [0.0] * space.degrees.pp
    _, ends_s = action_order(space.table).durations(stages.ravel().tolist()).ends_s(begin_s, space.hop_s)
    return max(ends_s) + once_s


def _few_paths_s(space: StageSpace, stages: Floats) -> float:
    """The longest of few paths that every table has, by what actions of stages take [stage, kind].

    A rank begins with its first stage, behind a forward of all before it, and runs all its actions. All
    forwards and passes back of a stage lie between its first, before which a forward runs through all
    stages before it, and its last, behind which a pass back does. In a V so do those of the rank's other
    stage, whose forwards come later and whose passes back come before.
    """
    import numpy as np

    forward, whole, inputs, weights, _ = stages.T
    parts, schedule, m = inputs + weights, space.degrees.schedule, space.degrees.num_micro_batches
    if not schedule.splits_backward:
        back, all_back = whole, whole
    elif schedule.splits_every_backward:
        back, all_back = inputs, parts
    else:
        back, all_back = np.minimum(whole, inputs), np.minimum(whole, parts)
    both, ranks = forward + back, np.asarray(space.rank_of)
    begin_s, around_s = (np.cumsum(each) - each for each in (forward, both))
    firsts = [own[0] for own in space.stages_of]
    longest_s = max(
        (begin_s[firsts] + m * np.bincount(ranks, forward + all_back)).max(), (around_s + m * both).max()
    )
    if schedule.v_shaped:
        longest_s = max(longest_s, (around_s[firsts] + m * np.bincount(ranks, both)).max())
    return float(longest_s)


def even_bound_s(space: StageSpace, enough_s: float = float("inf")) -> float:
    """What no recipes of the even split beat, or a bound of at least `enough_s` where that is no more;
    infinite where none fit."""
    spans, hop_s = list(pairwise(space.even)), space.hop_s
    through = [FORWARD] if space.degrees.schedule.splits_backward else [FORWARD, BACKWARD]
    worst_s = entered_s = 0.0
    once_s = space.once_s + space.optimizer_s
    for rank, stages in enumerate(space.stages_of):
        worst_s = max(worst_s, entered_s + space.even_own_s(rank, spans))
        if worst_s + once_s >= enough_s:
            break
        own_s = space.books[rank].least_passes.stage_s(*spans[stages[0]])
        entered_s += sum(hop_s + float(own_s[kind]) for kind in through)
    return worst_s + once_s


MAX_SPLITS = 400
"""Ways to deal the blocks that are all replayed; of more, the ILP finds the best."""
MAX_REPLAYED = 2_000_000
"""Actions of all these replays together."""
MAX_COLUMNS, MIXES_EACH = 80, 5
"""Columns beyond which a programme is not solved, and how many a stage and size have about where stages share
a rank's tight memory. The shape's bound is then that of its relaxation, and its gap stays open."""
MAX_SEVERAL = 400
"""Spans that stages may hold, all counted, beyond which the certificate speaks of the even split alone of a
shape of several layer classes and several stages a rank; moves of blocks may find better ones."""
DEALT_WITHIN = 1.05
"""Blocks are dealt where fractions of them, and dealt better where a first deal, are within this of the step
time to beat: of 295 shapes deals of 30 beat it, at fractions of 1.031 at most."""
PLAYED_WITHIN = 1.03
"""A game is played where the best deal is within this of it."""
FEW, MANY = 3, 60
"""Replays of a relaxation when a shape is searched, and when its bound is asked for."""
NODES = 20
"""Nodes of branch and bound for a relaxation of whole blocks."""
ROUNDING = 1e-6
"""Share of a step time by which an ILP's bound may lie below its own optimum: HiGHS's tolerance."""
BOUND_GAMES, BOUND_NEAR = 9, 1e-3
"""How many games are played at most for the bound of an open shape, and how near it is to be found, as a
share of it."""
NO_GAME = Outcome(None, float("inf"), 0.0)
SHARED_ROUNDS = 3
"""ILPs that are solved for one shape where devices share cores."""


class Found(NamedTuple):
    """A strategy and its replayed step time."""

    strategy: Strategy
    step_time_s: float


class ShapeResult(NamedTuple):
    """The best strategy of a shape (None: no recipe fits), the proven bound (0: none but what was known
    before), and the ILPs solved."""

    found: Found | None
    bound_s: float
    milps: int


class Budget(NamedTuple):
    """What the search of a shape may use: the clock's time at which it ends (None: no clock), and ILPs.

    `to_beat_s` is the step time that is worth beating, `nodes` the branch-and-bound nodes of one ILP. A gap
    of `tolerance` or less may stay open.
    """

    deadline_s: float | None
    to_beat_s: float
    rounds: int
    nodes: int | None
    tolerance: float = 0.0

    @property
    def seconds(self) -> float | None:
        """What is left of the time."""
        return None if self.deadline_s is None else self.deadline_s - time.monotonic()


class ShapeSearch:
    """Searches one shape of a problem, whose stages are those of a space."""

    def __init__(self, space: StageSpace) -> None:
        self.space, self.degrees = space, space.degrees
        self.bounds = PartitionBounds(space)
        self.model, self.shape = space.model, space.shape
        self.dealable = (
            self.degrees.pp > 1
            and space.model.sharing is None
            and (space.one_class or self.degrees.chunks == 1)
        )
        self._places: tuple[frozenset[Place], ...] | None = None
        """What ranks may hold to beat the time of the last game, and so any shorter one."""

    def run(self, budget: Budget) -> ShapeResult:
        """The best strategy of the shape that can beat the incumbent, or proof that none does."""
        if self.degrees.pp == 1:
            return self._without_pipeline()
        if not self.dealable:
            return self._not_dealt(budget)
        if not self._may_beat(budget.to_beat_s):
            return ShapeResult(None, budget.to_beat_s, 0)
        relaxed = self._relaxed(budget.to_beat_s, FEW)
        if relaxed.bound_s >= budget.to_beat_s:
            return ShapeResult(None, budget.to_beat_s, 0)
        within_s = DEALT_WITHIN * budget.to_beat_s
        worth = relaxed.blocks is None or relaxed.replayed_s <= within_s
        starts = self._starts(relaxed) if worth else []
        each = [f for start in starts if (f := self.dealt(within_s, start)) is not None]
        near_s = PLAYED_WITHIN * budget.to_beat_s
        near = not self.space.one_class or any(found.step_time_s < near_s for found in each)
        played = self.played(budget) if near else ShapeResult(None, 0.0, 0)
        played = played._replace(bound_s=max(played.bound_s, relaxed.bound_s))
        if played.bound_s >= budget.to_beat_s:
            return played
        each += [played.found] if played.found else []
        to_beat_s = min([budget.to_beat_s, *(found.step_time_s * (1 - budget.tolerance) for found in each)])
        if played.bound_s >= to_beat_s:
            result = ShapeResult(None, played.bound_s, 0)
        else:
            budget = budget._replace(to_beat_s=to_beat_s)
            result = self._of_one_class(budget) if self.space.one_class else self._of_several(budget)
        best = _fastest(*each, result.found)
        return result._replace(found=best, bound_s=max(played.bound_s, result.bound_s))

    def _relaxed(self, to_beat_s: float, rounds: int, whole: Whole | None = None) -> Relaxed:
        """What the relaxation says of a step time, after so many replays."""
        if to_beat_s == float("inf") or not self.dealable or not self.space.one_class:
            return Relaxed(0.0, None)
        sizes = self.bounds.sizes(to_beat_s)
        if sizes is None:
            return Relaxed(to_beat_s, None)
        return self.bounds.relaxation.within(to_beat_s, sizes, rounds, whole)

    def _starts(self, relaxed: Relaxed) -> list[tuple[int, ...] | None]:
        """Deals to begin with: an even one, and fractions of blocks made whole."""
        return [None] if relaxed.blocks is None else [None, self._rounded(relaxed.blocks)]

    def _rounded(self, blocks: Floats) -> tuple[int, ...]:
        """Whole blocks near fractions of them, as many: on each rank, then on its stages."""
        ranks = whole([sum(blocks[s] for s in stages) for stages in self.space.stages_of], self.space.layers)
        deal = [0] * self.degrees.stages
        for stages, held in zip(self.space.stages_of, ranks, strict=True):
            for s, n in zip(stages, whole([blocks[s] for s in stages], held), strict=True):
                deal[s] = n
        return tuple(deal)

    def played(self, budget: Budget) -> ShapeResult:
        """The best recipes that games of paths find, and their bound: each has to beat the one before."""
        best: Found | None = None
        to_beat_s = budget.to_beat_s
        while True:
            outcome = self._game(to_beat_s, budget.tolerance)
            found_s = outcome.step_time_s
            if outcome.columns is not None and (best is None or found_s < best.step_time_s):
                best = self._found(outcome.columns, found_s)
            less_s = found_s * (1 - budget.tolerance)
            if outcome.bound_s >= to_beat_s or less_s >= to_beat_s:
                return ShapeResult(best, outcome.bound_s, 0)
            to_beat_s = less_s

    def _game(self, to_beat_s: float, tolerance: float, *, thorough: bool = False) -> Outcome:
        """The game of a shape for a time to beat; that knows nothing where there is none."""
        outcome: Outcome | None = None
        if to_beat_s < float("inf") and self.space.one_class and self.dealable:
            sizes = self.bounds.sizes(to_beat_s)
            if sizes is None:
                return Outcome(None, float("inf"), to_beat_s)
            outcome = self.games.play(to_beat_s, splits_within(self.space, sizes), thorough=thorough)
        elif to_beat_s < float("inf") and self.dealable:
            cuts = self.bounds.cuts.within(to_beat_s)
            if cuts is None:
                return Outcome(None, float("inf"), to_beat_s)
            outcome = self.games.play_cuts(to_beat_s, cuts, thorough=thorough)
        elif to_beat_s < float("inf") and self._even_only(tolerance):
            outcome = self.games.play(to_beat_s, even_splits(self.space), thorough=thorough)
        if outcome is not None and outcome.places is not None:
            self._places = outcome.places
        return outcome or NO_GAME

    @cached_property
    def games(self) -> PathGame:
        """Games of the shape."""
        return PathGame(self.space)

    def better(self, budget: Budget) -> ShapeResult:
        """What games and moves of blocks find in little time; no proof."""
        return ShapeResult(_fastest(self.played(budget).found, self.dealt()), 0.0, 0)

    def bound(self, budget: Budget, low_s: float) -> ShapeResult:
        """The greatest step time, from one that is ruled out to the one to beat, that relaxations or games
        rule out; and what games find."""
        high_s = middle_s = budget.to_beat_s
        best, bound_s, step_s = None, 0.0, BOUND_NEAR * low_s
        for number in range(BOUND_GAMES):
            left = budget.seconds
            if left is not None and left <= 0:
                break
            outcome = self._bounded(middle_s, budget.tolerance, FEW if number else MANY)
            bound_s = max(bound_s, outcome.bound_s)
            if outcome.columns is not None and (best is None or outcome.step_time_s < best.step_time_s):
                best = self._found(outcome.columns, outcome.step_time_s)
            if outcome.bound_s >= middle_s:
                low_s, step_s = middle_s, 2 * step_s
            else:
                high_s = middle_s
            low_s = max(low_s, bound_s)
            if low_s >= high_s * (1 - BOUND_NEAR):
                break
            middle_s = min(low_s + step_s, (low_s + high_s) / 2)
        left = budget.seconds
        if bound_s < budget.to_beat_s and (left is None or left > 0):
            relaxed = self._relaxed(budget.to_beat_s, 0, Whole(NODES, left))
            bound_s, within_s = max(bound_s, relaxed.bound_s), DEALT_WITHIN * budget.to_beat_s
            if relaxed.blocks is not None:
                best = _fastest(best, self.dealt(within_s, self._rounded(relaxed.blocks)))
        return ShapeResult(best, bound_s, 0)

    def _bounded(self, to_beat_s: float, tolerance: float, rounds: int) -> Outcome:
        """What the relaxation, after so many replays, or a game says of a step time, taking its time."""
        if self.dealable and self.space.one_class:
            return Outcome(None, float("inf"), self._relaxed(to_beat_s, rounds).bound_s)
        outcome = self._game(to_beat_s, tolerance, thorough=True)
        if self.degrees.pp > 1 and not self.dealable and outcome.bound_s < to_beat_s < float("inf"):
            relaxation, even = self.bounds.relaxation, self._even_only(tolerance)
            relaxed = relaxation.even(to_beat_s, rounds) if even else relaxation.near(to_beat_s, rounds)
            outcome = outcome._replace(bound_s=max(outcome.bound_s, relaxed.bound_s))
        return outcome

    def dealt(self, within_s: float = float("inf"), start: tuple[int, ...] | None = None) -> Found | None:
        """The best deal near one (None: an even one), found by moves where that takes at most `within_s`.

        None where none fits, or none is tried.
        """
        if self.degrees.pp == 1 or self.model.sharing is not None:
            return None
        deal = self.dealer.best(self._even_deal if start is None else start, within_s)
        return None if deal is None else self._found(deal[0], self.space.replay(deal[0]).step_time_s)

    @cached_property
    def dealer(self) -> Dealer:
        """Deals of the shape's blocks."""
        return Dealer(self.space)

    def greedy(self) -> Found | None:
        """An even split; of equal blocks and several stages a rank one near it, where that does not fit."""
        return self.dealt(0.0) if self.degrees.chunks > 1 and self.dealable else self.even()

    def even(self) -> Found | None:
        """An even split and no other: None where a rank has no recipe for it that fits."""
        columns = self.dealer.columns(self._even_deal)
        return None if columns is None else self._found(columns, self.space.replay(columns).step_time_s)

    @cached_property
    def _even_deal(self) -> tuple[int, ...]:
        """Blocks of each stage of an even split."""
        return tuple(b - a for a, b in pairwise(self.space.even))

    def _found(self, columns: tuple[Column, ...], step_time_s: float) -> Found:
        stages, first = [], 0
        for column in columns:
            stages.append(dataclasses.replace(column.stage, first=first, end=first + column.layers))
            first += column.layers
        return Found(Strategy(degrees=self.degrees, stages=tuple(stages)), step_time_s)

    def _without_pipeline(self) -> ShapeResult:
        column = self.space.recipe(0, (0, self.space.layers))
        if column is None:
            return ShapeResult(None, float("inf"), 0)
        found = self._found((column,), self.space.replay((column,)).step_time_s)
        return ShapeResult(found, found.step_time_s, 0)

    def _columns(self, budget: Budget, sizes: Sizes | None) -> list[list[Column]]:
        return [self.space.columns(s, budget.to_beat_s, sizes) for s in range(self.degrees.stages)]

    def _not_dealt(self, budget: Budget) -> ShapeResult:
        """The best of a shape on shared cores, or of several classes and several stages a rank."""
        if self._even_only(budget.tolerance):
            bound_s = even_floor_s(self.space, budget.to_beat_s)
            if bound_s < budget.to_beat_s:
                bound_s = max(bound_s, even_bound_s(self.space, budget.to_beat_s))
            if bound_s < budget.to_beat_s < float("inf"):
                bound_s = max(bound_s, self.bounds.relaxation.even(budget.to_beat_s, FEW).bound_s)
            if bound_s >= budget.to_beat_s:
                return ShapeResult(None, budget.to_beat_s, 0)
            played = self.played(budget)
            if played.bound_s >= budget.to_beat_s:
                return played
            best = _fastest(played.found, self.dealt(DEALT_WITHIN * budget.to_beat_s))
            return ShapeResult(best, max(bound_s, played.bound_s), 0)
        sizes = self.bounds.sizes(budget.to_beat_s) if self.space.one_class else None
        near = Relaxed(0.0, None) if sizes else self.bounds.relaxation.near(budget.to_beat_s, FEW)
        if near.bound_s >= budget.to_beat_s:
            return ShapeResult(None, budget.to_beat_s, 0)
        columns = self._columns(budget, sizes)
        if budget.tolerance and not self.space.one_class and sum(map(len, columns)) > MAX_COLUMNS:
            within_s = DEALT_WITHIN * budget.to_beat_s
            each = [self.dealt(within_s, start) for start in self._starts(near)]
            return ShapeResult(_fastest(*each), near.bound_s, 0)
        result = self._by_programme(columns, budget)
        return result._replace(bound_s=max(result.bound_s, near.bound_s))

    def _even_only(self, tolerance: float) -> bool:
        """Whether bounds are of the even split alone: of several classes, where a gap may stay open and the
        ways are many."""
        if not tolerance or self.space.one_class or self.dealable or self.model.sharing is not None:
            return False
        return self.space.near_spans > MAX_SEVERAL

    def _may_beat(self, to_beat_s: float) -> bool:
        if self.space.one_class:
            return self.bounds.sizes(to_beat_s) is not None
        return self.bounds.cuts.within(to_beat_s) is not None

    def _of_several(self, budget: Budget) -> ShapeResult:
        """The best cut of a model of several layer classes, or proof that none beats the incumbent."""
        cuts = self.bounds.cuts.within(budget.to_beat_s)
        if cuts is None:
            return ShapeResult(None, budget.to_beat_s, 0)
        each = enumerate(cuts)
        columns = [self.space.columns(s, budget.to_beat_s, None, spans) for s, spans in each]
        if self._places is not None:
            columns = [
                [column for column in each if (column.stage.first, column.layers) in places]
                for each, places in zip(columns, self._places, strict=True)
            ]
        return self._by_programme(columns, budget)

    def _of_one_class(self, budget: Budget) -> ShapeResult:
        """The best deal that can beat the incumbent, or proof that none does."""
        sizes = self.bounds.sizes(budget.to_beat_s)
        if sizes is not None and self._places is not None and self.degrees.chunks == 1:
            blocks = [[n for _, n in places] for places in self._places]
            each = zip(sizes.ranks, blocks, strict=True)
            limits = [(max(low, min(own)), min(high, max(own))) for (low, high), own in each]
            by_rank = narrowed(limits, self.space.layers)
            sizes = None if by_rank is None else Sizes(by_rank, by_rank)
        if sizes is None:
            return ShapeResult(None, budget.to_beat_s, 0)
        spans = [(s, span) for s in range(self.degrees.stages) for span in self.space.spans(s, sizes)[0]]
        ranks, many = range(self.degrees.pp), len(spans) * MIXES_EACH > MAX_COLUMNS
        tight = many and self.bounds.tight(sizes)
        roomy = self.degrees.chunks == 1 or (
            not tight and all(self.space.rank_roomy(rank, sizes) for rank in ranks)
        )
        if not roomy and many:
            return ShapeResult(None, 0.0, 0)
        columns = self._columns(budget, sizes)
        every = self._all_splits(sizes, columns, budget.to_beat_s) if roomy and all(columns) else None
        return every or self._by_programme(columns, budget)

    def _all_splits(self, sizes: Sizes, columns: list[list[Column]], to_beat_s: float) -> ShapeResult | None:
        """The best of all ways to deal blocks, each stage and size having one recipe; None if too many."""
        each = [{column.layers: column for column in found} for found in columns]
        limits = tuple(
            (max(low, min(by_size)), min(high, max(by_size)))
            for (low, high), by_size in zip(sizes.stages, each, strict=True)
        )
        most = min(MAX_SPLITS, MAX_REPLAYED // self.space.table.actions)
        ways = splits(Sizes(limits, sizes.ranks), self.space.layers, self.space.rank_of, most)
        if ways is None:
            return None
        if not ways:
            return ShapeResult(None, to_beat_s, 0)
        chosen = [tuple(each[s][size] for s, size in enumerate(way)) for way in ways]
        steps_s = self.dealer.steps_s(chosen)
        best = min(range(len(ways)), key=steps_s.__getitem__)
        found = self._found(chosen[best], self.space.replay(chosen[best]).step_time_s)
        return ShapeResult(found, min(found.step_time_s, to_beat_s), 0)

    def _by_programme(self, columns: list[list[Column]], budget: Budget) -> ShapeResult:
        if not all(columns):
            return ShapeResult(None, budget.to_beat_s, 0)
        programme = self._programme(columns, budget.to_beat_s)
        ilp = StageIlp(programme, budget.nodes)
        best: Found | None = None
        to_beat_s, bound_s, milps = budget.to_beat_s, 0.0, 0
        rounds = budget.rounds if self.model.sharing is None else min(budget.rounds, SHARED_ROUNDS)
        while milps < rounds:
            left = budget.seconds
            if left is not None and left <= 0:
                break
            answer = ilp.solve(left)
            milps += 1
            if answer.status == "infeasible":
                bound_s = to_beat_s
                break
            bound_s = max(bound_s, answer.bound_s)
            if not answer.columns:
                break
            replayed = self.space.replay(answer.columns)
            if best is None or replayed.step_time_s < best.step_time_s:
                best = self._found(answer.columns, replayed.step_time_s)
            to_beat_s = min(best.step_time_s, to_beat_s)
            if bound_s >= to_beat_s * (1 - max(budget.tolerance, ROUNDING)) or answer.status == "limit":
                break
            if self.model.sharing is None:
                ilp.add_path(critical_path(replayed, programme.hop_s))
            else:
                ilp.exclude(answer.columns)
        return ShapeResult(best, min(bound_s, to_beat_s), milps)

    def _programme(self, columns: list[list[Column]], to_beat_s: float) -> StageProgramme:
        """The data of the ILP."""
        degrees, sharing, space = self.degrees, self.model.sharing, self.space
        per_rank = degrees.world // degrees.pp
        each = zip(space.limits_bytes, space.books, strict=True)
        return StageProgramme(
            degrees=degrees,
            layers=space.layers,
            one_class=space.one_class,
            columns=tuple(map(tuple, columns)),
            in_flight=space.in_flight,
            hop_s=self.shape.messages.p2p_s(),
            limits_bytes=tuple(limit - book.shape.runtime_bytes for limit, book in each),
            transient_bytes=lambda s, c, flight: space.books[space.rank_of[s]].transient_bytes(c, flight),
            step_s=self.shape.constants.step_s,
            to_beat_s=to_beat_s,
            work_scale=sharing.slowdown(per_rank) if sharing else 1.0,
            optimizer_scale=sharing.slowdown(degrees.world) if sharing else 1.0,
            throughput=sharing.best_throughput(degrees.world) if sharing else None,
            devices_per_rank=per_rank,
        )


def _fastest(*found: Found | None) -> Found | None:
    """What takes least of what was found; None where nothing was."""
    return min((each for each in found if each), key=lambda each: each.step_time_s, default=None)
